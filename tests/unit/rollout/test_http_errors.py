"""What a Retry-After header says; `test_client` has what each status is."""

from __future__ import annotations

import time
from email.utils import formatdate

import pytest

from megatron_drpo.rollout.http_errors import MAX_RETRY_AFTER_S, read_retry_after_s


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, 0.0),
        ("0", 0.0),
        ("7", 7.0),
        (" 7 ", 7.0),
        ("60", 60.0),
        ("61", MAX_RETRY_AFTER_S),
        ("9" * 400, MAX_RETRY_AFTER_S),
        ("-3", 0.0),
        ("1.5", 0.0),
        ("soon", 0.0),
        ("", 0.0),
        ("\u0663", 0.0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("Wed, 21 Oct 2995 07:28:00 GMT", MAX_RETRY_AFTER_S),
        ("Wed, 99 Oct 2015 07:28:00 GMT", 0.0),
    ],
)
def test_numbers_and_dates(value: str | None, seconds: float) -> None:
    assert read_retry_after_s(value) == seconds


@pytest.mark.parametrize("zone", ["GMT", "-0000"])
def test_a_date_that_comes(zone: str) -> None:
    date = formatdate(time.time() + 30, usegmt=True).replace("GMT", zone)
    assert 20 < read_retry_after_s(date) <= 30
