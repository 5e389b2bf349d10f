from __future__ import annotations

from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from megatron_drpo.data.cursor import Cursor


@given(st.lists(st.integers(0, 40)))
def test_same_as_a_plain_set(positions: list[int]) -> None:
    cursor, consumed = Cursor(), set()
    for position in positions:
        cursor.consume(position)
        consumed.add(position)
        assert [p for p in range(50) if p in cursor] == sorted(consumed)
    missing = [p for p in range(100) if p not in consumed]
    assert list(islice(cursor.remaining(), 50)) == missing[:50]
    assert cursor.low_water == missing[0]
    assert cursor.exceptions == {p for p in consumed if p > missing[0]}
