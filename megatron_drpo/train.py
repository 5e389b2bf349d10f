"""Entry of one rank: `torchrun -m megatron_drpo.train config=run.yaml`; the supervisor starts it likewise."""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_drpo.batching.route_check import RouteCheck
from megatron_drpo.checkpoint.checkpointer import Checkpointer
from megatron_drpo.config.io import read_config
from megatron_drpo.config.schema import Config, Mode, OnBadLine, PlatformName, RoutingReplay, WeightSyncPath
from megatron_drpo.data.prompts import PromptFile, load_prompts
from megatron_drpo.data.source import PromptShare, PromptSource
from megatron_drpo.data.tokenizer import load_tokenizer, read_stop_token_ids
from megatron_drpo.errors import ConfigError, DrpoError, NumericsError, RolloutError
from megatron_drpo.fleet.build import starts_fleet
from megatron_drpo.fleet.metrics import FleetWatch
from megatron_drpo.launch.check import check_config, refuse_problems, warn_config
from megatron_drpo.launch.resolve import resolve_config
from megatron_drpo.losses.registry import build_loss
from megatron_drpo.metrics.progress import Progress
from megatron_drpo.metrics.prometheus import PrometheusServer
from megatron_drpo.metrics.report import write_report
from megatron_drpo.metrics.rollout_dump import write_index
from megatron_drpo.metrics.writer import MetricsWriter
from megatron_drpo.models.base import ArchitectureConfig
from megatron_drpo.platform.base import Platform, build_platform
from megatron_drpo.policy.parallel import ParallelState, RankInfo, initialise_parallel
from megatron_drpo.policy.policy import Policy
from megatron_drpo.rewards.functions import needs_answer
from megatron_drpo.rewards.pool import RewardPool
from megatron_drpo.rollout.completion import RouteShape
from megatron_drpo.rollout.engine import RolloutEngine, wait_until_ready
from megatron_drpo.rollout.time_limits import reload_limit_s
from megatron_drpo.runtime.process_end import SUPERVISOR_PID, die_with_parent
from megatron_drpo.runtime.upstream_warnings import ignore_expected_warnings
from megatron_drpo.runtime.watchdog import Watchdog
from megatron_drpo.step.colocation import SharedDevices
from megatron_drpo.step.experience_source import (
    DemonstrationExperience,
    Evaluator,
    ExperienceSource,
    RolloutExperience,
)
from megatron_drpo.step.leader_wait import CollectiveWait
from megatron_drpo.step.publish import WeightPublisher
from megatron_drpo.trainer import Trainer
from megatron_drpo.weight_sync.control import FleetControl, build_directory
from megatron_drpo.weight_sync.push import WeightPusher
from megatron_drpo.weight_sync.rank_environment import build_rank_environment
from megatron_drpo.weight_sync.server_memory import ServerMemory


def run(config: Config) -> None:
    """Train on this rank, by a configuration that is resolved, until `train.num_steps`.

    Raises:
        DrpoError: its message says all a user needs to know.
    """
    platform = build_platform(config.platform)
    if platform.name is PlatformName.cuda:
        os.environ.update(build_rank_environment(config, os.environ))
    device = platform.prepare(RankInfo.from_environment().local_rank)
    parallel = initialise_parallel(config.parallel, platform.backend, device)
    with ExitStack() as stack:
        watchdog = stack.enter_context(Watchdog(config.deadlines, config.run_dir))
        progress = writer = prometheus = None
        if parallel.is_main:
            prometheus = _serve_metrics(config, stack)
            writer = stack.enter_context(
                MetricsWriter(config.run_dir, tensorboard=config.metrics.tensorboard)
            )
            live = config.metrics.progress and sys.stdout.isatty()
            progress = Progress(config.train.num_steps, live=live)
        memory = _clear_devices(config, parallel)
        policy = Policy(config, platform, parallel)
        if parallel.is_main:
            _print_banner(config, platform, policy)
        is_rl = config.train.mode is Mode.rl
        engine = _build_engine(config, policy, stack) if is_rl and parallel.is_leader else None
        if engine is not None:
            watchdog.describe = engine.describe
        control = _build_control(config, policy, memory, stack) if is_rl and parallel.is_main else None
        devices = publisher = None
        if is_rl:
            if config.rollout.colocated:
                devices = SharedDevices(policy, control=control, engine=engine)
            publisher = WeightPublisher(policy, control=control, engine=engine, devices=devices)
        wait = CollectiveWait(publisher, num_replicas=parallel.data_size, replica=parallel.data_rank)
        share = experience = evaluator = None
        if parallel.is_leader:
            share, experience, evaluator = _build_leader(config, policy, engine, wait, stack)
        if progress is not None:
            stack.enter_context(progress)
        Trainer(
            config,
            policy,
            Checkpointer(config.run_dir, config.checkpoint),
            share=share,
            experience=experience,
            evaluator=evaluator,
            publisher=publisher,
            wait=wait,
            devices=devices,
            writer=writer,
            progress=progress,
            watchdog=watchdog,
            prometheus=prometheus,
        ).run()
    if parallel.is_main:
        _write_summary(config)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _serve_metrics(config: Config, stack: ExitStack) -> PrometheusServer | None:
    metrics = config.metrics
    if metrics.prometheus_port is None:
        return None
    server = stack.enter_context(PrometheusServer(metrics.prometheus_host, metrics.prometheus_port))
    if config.train.mode is Mode.rl:
        stack.enter_context(FleetWatch(config.rollout, server))
    return server


def _build_engine(config: Config, policy: Policy, stack: ExitStack) -> RolloutEngine:
    """What asks the servers for a replica's rollouts; it has none before the first weight sync."""
    tokenizer = load_tokenizer(config.policy.model_path)
    engine = RolloutEngine(
        config.rollout,
        tokenizer,
        stop_token_ids=read_stop_token_ids(config.policy.model_path, tokenizer),
        vocab_size=policy.architecture.vocab_size,
        seed=config.seed,
        route_shape=_route_shape(config, policy.architecture),
        keep_special_tokens=config.reward.keep_special_tokens,
    )
    stack.callback(engine.close)
    return engine


def _route_shape(config: Config, architecture: ArchitectureConfig) -> RouteShape | None:
    """Of the experts that servers are to report; None if they are not needed."""
    moe = architecture.moe
    if config.policy.routing_replay is not RoutingReplay.rollout or moe is None:
        return None
    return RouteShape(
        moe_layers=tuple(i for i in range(architecture.num_layers) if architecture.is_moe_layer(i)),
        num_layers=architecture.num_layers,
        num_experts=moe.num_experts,
        num_experts_per_token=moe.num_experts_per_token,
        on_bad=config.policy.on_bad_routes,
    )


def _clear_devices(config: Config, parallel: ParallelState) -> ServerMemory | None:
    """With rollout.colocated: the servers, which start first, let go of the memory that the policy needs.

    Raises:
        RolloutError: one does not.
    """
    if config.train.mode is not Mode.rl or not config.rollout.colocated:
        return None
    memory = None
    if parallel.is_main:
        memory = ServerMemory(config.rollout, config.weight_sync.timeout_s)
        wait_until_ready(config.rollout, config.rollout.endpoints)
        memory.announce()
        failures = memory.release(build_directory(config.rollout).endpoints())
        if failures:
            raise RolloutError("\n".join(failures.values()))
    torch.distributed.barrier()
    return memory


def _build_control(
    config: Config, policy: Policy, memory: ServerMemory | None, stack: ExitStack
) -> FleetControl:
    wait_until_ready(config.rollout, config.rollout.endpoints)
    pusher = WeightPusher(
        config.weight_sync,
        model_path=config.policy.model_path,
        run_dir=config.run_dir,
        device=policy.parallel.device,
        api_key=config.rollout.api_key,
    )
    sync = config.weight_sync
    limit_s = reload_limit_s(sync) if sync.path is WeightSyncPath.disk else sync.timeout_s
    control = FleetControl(config.rollout, pusher, memory, step_limit_s=limit_s)
    stack.callback(control.close)
    return control


def _build_leader(
    config: Config, policy: Policy, engine: RolloutEngine | None, wait: CollectiveWait, stack: ExitStack
) -> tuple[PromptShare, ExperienceSource, Evaluator | None]:
    """Where a replica's data comes from: prompts, engine, rewards."""
    parallel = policy.parallel
    tokenizer = load_tokenizer(config.policy.model_path)
    is_rl = engine is not None
    log = Path(config.run_dir) / "logs" / f"reward_rank_{parallel.rank}.log"
    rewards = stack.enter_context(RewardPool(config.reward, log)) if is_rl else None
    vocab_size = policy.architecture.vocab_size
    find_answer_problems = None
    if rewards is not None and config.data.on_bad_line is OnBadLine.skip:  # else one has ended the run
        find_answer_problems = partial(rewards.find_answer_problems, tolerates_timeouts=True)

    def load(path: str) -> PromptFile:
        loaded = load_prompts(
            path,
            config.data,
            tokenizer,
            config.train.mode,
            needs_answer=is_rl and needs_answer(config.reward),
            vocab_size=vocab_size,
            find_answer_problems=find_answer_problems,
        )
        if parallel.is_main and loaded.left_out is not None:
            Console().print(f"[yellow]warning[/] {path}: {escape(loaded.left_out)}", soft_wrap=True)
        return loaded

    train_prompts = load(config.data.train_path).prompts
    source = PromptSource(train_prompts, shuffle=config.data.shuffle, seed=config.seed)
    share = PromptShare(source, config.rollout.num_prompts_per_step, parallel.data_rank, parallel.data_size)
    if engine is None or rewards is None:
        eos_token_id = read_stop_token_ids(config.policy.model_path, tokenizer)[0]
        return share, DemonstrationExperience(share, tokenizer, eos_token_id, vocab_size=vocab_size), None
    evaluator = None
    if config.eval.every_steps and config.data.eval_path is not None:
        held_out = load(config.data.eval_path).prompts[parallel.data_rank :: parallel.data_size]
        evaluator = Evaluator(config, held_out, engine, rewards, wait.until)
    experience = RolloutExperience(
        config,
        share,
        engine,
        rewards,
        vocab_size=vocab_size,
        num_topk=build_loss(config.algorithm.loss).num_topk,
        wait_until=wait.until,
        agree=wait.agree,
        sum_over_replicas=lambda values: _gather(parallel, values).sum(0),
        route_check=_route_check(config, policy.architecture),
    )
    return share, experience, evaluator


def _gather(parallel: ParallelState, values: torch.Tensor) -> torch.Tensor:
    """The replicas' values, in their order, so that every leader's sum of them has the same bits."""
    values = values.to(parallel.device)
    gathered = [torch.empty_like(values) for _ in range(parallel.data_size)]
    torch.distributed.all_gather(gathered, values, group=parallel.data_group)
    return torch.stack(gathered).cpu()


def _route_check(config: Config, architecture: ArchitectureConfig) -> RouteCheck | None:
    shape = _route_shape(config, architecture)
    if shape is None:
        return None
    return RouteCheck(num_experts=shape.num_experts, on_bad=config.policy.on_bad_routes)


def _print_banner(config: Config, platform: Platform, policy: Policy) -> None:
    table = Table.grid(padding=(0, 2))
    parallel = config.parallel
    sizes = {
        "TP": parallel.tensor_parallel_size,
        "CP": parallel.context_parallel_size,
        "PP": parallel.pipeline_parallel_size,
        "VPP": parallel.virtual_pipeline_parallel_size,
        "EP": parallel.expert_parallel_size,
        "ETP": parallel.expert_tensor_parallel_size,
        "DP": parallel.data_parallel_size,
    }
    weights_path = config.policy.weights_path
    layout = " x ".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "single rank"
    lines = [
        ("model", f"{config.policy.model_path} ({config.policy.dtype})"),
        *([("weights", weights_path)] if weights_path is not None else []),
        ("layout", layout + (", sequence parallel" if parallel.sequence_parallel else "")),
        *platform.describe(config.policy.layers),
        ("run", config.run_dir),
    ]
    for name, value in lines:
        table.add_row(f"[dim]{name}[/]", value)
    console = Console()
    console.print(table)
    for warning in warn_config(config):
        console.print(f"[yellow]warning[/] {warning}", soft_wrap=True)


def _write_summary(config: Config) -> None:
    """The pictures and pages made of what the run wrote."""
    write_report(config.run_dir)
    if config.train.mode is Mode.rl:
        write_index(config.run_dir)


def main() -> None:
    """Load and check the configuration, then run; any error of ours is one message and exit status 1, any
    other its traceback."""
    if SUPERVISOR_PID in os.environ:
        die_with_parent(int(os.environ[SUPERVISOR_PID]))
    ignore_expected_warnings()
    try:
        config, problems = read_config(sys.argv[1:])
        is_main = RankInfo.from_environment().rank == 0
        is_checked = SUPERVISOR_PID in os.environ or not is_main
        if not problems:
            resolve_config(config)
            problems = check_config(config, reads_prompts=not is_checked, sends_weights=is_main)
        if config.train.mode is Mode.rl and starts_fleet(config):
            problems.append(
                "rollout.endpoints is empty and there is no rollout.fleet_file: a rank starts no server; "
                "give the URLs of running ones, or start a fleet with `megatron-drpo fleet up`"
            )
        refuse_problems(config, problems)
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        run(config)
    except DrpoError as error:
        rank = RankInfo.from_environment().rank
        if rank == 0 or not isinstance(error, ConfigError | NumericsError):  # those are every rank's
            print(f"\n{type(error).__name__} (rank {rank}): {error}", file=sys.stderr, flush=True)
        _end(1)
    except KeyboardInterrupt:  # the supervisor says so
        _end(130)
    except Exception as error:  # noqa: BLE001 (it ends here, whatever it is)
        print(f"\nrank {RankInfo.from_environment().rank} ends by {type(error).__name__}:", file=sys.stderr)
        traceback.print_exc()
        _end(1)


def _end(status: int) -> NoReturn:
    """At once. The other ranks wait in collectives, and the interpreter's teardown would wait for them:
    groups are destroyed, and threads joined."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
