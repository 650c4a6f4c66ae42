"""Rows: which are held out for validation, and which make an expert's proxy (specification, A.1 and A.2)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from globe.checkpoint.family import Family
from globe.checkpoint.powers import times_power, usual_exponent
from globe.compute import ranks
from globe.compute.gemm import to_numpy
from globe.compute.passes import engine
from globe.compute.stream import ahead, expert_batches
from globe.errors import GlobeError
from globe.runs.job import Job
from globe.runs.stages import Advance
from globe.settings import Settings

_SCANNED_AT_ONCE = 8
_FAINTEST = 2.0**-20  # of the typical root mean square
_WILDEST = 2.0**20  # times the family's typical weight: beyond it nothing else would count in fp32


@dataclass(frozen=True)
class Rows:
    """The split of every expert's p rows, the same for all experts of a family.

    `train` and `validation` divide the rows; `proxy` are the r training rows of which proxies are made.
    """

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    proxy: NDArray[np.int64]

    def all_trained(self) -> Rows:
        """The same with no row held out."""
        return Rows(np.arange(len(self.train) + len(self.validation)), self.validation[:0], self.proxy)


@dataclass(frozen=True)
class Scan:
    """What the first pass sees: the row energies Σ_i ‖W_i[k,:]‖² (p,) over the ranked experts, and ‖W_i‖² (N,).

    `digests` (N,) are the experts' CRC-32, by which a later pass knows that they are the same.
    """

    row_energy: NDArray[np.float64]
    energy: NDArray[np.float64]
    digests: NDArray[np.int64]

    def usual_size(self, family: Family) -> Family:
        """The family with its digests, and times a power of two that makes an expert's root mean square about one.

        Nothing changes where that is within 2^±16 already. Experts fainter than `_FAINTEST` of the typical one are
        brought up to it, where they weigh next to nothing and nothing underflows: A_i absorbs the factor.
        """
        typical = self.typical(family)
        exponent = usual_exponent(math.floor(math.log2(typical)))
        sizes = np.sqrt(self.energy / (family.p * family.d))
        lifts = [math.ceil(math.log2(_FAINTEST * typical / size)) if size > 0 else 0 for size in sizes]
        scaled = (
            replace(expert, exponent=exponent - max(0, lift), digest=int(digest))
            for expert, lift, digest in zip(family.experts, lifts, self.digests, strict=True)
        )
        return replace(family, experts=tuple(scaled))

    def typical(self, family: Family) -> float:
        """The median of the root mean squares of the experts that are not zero."""
        return math.sqrt(float(np.median(self.energy[self.energy > 0])) / (family.p * family.d))


def scan_family(family: Family, job: Job) -> Scan:
    """The energies of a family, from the job's store or by a pass over it."""
    name = f"{family.name}.scan"
    saved = job.store.load(name)
    if saved is not None:
        job.stages.recall(saved.meta["stage"])
        return Scan(saved.array("row_energy"), saved.array("energy"), saved.tensors["digests"].numpy())
    with job.stages.stage(f"{family.name}: scan", len(family)) as advance:
        found = scan(family, job.settings, advance)
        tensors = {part: torch.from_numpy(array) for part, array in vars(found).items()}
        job.store.save(name, tensors, {"stage": job.stages.so_far()})
    return found


def scan(family: Family, settings: Settings, advance: Advance) -> Scan:
    """Read every expert once: check that all values are finite, sum the energies, and take the digests.

    Raises
    ------
    GlobeError
        If an expert holds NaN, Inf, or a value so large that the other experts would not count; the tensor, the row
        and the value are named.
    """
    step, mine = -(-len(family) // settings.energy_experts), ranks.dealt(family)
    share = len(family) / max(1, mine.stop - mine.start)  # shown is the whole family
    ranked = np.zeros(family.p)
    energy, peaks, digests = np.zeros(len(family)), np.zeros(len(family)), np.zeros(len(family), np.int64)
    cpu = torch.device("cpu")
    with ranks.together(), engine(cpu) as workers:
        for span, batch in expert_batches(family, _SCANNED_AT_ONCE, cpu, mine, digests):

            def energies(part: slice, batch: torch.Tensor = batch) -> list[tuple[NDArray[np.float64], float]]:
                return [_row_energies(matrix) for matrix in batch[part]]

            found = (each for _, several in workers.map(energies, len(batch)) for each in several)
            for number, (rows, peaks[number]) in enumerate(found, span.start):
                if not np.isfinite(rows).all():
                    expert, row = family.experts[number], int(np.flatnonzero(~np.isfinite(rows))[0])
                    line = "column" if expert.transposed else "row"
                    raise GlobeError(
                        f"tensor {expert.tensor} (expert {expert.expert} of layer {expert.layer}) holds NaN or Inf in "
                        f"{line} {row} of family {family.name}; expected finite weights: fetch the checkpoint again"
                    )
                energy[number] = rows.sum()
                if number % step == 0:
                    ranked += rows
                advance(share)
    ranked, energy, peaks = (ranks.summed_array(each) for each in (ranked, energy, peaks))
    digests = ranks.summed_array(digests)
    if not energy.any():
        raise GlobeError(f"family {family.name}: all experts are zero; there is nothing to factorise")
    result = Scan(ranked, energy, digests)
    wildest = int(peaks.argmax())
    if peaks[wildest] > _WILDEST * result.typical(family):
        raise _wild(family, wildest, result.typical(family))
    return result


def _row_energies(weights: torch.Tensor) -> tuple[NDArray[np.float64], float]:
    """‖W_i[k,:]‖² (p,) whatever the scale of the weights, and the largest |W_i|."""
    weights = weights.float()
    low, high = (float(value) for value in weights.aminmax())
    peak = max(-low, high)
    exponent = usual_exponent(math.frexp(peak)[1]) if math.isfinite(peak) else 0
    norms = torch.linalg.vector_norm(times_power(weights, -exponent), dim=1)
    energies: NDArray[np.float64] = norms.double().numpy() ** 2 * 4.0**exponent
    return energies, peak


def _wild(family: Family, number: int, typical: float) -> GlobeError:
    expert, weights = family.experts[number], family.read(number).float()
    row, column = divmod(int(weights.abs().argmax()), family.d)
    line = "column" if expert.transposed else "row"
    return GlobeError(
        f"tensor {expert.tensor} (expert {expert.expert} of layer {expert.layer}) holds "
        f"{float(weights[row, column]):g} in {line} {row} of family {family.name}, whose weights are about "
        f"{typical:.2g}; expected none beyond "
        f"{_WILDEST:.1e} times that, as nothing else would count: fetch the checkpoint again, or mend the tensor"
    )


def split_rows(p: int, rank: int, row_energy: NDArray[np.float64], settings: Settings) -> Rows:
    """Hold rows out and select the proxy's rows among the rest.

    Parameters
    ----------
    p, rank : int
        Rows of an expert matrix, and of a proxy.
    row_energy : array, shape (p,)
        Energies that the `energy` selector ranks.
    settings : Settings
        `selector`, `seed` and `validation_share`.
    """
    share = settings.validation_share
    held = min(max(1, round(p * share)) if share > 0 else 0, p - rank)
    validation = np.floor((np.arange(held) + 0.5) * p / held).astype(np.int64) if held else np.empty(0, np.int64)
    train = np.setdiff1d(np.arange(p), validation)
    if settings.selector == "energy":
        proxy = train[np.argsort(-row_energy[train], kind="stable")[:rank]]
    elif settings.selector == "uniform":
        proxy = train[np.arange(rank) * len(train) // rank]
    else:
        proxy = np.random.default_rng(settings.seed).choice(train, rank, replace=False)
    return Rows(train, validation, np.sort(proxy))


def proxy_blocks(
    family: Family, rows: NDArray[np.int64], device: torch.device, spans: list[slice]
) -> Iterator[tuple[slice, torch.Tensor]]:
    """The proxies B_i⁰ = S W_i of all experts, a block of rows at a time; the next block is read meanwhile.

    Parameters
    ----------
    family : Family
    rows : array of int
        S.
    device : torch.device
    spans : list of slice
        The blocks of rows, of `row_spans`.

    Yields
    ------
    slice
        The rows of the proxies in hand.
    torch.Tensor, shape (N, block · d), in the checkpoint's dtype
        Those rows of all proxies.
    """

    def read(span: slice) -> torch.Tensor:
        chosen = rows[span]
        start, stop = int(chosen[0]), int(chosen[-1]) + 1
        stacked = torch.empty(len(family), len(chosen), family.d, dtype=family.dtype)
        gathered = to_numpy(stacked)  # NumPy copies on this thread; torch would wake its pool for every expert
        for number in range(len(family)):
            rows_read = family.read(number, (start, stop)).to(family.dtype)
            np.take(to_numpy(rows_read), chosen - start, axis=0, out=gathered[number], mode="clip")
        return stacked.flatten(1)

    for span, block in zip(spans, ahead(partial(read, span) for span in spans), strict=True):
        yield span, block.to(device)


def row_spans(experts: int, rank: int, d: int, budget: int) -> list[slice]:
    """Blocks of rows of proxies: two of two (four) bytes a value and one (no) copy in fp32 take `budget` bytes.

    One row at least.
    """
    block = max(1, budget // (8 * experts * d))
    return [slice(first, min(first + block, rank)) for first in range(0, rank, block)]
