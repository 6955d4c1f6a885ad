import pytest
import torch
import torch.nn.functional as F

from train.gelu import gelu


def test_values_and_gradients_are_the_exact_gelu_s():
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e30, 1e30])]).requires_grad_()
    exact = x.detach().double().requires_grad_()
    y, expected = gelu(x), F.gelu(exact)
    assert ((y - expected).abs() <= 4e-7 * exact.abs().clamp(min=1)).all()
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    y.backward(grad)
    expected.backward(grad.double())
    assert (x.grad - exact.grad).abs().max() < 1e-6
    assert gelu(torch.tensor([torch.nan])).isnan().all()


def test_bfloat16_is_rounded_once():
    x = torch.linspace(-4, 4, 1001).bfloat16()
    off = (gelu(x).float() - F.gelu(x.float()).bfloat16().float()).abs()
    assert (off > 0).float().mean() < 0.02  # in the tail, where values are under 1e-3
    assert gelu(x).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_it_has_the_same_gradient(dtype):
    """PyTorch 2.11 lost that of float32 where the forward casts a tensor to the dtype it has."""
    x = torch.linspace(-3, 3, 20, dtype=dtype, requires_grad=True)
    (expected,) = torch.autograd.grad(gelu(x).sum(), x)
    compiled = torch.compile(lambda x: gelu(x * 1.0).sum(), backend="eager", fullgraph=True)
    (found,) = torch.autograd.grad(compiled(x), x)
    torch.testing.assert_close(found, expected)
