"""Messages of worlds without MPI: what went in comes out, and bytes of strangers run nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import pickle
import random
import struct
import sys
import threading
import typing
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.garbage import STRUCTURED, random_strings
from helpers.limits import JOB_SECONDS
from torch.distributed import HashStore, PrefixStore, Store, TCPStore

from hpctrain.config.schema import LaunchSection
from hpctrain.config.semantics import NEWEST
from hpctrain.data.dataset import Dataset, Field, Layout, Shard
from hpctrain.data.order.selection import Spans
from hpctrain.errors import CheckpointError, DatasetError, ExitCode, HpctrainError, LaunchError
from hpctrain.launch.message_types import NAMES
from hpctrain.launch.messages import MOST_DEPTH, DecodingError, decode, encode
from hpctrain.launch.placement import Node
from hpctrain.launch.rendezvous import Address
from hpctrain.launch.store import StoreCommunicator
from hpctrain.preflight.checks import Answer
from hpctrain.training.metrics import Part


def nested(depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = [value]
    return value


DATASET = Dataset(
    source="data/x",
    fields={"image": Field((3, 4), np.dtype("<f4"))},
    shards=(Shard("a.h5", 7, 900, None, {"image": Layout(512)}),),
)
VALUES: tuple[object, ...] = (
    *(None, True, False, 0, -1, 2**63 - 1, -(2**63), 2**63, -(2**200), 1.5, float("inf"), 2 - 3j),
    *("", "ü", "\udcff", "a\0b", b"", b"\0\xff", Path("/a/b"), Path("c")),
    *([], [1, [2]], (), (1, "x"), {1, 2}, frozenset({"a"}), {}, {"a": {1: None}}, {(1, 2): b"x"}),
    *(nested(MOST_DEPTH), LaunchSection(), NEWEST, ExitCode.DATA, Node("boot", "host")),
    *([Address("eth0", "::1")], DATASET, Answer(1, "host", (2, "x"))),
    *(np.dtype("<f4"), np.dtype("M8[ns]"), np.dtype([("a", "<i4"), ("b", "S3")])),
    # Texts of any length in an HDF5 file, alone and as a member of a table.
    *(np.dtype("O"), np.dtype([("word", "O"), ("mass", "<f4")])),
    *(torch.float32, torch.bfloat16, np.float64(0.1), np.int8(-3), np.bool_(True)),
)


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:40])
def test_what_went_in_comes_out(value: object) -> None:
    again = decode(encode(value))
    assert again == value
    assert type(again) is type(value)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12.0).reshape(3, 4)[:, ::2],
        np.zeros((0, 5), ">i2"),
        np.array(7, np.uint64),
        np.array([b"a", b"bc"]),
        np.array(["ü", ""], dtype=object),
        np.array([(1, 2.5)], dtype=[("a", "<i4"), ("b", "<f8")]),
        np.asfortranarray(np.arange(6, dtype=np.complex64).reshape(2, 3)),
        np.array(["2026-11-28"], "M8[D]"),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_arrays(array: np.ndarray[Any, Any]) -> None:
    again = decode(encode(array))
    assert (again.dtype, again.shape) == (array.dtype, array.shape)
    assert again.tobytes() == array.tobytes() if array.dtype != object else (again == array).all()
    assert again.flags.writeable


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).reshape(2, 3).T,
        torch.rand(1, 2)[:, 1],
        torch.zeros(0, 3, dtype=torch.int64),
        torch.tensor(2.5, dtype=torch.bfloat16),
        torch.tensor([1 + 2j]).conj(),
        torch.nn.Parameter(torch.ones(2)),
        torch.tensor([True, False]),
        torch.zeros(4, dtype=torch.float8_e4m3fn),
    ],
    ids=lambda tensor: f"{tensor.dtype}{tuple(tensor.shape)}",
)
def test_tensors(tensor: torch.Tensor) -> None:
    again = decode(encode(tensor))
    assert (again.dtype, again.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(again.view(torch.uint8) if again.dim() else again, plain_bytes(tensor))


def plain_bytes(tensor: torch.Tensor) -> torch.Tensor:
    plain = tensor.detach().resolve_conj().clone(memory_format=torch.contiguous_format)
    return plain.view(torch.uint8) if plain.dim() else plain


def test_values_with_arrays_in_them() -> None:
    spans = decode(encode(Spans(np.array([1]), np.array([5]))))
    assert type(spans) is Spans
    assert spans.stops.tolist() == [5]
    part = decode(encode(Part(sums={"a": torch.ones(2)}, quotients={"b": (1.0, 2.0)})))
    assert part.sums["a"].tolist() == [1, 1]
    assert part.quotients == {"b": (1.0, 2.0)}


def test_errors_keep_what_they_say_and_garble_no_terminal() -> None:
    sent = CheckpointError("a\x1b[2J\nb", everywhere=True)
    sent.reported = True
    again = decode(encode(sent))
    assert type(again) is CheckpointError
    assert str(again) == "a\\x1b[2J\nb"
    assert (again.everywhere, again.reported) == (True, True)


class Unknown:
    """Of no module that is listed."""


@dataclasses.dataclass
class UnknownData:
    """Nor this."""


@pytest.mark.parametrize(
    "value",
    [Unknown(), UnknownData(), [Unknown], len, nested(MOST_DEPTH + 2), np.array([Unknown()])],
    ids=["object", "dataclass", "class", "function", "nested", "array"],
)
def test_what_no_message_may_hold(value: object) -> None:
    with pytest.raises(TypeError):
        encode(value)


def named(tag: bytes, name: bytes, content: bytes = b"") -> bytes:
    return struct.pack("<cQ", tag, len(name)) + name + content


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"?",
        pickle.dumps(print),
        encode(1) + b"x",
        encode("abc")[:-1],
        struct.pack("<cQ", b"b", 2**62),
        struct.pack("<cQ", b"l", 2**62),
        struct.pack("<cQ", b"l", 9) + b"N" * 8,
        b"l\1\0\0\0\0\0\0\0" * 100_000,
        struct.pack("<cQ", b"I", 5000) + b"\xff" * 5000,
        struct.pack("<cQ", b"s", 2) + b"\xff\xff",
        struct.pack("<cQ", b"m", 1) + encode([]) + encode(1),
        named(b"o", b"os:system"),
        named(b"o", b"hpctrain.errors:enum"),
        named(b"o", b"hpctrain.cli:main"),
        named(b"o", b"hpctrain.errors:ExitCode"),
        named(b"o", b"hpctrain.launch.placement:Node"),
        named(b"e", b"hpctrain.errors:ExitCode", encode("SECRET")),
        named(b"e", b"hpctrain.launch.placement:Node", encode("x")),
        named(b"x", b"hpctrain.errors:ExitCode", encode((1, 2, 3))),
        named(b"x", b"hpctrain.errors:DatasetError", encode(("", True))),
        named(b"n", b"hpctrain.launch.placement:Node", encode(1)),
        named(b"o", b"\xff:\xff"),
        b"a" + encode((2**40, 2**40)) + encode("<f8") + encode(b""),
        b"a" + encode((2,)) + encode("O") + encode(b"\0" * 16),
        b"a" + encode((-1,)) + encode("<f8") + encode(b"\0" * 8),
        b"a" + encode(("x",)) + encode("<f8") + encode(b"\0" * 8),
        b"a" + encode((1,)) + encode("no dtype") + encode(b"\0" * 8),
        b"a" + encode((10**30, 0)) + encode("<f8") + encode(b""),
        b"g" + encode(7),
        b"t" + encode(torch.float32) + encode((3,)) + encode(b"\0" * 8),
        b"t" + encode(7) + encode((2,)) + encode(b"\0" * 8),
        named(b"D", b"load"),
        *STRUCTURED,
    ],
    ids=lambda data: repr(data[:40]),
)
def test_bytes_that_are_no_message(data: bytes) -> None:
    with pytest.raises(DecodingError):
        decode(data)


def test_random_changes_end_in_a_value_or_in_our_error() -> None:
    """Of a message with everything in it: nothing else is raised, and no memory is lost."""
    whole = encode([value for value in VALUES if type(value) is not list])
    draw = random.Random(1)
    mutants = [*random_strings(200)]
    for _ in range(3000):
        mutant = bytearray(whole)
        for _ in range(draw.choice((1, 1, 2, 8))):
            mutant[draw.randrange(len(mutant))] = draw.choice((0, 1, 255, draw.randrange(256)))
        mutants.append(
            bytes(mutant[: draw.choice((len(mutant), draw.randrange(len(mutant)))) or 1])
        )
    before = set(sys.modules)
    for mutant in mutants:
        with contextlib.suppress(DecodingError):
            decode(mutant)
    foreign = {name for name in set(sys.modules) - before if not name.startswith("hpctrain")}
    assert not foreign


def is_message_type(kind: object) -> bool:
    """Tell whether something is a class that only holds values, or an error of hpctrain's."""
    if not isinstance(kind, type):
        return False
    is_named_tuple = issubclass(kind, tuple) and hasattr(kind, "_fields")
    return (
        dataclasses.is_dataclass(kind) or is_named_tuple or issubclass(kind, (Enum, HpctrainError))
    )


def listed_classes() -> Iterator[type]:
    for name in sorted(NAMES):
        module, _, kind = name.partition(":")
        yield getattr(importlib.import_module(module), kind)


def test_classes_that_may_be_sent_do_nothing_when_they_are_made_or_lost() -> None:
    found = list(listed_classes())
    assert len(found) > 50
    for kind in found:
        assert is_message_type(kind), kind
        assert "__del__" not in dir(kind), kind
        assert "__setattr__" not in vars(kind) or dataclasses.is_dataclass(kind), kind


def mentioned(annotation: object) -> Iterator[type]:
    """Yield the classes that a type is made of."""
    if isinstance(annotation, type) and not typing.get_args(annotation):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from mentioned(argument)


def test_what_is_inside_of_a_class_that_may_be_sent_may_be_sent_too() -> None:
    classes = set(listed_classes())
    missing = set()
    for kind in classes:
        if not dataclasses.is_dataclass(kind):
            continue
        hints = typing.get_type_hints(kind, vars(importlib.import_module(kind.__module__)))
        for field in dataclasses.fields(kind):
            for part in mentioned(hints[field.name]):
                if part.__module__.startswith("hpctrain") and is_message_type(part):
                    missing |= {part} - classes
    assert not missing


def together(stores: Sequence[Store], body: Callable[[StoreCommunicator], Any]) -> list[Any]:
    """Run a body as several ranks, each in a thread and with its own way to the store."""
    size = len(stores)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = body(StoreCommunicator(PrefixStore("x", stores[rank]), rank, size))
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(JOB_SECONDS)
    if errors:
        raise errors[0]
    return results


def test_a_message_larger_than_torchs_store_takes_at_once() -> None:
    """Its limit is 8 MiB: a large index travels in pieces."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    other = TCPStore("127.0.0.1", store.port, is_master=False)
    large = np.random.default_rng(0).integers(0, 255, 9 * 2**20, np.uint8)

    def body(communicator: StoreCommunicator) -> bool:
        of_all = communicator.all_gather(large[: communicator.rank * 10**7])
        got = communicator.broadcast(large if communicator.rank == 0 else None)
        for _ in range(3):
            communicator.barrier()
        return [len(each) for each in of_all] == [0, len(large)] and np.array_equal(got, large)

    assert together([store, other], body) == [True, True]
    assert store.num_keys() < 12  # what has been read is not kept


def test_maxima_overlap_as_packing_has_them() -> None:
    """One rank is slow to read a round that the other has left already."""
    store = HashStore()
    store.set_timeout(timedelta(seconds=5))
    one, two = (StoreCommunicator(PrefixStore("x", store), rank, 2) for rank in range(2))
    first = [each.start_max([rank]) for rank, each in enumerate((one, two))]
    second = [each.start_max([rank]) for rank, each in enumerate((one, two))]
    assert first[0].wait() == (1,)
    third = one.start_max([7])
    assert second[0].wait() == (1,)
    assert first[1].wait() == (1,)  # not until now
    assert second[1].wait() == (1,)
    assert two.start_max([0]).wait() == third.wait() == (7,)


@pytest.mark.parametrize(
    "planted",
    [b"", b"x", struct.pack("<Q", 2**60), struct.pack("<Q", 5) + b"?????", pickle.dumps(print)],
)
def test_what_another_program_has_put_into_the_store_is_refused(planted: bytes) -> None:
    store = HashStore()
    own = PrefixStore("x", store)
    communicator = StoreCommunicator(own, 0, 2)
    PrefixStore("messages", own).set("0/1/0", planted)  # type: ignore[arg-type]
    with pytest.raises(LaunchError, match="what rank 1 has not written"):
        communicator.all_gather(1)


def test_failures_of_all_kinds_arrive() -> None:
    for kind in HpctrainError.__subclasses__():
        assert type(decode(encode(kind("x")))) is kind
    assert DatasetError in HpctrainError.__subclasses__()
