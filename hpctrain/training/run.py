"""The run that the loop works on: lines of metrics.jsonl, evaluations, saves and stops."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from hpctrain.batch.stop import END_DUE, SAVE_DUE, Boundary, StopAgreement
from hpctrain.data.loading.batch import EvaluationBatches
from hpctrain.data.order.epochs import source_epochs
from hpctrain.launch.process_group import World
from hpctrain.training.build import Parts
from hpctrain.training.data.run_data import Data
from hpctrain.training.early_stopping import ASKED, STATE, early_stopping_of
from hpctrain.training.evaluation import Turn, evaluate
from hpctrain.training.modules.task import ModuleTask
from hpctrain.training.nonfinite import BadStepPolicy, SpikeWatch, explain, nothing_applied
from hpctrain.training.parallel.ddp import check_equal_parameters
from hpctrain.training.position import Position
from hpctrain.training.profiling import Phases, StepProfiler, note_figures
from hpctrain.training.rank_zero import RankZero
from hpctrain.training.saver import Saver
from hpctrain.training.task.misfits import look_at_ranges
from hpctrain.training.task.task import learns_progress
from hpctrain.utils.text import metric

logger = logging.getLogger("hpctrain")

Metrics = dict[str, float]


VALIDATION = "validation"
"""What the data are called whose metrics have no name before theirs."""


class Run:
    """The hooks of the loop, on one rank.

    Attributes:
        stopping: what ends the run before its limits.
        metrics: of the newest evaluation.
        first_place: where this job began.
        place: where it stands.
        reasons: why all ranks agreed to stop, as a bit set; 0: they did not.
        evaluation_owed: an evaluation at `place` was cut short by a stop.
        rank_zero: what only rank 0 has; None on the others.
        phases: seconds of this rank.
        skipped_steps: steps of the run, as far as is known, that were not applied.
    """

    def __init__(
        self,
        world: World,
        data: Data,
        parts: Parts,
        *,
        phases: Phases,
        stop: StopAgreement,
        rank_zero: RankZero | None,
        saved: Mapping[str, Any],
        profiler: StepProfiler | None = None,
    ) -> None:
        """Take up the run where its data say that it goes on.

        Args:
            world: the ranks.
            data: of the run, and its config.
            parts: what is trained, restored already.
            phases: seconds of this rank.
            stop: the agreement of all ranks to stop.
            rank_zero: what only rank 0 has; None on the others.
            saved: values of the checkpoint that the run goes on from; empty: it begins.
            profiler: of steps to come; None: none.
        """
        place = data.place
        self._config = config = data.config
        self._world = world
        self._data = data
        self._parts = parts
        self._module = parts.task if isinstance(parts.task, ModuleTask) else None
        self._task_log = parts.step.task_log
        logging = self._module or self._task_log
        self._media = None if logging is None else logging.logs.media
        self._callbacks = parts.callbacks
        self._step = parts.step
        self._trainer = parts.callbacks.trainer if self._module is None else self._module.trainer
        if self._trainer is not None:
            stop.add(self._trainer.end_due)
        self._task_learns = learns_progress(parts.task)
        self.phases = phases
        self._stop = stop
        self.rank_zero = self._rank_zero = rank_zero
        self._logged_samples = place.samples_seen
        self._logged_time = time.perf_counter()
        self.stopping = early_stopping_of(config, parts.task, saved)
        self.metrics: Metrics = dict(saved.get("metrics", {}))
        self.first_place = self.place = place
        self.reasons = 0
        self._skipped_before = int(parts.step.bad_steps[2].item())
        self._count_skipped(self._skipped_before)
        if rank_zero is not None:
            topology = world.topology
            rank_zero.folder.phase_log.begin_training(
                place.step, nodes=topology.num_nodes, ranks=topology.world_size
            )
        self.evaluation_owed = False
        self._save_due = 0
        self._confirmed = False
        self._profiler = profiler
        self._prune = data.brought.prune
        self._looks = False
        self._saver = Saver(config, world, data, parts.step, stop=stop, rank_zero=rank_zero)
        self._spikes = SpikeWatch()
        self._policy = BadStepPolicy(
            config.training,
            skipped=self._skipped_before,
            explain=self._explain,
            roll_back=self._saver.roll_back,
            warn=self.warn,
        )

    def advanced(self, place: Position) -> None:
        """Take note of a step. Collective after the first one: all ranks.

        Called after every one, so it must cost next to nothing.
        """
        self.place = place
        self._world.pulse.step_done(place.step)
        if self._task_learns is not None:
            self._task_learns(place.step, place.epoch, "train")
        if self._module is not None:
            self._module.end_step()
        if self._callbacks.items:
            self._callbacks.end_step(place, self._data.stop_at, lambda: self._step.last_loss)
        if self._step.average is not None:
            self._step.average.update(place.step)
        if self._media is not None:
            self._expect_media(place.step + 1)
        if self._rank_zero is not None:
            self._rank_zero.progress.update(place.step, place.epoch)
        if self._looks:
            self._looks = False
            look_at_ranges(self._parts.task, looks=False)
        if not self._confirmed:
            # Only now the optimizer has all that it keeps.
            self._confirmed = True
            self.try_save(place)
        if self._profiler is not None and self._profiler.step_done(place.step):
            self._profiler = None

    def log(
        self, place: Position, epoch: int, lr: float, more: Mapping[str, float] | None = None
    ) -> None:
        """Write the step that led to `place` to the metrics. Collective: all ranks.

        Args:
            place: where the run stands.
            epoch: of the step.
            lr: its learning rate.
            more: further numbers of it, by name.
        """
        numbers = self._read(place)
        if self._config.logging.machine:
            note_figures(self._world, self.phases, place.step, place.step - self.first_place.step)
        if self._world.device.type != "cpu":
            # The device has nothing to do at this moment: the next step may look, too.
            self._looks = True
            look_at_ranges(self._parts.task, looks=True)
        now = time.perf_counter()
        rate = (place.samples_seen - self._logged_samples) / max(now - self._logged_time, 1e-9)
        self._logged_samples, self._logged_time = place.samples_seen, now
        self._write_media()
        logged: dict[str, Any] = {}
        if self._module is not None:
            self._module.show_metrics()
            if written := self._written("train", self._module.logs.step_values):
                logged = {"logged": written}
        elif self._task_log is not None and self._task_log.logs.step_values:
            logged = {"logged": dict(self._task_log.logs.step_values)}
        if self._rank_zero is None:
            return
        self._rank_zero.progress.update(place.step, epoch, numbers["loss"], rate)
        if (spike := self._spikes.look(numbers["loss"])) is not None:
            self.warn(f"step {place.step:,}: {spike}")
        self._rank_zero.writer.write(
            {
                "kind": "train",
                "step": place.step,
                "epoch": epoch,
                "samples_seen": place.samples_seen,
                "loss": numbers["loss"],
                "lr": lr,
                **self._parts.schedule.rates(),
                "grad_norm": numbers["grad_norm"],
                "skipped_steps": self.skipped_steps,
                **logged,
                **(_source_epochs(self._data, place) if self._config.data.sources else {}),
                "samples_per_second": rate,
                "seconds": self.phases.lap(),
                **(more or {}),
            }
        )
        self._rank_zero.folder.phase_log.note(place.step, self.phases.totals)

    def _expect_media(self, step: int) -> None:
        """Have images taken in the step to come if its line is to be written."""
        assert self._media is not None
        if step % self._config.logging.every_steps == 0:
            self._media.open("train", step)
        else:
            self._media.close()

    def _write_media(self) -> None:
        """Write the images and histograms of a step, or an evaluation."""
        if self._media is not None and self._rank_zero is not None:
            for item in self._media.taken():
                self._rank_zero.writer.write_media(item)

    def begin_epoch(self, place: Position) -> None:
        """Take note of an epoch that begins, or goes on in this job."""
        self._callbacks.begin_epoch(place.epoch)
        if self._module is not None:
            self._module.begin_epoch(place.epoch)

    def end_epoch(self, place: Position, epoch: int) -> None:
        """Write down what was logged for the epoch. Collective: all ranks."""
        self._callbacks.end_epoch()
        logging = self._module or self._task_log
        logged = None if logging is None else logging.end_epoch()
        self._ask_all()
        if logged is None:
            return
        if self._rank_zero is not None and (written := self._written("train", logged)):
            record = {"kind": "epoch", "split": "train", "step": place.step, "epoch": epoch}
            self._rank_zero.writer.write({**record, **written, **record})

    def _written(self, stage: str, logged: Mapping[str, float]) -> Metrics:
        """Return what of logged values goes into the metrics."""
        if self._module is None:
            return dict(logged)
        logs = self._module.logs
        return {name: value for name, value in logged.items() if logs.written(stage, name)}

    def evaluate(self, place: Position, epoch: int) -> Metrics | None:
        """Return the metrics of the validation data, None if stopped. Collective: all ranks."""
        data = self._data
        split = {VALIDATION: data.validations}
        split |= {name: [each] for name, each in data.evaluations.items()}
        found: dict[str, Metrics] = {}
        with self.phases.measure("evaluation"), self._step.evaluation_weights():
            self._callbacks.begin_evaluation()
            for name, sets in split.items():
                self._show_task(place, name)
                if self._media is not None:
                    self._media.open(name, place.step)
                metrics = self._evaluated([each.loader for each in sets])
                self._write_media()
                if metrics is None:
                    self.evaluation_owed = True
                    self._show_task(place, "train")
                    self._callbacks.end_evaluation(None)
                    return None
                found[name] = metrics
            self.metrics = {
                key if name == VALIDATION else f"{name}/{key}": value
                for name, metrics in found.items()
                for key, value in metrics.items()
            }
            self._callbacks.end_evaluation(self.metrics)
        if self._media is not None:
            self._expect_media(place.step + 1)
        self._ask_all()
        self._show_task(place, "train")
        self._parts.schedule.observe(self.metrics)
        self.stopping.observe(self.metrics, place)
        self.write_evaluation(place, epoch, found)
        if self._prune is not None:
            self.stopping.ask_study(self._prune, place, self.metrics, self._world.communicator)
        return self.metrics

    def write_evaluation(self, place: Position, epoch: int, found: Mapping[str, Metrics]) -> None:
        """Write an evaluation down that has made `metrics`.

        Args:
            place: where the run stands.
            epoch: that led there.
            found: its metrics, by the names of the data.
        """
        if self._rank_zero is None:
            return
        for name, metrics in found.items():
            record = {"kind": "evaluation", "split": name, "step": place.step, "epoch": epoch}
            written = self._written("validate", metrics)
            self._rank_zero.writer.write({**record, **written, **record})
        self._rank_zero.folder.phase_log.note(place.step, self.phases.totals)
        shown = "  ".join(f"{name} {metric(value)}" for name, value in self.metrics.items())
        self._rank_zero.progress.note(f"step {place.step:,}  epoch {epoch}  {shown}")

    def _evaluated(self, loaders: list[EvaluationBatches]) -> Metrics | None:
        """Return the metrics of some data, None if stopped. Collective: all ranks."""
        step = self._step
        metrics = evaluate(
            step.runner,
            [Turn.of(each, accompanies=step.sharded is not None) for each in loaders],
            self._world,
            stopping=lambda: bool(self.agreed(Boundary.EVALUATION_BATCH) & ~SAVE_DUE),
        )
        step.settle()
        return metrics

    def _ask_all(self) -> None:
        """End the run here if code of the user's on any rank asks for it. Collective: all ranks.

        Between two epochs and behind an evaluation; inside an epoch the agreement to stop has
        it, a few steps later.
        """
        if self._trainer is None or self.stopping.reason is not None:
            return
        if any(self._world.communicator.all_gather(bool(self._trainer.should_stop))):
            self.stopping.ask(ASKED)

    def check(self, place: Position) -> None:
        """Compare the parameters of all ranks, where all have the same. Collective: all ranks."""
        if self._step.sharded is None:
            check_equal_parameters(self._parts.model, self._world, place.step)

    def save(self, place: Position, metrics: Metrics | None) -> None:
        """Save a checkpoint in the background. Collective: all ranks."""
        self._save_due = 0
        self._read(place)  # nothing is saved behind a failure that nobody has looked at
        self._refuse_idle_end(place)
        if self._config.training.fast_dev_run:
            return  # a trial has shown already that it can be saved
        self._saver.save(place, metrics, self._memory())

    def begin(self, place: Position) -> None:
        """See that the ranks are equal and the run can be saved. Collective: all ranks."""
        if self._module is not None:
            self._module.begin_training(place)
        self._callbacks.begin_training(place)
        if self._media is not None:
            self._expect_media(place.step + 1)
        self._show_task(place, "train")
        self.check(place)
        self.try_save(place)

    def _show_task(self, place: Position, stage: str) -> None:
        """Report where the run stands to a task that wants to know."""
        if self._task_learns is not None:
            self._task_learns(place.step, place.epoch, stage)

    def try_save(self, place: Position) -> None:
        """Send what a save would hold to memory and back. Collective: all ranks.

        Raises:
            CheckpointError: on every rank, naming what could not be saved.
        """
        self._saver.attempt(place, self._memory())

    def agreed(self, boundary: Boundary = Boundary.STEP) -> int:
        """Return what all ranks have agreed on here: reasons to stop, SAVE_DUE, or 0.

        Collective: all ranks. A save stays due until it is made; a stop stays agreed: an evaluation
        that was cut short ends the step behind it too.
        """
        if not self.reasons:
            agreed = self._stop.boundary(boundary)
            self._saver.look()
            if agreed:
                self._save_due |= agreed & SAVE_DUE
                if agreed & END_DUE:
                    self.stopping.ask(ASKED)
                self.reasons = agreed & ~(SAVE_DUE | END_DUE)
        return self.reasons | self._save_due

    def finish(self) -> None:
        """Leave no reduction behind that others still wait for. Collective: all ranks."""
        self._stop.flush()
        self._callbacks.end_training(self.place.epoch)
        if self._module is not None:
            self._module.end_training(self.place.epoch)

    @contextmanager
    def failures_reported(self) -> Iterator[None]:
        """Report an exception of the body to callbacks and to a module, on this rank."""
        try:
            yield
        except Exception as error:
            hooks: Any = self._callbacks if self._module is None else self._module
            try:
                hooks.fail(error)
            except Exception:
                logger.exception("on_exception has failed itself; what it was called for follows")
            raise

    def saves_finished(self) -> AbstractContextManager[None]:
        """Return the context after which the last save is finished. Collective: all ranks."""
        return self._saver.finished()

    def _memory(self) -> Mapping[str, Any]:
        """Return what a run that goes on should know of this one."""
        end = self._data.stop_at.end(self.place)
        return {
            "total_steps": end.step,
            "lr": self._parts.schedule(self.place, end),
            "schedule": self._parts.schedule.state_dict(),
            "metrics": self.metrics,
            "evaluation_owed": self.evaluation_owed,
            STATE: self.stopping.state_dict(),
            **self._data.record(self._config),
        }

    def _read(self, place: Position) -> Metrics:
        """Return the numbers of the last step, unless they end the run. Collective: all ranks."""
        numbers = self._step.read()
        if self._rank_zero is not None:
            self._notify_nonfinite(place, numbers)
        self._policy.judge(place, numbers)
        self._count_skipped(int(numbers["skipped_steps"]))
        return numbers

    def _notify_nonfinite(self, place: Position, numbers: Mapping[str, float]) -> None:
        """Report the first step of a job that was not finite to the notify command."""
        what = "" if math.isfinite(numbers["loss"]) else f"the loss is {numbers['loss']}"
        if not what and numbers["most_bad_steps"]:
            what = "the gradient was not finite"
        if what:
            assert self._rank_zero is not None
            self._rank_zero.folder.notifier.notify_beside(
                "nonfinite", f"step {place.step:,}: {what}", step=place.step
            )

    def _count_skipped(self, total: int) -> None:
        self.skipped_steps = total
        if self._rank_zero is not None:
            self._rank_zero.folder.skipped_steps = total

    def _refuse_idle_end(self, place: Position) -> None:
        """Refuse to end, and to save the end, if no step of this job was applied. Collective.

        Raises:
            TrainingError: on every rank.
        """
        steps = place.step - self.first_place.step
        complete = self.stopping.ends(place)
        complete = complete or place.step >= self._data.stop_at.total_steps(place)
        scaler = self._step.scaler
        # A loss scale that still falls goes on doing so in the next job.
        ends = complete or (self.reasons != 0 and not scaler.enabled)
        if steps and ends and self.skipped_steps - self._skipped_before >= steps:
            scale = scaler.scale.item() if scaler.enabled else None
            raise nothing_applied(place.step, steps, scale, self._explain)

    def batches_under_way(self) -> list[tuple[int, int, int]]:
        """Return epoch, start and size of the newest batches, and of the one that comes next."""
        place, size = self.place, self._config.data.global_batch_size
        size = min(size, self._data.train_loader.epoch_size - place.position)
        return [*self._step.recent_batches(), (place.epoch, place.position, size)]

    def _explain(self, step: int) -> str:
        """Return what is known of the newest bad steps. Collective: all ranks."""
        return explain(self._step.bad_batches(step), self._data.train_loader, self._world)

    def warn(self, text: str) -> None:
        """Say on rank 0 what a user should know."""
        if self._rank_zero is not None:
            logger.warning(text)


def _source_epochs(data: Data, place: Position) -> dict[str, Any]:
    """Return how far the sources of a mixture are, for the log."""
    order = data.train_loader.order_of(place.epoch)
    return {"source_epochs": source_epochs(order, place.epoch, place.position)}
