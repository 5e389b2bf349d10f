"""What the parity matrix covers, and that it sees what it has to see."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_drpo.config.schema import Layers, LogprobMode
from megatron_drpo.losses.registry import LOSSES
from tools import reference_objective
from tools.parity_cases import LAYOUTS, ROWS, SPLITS, Case, build_config, full_product, pairwise
from tools.parity_matrix import Outcome, compare, failures, markdown

FACTORS = {
    "row": list(ROWS),
    "layout": list(LAYOUTS),
    "layers": list(Layers),
    "split": list(SPLITS),
    "mode": [LogprobMode.one_pass, LogprobMode.recompute],
}


def test_pairwise_has_every_pair_of_factors() -> None:
    cases = pairwise(ROWS, LAYOUTS)
    for (one, ones), (other, others) in itertools.combinations(FACTORS.items(), 2):
        covered = {(getattr(case, one), getattr(case, other)) for case in cases}
        assert covered == set(itertools.product(ones, others)), (one, other)
    assert len(cases) == len(ROWS) * len(LAYOUTS)
    assert set(cases) < set(full_product(ROWS, LAYOUTS))


def test_every_loss_of_the_registry_is_a_row_and_has_a_reference() -> None:
    assert set(LOSSES) == {algorithm.loss.name for algorithm in ROWS.values()}
    assert set(LOSSES) == set(reference_objective.LOSSES) == set(reference_objective.EXCESS)


@pytest.mark.parametrize("row", ROWS)
def test_every_row_is_a_valid_configuration(row: str, tmp_path: Path) -> None:
    """`build_config` raises otherwise; here only that it keeps the row's numbers."""
    config = build_config(Case(row, "TP2xPP2xEP2", Layers.local, "many", LogprobMode.one_pass), tmp_path)
    assert config.algorithm.loss == ROWS[row].loss
    assert config.parallel.world_size == 4


CASE = Case("drpo", "DP2", Layers.local, "one", LogprobMode.one_pass)
EXPECTED = {
    "loss": 0.5,
    "scale": 2.0,
    "gradients": {"a": torch.tensor([3.0, 4.0]).double(), "b": torch.tensor([1e-3]).double()},
    "metrics": {"small": 0.1, "large": 400.0, "list": [0.0, 2.0]},
}
EXACT = {
    "loss": 0.5,
    "norm": math.sqrt(25 + 1e-6),
    "gradients": {name: gradient.float() for name, gradient in EXPECTED["gradients"].items()},
    "metrics": EXPECTED["metrics"],
}


def outcome(**changes: object) -> Outcome:
    return compare(CASE, EXACT | changes, EXPECTED, 0.0)


def test_figures_by_hand() -> None:
    """loss: of the scale 2; gradient: of the tensor's own norm, 5 and 1e-3; norm: of all of them together;
    metric: absolute up to 1."""
    assert outcome().figures["loss"] == 0
    assert outcome().figures["norm"] == pytest.approx(0, abs=1e-14)
    assert outcome(norm=5 * (1 + 1e-4)).figures["norm"] == pytest.approx(1e-4, rel=1e-3)
    assert outcome(loss=0.5 + 1e-6).figures["loss"] == pytest.approx(5e-7)
    gradients = {"a": torch.tensor([3.0, 4.0 + 1e-3]), "b": torch.tensor([1e-3])}
    assert outcome(gradients=gradients).figures["gradient"] == pytest.approx(2e-4, rel=1e-3)
    assert outcome(gradients=gradients).worst_tensor == "a"
    metrics = {"small": 0.1 + 2e-6, "large": 400.0 + 4e-4, "list": [0.0, 2.0 + 6e-6]}
    found = outcome(metrics=metrics)
    assert found.figures["metric"] == pytest.approx(3e-6, rel=1e-3)
    assert found.worst_metric == "list"


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": 0.5 + 3e-6},
        {"loss": math.nan},
        {"norm": 5 * (1 - 1.2e-2)},
        {"norm": math.nan},
        {"gradients": EXACT["gradients"] | {"b": torch.tensor([1.00002e-3])}},
        {"gradients": EXACT["gradients"] | {"a": torch.tensor([math.nan, 4.0])}},
        {"metrics": EXPECTED["metrics"] | {"small": 0.1 + 2e-5}},
        {"metrics": EXPECTED["metrics"] | {"list": [0.0]}},
    ],
    ids=[
        "loss",
        "loss is NaN",
        "norm",
        "norm is NaN",
        "small tensor",
        "gradient is NaN",
        "metric",
        "list too short",
    ],
)
def test_whatever_is_beyond_its_limit_fails(changes: dict[str, object]) -> None:
    assert failures([outcome()]) == []
    wrong = outcome(**changes)
    assert failures([outcome(), wrong]) == [wrong]


def test_markdown_shows_the_worst_case_of_each_cell() -> None:
    good, bad = outcome(), outcome(loss=0.5 + 1e-6)
    other = replace(good, case=replace(CASE, layout="CP2"))
    table = markdown([good, bad, other], "command").splitlines()
    worst_of_good = f"{good.share_of_limit:.2f}"
    assert table[:3] == ["| objective | CP2 | DP2 |", "|---|---|---|", f"| drpo | {worst_of_good} | 0.50 |"]
