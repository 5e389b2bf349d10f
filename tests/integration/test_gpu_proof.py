"""The tool that proves things on a GPU, as far as it goes without one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools.gpu_proof import ROOT, Part, build_parts, run_part

TOOL = [sys.executable, "tools/gpu_proof.py"]


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.timeout(600)
def test_a_dry_run_walks_through_all_that_needs_no_gpu(tmp_path: Path) -> None:
    done = subprocess.run(
        [*TOOL, "--dry-run", "--folder", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    logs = "\n".join(log.read_text()[-2000:] for log in tmp_path.glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    heading, _, *rows = (tmp_path / "table.md").read_text().splitlines()
    assert heading == "| part | what it shows | status | s | detail |"
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if row.startswith("|")]
    assert {cell[0]: cell[2] for cell in cells} == {
        part.name: "ok" for part in build_parts(tmp_path, is_dry=True)
    }
    assert "passed" in cells[0][4]
    assert "time/step_s" in cells[-1][4]
    assert rows[-1].startswith("no GPU, ")
    assert "torch 2." in rows[-1]


def test_it_says_what_it_needs() -> None:
    without = subprocess.run(TOOL, cwd=ROOT, capture_output=True, text=True, check=False)
    assert without.returncode == 2
    assert "torch sees no GPU here; --dry-run runs what needs none" in without.stderr
    unknown = [*TOOL, "--dry-run", "--parts", "layers", "wings"]
    done = subprocess.run(unknown, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no part ['wings']; there are layers, model, triton, ipc, logprobs, train" in done.stderr


def part(code: str, modules: tuple[str, ...] = (), limit_s: float = 60.0) -> Part:
    command = (sys.executable, "-c", code)
    return Part("one", "something", command, command, modules=modules, limit_s=limit_s)


@pytest.mark.parametrize(
    ("chosen", "status", "detail"),
    [
        (part("print('3 passed in 1 s')"), "ok", "3 passed in 1 s"),
        (part("import sys; sys.exit(3)"), "FAILED", "exit status 3, see one.log"),
        (part("import time; time.sleep(60)", limit_s=1.0), "FAILED", "not done after 1 s, see one.log"),
        (part("", modules=("no_such_package.core",)), "skipped", "not installed: no_such_package.core"),
    ],
)
def test_each_part_reports_on_its_own(tmp_path: Path, chosen: Part, status: str, detail: str) -> None:
    result = run_part(chosen, tmp_path, 100.0, is_dry=True)
    assert result.status == status
    assert detail in result.detail
    assert run_part(chosen, tmp_path, 5.0, is_dry=True).status == "skipped"
