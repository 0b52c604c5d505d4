"""The bytes of a tensor, in the order of its values: what is written, sent and compared."""

from __future__ import annotations

import torch
from torch import Tensor


def tensor_bytes(tensor: Tensor) -> Tensor:
    """Return the values of a tensor one after the other, as bytes.

    So every dtype travels, whatever a backend or a file knows.

    Args:
        tensor: strided, of any shape and strides.

    Returns:
        (bytes,) uint8; the memory of the tensor where its values lie there in this order.
    """
    plain = tensor.detach().resolve_conj().resolve_neg().reshape(-1).contiguous()
    if plain.numel() == 1:
        # Of one value torch takes any stride for contiguous, and views only a stride of 1 as bytes.
        plain = plain.as_strided((1,), (1,))
    return plain.view(torch.uint8)
