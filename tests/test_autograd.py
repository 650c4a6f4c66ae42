import numpy as np
import pytest
import torch

from globe import kernels
from globe.autograd import entmax


@pytest.mark.parametrize("alpha", [1.05, 1.3, 1.5, 2.0])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_gradcheck(alpha, temperature):
    torch.manual_seed(0)
    z = torch.randn(3, 2, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: entmax(z, alpha, temperature), (z,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept(dtype):
    z = torch.randn(4, 100).to(dtype).requires_grad_()
    y = entmax(z)
    y.square().sum().backward()
    assert y.dtype == z.grad.dtype == dtype
    expected = kernels.entmax(z.detach().float().numpy())
    np.testing.assert_allclose(y.detach().float().numpy(), expected, atol=1e-2 if dtype.itemsize == 2 else 1e-6)


def test_strides_are_followed():
    z = torch.randn(6, 4, dtype=torch.float64).T.requires_grad_()
    y = entmax(z, 2.0)
    y[:, 0].sum().backward()
    copy = z.detach().contiguous().requires_grad_()
    entmax(copy, 2.0)[:, 0].sum().backward()
    torch.testing.assert_close(z.grad, copy.grad, rtol=0, atol=0)


def test_matches_the_entmax_package():
    package = pytest.importorskip("entmax")
    z = torch.randn(20, 50, dtype=torch.float64, requires_grad=True)
    for ours, theirs in ((entmax(z, 1.5), package.entmax15(z)), (entmax(z, 2.0), package.sparsemax(z))):
        torch.testing.assert_close(ours, theirs)
        slopes = [torch.autograd.grad(y.pow(3).sum(), z)[0] for y in (ours, theirs)]
        torch.testing.assert_close(*slopes)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: entmax(torch.zeros(3, device="meta")), "z"),
        (lambda: entmax(torch.zeros(3, dtype=torch.int64)), "z"),
        (lambda: entmax(torch.zeros(3), 1.0), "alpha"),
        (lambda: entmax(torch.zeros(3), temperature=0.0), "temperature"),
        (lambda: entmax(torch.full((3,), float("nan"))), "logits"),
    ],
)
def test_errors_name_the_argument(call, name):
    with pytest.raises(ValueError, match=f"^{name}: found"):
        call()


def test_probabilities_cannot_be_changed_under_the_gradient():
    y = entmax(torch.randn(3, requires_grad=True))
    with torch.no_grad():
        y.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
