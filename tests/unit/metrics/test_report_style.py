"""Words for shares."""

from __future__ import annotations

import pytest

from megatron_drpo.metrics.report_style import format_share


@pytest.mark.parametrize(
    ("share", "shown"),
    [(0.0, "0.00 %"), (1e-6, "< 0.01 %"), (0.5, "50.00 %"), (1 - 1e-6, "> 99.99 %"), (1.0, "100.00 %")],
)
def test_share_is_never_rounded_to_none_or_all(share: float, shown: str) -> None:
    assert format_share(share) == shown
