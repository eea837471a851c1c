"""Packed linear layers compute what plain ones do, forward and backward, and leave alone what is trained."""

import pytest
import torch

from common import linears


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 48), (7, 48), (2, 33, 48)])
def test_the_same_numbers(shape, bias):
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(48, 96, bias=bias), torch.nn.SiLU(), torch.nn.Linear(96, 40, bias=bias))
    plain.requires_grad_(False)
    x = torch.randn(shape, requires_grad=True)
    expected = plain(x)
    (wanted,) = torch.autograd.grad(expected.square().sum(), x)
    linears.pack_linears(plain, backward=True)
    assert not any(type(module) is torch.nn.Linear for module in plain)
    found = plain(x)
    (gradient,) = torch.autograd.grad(found.square().sum(), x)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert torch.allclose(gradient, wanted, rtol=1e-5, atol=1e-6)


def test_layers_that_learn_stay():
    layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4).requires_grad_(False))
    linears.pack_linears(layers, backward=True)
    assert type(layers[0]) is torch.nn.Linear and type(layers[1]) is not torch.nn.Linear
