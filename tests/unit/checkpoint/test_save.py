"""Copies of tensors that are lent are whole, whatever happens once the originals may change."""

from __future__ import annotations

from threading import Thread

import pytest
import torch
from torch import Tensor

from hpctrain.checkpoint.save import HostCopies


def tensors(device: str, number: int) -> dict[str, Tensor]:
    whole = torch.arange(300, dtype=torch.float32, device=device).reshape(4, 5, 3, 5) + number
    return {
        "whole": whole,
        "channels last": whole.to(memory_format=torch.channels_last),
        "half": whole.to(torch.bfloat16),
        "count": torch.tensor(float(number)),  # on the host, as optimizers keep it
        "empty": torch.empty(0, 3, device=device),
    }


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
        ),
    ],
)
def test_copies_are_of_what_was_there_when_they_were_asked_for(device: str) -> None:
    copies = HostCopies()
    before: dict[str, Tensor] = {}
    for number in range(3):
        live = tensors(device, number)
        if device == "cuda":  # the values come late, and so do the copies
            torch.cuda._sleep(10**8)
            live["whole"] += 1
        later = copies.copy_later("lent", live)
        writing = Thread(target=later.make)
        writing.start()
        later.wait()
        for tensor in live.values():
            tensor.fill_(-1)
        writing.join()
        expected = tensors("cpu", number)
        if device == "cuda":
            expected["whole"] += 1
        for name, tensor in expected.items():
            assert torch.equal(later.host[name], tensor), name
            assert later.host[name].is_contiguous()
            assert number == 0 or later.host[name] is before[name], "the memory is kept"
        before = dict(later.host)
