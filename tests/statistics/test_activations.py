"""Slopes of activations in closed form against automatic differentiation."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from globe.statistics.activations import KNOWN, differentiated, sloped  # noqa: E402

CPU = torch.device("cpu")
CLASSES = {  # of transformers, by what they compute
    "silu": ("silu", "swish"),
    "gelu": ("gelu", "gelu_python"),
    "gelu_pytorch_tanh": ("gelu_pytorch_tanh", "gelu_python_tanh", "gelu_new", "gelu_fast", "gelu_accurate"),
    "quick_gelu": ("quick_gelu",),
    "relu": ("relu",),
    "relu2": ("relu2",),
}
UNKNOWN = ("gelu_10", "relu6", "leaky_relu", "mish", "sigmoid", "tanh", "linear", "hardswish", "laplace")


@pytest.mark.parametrize(("known", "name"), [(known, name) for known, names in CLASSES.items() for name in names])
def test_known_activations_have_the_slope_that_autograd_finds(known: str, name: str) -> None:
    activation = transformers.activations.ACT2FN[name]
    assert sloped(activation, CPU) is KNOWN[known]
    grid = torch.cat([torch.linspace(-30, 30, 2001), torch.tensor([-1e4, -300.0, 0.0, 300.0, 1e4])])
    at = torch.stack([grid, grid.flip(0)])
    before = at.clone()
    value, slope = KNOWN[known](at)
    assert torch.equal(at, before)
    wanted, tangent = differentiated(activation, at.double())
    torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(slope.double(), tangent, rtol=1e-5, atol=5e-6)


def test_all_known_activations_are_tested() -> None:
    assert CLASSES.keys() == KNOWN.keys()


@pytest.mark.parametrize("name", UNKNOWN)
def test_other_activations_are_differentiated(name: str) -> None:
    activation = transformers.activations.ACT2FN[name]
    found = sloped(activation, CPU)
    assert found not in KNOWN.values()
    at = torch.linspace(-12, 12, 41, dtype=torch.float64) + 0.01
    value, slope = found(at)
    torch.testing.assert_close(value, activation(at))
    torch.testing.assert_close(slope, (activation(at + 1e-6) - activation(at - 1e-6)) / 2e-6, rtol=1e-6, atol=1e-8)
