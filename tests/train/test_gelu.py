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
