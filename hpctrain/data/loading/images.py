"""Encoded images to pixels, beside the training: each by one thread, straight to its place.

JPEG is decoded by simplejpeg where that is installed, at two thirds of Pillow's time and to the
same pixels; all else, and what it does not take, by Pillow, which also scales: as torchvision does.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from hpctrain.data.dataset import Field
from hpctrain.data.loading.prefetch import BufferPool, new_bytes
from hpctrain.data.loading.sources import Group, HostGroup, RowSource, Source
from hpctrain.data.loading.values import HostValues, ValuePool, ValueSource
from hpctrain.data.reading.rows import ViewReader, open_rows
from hpctrain.data.reading.threads import Helpers
from hpctrain.data.view import View
from hpctrain.errors import DatasetError

Crop = Literal["center", "random", "none"]
Pixels = npt.NDArray[np.uint8]
Box = tuple[float, float, float, float]
"""Left, top, right and bottom edge of what is kept of an image."""
MOST_PIXELS = 2**28
"""Of one image: a header of a few bytes may claim any number."""
CENTER = 0.875
"""Part of the shorter side that is kept around the centre: 224 of 256 pixels."""
AREAS = (0.08, 1.0)
"""Part of its area that is kept of an image at random. As torchvision."""
RATIOS = (3 / 4, 4 / 3)
"""Width over height of such a part."""
_TRIES = 10
_JPEG = b"\xff\xd8\xff"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """What images of a field become.

    Attributes:
        rows: of pixels.
        columns: of pixels.
        crop: what is kept of an image in training; around the centre in an evaluation.
        grey: one channel in place of three.
    """

    rows: int
    columns: int
    crop: Crop = "center"
    grey: bool = False

    @property
    def field(self) -> Field:
        return Field((1 if self.grey else 3, self.rows, self.columns), np.dtype(np.uint8))

    def box(self, width: int, height: int, key: int, *, training: bool) -> Box:
        """Return what is kept of an image of this size.

        Args:
            width: of the image.
            height: of the image.
            key: of the sample: the same crop at any world size, and after a restart.
            training: False in an evaluation.
        """
        if self.crop == "none":
            return 0, 0, width, height
        if self.crop == "random" and training:
            return _random_box(width, height, key)
        scale = CENTER * min(width / self.columns, height / self.rows)
        left, top = (width - scale * self.columns) / 2, (height - scale * self.rows) / 2
        return left, top, width - left, height - top

    def decode(self, content: Pixels, out: Pixels, key: int, *, training: bool) -> None:
        """Make pixels of an encoded image.

        Args:
            content: (bytes,) of the file.
            out: (channels, rows, columns), to be filled.
            key: of the sample.
            training: False in an evaluation.
        """
        from PIL import Image

        whole = _whole(content)
        width, height = whole.size
        box = self.box(width, height, key, training=training)
        image = whole
        if whole.size != (self.columns, self.rows) or box != (0, 0, width, height):
            image = whole.resize((self.columns, self.rows), Image.Resampling.BILINEAR, box)
        if self.grey:
            out[0] = np.asarray(image.convert("L"))
        else:
            out[:] = np.asarray(image).transpose(2, 0, 1)


def _random_box(width: int, height: int, key: int) -> Box:
    draw = np.random.Generator(np.random.Philox(key=key))
    for _ in range(_TRIES):
        area = width * height * draw.uniform(*AREAS)
        ratio = math.exp(draw.uniform(math.log(RATIOS[0]), math.log(RATIOS[1])))
        columns, rows = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if columns <= width and rows <= height:
            left, top = draw.uniform(0, width - columns), draw.uniform(0, height - rows)
            return left, top, left + columns, top + rows
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _whole(content: Pixels) -> Any:
    """Return an image of Pillow's in three channels."""
    from PIL import Image

    library = _simplejpeg()
    if library is not None and content[:3].tobytes() == _JPEG:
        height, width, space, _ = library.decode_jpeg_header(content)
        _require_size(width, height)
        if space in ("YCbCr", "RGB", "Gray"):
            return Image.fromarray(library.decode_jpeg(content, "RGB"))
    with Image.open(io.BytesIO(content.tobytes())) as file:
        _require_size(*file.size)
        return file.convert("RGB")


def _require_size(width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than an image may have")


@cache
def _simplejpeg() -> Any:
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


def require_decoder() -> None:
    """Check that there is one.

    Raises:
        DatasetError: naming the extra, if there is none.
    """
    try:
        import PIL  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise DatasetError(
            "encoded images are read by Pillow, which is not installed: "
            "pip install 'hpctrain[images]'"
        ) from error


class ImagePreparation:
    """Decodes images of groups of samples; their other fields go on as they are.

    Attributes:
        fields: by name, what goes to the device.
        images: by field, what its images become.
    """

    def __init__(
        self, dataset: View, images: Mapping[str, Decoded], threads: int, *, training: bool
    ) -> None:
        """Prepare; no file is opened yet.

        Args:
            dataset: with the fields that are read.
            images: by field.
            threads: that decode, beside the one that reads.
            training: False in an evaluation.

        Raises:
            DatasetError: if no decoder is installed, or a field holds no bytes.
        """
        require_decoder()
        for name in images:
            if (about := dataset.fields[name]).dtype != np.uint8 or about.shape:
                raise DatasetError(
                    f'{dataset.source}: field "{name}" is {about.dtype} of shape {about.shape}, '
                    "and encoded images are bytes, uint8: leave data.fields.NAME.image out"
                )
        self.images = images
        self.fields: Mapping[str, Field] = {
            **dataset.fields,
            **{name: each.field for name, each in images.items()},
        }
        self._dataset = dataset
        self._training = training
        self._helpers = Helpers(threads)

    @property
    def row_bytes(self) -> int:
        """Bytes of one sample as it goes to the device."""
        return sum(field.row_bytes for field in self.fields.values())

    @property
    def staging_bytes(self) -> int:
        """Bytes that the preparation takes for each sample of a group."""
        return 2 * self._dataset.bytes_per_sample

    def one(self, row: int) -> dict[str, npt.NDArray[Any]]:
        """Return one sample, (1, *shape) a field, decoded by the calling thread."""
        rows = np.array([row], np.int64)
        group = Group([0, 1], rows, rows, rows.astype(np.uint64))
        with closing(open_rows(self._dataset)) as access:
            assert isinstance(access, ViewReader)
            values = ValueSource(self._dataset, access, ValuePool(new_bytes))
            source = RowSource(access, lambda rows: rows, values)
            pool = BufferPool(self._rectangular(self.fields), 1, 1, new_bytes)
            (host,) = self.read_groups(source, [group], 1, 0, pool)
            found = {name: content.copy() for name, content in host.fields.items()}
        return {
            name: content.view(self.fields[name].dtype.newbyteorder("=")).reshape(
                1, *self.fields[name].shape
            )
            for name, content in found.items()
        }

    def read_groups(
        self, source: Source, groups: Iterable[Group], rows: int, ahead: int, pool: BufferPool
    ) -> Iterator[HostGroup]:
        """Yield the samples of each group, decoded.

        Args:
            source: of the samples.
            groups: of up to `rows` of them.
            rows: the most samples of a group.
            ahead: groups that the source fills in part before their turn.
            pool: of memory for what comes out.

        Raises:
            DatasetError: naming file, field and row of an image that cannot be decoded.
        """
        stored = self._rectangular(self._dataset.fields)
        for group, fields, ragged in source.read(
            groups, BufferPool(stored, rows, ahead + 1, new_bytes)
        ):
            made = pool.take(len(group.positions))
            for name, content in fields.items():
                np.copyto(made[name], content)
            for name, how in self.images.items():
                if len(group.positions):
                    self._decode(name, how, group, ragged[name], made[name])
            others = {name: each for name, each in ragged.items() if name not in self.images}
            yield HostGroup(group, made, others)

    def _rectangular(self, fields: Mapping[str, Field]) -> dict[str, Field]:
        """Return those fields whose samples are of one shape."""
        return {name: field for name, field in fields.items() if field.mean_rows is None}

    def _decode(self, name: str, how: Decoded, group: Group, host: HostValues, out: Pixels) -> None:
        assert group.rows is not None
        assert group.keys is not None
        rows, keys = group.rows, group.keys
        content, bounds = host.values.reshape(-1), host.offsets
        pixels = out.view(np.uint8).reshape(len(rows), *how.field.shape)

        def fill(index: int) -> None:
            own = content[bounds[index] : bounds[index + 1]]
            try:
                how.decode(own, pixels[index], int(keys[index]), training=self._training)
            except Exception as error:  # whatever a decoder makes of damaged bytes
                raise self._damaged(name, int(rows[index]), error) from error

        self._helpers.each(fill, range(len(rows)))

    def _damaged(self, name: str, row: int, error: Exception) -> DatasetError:
        ((shard, inside),) = self._dataset.places(np.array([row]))
        what = str(error) or type(error).__name__
        return DatasetError(
            f'{shard.path}: field "{name}", row {inside}: this image cannot be decoded: {what}. '
            "Take the sample out, or write the file anew"
        )
