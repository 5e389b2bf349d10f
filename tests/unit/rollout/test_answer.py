"""Fields of an answer: those that are there, and every way in which one is not."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_drpo.errors import RolloutError
from megatron_drpo.rollout.answer import Answer, shorten

WHERE = "http://a/server_info"


def make(**fields: Any) -> Answer:
    return Answer(fields, WHERE)


def test_fields_that_are_there() -> None:
    answer = make(n=3, x=0.5, name="a", on=True, rows=[{"n": 1}, {"n": 2}], inner={"n": 4}, none=None)
    assert answer.get("n", int) == 3
    assert answer.get("x", float) == 0.5
    assert answer.get("n", float) == 3, "a whole number is a number"
    assert answer.get("name", str) == "a"
    assert answer.get("on", bool) is True
    assert answer.nested("inner").get("n", int) == 4
    assert [row.get("n", int) for row in answer.objects("rows")] == [1, 2]
    assert answer.find("none", int) is None
    assert answer.find("missing", str) is None
    assert answer.raw("missing") is None


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (int, "3", "is '3'; expected an integer"),
        (int, 3.0, "is 3.0; expected an integer"),
        (int, True, "is True; expected an integer"),
        (int, None, "is None; expected an integer"),
        (float, False, "is False; expected a number"),
        (str, 3, "is 3; expected a string"),
        (bool, 1, "is 1; expected true or false"),
        (list, {}, "is {}; expected a list"),
        (dict, [], "is []; expected an object"),
    ],
)
def test_a_field_of_another_kind_is_named_with_its_value(kind: Any, value: Any, expected: str) -> None:
    with pytest.raises(RolloutError) as caught:
        make(field=value).get("field", kind)
    assert str(caught.value) == f"{WHERE}: field {expected}"
    if value is not None:
        with pytest.raises(RolloutError):
            make(field=value).find("field", kind)


def test_names_are_paths() -> None:
    answer = make(rows=[{"inner": {}}])
    [row] = answer.objects("rows")
    with pytest.raises(
        RolloutError, match=rf"^{WHERE}: the answer has no 'rows\[0\]\.inner\.n'; expected an int"
    ):
        row.nested("inner").get("n", int)
    with pytest.raises(RolloutError, match=rf"^{WHERE}: rows\[0\] is 3; expected an object"):
        list(make(rows=[3]).objects("rows"))
    with pytest.raises(RolloutError, match=rf"^{WHERE}: the answer is \[1\]; expected an object"):
        Answer([1], WHERE)
    assert str(row.lie("n", 9, "4 at most")) == f"{WHERE}: rows[0].n is 9; expected 4 at most"


def test_long_values_are_shortened() -> None:
    assert shorten("x") == "'x'"
    assert len(shorten("x" * 10_000)) <= 202
    assert len(shorten([[0.5, 7, None]] * 10_000)) < 200
    assert len(shorten(10**4000)) <= 202
