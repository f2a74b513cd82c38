"""Blocks compiled one by one compute what they computed before, under the same names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spear_lightning.errors import ConfigError
from spear_lightning.training.network_blocks import list_entries, matching
from spear_lightning.training.regional_compile import RegionalCompile


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = x + torch.tanh(part(x))
        return x


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x


def test_the_outermost_lists_entries_are_the_blocks() -> None:
    assert list(list_entries(Network())) == ["blocks.0", "blocks.1", "blocks.2"]


def test_names_are_matched_between_the_dots() -> None:
    network = Network()
    assert list(matching(network, ["stem", "blocks.*.parts.1"])) == [
        "stem",
        *(f"blocks.{i}.parts.1" for i in range(3)),
    ]
    assert "blocks.0.parts.0" not in matching(network, ["blocks.*"])
    with pytest.raises(ConfigError, match=r"trunk\.\*"):
        matching(network, ["trunk.*"])


def test_one_graph_serves_all_blocks_and_changes_neither_values_nor_names(tiny_module: Any) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    network = Network()
    x = torch.randn(2, 4)
    expected, names = network(x), list(network.state_dict())
    module = tiny_module(network)
    callback = RegionalCompile()
    callback.options["backend"] = backend
    callback.setup(module, module, "validate")
    assert not graphs
    assert network(x) is not None
    assert not graphs, "only training is compiled"
    callback.setup(module, module, "fit")
    assert torch.equal(network(x), expected)
    assert len(graphs) == 1
    assert list(network.state_dict()) == names
