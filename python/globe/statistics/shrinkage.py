"""How much of an expert's own second moment is believed, and its leading directions beyond its layer's."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from globe.compute.spd import ridged_factor

DAMPING = 1e-3  # of the mean diagonal: inputs that the text never shows stay worth something
_SPARE = 8  # directions iterated beyond those that are kept
_ROUNDS = 6  # of subspace iteration
_LEAST = 0.02  # of E_e: believing less of it is believing nothing


def damped_factor(moment: torch.Tensor) -> torch.Tensor:
    """L (d, d), fp32, lower triangular: L Lᵀ is the moment with `DAMPING` of its mean diagonal added.

    Of a moment near the end of fp32, which its rounding may leave indefinite, too.
    """
    return ridged_factor(moment.double(), DAMPING).float()


@dataclass(frozen=True)
class Own:
    """c L (I + U Λ Uᵀ) Lᵀ: the moment of an expert.

    Parameters
    ----------
    directions : torch.Tensor, shape (d, k), fp32
        U, orthonormal.
    values : torch.Tensor, shape (k,), fp32
        Λ, above −1.
    size : float
        c.
    """

    directions: torch.Tensor
    values: torch.Tensor
    size: float


class Whitened:
    """A layer's coordinates, in which its damped moment is the identity.

    Parameters
    ----------
    moment : torch.Tensor, shape (d, d)
        Of the layer.
    """

    def __init__(self, moment: torch.Tensor) -> None:
        self._factor = damped_factor(moment)
        level = DAMPING * moment.diagonal().double().mean()
        self._damping = self._seen(torch.eye(len(moment)) * level.float())
        self._undamped = len(moment) - float(self._damping.diagonal().sum())

    def own(self, means: torch.Tensor, weights: torch.Tensor, count: int, kept: int) -> Own | None:
        """An expert's moment, shrunk towards its layer's.

        With S = I + E an expert's moment in these coordinates, its size taken off and damped as the layer's is,
        I + θ E is kept, of it the `kept` directions that matter most to a Gaussian likelihood, by |log(1 + θ ε)|, ε
        being the eigenvalues of E. θ is that of :func:`believed`.

        Parameters
        ----------
        means : torch.Tensor, shape (2, d, d)
            The moments of two halves of its tokens.
        weights : torch.Tensor, shape (2,)
            What the halves count for, together.
        count : int
            The tokens of both.
        kept : int

        Returns
        -------
        Own or None
            None where the halves have nothing in common that the layer has not, or one is empty.
        """
        if not bool((weights > 0).all()):
            return None
        halves = [self._seen(mean) for mean in means.float()]
        if float(torch.stack(halves).diagonal(dim1=1, dim2=2).sum(1).min()) <= 0:
            return None
        shares = (weights / weights.sum()).tolist()
        whole = shares[0] * halves[0] + shares[1] * halves[1]
        first, second, both = (self._beyond(moment) for moment in (*halves, whole))
        theta = believed(first, second, count)
        if theta < _LEAST:
            return None
        directions, values = leading(torch.eye(len(whole)) + theta * both, kept)
        return Own(directions, values - 1, self._size(whole))

    def _seen(self, moment: torch.Tensor) -> torch.Tensor:
        """L⁻¹ M L⁻ᵀ, symmetric."""
        half = torch.linalg.solve_triangular(self._factor, moment, upper=False)
        found: torch.Tensor = torch.linalg.solve_triangular(self._factor, half.mT.contiguous(), upper=False)
        return (found + found.mT) / 2

    def _size(self, moment: torch.Tensor) -> float:
        return float(moment.diagonal().sum()) / self._undamped

    def _beyond(self, moment: torch.Tensor) -> torch.Tensor:
        """E of a moment in these coordinates."""
        found = moment / self._size(moment) + self._damping
        found.diagonal().sub_(1)
        return found


def believed(first: torch.Tensor, second: torch.Tensor, count: int) -> float:
    """θ with which θ E says the most of what further tokens of the expert will show, from E of two halves.

    ‖θ E_1 − E_2‖² + ‖θ E_2 − E_1‖² is least at θ_½ = 2⟨E_1, E_2⟩ / (‖E_1‖² + ‖E_2‖²): the share of a half's E that is
    not chance. What is chance halves with twice the tokens, so 2 θ_½ / (1 + θ_½) of the E of all is not; and d numbers
    are not told by fewer tokens, however they agree: θ ≤ n / (n + d).
    """
    both = float(first.square().sum() + second.square().sum())
    if both <= 0:
        return 0.0
    half = max(0.0, 2 * float((first * second).sum()) / both)
    return min(2 * half / (1 + half), count / (count + len(first)))


def leading(moment: torch.Tensor, kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvectors (d, k) and eigenvalues (k,) σ of a positive definite matrix with the largest |log σ|.

    By subspace iteration with S − S⁻¹, whose eigenvalues 2 sinh(log σ) are in that order; exact where k is near d.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
    order = moment - inverse
    generator = torch.Generator().manual_seed(len(moment))
    basis = torch.randn(len(moment), min(len(moment), kept + _SPARE), generator=generator)
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(order @ basis)[0]
    values, turned = torch.linalg.eigh(basis.mT @ moment @ basis)
    first = values.log().abs().topk(min(kept, len(values))).indices
    return basis @ turned[:, first], values[first]
