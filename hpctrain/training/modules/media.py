"""Images and histograms that a task or a module logs: rank 0's, of steps whose line is written."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from hpctrain.errors import TrainingError
from hpctrain.observe.records import BINS, Histogram, Image

_CHANNELS = (1, 3, 4)


class Media:
    """Takes images and histograms of the step, or the evaluation, that is under way.

    Of each name the first of a step is taken, and nothing of a step without a line in the metrics:
    so most steps cost a comparison, and no device is waited for.
    """

    def __init__(self, *, is_rank_zero: bool) -> None:
        self._is_rank_zero = is_rank_zero
        self._stage: str | None = None
        self._step = 0
        self._taken: dict[str, Image | Histogram] = {}
        self._methods: dict[str, str] = {}

    def open(self, stage: str, step: int) -> None:
        """Take what is logged from here on.

        Args:
            stage: that it is logged in: "train", or the name of an evaluation.
            step: that it is of.
        """
        self._stage, self._step = stage, step

    def close(self) -> None:
        """Take nothing from here on."""
        self._stage = None

    def taken(self) -> list[Image | Histogram]:
        """Return what was taken since the last call."""
        if not self._taken:
            return []
        taken, self._taken = self._taken, {}
        return list(taken.values())

    def image(self, name: str, image: Any, *, takes: bool = True) -> None:
        """Log an image.

        Args:
            name: of it.
            image: (height, width), (channels, height, width) or (height, width, channels) with 1, 3
                or 4 channels; uint8, or real numbers from 0 to 1.
            takes: False: see that it is one, and forget it.

        Raises:
            TrainingError: if it is none.
        """
        tensor = self._whole("log_image", name, image)
        shape, channels_first = _layout(name, tensor)
        if takes and self._is_due(name):
            self._taken[self._named(name)] = self._image(name, tensor, shape, channels_first)

    def histogram(self, name: str, values: Any, *, takes: bool = True) -> None:
        """Log how numbers are spread; those that are not finite are left out.

        Args:
            name: of it.
            values: a tensor or an array of any shape.
            takes: False: see that they are numbers, and forget them.

        Raises:
            TrainingError: if they are none.
        """
        tensor = self._whole("log_histogram", name, values)
        if tensor.is_complex():
            raise TrainingError(f"log_histogram({name!r}): of complex numbers there is none")
        if takes and self._is_due(name) and (found := self._histogram(name, tensor)) is not None:
            self._taken[found.name] = found

    def _whole(self, method: str, name: str, values: Any) -> Tensor:
        """Return values as a tensor.

        Raises:
            TrainingError: if they are none, this rank has a part of them alone, or the name is that
                of something else.
        """
        if self._methods.setdefault(name, method) != method:
            raise TrainingError(
                f"{method}({name!r}): {self._methods[name]} has this name already, and TensorBoard "
                "shows one of them: take another"
            )
        if hasattr(values, "to_local"):
            raise TrainingError(
                f"{method}({name!r}): this tensor is spread over the ranks (fsdp). Give "
                "tensor.full_tensor(), called on all ranks"
            )
        try:
            return torch.as_tensor(values).detach()
        except (TypeError, ValueError, RuntimeError) as error:
            raise TrainingError(f"{method}({name!r}): {error}") from error

    def _is_due(self, name: str) -> bool:
        return (
            self._is_rank_zero and self._stage is not None and self._named(name) not in self._taken
        )

    def _named(self, name: str) -> str:
        return f"{self._stage}/{name}"

    def _image(
        self, name: str, tensor: Tensor, shape: tuple[int, int, int], channels_first: bool
    ) -> Image:
        height, width, channels = shape
        if tensor.dtype != torch.uint8:
            tensor = (tensor.float().nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8)
        if channels_first:
            tensor = tensor.movedim(0, -1)
        return Image(
            name=self._named(name),
            step=self._step,
            wall_time=round(time.time(), 3),
            height=height,
            width=width,
            channels=channels,
            pixels=tensor.cpu().contiguous().numpy().tobytes(),
        )

    def _histogram(self, name: str, tensor: Tensor) -> Histogram | None:
        values = tensor.flatten()
        # Small integers stay exact in float32; float64 is not on every device.
        values = values if values.dtype == torch.float64 else values.float()
        values = values[values.isfinite()]
        if not values.numel():
            return None
        low, high = values.min().item(), values.max().item()
        width = (high - low) / BINS or 1.0
        places = ((values - low) / width).long().clamp_(0, BINS - 1)
        return Histogram(
            name=self._named(name),
            step=self._step,
            wall_time=round(time.time(), 3),
            edges=[low + width * i for i in range(BINS + 1)],
            counts=torch.bincount(places, minlength=BINS).tolist(),
            total=values.sum().item(),
            squares=values.square().sum().item(),
        )


def _layout(name: str, tensor: Tensor) -> tuple[tuple[int, int, int], bool]:
    """Return height, width and channels of an image, and whether channels come first."""
    shape = tuple(tensor.shape)
    if 0 not in shape and not tensor.is_complex():
        if len(shape) == 2:
            return (*shape, 1), False
        if len(shape) == 3 and shape[0] in _CHANNELS:
            return (shape[1], shape[2], shape[0]), True
        if len(shape) == 3 and shape[2] in _CHANNELS:
            return shape, False
    raise TrainingError(
        f"log_image({name!r}): {shape} {tensor.dtype} is not an image: give (height, width), "
        "(channels, height, width) or (height, width, channels) with 1, 3 or 4 channels, such as "
        "one sample of a batch"
    )
