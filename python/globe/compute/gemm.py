"""Large products on any device, in the precision that was chosen: the one place that multiplies."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray

from globe import kernels
from globe.compute.forms import per_core, wide_dtype

# Apple's matmul returned wrong numbers from an inner dimension of 32,767 on (pytorch#195163).
_MPS_INNER = 16_384
_BF16_SHIFT = 2.0**-7
_PANELS = 4  # of a triangular matrix: 5/8 of the products are left
_FP32_RUN = 4096  # columns whose products are summed in fp32 before fp64 takes over


def solver_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The dtype of products inside conjugate gradients: bf16 on a CPU with bf16 dot products, unless refused."""
    return torch.bfloat16 if wanted == "auto" and per_core(device) and _bf16_dots() else torch.float32


def storable(matrices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Positive definite matrices (n, r, r) in a dtype in which they stay so.

    Rounding to bf16 moves eigenvalues by up to about 2⁻⁷ of their root mean square, so that much of it is added.
    The matrices are overwritten.
    """
    if dtype == torch.bfloat16:
        spread = torch.linalg.vector_norm(matrices.flatten(1), dim=1) / matrices.shape[1] ** 0.5
        matrices.diagonal(dim1=1, dim2=2).add_(spread[:, None], alpha=_BF16_SHIFT)
    return matrices.to(dtype)


def fast_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bf16 faster than fp32: a CPU with bf16 dot products, a GPU with cores for them."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return per_core(device) and _bf16_dots()


def _bf16_dots() -> bool:
    return str(kernels.available()["isa"]).endswith("_bf16")


def precision_report(wanted: str, device: torch.device) -> dict[str, str]:
    """What metrics.json says: the dtype of products inside conjugate gradients, and the instruction set."""
    inner = "bf16" if solver_dtype(wanted, device) == torch.bfloat16 else "fp32"
    return {"products": "fp32", "solver": inner, "isa": kernels.available()["isa"]}


def matmul(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """left @ right on their device and in their dtype, to `out` if given; the inner dimension in chunks on MPS."""
    inner = left.shape[-1]
    chunk = _MPS_INNER if left.device.type == "mps" else max(inner, 1)
    total: torch.Tensor = torch.matmul(left[..., :chunk], right[..., :chunk, :], out=out)
    for first in range(chunk, inner, chunk):
        total += left[..., first : first + chunk] @ right[..., first : first + chunk, :]
    return total


def weighted_sum(weights: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """Σ_i w_i X_i (k, l) of matrices (n, k, l)."""
    if per_core(matrices.device) and len(matrices) == 1:  # for which a product with a vector is slow
        return matrices[0] * weights[0]
    return (weights @ matrices.flatten(1)).view(matrices.shape[1:])


def times_lower(left: torch.Tensor, lower: torch.Tensor) -> torch.Tensor:
    """left @ lower for a lower triangular matrix (d, d); on a CPU most of its zeros are passed over.

    No gradient is followed there.
    """
    if not per_core(left.device):
        return matmul(left, lower)
    rows, found = left.flatten(0, -2), torch.empty_like(left, memory_format=torch.contiguous_format)
    for some in _panels(len(lower)):
        torch.mm(rows[:, some.start :], lower[some.start :, some], out=found.view(rows.shape)[:, some])
    return found


def times_upper(left: torch.Tensor, lower: torch.Tensor) -> torch.Tensor:
    """left @ lowerᵀ, likewise."""
    if not per_core(left.device):
        return matmul(left, lower.mT)
    rows, found = left.flatten(0, -2), torch.empty_like(left, memory_format=torch.contiguous_format)
    for some in _panels(len(lower)):
        torch.mm(rows[:, : some.stop], lower[some, : some.stop].mT, out=found.view(rows.shape)[:, some])
    return found


def lower_times(lower: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """lower @ right for lower triangular matrices (n, r, r), likewise, in any dtype."""
    if not per_core(right.device):
        return lower @ right
    found = torch.empty_like(right, memory_format=torch.contiguous_format)
    for some in _panels(lower.shape[1]):
        torch.bmm(lower[:, some, : some.stop], right[:, : some.stop], out=found[:, some])
    return found


def lower_gram(matrices: torch.Tensor) -> torch.Tensor:
    """X_i X_iᵀ (n, r, r) in the dtype of X (n, r, d); on a CPU only what lies below the diagonal, and some above."""
    if not per_core(matrices.device):
        return matrices @ matrices.mT
    found = matrices.new_zeros(len(matrices), matrices.shape[1], matrices.shape[1])
    for some in _panels(matrices.shape[1]):
        found[:, some, : some.stop] = matrices[:, some] @ matrices[:, : some.stop].mT
    return found


def _panels(size: int) -> list[slice]:
    """Rows or columns of a triangular matrix in a few blocks."""
    step = -(-size // _PANELS)
    return [slice(first, min(first + step, size)) for first in range(0, size, step)]


def grams(matrices: torch.Tensor) -> torch.Tensor:
    """X_i X_iᵀ (n, k, k) of X (n, k, c), on their device: fp64 products, or fp32 where the device has no fp64.

    On the CPU the native kernel; elsewhere batched products of runs of columns.
    """
    if per_core(matrices.device):
        threads = torch.get_num_threads()
        products = [kernels.gram(to_numpy(matrix), threads=threads) for matrix in matrices.contiguous()]
        return torch.from_numpy(np.stack(products))
    count, size = matrices.shape[:2]
    wide = wide_dtype(matrices.device)
    total = torch.zeros(count, size, size, dtype=wide, device=matrices.device)
    for part in matrices.split(_FP32_RUN, 2):
        part = part.to(wide)
        total += part @ part.mT
    return (total + total.mT) / 2


def mixtures(codes: NDArray[np.float64], bank: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """B̃_i = Σ_j α_ij B_j for a batch of experts, shape (n, r, d), on the bank's device, summed in fp32.

    The bank may be in bf16 on the CPU. `out` (n or more, r, d; fp32, or bf16 on the CPU) is written in its first n
    entries, which are returned.
    """
    if out is None:
        out = torch.empty(len(codes), *bank.shape[1:], device=bank.device)
    out = out[: len(codes)]
    if per_core(bank.device):
        kernels.compose(codes.astype(np.float32), to_numpy(bank), out=to_numpy(out))
    else:
        weights = torch.from_numpy(codes.astype(np.float32)).to(bank.device)
        torch.mm(weights, bank.flatten(1), out=out.view(len(codes), -1))
    return out


def scatter_add(codes: NDArray[np.float64], summands: torch.Tensor, total: torch.Tensor, room: torch.Tensor) -> None:
    """total_j += Σ_i α_ij S_i for all atoms j: the adjoint of :func:`mixtures`, in place.

    Parameters
    ----------
    codes : array, shape (n, m)
    summands : torch.Tensor, shape (n, r, d), fp32 or bf16
    total : torch.Tensor, shape (m, r, d), fp32
    room : torch.Tensor, shape (one or more, r, d), fp32
        Is overwritten.
    """
    if not per_core(total.device):
        weights = torch.from_numpy(codes.T.astype(np.float32)).to(total.device)
        total.view(len(total), -1).addmm_(weights, summands.flatten(1).float())
        return
    transposed = scipy.sparse.csr_array(codes.T.astype(np.float32))
    used = np.flatnonzero(np.diff(transposed.indptr))
    for first in range(0, len(used), len(room)):
        rows = used[first : first + len(room)]
        part = room[: len(rows)].numpy()
        kernels.compose(transposed[rows], to_numpy(summands), out=part)
        total.index_add_(0, torch.from_numpy(rows), room[: len(rows)])


def bank_gram(bank: torch.Tensor) -> NDArray[np.float64]:
    """⟨B_j, B_k⟩ for all atoms, as :func:`grams` has it, on the host."""
    gram: NDArray[np.float64] = grams(bank.flatten(1)[None])[0].cpu().double().numpy()
    return gram


class GramSum:
    """Σ_b X_b X_bᵀ over blocks X_b (n, k): products in fp32 inside a chunk of columns, sums in fp64 across chunks.

    On the CPU the blocks go to the native kernel in their own dtype, which is exact for bf16 and twice as fast. The
    sum stays where it is made until it is asked for, or comes to the host where the device has no fp64.
    """

    def __init__(self, count: int) -> None:
        self._native = kernels.GramAccumulator(count)
        self._there: torch.Tensor | None = None

    def add(self, block: torch.Tensor) -> None:
        """Add a block, bf16, fp16 or fp32."""
        if per_core(block.device):
            self._native.add(to_numpy(block))
            return
        for part in block.split(_FP32_RUN, 1):
            part = part.float()
            product = part @ part.T
            product = product.double() if wide_dtype(part.device) == torch.float64 else product.cpu().double()
            self._there = product if self._there is None else self._there.add_(product)

    @property
    def matrix(self) -> NDArray[np.float64]:
        """The sum so far, (n, n), symmetric."""
        total: NDArray[np.float64] = self._native.matrix
        if self._there is not None:
            total = total + ((self._there + self._there.T) / 2).cpu().numpy()
        return total


def to_numpy(tensor: torch.Tensor) -> NDArray[Any]:
    """The array of a CPU tensor; bf16, which torch does not hand over, as ml_dtypes.bfloat16."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    array: NDArray[Any] = tensor.numpy()
    return array


def correlations(targets: torch.Tensor, bank: torch.Tensor) -> NDArray[np.float64]:
    """⟨T_i, B_j⟩ for a batch of targets, shape (n, m), fp32 inside runs of columns and fp64 across them.

    On a device this is the one time that the host reads what was made of a batch.
    """
    flat, atoms = targets.flatten(1), bank.flatten(1)
    if per_core(bank.device):
        total = torch.zeros(len(flat), len(atoms), dtype=torch.float64)
        for left, right in zip(flat.split(_FP32_RUN, 1), atoms.split(_FP32_RUN, 1), strict=True):
            total += matmul(left, right.T).double()
        found: NDArray[np.float64] = total.numpy()
        return found
    runs = flat.shape[1] // _FP32_RUN
    (left, over), (right, beyond) = (each.tensor_split([runs * _FP32_RUN], 1) for each in (flat, atoms))
    whole = left.unflatten(1, (runs, _FP32_RUN)).transpose(0, 1) @ right.unflatten(1, (runs, _FP32_RUN)).permute(
        1, 2, 0
    )
    products = torch.cat([whole, (over @ beyond.T)[None]])
    return _summed_on_host(products)


def correlations_at(places: NDArray[Any], targets: torch.Tensor, bank: torch.Tensor) -> NDArray[np.float64]:
    """⟨T_i, B_j⟩ where `places` (n, m) is not zero, for a batch of targets, shape (n, m); on a CPU zero elsewhere.

    Summed as in :func:`correlations`, which makes all of them, as a device does here.
    """
    if not per_core(bank.device):
        return correlations(targets, bank)
    found = kernels.compose_code_gradient(scipy.sparse.csr_array(places), to_numpy(targets), to_numpy(bank))
    products: NDArray[np.float64] = found.toarray()
    return products


def inner_products(left: torch.Tensor, right: torch.Tensor) -> NDArray[np.float64]:
    """⟨X_j, Y_j⟩ for matrices (m, r, d) in fp32, shape (m,); on a CPU summed as by :func:`correlations`."""
    if per_core(left.device):
        pairs = scipy.sparse.csr_array(scipy.sparse.identity(len(left), np.float32))
        products: NDArray[np.float64] = kernels.compose_code_gradient(pairs, left.numpy(), right.numpy()).data
        return products
    dots = [torch.dot(a.flatten(), b.flatten()) for a, b in zip(left, right, strict=True)]
    return np.asarray(torch.stack(dots).cpu().double()) if dots else np.zeros(0)


def _summed_on_host(products: torch.Tensor) -> NDArray[np.float64]:
    """Σ_k P_k in fp64: on the device where it has fp64, so that less is brought to the host."""
    if wide_dtype(products.device) == torch.float64:
        return np.asarray(products.double().sum(0).cpu())
    return np.asarray(products.cpu().double().sum(0))
