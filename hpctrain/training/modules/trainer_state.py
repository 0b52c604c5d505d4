"""`trainer.state`: what a Trainer is doing, in Lightning's words."""

from __future__ import annotations

_STAGES = {"fit": "train"}
"""Stage that a method of the Trainer begins in, where it is not called as the method is."""


class Word(str):
    """A word of Lightning's enumerations, which is equal to the member and asked as that is."""

    __slots__ = ()

    @property
    def value(self) -> str:
        """The word itself."""
        return str(self)

    @property
    def evaluating(self) -> bool:
        """Whether a stage evaluates."""
        return self in ("validate", "test", "sanity_check")

    @property
    def dataloader_prefix(self) -> str:
        """What the loaders of a stage are called by."""
        return "val" if self in ("validate", "sanity_check") else str(self)

    @property
    def stopped(self) -> bool:
        """Whether a status is that of a run which is over."""
        return self in ("finished", "interrupted")


class State:
    """What a Trainer is doing.

    Attributes:
        fn: the method that was called last: "fit", "validate", "test", "predict"; None: none yet.
        status: "initializing", "running", "finished" or "interrupted".
    """

    def __init__(self) -> None:
        self.fn: Word | None = None
        self.status = Word("initializing")
        self._stage: Word | None = None

    @property
    def stage(self) -> Word | None:
        """Such as "train", or "validate" between two epochs of it; None: nothing runs."""
        return self._stage

    @stage.setter
    def stage(self, name: str | None) -> None:
        self._stage = None if name is None else Word(name)

    @property
    def finished(self) -> bool:
        return self.status == "finished"

    @property
    def stopped(self) -> bool:
        return self.status.stopped

    def begin(self, name: str) -> None:
        """Begin what a method of the Trainer does."""
        self.fn, self.stage = Word(name), _STAGES.get(name, name)
        self.status = Word("running")

    def end(self, *, failed: bool = False) -> None:
        """End it."""
        self.stage = None
        self.status = Word("interrupted" if failed else "finished")
