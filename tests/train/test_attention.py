"""Attention to few keys is attention: cutting the queries changes neither values nor gradients."""

import pytest
import torch

from train.attention import attend, attend_to_few


@pytest.mark.parametrize("tokens", [8, 9, 10, 7])
def test_cutting_the_queries_changes_nothing(tokens):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, length, 3, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for length in (tokens, 5, 5)
    )
    grad = torch.randn(query.shape, generator=generator, dtype=torch.float64)
    results = []
    for attention in (attend, attend_to_few):
        output = attention(query, key, value)
        results.append((output, *torch.autograd.grad(output, (query, key, value), grad)))
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
