"""The combinations that cannot work, and every other one."""

from __future__ import annotations

import itertools
import typing
from typing import Any

from hpctrain.config.capabilities import Combination, unsupported
from hpctrain.config.schema import LaunchSection, Precision

PRECISIONS = typing.get_args(Precision)
HINTS = typing.get_type_hints(LaunchSection)


def test_every_combination_of_a_torch_that_has_them_all() -> None:
    for precision, device, backend in itertools.product(
        PRECISIONS, typing.get_args(HINTS["device"]), (None, *typing.get_args(HINTS["backend"]))
    ):
        found = unsupported(
            Combination(precision=precision, device=device, backend=backend), torch="2.13.0+cpu"
        )
        impossible = device == "mps" or (device, backend) == ("cpu", "nccl")
        assert (found is not None) == impossible


def test_bfloat16_over_gloo_needs_its_torch() -> None:
    cells = {
        ("bf16-true", "gloo", "2.6.0+cu124"): "training.precision",
        ("bf16-true", "gloo", "2.7.1"): "training.precision",
        ("bf16-true", "gloo", "2.8.0a0+git1234"): None,
        ("bf16-true", "gloo", None): None,
        ("bf16-true", "nccl", "2.6.0"): None,
        ("bf16-true", None, "2.6.0"): None,
        ("bf16-mixed", "gloo", "2.6.0"): None,
    }
    for (precision, backend, torch), key in cells.items():
        found = unsupported(
            Combination(precision=precision, backend=backend, device="cuda"), torch=torch
        )
        assert (found[0] if found else None) == key


def test_gradients_are_compressed_where_that_makes_sense() -> None:
    cells: dict[tuple[str, str, str, str], bool] = {
        ("32-true", "bf16", "gloo", "2.13.0"): False,
        ("32-true", "bf16", "gloo", "2.7.1"): False,
        ("32-true", "bf16", "nccl", "2.7.1"): True,
        ("32-true", "fp16", "gloo", "2.6.0"): True,
        ("64-true", "fp16", "gloo", "2.13.0"): False,
        ("64-true", "bf16", "nccl", "2.13.0"): False,
        ("16-mixed", "fp16", "nccl", "2.13.0"): False,
        ("16-mixed", "bf16", "nccl", "2.13.0"): True,
        ("64-true", "none", "gloo", "2.13.0"): True,
    }
    for (precision, compression, backend, torch), works in cells.items():
        found = unsupported(
            Combination(precision=precision, compress_gradients=compression, backend=backend),
            torch=torch,
        )
        assert (found is None) == works, (precision, compression, backend, torch)
        assert found is None or found[0] == "training.compress_gradients"


def test_batch_norms_are_synchronised_on_gpus_only() -> None:
    for device, wanted, works in [
        ("cpu", True, False),
        ("cuda", True, True),
        ("cpu", False, True),
        ("cpu", None, True),
    ]:
        assert (unsupported(Combination(device=device, sync_batchnorm=wanted)) is None) == works


def test_what_goes_with_a_strategy() -> None:
    cells: list[tuple[dict[str, Any], str | None]] = [
        ({"strategy": "ddp"}, None),
        ({"strategy": "fsdp"}, None),
        ({"strategy": "zero1"}, "training.strategy"),
        ({"strategy": "fsdp", "device": "cpu", "torch": "2.6.0+cpu"}, "training.strategy"),
        ({"strategy": "fsdp", "device": "cpu", "torch": "2.13.0+cpu"}, None),
        ({"strategy": "fsdp", "device": "cuda", "torch": "2.6.0+cu124"}, None),
        ({"strategy": "ddp", "shards": True}, "training.shard"),
        ({"strategy": "ddp", "cpu_offload": True}, "training.cpu_offload"),
        ({"strategy": "ddp", "reshard_after_forward": False}, "training.reshard_after_forward"),
        ({"strategy": "ddp", "channels_last": True, "buckets": True, "checks_sync": True}, None),
        ({"strategy": "fsdp", "shards": True, "reshard_after_forward": False}, None),
        ({"strategy": "fsdp", "cpu_offload": True, "device": "cuda"}, None),
        ({"strategy": "fsdp", "cpu_offload": True, "device": "cpu"}, "training.cpu_offload"),
        (
            {"strategy": "fsdp", "cpu_offload": True, "precision": "16-mixed"},
            "training.precision",
        ),
        ({"strategy": "fsdp", "compress_gradients": "bf16"}, "training.compress_gradients"),
        ({"strategy": "fsdp", "compress_gradients": "fp16"}, "training.compress_gradients"),
        ({"strategy": "fsdp", "compress_gradients": "none"}, None),
        ({"strategy": "fsdp", "buckets": True}, "training.bucket_mb"),
        ({"strategy": "fsdp", "static_graph": True}, "training.static_graph"),
        ({"strategy": "ddp", "static_graph": True}, None),
        ({"static_graph": True, "unused_parameters": "allow"}, "training.static_graph"),
        ({"strategy": "fsdp", "channels_last": True}, "training.channels_last"),
        ({"strategy": "fsdp", "checks_sync": True}, "training.check_sync_every"),
        ({"strategy": "fsdp", "graphs": True, "device": "cuda"}, "training.compile_mode"),
        ({"strategy": "fsdp", "graphs": True, "device": "cpu", "torch": "2.13.0"}, None),
        ({"strategy": "ddp", "graphs": True, "device": "cuda"}, None),
    ]
    for given, key in cells:
        torch = given.pop("torch", None)
        found = unsupported(Combination(**given), torch)
        assert (found[0] if found else None) == key, given
