"""Integers that are missing where nothing would tell them from others: refused as they are read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from hpctrain.data.decoding import FieldDecoding, Numbers
from hpctrain.data.loading.buffers import BufferPool
from hpctrain.data.order.permutation import Int64s
from hpctrain.data.reading.reader import Group, HostGroup, Source
from hpctrain.errors import DatasetError


class Refusing:
    """Reads samples, and raises where one of them has a missing value of some fields."""

    def __init__(self, source: Source, decodings: Sequence[FieldDecoding]) -> None:
        """Read from `source`; look at the fields of `decodings`."""
        self._source = source
        self._decodings = decodings

    def read(self, groups: Iterable[Group], pool: BufferPool) -> Iterator[HostGroup]:
        """Yield the samples of groups, as `Source.read` does.

        Raises:
            DatasetError: naming file, row and field of a missing value.
        """
        for host in self._source.read(groups, pool):
            samples = host.group.rows
            assert samples is not None
            for each in self._decodings:
                stored = each.dataset.fields[each.name]
                numbers = host.fields[each.name].view(stored.dtype.newbyteorder("="))
                require_all(each, numbers.reshape(len(samples), *stored.shape), samples)
            yield host
            # Its memory is for the next group that is read.
            del host


def require_all(decoding: FieldDecoding, numbers: Numbers, samples: Int64s) -> None:
    """Check that none of the numbers of a field is missing.

    Args:
        decoding: of the field.
        numbers: (samples, *shape), as stored but in this machine's byte order.
        samples: which they are.

    Raises:
        DatasetError: naming file, row and field of one that is.
    """
    is_missing = decoding.missing(numbers, decoding.codes(samples))
    if not is_missing.any():
        return
    at = tuple(np.argwhere(is_missing)[0])
    name, number = decoding.name, numbers.view(decoding.viewed)[at]
    ((shard, row),) = decoding.dataset.places(samples[[at[0]]])
    raise DatasetError(
        f'{shard.path}: field "{name}", row {row}: {number} is a missing value by the attributes '
        f"of this file, and would be taken for one that is there. Let a mask tell: "
        f'data.fields.{name}.mask = "{name}_mask"; or, of classes, set task.ignore_index = '
        f'{number}; or take all numbers as they are: data.fields.{name}.decode = "none"'
    )
