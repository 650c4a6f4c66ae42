"""Guards of the bank (specification, I): the coherence penalty, and new atoms for dead and duplicate ones."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from globe.compute.gemm import bank_gram, matmul, mixtures
from globe.compute.spd import gram_inverse
from globe.fit.dictionary import spans
from globe.fit.lefts import fit_lefts
from globe.fit.sight import Sight
from globe.fit.sums import State
from globe.seeds.pool import Pool
from globe.settings import Settings

Array = NDArray[np.float64]
_ROW_BLOCK_BYTES = 64 << 20
_FITTED = 1e-8  # experts of a smaller error have no residual that could make an atom


def decorrelate(bank: torch.Tensor, weight: float) -> torch.Tensor:
    """B ← (B + c G^(−1/2) B) / (1 + c), in place: a proximal step of ‖G − I‖_F² for unit atoms, G_jk = ⟨B_j, B_k⟩.

    It is argmin over B of ‖B − B⁰‖² + c ‖B − U‖² with U = G^(−1/2) B⁰ the orthonormal atoms nearest to B⁰. The roots of
    the eigenvalues of G go from √g to (√g + c) / (1 + c): nearer to one for every weight c, so no weight is too large.
    """
    values, vectors = np.linalg.eigh(bank_gram(bank))
    values = np.maximum(values, 1e-6 * values[-1])  # below it the eigenvectors in the space of atoms are rounding
    turn = np.eye(len(bank)) + weight * (vectors / np.sqrt(values)) @ vectors.T
    factor = torch.from_numpy((turn / (1 + weight)).astype(np.float32)).to(bank.device)
    for span in spans(bank.shape[1], max(1, _ROW_BLOCK_BYTES // (4 * len(bank) * bank.shape[2]))):
        bank[:, span] = matmul(factor, bank[:, span].flatten(1)).view(bank[:, span].shape)
    return bank


def reseed(pool: Pool, state: State, errors: Array, settings: Settings) -> tuple[State, int]:
    """Give every atom that does no work to an expert with a large error; the bank is changed in place.

    Atoms that no expert uses, and the later of two with ⟨B_j, B_k⟩ above `duplicate` (of either sign where codes are
    signed; non-negative codes need both B and −B), whose codes the earlier one takes. In their place come
    A_i⁺(W_i − A_i B̃_i) of the experts with the largest errors, one each, with the code that makes B̃_i the target
    A_i⁺W_i.

    Parameters
    ----------
    pool : Pool
    state : State
        Unit atoms.
    errors : array, shape (N,)
        Relative errors on the training rows.
    settings : Settings
        `codes`, `duplicate`.

    Returns
    -------
    state : State
    count : int
        Atoms replaced.
    """
    codes = state.codes.copy()
    idle = _idle(bank_gram(state.bank), codes, settings)
    worst = iter(np.argsort(-errors, kind="stable"))
    count = 0
    for atom in idle:
        found = None
        while found is None:
            number = next(worst, None)
            if number is None or errors[number] <= _FITTED:
                break
            found = _residual(pool, State(state.bank, codes, state.temperature), int(number), settings)
        if number is None or found is None:
            break
        norm = float(torch.linalg.vector_norm(found))
        state.bank[atom] = found / norm
        codes[number, atom] = norm
        count += 1
    if settings.codes not in ("nnls", "signed"):
        codes = codes / codes.sum(1, keepdims=True)
    return State(state.bank, codes, state.temperature), count


def _idle(gram: Array, codes: Array, settings: Settings) -> list[int]:
    """Atoms to replace, in order; the codes of duplicates are moved, in place."""
    used = np.abs(codes).max(0) > 0
    for later in range(len(gram)):
        for earlier in np.flatnonzero(used[:later]):
            alike = gram[earlier, later]
            if used[later] and (abs(alike) if settings.codes == "signed" else alike) > settings.duplicate:
                codes[:, earlier] += np.sign(alike) * codes[:, later]
                codes[:, later] = 0
                used[later] = False
    return [int(atom) for atom in np.flatnonzero(~used)]


def _residual(pool: Pool, state: State, number: int, settings: Settings) -> torch.Tensor | None:
    """A_i⁺(W_i − A_i B̃_i) (r, d) of an expert, A_i from its training rows; None where it is rounding."""
    metric, device, some = pool.metric, state.bank.device, slice(number, number + 1)
    weights = pool.family.read(number).to(device)[None]
    mixed = mixtures(state.codes[some], state.bank)
    seen, seen_mixed = Sight(state.bank, metric, settings).look(some, weights, mixed)
    fit = fit_lefts(seen, seen_mixed, settings)
    held = torch.from_numpy(pool.rows.validation).to(device)
    transposed = fit.lefts.index_fill(1, held, 0.0).mT.contiguous()
    inverse, _, _ = gram_inverse(transposed, settings.ridge, settings.ridge_rcond)
    plain = weights.float()
    moved = matmul(transposed, plain if metric is None else metric.weigh_rows(some, plain))
    target = matmul(inverse, moved)[0]
    found = target - mixed[0]
    small = float(torch.linalg.vector_norm(found)) <= 1e-6 * float(torch.linalg.vector_norm(target))
    return None if small else found
