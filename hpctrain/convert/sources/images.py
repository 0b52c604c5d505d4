"""Folders of images: one subfolder a class, or images alone; as pixels, or as they are."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpctrain.convert.parallel import processors
from hpctrain.convert.sources.source import Arrays, Samples, identity_of, reading
from hpctrain.data.arrays import Int64s
from hpctrain.data.dataset import Field
from hpctrain.data.files.discovery import in_order
from hpctrain.data.ragged import Ragged
from hpctrain.errors import DatasetError
from hpctrain.utils.files import require_regular

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
CHANNELS = {"RGB": 3, "L": 1}
"""Channels of an image, by Pillow's name for its mode."""


@dataclass(frozen=True)
class ImageFolder:
    """ImageFolder, and the number of the class that each one's folder names.

    Attributes:
        name: the folder.
        paths: of the images.
        labels: the class of each; empty if the images lie in the folder itself.
        classes: names of the subfolders, sorted.
        mode: "RGB" or "L", what every image is converted to.
        size: rows and columns.
        resize: whether images of another size are scaled, or refused.
    """

    name: str
    paths: Sequence[str]
    labels: Sequence[int]
    classes: Sequence[str]
    mode: str
    size: tuple[int, int]
    resize: bool

    @classmethod
    def open(cls, folder: str, size: tuple[int, int] | None, grey: bool) -> ImageFolder:
        """Find the images of a folder.

        Raises:
            DatasetError: if there are none, or Pillow is not installed.
        """
        _require_pillow()
        paths, labels, classes = _found_in(folder)
        mode = "L" if grey else "RGB"
        chosen = size or _decode(paths[0], mode, None).shape[1:]
        return cls(folder, paths, labels, classes, mode, chosen, size is not None)

    @property
    def samples(self) -> int:
        return len(self.paths)

    @property
    def fields(self) -> Mapping[str, Field]:
        image = Field((CHANNELS[self.mode], *self.size), np.dtype(np.uint8))
        return {"image": image} | ({"label": Field((), np.dtype(np.int64))} if self.classes else {})

    @property
    def attributes(self) -> Mapping[str, Mapping[str, Any]]:
        image = {"description": "channel, row, column", "mode": self.mode}
        return {"image": image} | (
            {"label": {"classes": json.dumps(list(self.classes))}} if self.classes else {}
        )

    @cached_property
    def identity(self) -> str:
        return f"{identity_of(self.paths)} {self.mode} {self.size}"

    def read(self, rows: Int64s) -> Arrays:
        """Return samples, as `Source.read` does."""
        images = np.empty((len(rows), *self.fields["image"].shape), np.uint8)

        def fill(place: int) -> None:
            images[place] = self._image(self.paths[rows[place]])

        # Pillow lets go of the interpreter while it decodes.
        with ThreadPoolExecutor(processors()) as threads:
            for _ in threads.map(fill, range(len(rows))):
                pass
        if not self.classes:
            return {"image": images}
        return {"image": images, "label": np.array(self.labels, np.int64)[rows]}

    def _image(self, path: str) -> npt.NDArray[np.uint8]:
        pixels = _decode(path, self.mode, self.size if self.resize else None)
        if pixels.shape[1:] != self.size:
            raise DatasetError(
                f"{path}: {_text(pixels.shape[1:])} pixels, but {_text(self.size)} in "
                f"{self.paths[0]}. Give the size that all are to have: --size {_text(self.size)}"
            )
        return pixels


@dataclass(frozen=True)
class EncodedImages:
    """Images as their files are, byte by byte, to be decoded beside the training.

    Attributes:
        name: what they were called.
        paths: of the images.
        labels: the class of each; empty if no folder names one.
        classes: names of the subfolders, sorted.
        mean_bytes: of a file, rounded up.
    """

    name: str
    paths: Sequence[str]
    labels: Sequence[int]
    classes: Sequence[str]
    mean_bytes: int

    @classmethod
    def open(cls, folder: str) -> EncodedImages:
        """Find the images of a folder.

        Raises:
            DatasetError: if there are none, one is empty, or Pillow is not installed.
        """
        return cls._of(folder, *_found_in(folder))

    @classmethod
    def of_files(cls, name: str, paths: Sequence[str]) -> EncodedImages:
        """Take files, without classes.

        Raises:
            DatasetError: as `open` does.
        """
        return cls._of(name, paths, [], [])

    @classmethod
    def _of(
        cls, name: str, paths: Sequence[str], labels: Sequence[int], classes: Sequence[str]
    ) -> EncodedImages:
        _require_pillow()
        total = 0
        for path in paths:
            with reading(path):
                total += require_regular(path).st_size
        return cls(name, paths, labels, classes, max(1, -(-total // len(paths))))

    @property
    def samples(self) -> int:
        return len(self.paths)

    @property
    def fields(self) -> Mapping[str, Field]:
        image = Field((), np.dtype(np.uint8), mean_rows=self.mean_bytes)
        return {"image": image} | ({"label": Field((), np.dtype(np.int64))} if self.classes else {})

    @property
    def attributes(self) -> Mapping[str, Mapping[str, Any]]:
        image = {"description": "files of images, one after the other"}
        return {"image": image} | (
            {"label": {"classes": json.dumps(list(self.classes))}} if self.classes else {}
        )

    @cached_property
    def identity(self) -> str:
        return f"{identity_of(self.paths)} encoded"

    def read(self, rows: Int64s) -> Samples:
        """Return samples, as `Source.read` does."""
        with ThreadPoolExecutor(processors()) as threads:
            files = list(threads.map(_bytes_of, [self.paths[row] for row in rows.tolist()]))
        image = Ragged.of([np.frombuffer(each, np.uint8) for each in files])
        if not self.classes:
            return {"image": image}
        return {"image": image, "label": np.array(self.labels, np.int64)[rows]}


def _bytes_of(path: str) -> bytes:
    """Return a file whose beginning is that of an image.

    Raises:
        DatasetError: if it is none: in a run nobody could say which file it was.
    """
    from PIL import Image

    with reading(path):
        require_regular(path)
        content = Path(path).read_bytes()
        with Image.open(io.BytesIO(content)):
            return content


def _found_in(folder: str) -> tuple[list[str], list[int], list[str]]:
    """Return the images of a folder, the class of each, and the names of the classes.

    Raises:
        DatasetError: if there are none.
    """
    paths: list[str] = images_in(Path(folder))
    labels: list[int] = []
    classes: list[str] = []
    if not paths:
        for each in sorted(entry for entry in Path(folder).iterdir() if entry.is_dir()):
            members = images_in(each)
            if members:
                labels += [len(classes)] * len(members)
                classes.append(each.name)
                paths += members
    if not paths:
        raise DatasetError(f"{folder}: there are no images here (*{', *'.join(SUFFIXES)})")
    return paths, labels, classes


def images_in(folder: Path) -> list[str]:
    """Return the images that lie in a folder itself, 2 before 10."""
    return in_order(
        str(entry)
        for entry in folder.iterdir()
        if entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith(".")
    )


def _decode(path: str, mode: str, size: tuple[int, int] | None) -> npt.NDArray[np.uint8]:
    """Return the pixels of a file, (channels, rows, columns)."""
    from PIL import Image

    with reading(path):
        require_regular(path)
        with Image.open(path) as file:
            image = file.convert(mode)
        if size is not None and image.size != (size[1], size[0]):
            image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    pixels = np.asarray(image, np.uint8)
    return pixels[None] if mode == "L" else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _text(size: Sequence[int]) -> str:
    return "x".join(str(each) for each in size)


def _require_pillow() -> None:
    try:
        import PIL  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise DatasetError(
            "images are read by Pillow, which is not installed: pip install 'hpctrain[images]'"
        ) from error
