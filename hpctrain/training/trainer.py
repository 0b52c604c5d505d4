"""The training loop: steps, and between two of them logs, evaluations, saves and stops."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from hpctrain.batch.stop import SAVE_DUE
from hpctrain.config import Config
from hpctrain.data.loading.batch import TrainBatches
from hpctrain.training.data.run_data import Data
from hpctrain.training.optim.lr_scheduler import Schedule
from hpctrain.training.position import Interval, Position, StopAt
from hpctrain.training.run import Metrics, Run
from hpctrain.training.step import TrainStep

logger = logging.getLogger("hpctrain")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """When the loop does what."""

    stop_at: StopAt
    log: Interval
    evaluate: Interval | None
    check: Interval
    save: Interval

    @classmethod
    def of(cls, config: Config, data: Data) -> Plan:
        """Return the plan of a config."""
        training, checkpoint = config.training, config.checkpoint
        evaluation = Interval(
            every_steps=training.evaluate_every_steps, every_epochs=training.evaluate_every_epochs
        )
        return cls(
            stop_at=data.stop_at,
            log=Interval(every_steps=config.logging.every_steps),
            evaluate=None if not data.validations or evaluation.is_never else evaluation,
            check=Interval(every_steps=training.check_sync_every),
            save=Interval(every_steps=checkpoint.every_steps, every_epochs=checkpoint.every_epochs),
        )

    def next_step(self, step: int, last: int) -> int:
        """Return the step after `step` at which something is due, whatever epochs ask for.

        Args:
            step: that the run stands at.
            last: step of the run.
        """
        intervals = (self.log, self.evaluate, self.check, self.save)
        return min([last, *(each.next_step(step) or last for each in intervals if each)])


def fit(
    place: Position,
    plan: Plan,
    *,
    step: TrainStep,
    loader: TrainBatches,
    schedule: Schedule,
    run: Run,
    evaluation_owed: bool = False,
) -> tuple[Position, bool]:
    """Train from `place` to the stop_at, or until all ranks agree to stop.

    Collective: all ranks.

    With `evaluation_owed` the evaluation at `place`, which a stop has cut short, comes first.

    Returns:
        Where the run stands, and whether it is complete.
    """
    end = plan.stop_at.end(place)
    # First what the job before has left undone: schedule and early stopping need its metrics.
    if evaluation_owed and plan.evaluate is not None and not _caught_up(place, plan, schedule, run):
        return place, False  # the checkpoint that the run came from says all there is
    # Looked up once: what follows is done in every step.
    stopping, in_groups = run.stopping, schedule.in_groups
    epoch_samples, rate = plan.stop_at.epoch_samples, schedule.until(end)
    while place.step < end.step and not stopping.ends(place):
        epoch = place.epoch
        run.begin_epoch(place)
        due = plan.next_step(place.step, end.step)
        for batch in loader.epoch(epoch, place.position):
            lr = rate(place)
            step(batch, None if in_groups else lr)
            place = place.after(batch.global_size, epoch_samples)
            if in_groups:
                schedule.advance(place)
            # Before all that looks at the parameters: averages and callbacks belong to the step.
            run.advanced(place)
            metrics, complete, saves = None, False, False
            # Most steps are followed by the next one, and cost no more than these comparisons.
            if place.step >= due or place.position == 0 or stopping.reason is not None:
                due = plan.next_step(place.step, end.step)
                metrics, complete, saves = _do_due(
                    place, epoch, lr, end, plan=plan, schedule=schedule, run=run
                )
            elif in_groups:
                schedule.advance_monitored(place)
            # After every step, as ranks may agree to save or to stop at any.
            if ends_here(place, run, metrics, complete=complete, saves=saves):
                return place, False
            if complete:
                break
    return place, True


def _do_due(
    place: Position,
    epoch: int,
    lr: float,
    end: Position,
    *,
    plan: Plan,
    schedule: Schedule,
    run: Run,
) -> tuple[Metrics | None, bool, bool]:
    """Log, compare and evaluate where it is time, after a step. Collective: all ranks.

    Args:
        place: that the step led to.
        epoch: of the step.
        lr: its learning rate.
        end: where the run will be complete.
        plan: when the loop does what.
        schedule: of learning rates.
        run: of the job.

    Returns:
        Metrics of an evaluation here; whether the run is complete; whether a save is due.
    """
    stopping = run.stopping
    complete = place.step == end.step or stopping.ends(place)
    if complete or plan.log.due(place):
        run.log(place, epoch, lr)
    if plan.check.due(place):
        run.check(place)
    metrics, owed = None, False
    if plan.evaluate is not None and (complete or plan.evaluate.due(place)):
        metrics = run.evaluate(place, epoch)
        owed = metrics is None
        complete = complete or stopping.ends(place)
    if not owed:
        _after_evaluation(place, epoch, schedule, run, complete=complete)
        complete = complete or stopping.ends(place)
    # Without its evaluation a run is not done; a later job begins with it.
    complete = complete and not owed
    return metrics, complete, complete or plan.save.due(place)


def _caught_up(place: Position, plan: Plan, schedule: Schedule, run: Run) -> bool:
    """Evaluate where a stop has cut that short, if it is not again. Collective: all ranks."""
    epoch = place.epoch - (place.position == 0)
    metrics = run.evaluate(place, epoch)
    if metrics is None:
        return False
    complete = plan.stop_at.reached(place) or run.stopping.ends(place)
    _after_evaluation(place, epoch, schedule, run, complete=complete)
    complete = complete or run.stopping.ends(place)
    # The checkpoint was saved without these metrics.
    if plan.save.due(place) or complete:
        run.save(place, metrics)
    return True


def _after_evaluation(
    place: Position, epoch: int, schedule: Schedule, run: Run, *, complete: bool
) -> None:
    """End an epoch that ends here, and step the LR scheduler. Collective: all ranks."""
    if complete or place.position == 0:
        run.end_epoch(place, epoch)
    if schedule.in_groups:
        schedule.advance_monitored(place)


def ends_here(
    place: Position, run: Run, metrics: Metrics | None, *, complete: bool, saves: bool
) -> bool:
    """Save where it is time; return whether all ranks stop here, before the run is complete.

    Collective: all ranks.

    Args:
        place: that a step led to.
        run: of the job.
        metrics: of an evaluation at this very place.
        complete: whether the run ends here anyway.
        saves: whether a save is due here, whatever the ranks agree on.
    """
    agreed = run.agreed()
    if agreed or saves:
        run.save(place, metrics)
    return not complete and bool(agreed & ~SAVE_DUE)
