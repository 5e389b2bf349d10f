"""Compute a failed update again: `torchrun --nproc-per-node RANKS tools/replay_failure.py FAILURE_FOLDER`.

FAILURE_FOLDER is one that a run left in run_dir/failures. As many ranks as the run had; `--override` changes
keys of the configuration, for example policy.dtype=fp32 or algorithm.loss.name=surrogate.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_drpo.checkpoint.checkpointer import Checkpointer
from megatron_drpo.config.io import load_config
from megatron_drpo.config.schema import Config
from megatron_drpo.errors import DrpoError
from megatron_drpo.metrics.timing import StepTimer
from megatron_drpo.platform.base import build_platform
from megatron_drpo.policy.parallel import RankInfo, initialise_parallel
from megatron_drpo.policy.policy import Policy
from megatron_drpo.runtime.upstream_warnings import ignore_expected_warnings
from megatron_drpo.step.failed_update import load_failed_micro_batches


def replay(folder: Path, config: Config) -> str:
    """The update's outcome in words.

    Raises:
        DrpoError: it fails again.
    """
    platform = build_platform(config.platform)
    device = platform.prepare(RankInfo.from_environment().local_rank)
    parallel = initialise_parallel(config.parallel, platform.backend, device)
    policy = Policy(config, platform, parallel)
    checkpointer = Checkpointer(str(folder), config.checkpoint)
    path = checkpointer.find()
    if path is None:
        raise DrpoError(f"{folder} holds no checkpoint: is it a folder of run_dir/failures?")
    checkpointer.load(path, policy)
    result = policy.train_step(load_failed_micro_batches(folder, parallel.rank), StepTimer())
    return f"no failure: loss {result.loss:g}, gradient norm {result.grad_norm:g}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--override", nargs="*", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    ignore_expected_warnings()
    is_main = RankInfo.from_environment().rank == 0
    try:
        overrides = ["checkpoint.resume=true", *arguments.override]
        outcome = replay(
            arguments.folder, load_config([f"config={arguments.folder}/config.yaml", *overrides])
        )
    except DrpoError as error:
        if is_main:
            print(f"{type(error).__name__}: {error}")
        return 1
    if is_main:
        print(outcome)
    return 0


if __name__ == "__main__":
    sys.exit(main())
