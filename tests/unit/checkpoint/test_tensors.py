"""Tensors as bytes, whatever their strides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hpctrain.checkpoint.save import _try_bytes
from hpctrain.checkpoint.tensors import tensor_bytes

NUMBERS = torch.arange(24, dtype=torch.float32)


@pytest.mark.parametrize(
    "tensor",
    [
        NUMBERS,
        NUMBERS[::5],
        NUMBERS[7::24],  # one value, of stride 24
        NUMBERS.as_strided((1, 1), (7, 3), 2),
        NUMBERS[3].expand(1),
        NUMBERS[3].expand(2, 3),
        NUMBERS.view(4, 6).t(),
        NUMBERS[0],
        NUMBERS[:0].view(0, 3),
        torch.complex(NUMBERS, -NUMBERS)[2:3:5].conj(),
        NUMBERS.to(torch.bfloat16)[1::30],
    ],
    ids=lambda tensor: f"{tuple(tensor.shape)}-{tensor.stride()}-{tensor.dtype}",
)
def test_the_values_in_their_order(tensor: Tensor) -> None:
    back = tensor_bytes(tensor).clone().view(tensor.dtype).view(tensor.shape)
    assert torch.equal(back, tensor)
    _try_bytes({"it": tensor})


def test_no_copy_of_what_lies_in_order() -> None:
    layer = nn.Linear(3, 4)
    assert tensor_bytes(layer.weight).data_ptr() == layer.weight.data_ptr()
