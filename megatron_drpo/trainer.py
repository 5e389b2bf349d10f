"""The loop: sample, score, update, publish; evaluate and save now and then."""

from __future__ import annotations

import math
from dataclasses import astuple, fields
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_drpo.checkpoint.checkpointer import Checkpointer, RunState
from megatron_drpo.config.schema import Config, Mode, RoutingReplay
from megatron_drpo.data.source import PromptShare
from megatron_drpo.errors import NumericsError
from megatron_drpo.metrics.alarm import TrustRegionAlarm
from megatron_drpo.metrics.device import device_memory, wait_for_kernels
from megatron_drpo.metrics.diagnostics import summarise
from megatron_drpo.metrics.faulty_tokens import FaultReport, alarm_of_faults, report_faults
from megatron_drpo.metrics.progress import Progress
from megatron_drpo.metrics.prometheus import PrometheusServer
from megatron_drpo.metrics.reward_alarm import RewardAlarm
from megatron_drpo.metrics.rollout_dump import delete_rollouts, write_rollouts
from megatron_drpo.metrics.sample_statistics import SampleStatistics, add_up
from megatron_drpo.metrics.timing import StepTimer
from megatron_drpo.metrics.writer import MetricsWriter
from megatron_drpo.policy.policy import Policy, UpdateResult
from megatron_drpo.runtime.watchdog import Watchdog
from megatron_drpo.step.colocation import SharedDevices
from megatron_drpo.step.experience_source import Evaluator, Experience, ExperienceSource
from megatron_drpo.step.failed_update import save_failure
from megatron_drpo.step.global_batch import iter_global_batches
from megatron_drpo.step.leader_wait import CollectiveWait
from megatron_drpo.step.publish import WeightPublisher
from megatron_drpo.types import MicroBatch, TrainSequence

Metrics = dict[str, float | str | list[float]]


class Trainer:
    """Composed by `train.py`. Runs on every rank; the optional parts exist where they have work.

    Args:
        share, experience: on replica leaders.
        evaluator: on replica leaders, if evaluation is on.
        publisher: on every rank, in rl mode.
        wait: on every rank.
        writer, progress, prometheus: on global rank 0.
        devices: on every rank, with rollout.colocated.
        watchdog: on every rank.
    """

    def __init__(
        self,
        config: Config,
        policy: Policy,
        checkpointer: Checkpointer,
        *,
        share: PromptShare | None,
        experience: ExperienceSource | None,
        evaluator: Evaluator | None,
        publisher: WeightPublisher | None,
        wait: CollectiveWait,
        writer: MetricsWriter | None,
        progress: Progress | None,
        devices: SharedDevices | None = None,
        watchdog: Watchdog | None = None,
        prometheus: PrometheusServer | None = None,
    ) -> None:
        self.config = config
        self.policy = policy
        self.checkpointer = checkpointer
        self.share = share
        self.experience = experience
        self.evaluator = evaluator
        self.publisher = publisher
        self.wait = wait
        self.writer = writer
        self.progress = progress
        self.devices = devices
        self.watchdog = watchdog
        self.prometheus = prometheus
        self.state = RunState()
        self.timer = StepTimer(wait=wait_for_kernels)
        self.trust_region = TrustRegionAlarm()
        self.rewards = RewardAlarm(config)
        self.alarms: list[str] = []
        """Of the step that runs."""
        self.num_tokens = 0.0
        """Prompt and response tokens of the latest step."""
        self.current_step = 0
        """Counted from 1: the step that runs, or the last one finished."""

    def run(self) -> None:
        """From where the run stands to `train.num_steps`, then the final export."""
        self._resume()
        self._publish_weights()
        if self.state.step == 0 and self._evaluates:
            self._report(0, self._evaluate())
        self.timer.finish()
        for step in range(self.state.step, self.config.train.num_steps):
            metrics = self._step(step)
            self.state.step = step + 1
            if self._evaluates and self._is_due(self.config.eval.every_steps):
                metrics |= self._evaluate()
            times = self.timer.finish()
            times["throughput/tokens_per_s"] = self.num_tokens / times["time/step_s"]
            metrics |= times
            metrics |= device_memory(self.policy.parallel.device)
            self._report(step + 1, metrics)
            if self._is_due(self.config.checkpoint.save_every_steps):
                self._save()
        if self.config.checkpoint.export_hf:
            self._phase("export")
            self._take_devices()
            self.policy.exporter.save(
                Path(self.config.run_dir) / "hf", source=self.policy.folder.path, overwrite=True
            )
        if self.devices is not None:
            self.devices.to_servers()

    def _step(self, step: int) -> Metrics:
        self.current_step = step + 1
        self._phase("rollout" if self.config.train.mode is Mode.rl else "data")
        experience = self._collect(step)
        self._phase("update")
        self._take_devices()
        batches = list(iter_global_batches(self.config, self.policy, experience.sequences))
        with self.timer.phase("logprobs"):
            batches = self.policy.add_logprobs(batches)
        updates = [self._update(micro_batches) for micro_batches in batches]
        self.state.policy_version += 1
        self._publish_weights()
        self._mark_consumed()
        if self.policy.parallel.is_main and experience.records:
            write_rollouts(self.config.run_dir, step + 1, experience.records)
        self._tell_faults(updates, experience.sequences)
        return self._sample_metrics(experience.statistics) | self._update_metrics(updates)

    def _update(self, micro_batches: list[MicroBatch]) -> UpdateResult:
        try:
            return self.policy.train_step(micro_batches, self.timer)
        except NumericsError as error:
            folder = save_failure(self.config, self.policy, self.state, micro_batches, error)
            raise NumericsError(f"{error}. The update changed no weight; {folder} reproduces it") from error

    def _collect(self, step: int) -> Experience:
        version = self.state.policy_version
        samples = None
        if self.experience is not None:
            samples = self.experience.sample(step, version, self.timer)
        with self.timer.phase("rollout"):  # the slowest replica's
            self.wait.for_others()
        self._show_messages()
        if self.experience is None or samples is None:
            return Experience(sequences=[], statistics=SampleStatistics())
        return self.experience.build(samples, version)

    def _publish_weights(self) -> None:
        if self.publisher is None:
            return
        self._phase("weight sync")
        with self.timer.phase("weight_sync"):
            self.publisher.publish(self.state.policy_version)
        self._show_messages()

    def _take_devices(self) -> None:
        """From the servers, until weights are published again."""
        if self.devices is not None:
            with self.timer.phase("handover"):
                self.devices.to_trainer()
            self._show_messages()

    def _mark_consumed(self) -> None:
        """The step's prompts count; those of groups still in flight, on any replica, do not yet."""
        if self.share is None or self.experience is None:
            return
        pending = self.experience.pending
        rollout = self.config.rollout
        if rollout.max_staleness or rollout.oversampling:
            parallel = self.policy.parallel
            gathered: list[list[int]] = [[] for _ in range(parallel.data_size)]
            dist.all_gather_object(gathered, pending, group=parallel.data_group)
            pending = [prompt_id for ids in gathered for prompt_id in ids]
        self.share.mark_consumed(pending)

    # ------------------------------------------------------------------------------------ now and then

    @property
    def _evaluates(self) -> bool:
        return self.config.eval.every_steps > 0 and self.config.train.mode is Mode.rl

    def _is_due(self, every_steps: int) -> bool:
        is_last = self.state.step == self.config.train.num_steps
        return is_last or (every_steps > 0 and self.state.step % every_steps == 0)

    def _evaluate(self) -> Metrics:
        self._phase("evaluation")
        with self.timer.phase("eval"):
            statistics = SampleStatistics()
            if self.evaluator is not None:
                statistics = self.evaluator.evaluate()
            self.wait.for_others()
            total = self._sum(statistics)
        return {
            "eval/accuracy": total.reward_sum / max(total.num_samples, 1),
            "eval/num_samples": total.num_samples,
            "eval/length_mean": total.length_sum / max(total.num_samples, 1),
        }

    def _save(self) -> None:
        self._phase("checkpoint")
        self._take_devices()
        with self.timer.phase("checkpoint"):
            if self.share is not None:
                self.state.cursor = self.share.source.state_dict()
            if self.writer is not None:
                self.state.metrics_position = self.writer.position
            self.checkpointer.save(self.policy, self.state)
        if self.devices is not None and self.state.step < self.config.train.num_steps:
            self._publish_weights()  # servers that had let go of their weights need them again

    def _resume(self) -> None:
        path = self.checkpointer.find()
        own = path is not None and self.checkpointer.is_own(path)
        if path is not None:
            self._phase("loading the checkpoint")
            self.state = self.checkpointer.load(path, self.policy, self._show)
            self.current_step = self.state.step
            if self.share is not None:
                self.share.source.load_state_dict(self.state.cursor)
            if self.progress is not None:
                self.progress.message(f"continuing after step {self.state.step}, from {path}")
        if self.writer is not None:
            self._forget_after(self.state if own else RunState(), self.writer)

    def _forget_after(self, state: RunState, writer: MetricsWriter) -> None:
        """What run_dir holds of later steps is void: they are run again."""
        writer.truncate(state.metrics_position)
        delete_rollouts(self.config.run_dir, after_step=state.step)
        self.checkpointer.claim()

    # ------------------------------------------------------------------------------------- what is seen

    def _show(self, message: str) -> None:
        if self.progress is not None:
            self.progress.message(message)

    def _show_messages(self) -> None:
        if self.publisher is not None and self.progress is not None:
            for message in self.publisher.take_messages():
                self.progress.message(message)

    def _phase(self, name: str) -> None:
        if self.progress is not None:
            self.progress.phase(name)
        if self.watchdog is not None:
            self.watchdog.begin(name, self.current_step)

    def _tell_faults(self, updates: list[UpdateResult], sequences: list[TrainSequence]) -> None:
        """An alarm of the faulty tokens of a step, named by the leaders, who know where they come from."""
        faults = [fault for update in updates for fault in update.faulty]
        parallel = self.policy.parallel
        if not faults or not parallel.is_leader:
            return
        origins = {sequence.id: sequence.origin for sequence in sequences}
        mine = report_faults((fault for fault in faults if fault.replica == parallel.data_rank), origins)
        gathered: list[list[FaultReport]] = [[] for _ in range(parallel.data_size)]
        dist.all_gather_object(gathered, mine, group=parallel.data_group)
        limit = self.config.algorithm.correction.faulty_log_ratio
        self.alarms.append(alarm_of_faults([report for of in gathered for report in of], limit))

    def _report(self, step: int, metrics: Metrics) -> None:
        if self.alarms:
            metrics["alarm"] = "\n".join(self.alarms)
        if self.writer is not None:
            self.writer.write(step, metrics)
        if self.prometheus is not None:
            self.prometheus.write(step, metrics, policy_version=self.state.policy_version)
        if self.progress is not None:
            self.progress.step(step, metrics)
            for alarm in self.alarms:
                self.progress.message(f"warning: {alarm}")
        self.alarms = []

    def _sample_metrics(self, statistics: SampleStatistics) -> Metrics:
        total = self._sum(statistics)
        count = max(total.num_samples, 1)
        self.num_tokens = total.length_sum + total.num_prompt_tokens
        metrics: Metrics = {
            "response/length_mean": total.length_sum / count,
            "response/length_max": total.length_max,
            "response/truncated_share": total.num_truncated / count,
            "data/num_samples": total.num_samples,
            "data/num_tokens": self.num_tokens,
        }
        if self.config.train.mode is Mode.rl:
            mean = total.reward_sum / count
            metrics["reward/mean"] = mean
            metrics["reward/std"] = math.sqrt(max(total.reward_square_sum / count - mean * mean, 0.0))
            metrics["reward/varied_groups_share"] = total.num_groups_varied / max(total.num_groups_scored, 1)
            alarm = self.rewards.update(total)
            self.alarms += [] if alarm is None else [alarm]
            metrics["rollout/staleness_mean"] = total.staleness_sum / max(total.num_response_tokens, 1)
            metrics["rollout/staleness_max"] = total.staleness_max
            if self.config.policy.routing_replay is RoutingReplay.rollout:
                metrics["routing/fallback_share"] = total.num_fallback_sequences / count
            if self.config.algorithm.dynamic_sampling.enabled:
                metrics["rollout/num_rounds"] = total.num_rounds
                metrics["rollout/groups_dropped_share"] = total.num_groups_dropped / max(total.num_groups, 1)
        return metrics

    def _sum(self, statistics: SampleStatistics) -> SampleStatistics:
        """Over all replicas' leaders."""
        parallel = self.policy.parallel
        values = torch.tensor(astuple(statistics), dtype=torch.float64, device=parallel.device)
        gathered = [torch.empty_like(values) for _ in range(parallel.data_size)]
        dist.all_gather(gathered, values, group=parallel.data_group)
        names = [f.name for f in fields(SampleStatistics)]
        return add_up(SampleStatistics(**dict(zip(names, part.tolist(), strict=True))) for part in gathered)

    def _update_metrics(self, updates: list[UpdateResult]) -> Metrics:
        """Over a step's updates: means of loss and gradient norm, and all tokens' diagnostics."""
        diagnostics = updates[0].diagnostics
        for update in updates[1:]:
            diagnostics = diagnostics + update.diagnostics
        metrics: Metrics = {
            "loss/value": sum(update.loss for update in updates) / len(updates),
            "optimizer/grad_norm": sum(update.grad_norm for update in updates) / len(updates),
            "optimizer/lr": updates[-1].lr,
        }
        num_choices = sum(update.agreement.num_choices for update in updates)
        if num_choices:
            num_equal = sum(update.agreement.num_equal for update in updates)
            metrics["routing/agreement"] = num_equal / num_choices
        details = summarise(diagnostics)
        details["mismatch/first_update_logprob_abs_mean"] = summarise(updates[0].diagnostics)[
            "mismatch/logprob_abs_mean"
        ]
        if self.config.train.mode is Mode.sft:  # there is no behaviour policy to compare with
            return metrics | {"policy/entropy": details["policy/entropy"]}
        if self.policy.objective.loss.has_trust_region:
            alarm = self.trust_region.update(diagnostics.num_tokens, diagnostics.num_outside)
            self.alarms += [] if alarm is None else [alarm]
        metrics["mismatch/faulty_tokens"] = sum(len(update.faulty) for update in updates)
        return metrics | details
