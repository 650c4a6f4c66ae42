"""Products with packed matrices, without their values where a kernel has them."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from globe.checkpoint.formats.packed import PACKED, SCALE, Packing
from globe.compute.gemm import to_numpy
from globe.hf.banks import unpacked
from globe.kernels import qmatmul

_BITS = (4, 8)  # of the kernel


def packed_linear(x: torch.Tensor, module: torch.nn.Module, name: str, number: int, packing: Packing) -> torch.Tensor:
    """x Wᵀ for tokens x (n, r) and one matrix W (p, r) of a packed tensor of a module, in the dtype of x.

    Tokens of 16 bits on a CPU, where no gradient is asked for, by :func:`globe.kernels.qmatmul`, which takes no more of
    them; all others with the values of W.
    """
    followed = torch.is_grad_enabled() and x.requires_grad
    if packing.bits not in _BITS or x.device.type != "cpu" or x.dtype.itemsize != 2 or followed:
        return linear(x, unpacked(module, name, number, packing, x.dtype))
    words, scales = (module.get_buffer(name + part)[number] for part in (PACKED, SCALE))
    found = x.new_empty(len(x), len(words))
    given = to_numpy(x.detach().contiguous()), words.numpy(), to_numpy(scales)
    qmatmul(*given, out=to_numpy(found), threads=torch.get_num_threads())
    return found
