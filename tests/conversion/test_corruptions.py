"""Whatever is wrong with the input or the target is refused, by name, and leaves no target."""

from __future__ import annotations

from pathlib import Path

import pytest

from conversion.hf_to_megatron import main as hf_to_megatron
from tools.corrupt_conversion import Originals, try_case
from tools.corruption_case import Action, Case, Kind
from tools.corruptions import all_cases


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Originals:
    return Originals(tmp_path_factory.mktemp("originals"))


@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_corruption_is_refused(case: Case, originals: Originals, tmp_path: Path) -> None:
    outcome = try_case(case, originals, tmp_path)
    assert outcome.problems == (), outcome.message


@pytest.mark.parametrize("kind", [Kind.hf, Kind.checkpoint])
def test_undamaged_output_is_verified(kind: Kind, originals: Originals, tmp_path: Path) -> None:
    outcome = try_case(Case("nothing", kind, Action.verify, ""), originals, tmp_path)
    assert outcome.problems == ("exit status 0",)


@pytest.mark.parametrize(
    ("kind", "action"),
    [(kind, Action.to_megatron if "HF" in kind else Action.to_hf) for kind in Kind],
)
def test_undamaged_input_is_converted(
    kind: Kind, action: Action, originals: Originals, tmp_path: Path
) -> None:
    """Else everything above would pass with a converter that refuses all."""
    outcome = try_case(Case("nothing", kind, action, ""), originals, tmp_path)
    assert outcome.problems == ("exit status 0", "there is a target")


def test_unfinished_conversion_is_finished_by_the_same_command(originals: Originals, tmp_path: Path) -> None:
    """A full disk in the middle of it; then there is room."""
    target = tmp_path / "out" / "target"
    [full] = [case for case in all_cases() if str(case) == "HF_folder:_disk_is_full"]
    assert try_case(full, originals, tmp_path).problems == ()
    left = sorted(path.name for path in target.parent.iterdir())
    assert left == [".target.converting", ".target.converting.jsonl"]
    assert hf_to_megatron([str(tmp_path / "source"), str(target), "--unit-mib", "1"]) == 0
    assert [path.name for path in target.parent.iterdir()] == ["target"]
