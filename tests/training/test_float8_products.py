"""Products in 8 bits: what rounding does, and what stays as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from spear_lightning.errors import ConfigError
from spear_lightning.training import Float8Products
from spear_lightning.training.float8_products import fitting_layers


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(32, 64, bias=False)
        self.narrow = nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(torch.tanh(self.wide(x)))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.out = nn.Linear(32, 7)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.out(x)


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return Network()


def test_layers_are_chosen_by_name(network: Network) -> None:
    assert fitting_layers(network, ["blocks.*.wide"]) == {"blocks.0.wide", "blocks.1.wide"}
    assert fitting_layers(network, ["blocks.1"]) == {"blocks.1.wide", "blocks.1.narrow"}
    # 7 outputs cannot be.
    assert "out" not in fitting_layers(network, ["*"])
    for name in ("out", "trunk.*"):
        with pytest.raises(ConfigError, match="multiples of 16"):
            fitting_layers(network, [name])


def test_parameters_and_their_names_stay(network: Network) -> None:
    before = dict(network.named_parameters())
    assert Float8Products(["blocks.*"], emulate=True).convert(network) == 4
    after = dict(network.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)


def _rounded(values: Tensor, dim: int | None) -> Tensor:
    """Round to 4 significant bits with the largest number at the top of the range: 448 in e4m3."""
    largest = values.abs().amax() if dim is None else values.abs().amax(dim, keepdim=True)
    scale = 448 / largest
    if dim is not None:
        scale = 2 ** scale.log2().floor()
    return (values * scale).to(torch.float8_e4m3fn).float() / scale


@pytest.mark.parametrize(("recipe", "dim"), [("tensorwise", None), ("rowwise", 1)])
def test_a_product_is_that_of_rounded_factors(network: Network, recipe: str, dim: int | None) -> None:
    layer = network.blocks[0].wide
    weight = layer.weight.detach().clone()
    x = torch.randn(48, 32, generator=torch.Generator().manual_seed(1))
    exact = x @ weight.T
    Float8Products(["blocks.*"], recipe=recipe, emulate=True).convert(network)  # type: ignore[arg-type]
    found = network.blocks[0].wide(x).detach()
    torch.testing.assert_close(found, _rounded(x, dim) @ _rounded(weight, dim).T, atol=1e-5, rtol=1e-5)
    assert 0.005 < float((found - exact).norm() / exact.norm()) < 0.06


def test_gradients_point_where_the_exact_ones_do(network: Network) -> None:
    x = torch.randn(48, 32, generator=torch.Generator().manual_seed(1))
    network(x).square().mean().backward()
    exact = {name: parameter.grad.clone() for name, parameter in network.named_parameters()}
    network.zero_grad()
    Float8Products(["blocks.*"], emulate=True).convert(network)
    network(x).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad.dtype == torch.float32
        assert float(torch.cosine_similarity(parameter.grad.flatten(), exact[name].flatten(), dim=0)) > 0.98
