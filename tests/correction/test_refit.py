"""Left factors refitted, against least squares in all their entries."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from globe import Settings  # noqa: E402
from globe.correction.composed import Factors  # noqa: E402
from globe.correction.refit import Batch, held_error, refit_lefts  # noqa: E402
from globe.statistics.experts import Experts, Seen, route  # noqa: E402

COUNT, TOKENS, P, R, D = 3, 400, 6, 3, 8
GAIN = 0.4


def _problem(seed: int) -> tuple[Experts, dict[int, Factors], Batch]:
    """Every token with two of three experts, and residuals that other left factors leave, with noise."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    factors = {e: Factors(normal(P, R).bfloat16(), normal(R, D)) for e in range(COUNT)}
    down = torch.stack([factors[e].matrix().mT for e in range(COUNT)])
    experts = Experts(normal(COUNT, 2 * P, D), down, torch.nn.functional.silu)
    chosen = torch.stack([torch.randperm(COUNT, generator=draw)[:2] for _ in range(TOKENS)])
    routing = route(chosen, torch.rand(TOKENS, 2, generator=draw), COUNT)
    seen = Seen(normal(0, D), routing, normal(1, 2 * TOKENS, P))
    batch = Batch(
        seen, 0.1 * normal(TOKENS, D), 0.5 + torch.rand(TOKENS, 1, generator=draw), torch.arange(TOKENS) % 4 == 3
    )
    for expert, span in enumerate(routing.spans):
        rows = routing.rows[span]
        inputs = seen.factors[0, span] * routing.weights[span, None] * batch.weights[rows] * GAIN
        batch.residuals[rows] += inputs @ (0.3 * normal(P, R)) @ factors[expert].mixed
    return experts, factors, batch


def _by_least_squares(batch: Batch, expert: int, factors: Factors, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """D in argmin Σ ‖r − x D B̃‖² + λ ‖D B̃‖² over the tokens that are fitted, and x of all tokens."""
    span = batch.seen.routing.spans[expert]
    rows = batch.seen.routing.rows[span]
    x = (batch.seen.factors[0, span] * batch.seen.routing.weights[span, None] * batch.weights[rows] * GAIN).double()
    fitted, mixed = x[~batch.held[rows]].numpy(), factors.mixed.double().numpy()
    penalty = np.sqrt(ridge * np.square(fitted).sum(0).mean())
    design = np.kron(np.vstack([fitted, penalty * np.eye(P)]), mixed.T)  # of vec(D) by rows, on vec(x D B̃) by rows
    wanted = batch.residuals[rows][~batch.held[rows]].double().numpy().ravel()
    change = np.linalg.lstsq(design, np.append(wanted, np.zeros(P * D)), rcond=None)[0]
    everything = np.zeros((TOKENS, P))
    everything[rows] = x.numpy()
    return change.reshape(P, R), everything


@pytest.mark.parametrize("seed", range(3))
def test_every_expert_takes_the_best_change_behind_those_before_it(seed: int) -> None:
    experts, factors, batch = _problem(seed)
    before, error = dict(factors), held_error([batch])
    start = Batch(batch.seen, batch.residuals.clone(), batch.weights, batch.held)
    ridges = refit_lefts(experts, factors, [batch], (GAIN, Settings()))
    assert held_error([batch]) < 0.3 * error
    for expert, ridge in enumerate(ridges):
        assert ridge is not None
        change, inputs = _by_least_squares(start, expert, before[expert], ridge)
        left = factors[expert].left
        assert left.dtype == torch.bfloat16
        wanted = before[expert].left.double().numpy() + change
        np.testing.assert_allclose(left.double().numpy(), wanted, rtol=2**-8, atol=1e-4)
        taken = factors[expert].matrix() - before[expert].matrix()
        start.residuals.sub_(torch.from_numpy(inputs @ taken.double().numpy()).float())
        assert torch.equal(experts.down[expert], factors[expert].matrix().mT)
    torch.testing.assert_close(batch.residuals, start.residuals, rtol=1e-4, atol=1e-4)


def test_what_does_not_hold_elsewhere_is_not_taken() -> None:
    experts, factors, batch = _problem(0)
    before, down = dict(factors), experts.down.clone()
    batch.residuals[batch.held] *= -1
    residuals = batch.residuals.clone()
    assert refit_lefts(experts, factors, [batch], (GAIN, Settings())) == [None] * COUNT
    assert factors == before and torch.equal(experts.down, down) and torch.equal(batch.residuals, residuals)
