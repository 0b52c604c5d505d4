"""Numbers of a hand-written task's own: what it logs in the steps of a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hpctrain.checkpoint.state import Json, decode, encode
from hpctrain.launch.process_group import World
from hpctrain.training.modules.log import Logs


class TaskLog:
    """Takes what a task logs in a step, as `self.log` of a module does; called for a number.

    A number that it logs elsewhere is of no step, and left out: `loss` may be called by `evaluate`
    as well. Images and histograms are taken in evaluations, too.

    Attributes:
        logs: what was logged.
    """

    def __init__(self, world: World) -> None:
        self.logs = Logs(world.communicator, world.device)
        self._in_pass = False

    @classmethod
    def of(cls, task: object, world: World) -> TaskLog | None:
        """Return that of a task that wants to log; None: it has no `set_log`."""
        give = getattr(task, "set_log", None)
        if not callable(give):
            return None
        made = cls(world)
        give(made)
        return made

    def __deepcopy__(self, memo: Any) -> TaskLog:
        return self  # copies of a task, for trials, log nothing

    def __call__(
        self,
        name: str,
        value: Tensor | float,
        *,
        on_step: bool = True,
        on_epoch: bool = False,
        reduce_fx: str = "mean",
        weight: float | None = None,
    ) -> None:
        """Log a number of a step, over all passes and ranks.

        Args:
            name: in the metrics.
            value: a number, or a tensor of one, on any device: nobody waits for it.
            on_step: in the line of every step that is logged.
            on_epoch: over all samples of the epoch, at its end.
            reduce_fx: "mean", "sum", "min" or "max".
            weight: of a mean; None: the samples of the pass.
        """
        if self._in_pass:
            options = {"on_step": on_step, "on_epoch": on_epoch, "reduce_fx": reduce_fx}
            self.logs.log(name, value, batch_size=weight, **options)  # type: ignore[arg-type]

    def image(self, name: str, image: Any) -> None:
        """Log an image, see `hpctrain.training.modules.media.Media.image`."""
        self.logs.media.image(name, image, takes=self._takes)

    def histogram(self, name: str, values: Any) -> None:
        """Log how numbers are spread, see `hpctrain.training.modules.media.Media.histogram`."""
        self.logs.media.histogram(name, values, takes=self._takes)

    @property
    def _takes(self) -> bool:
        """Whether this is no pass over a held row, which keeps other ranks company."""
        return not self._in_pass or self.logs.weight > 0

    def begin_step(self) -> None:
        """Forget what the step before has logged."""
        self.logs.begin_step()
        self._in_pass = self.logs.records = True
        self.logs.fx = "training_step"

    def end_step(self) -> None:
        """Log nothing from here on."""
        self._in_pass = False

    def end_epoch(self) -> dict[str, float]:
        """Return what was logged for the epoch, under all its names. Collective: all ranks."""
        found = self.logs.named("train", self.logs.end_epoch())
        self.logs.begin_epoch()
        return found

    def capture(self, tensors: dict[str, Tensor]) -> Json:
        """Return what was logged in the epoch under way, on this rank, as JSON.

        Args:
            tensors: takes the tensors of it.
        """
        return encode({"logs": self.logs.state()}, "logged", tensors, lambda _: {})

    def restore(self, parts: Sequence[tuple[Json, Mapping[str, Tensor]]]) -> None:
        """Go on from what some ranks have captured: from all of it together."""
        states = [decode(saved, tensors, lambda item, _: item.clone()) for saved, tensors in parts]
        self.logs.load_states([state["logs"] for state in states])
