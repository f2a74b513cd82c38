"""Images of several sizes in one pass of the encoders: the same tokens and gradients, in one compiled graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from spear_lightning.models import MogeEncoder, SiglipEncoder, SpearVLA
from spear_lightning.models.encoders import VisionEncoder

SIZES = [(3, 42, 56), (2, 28, 28), (1, 28, 70)]
"""Images, height and width."""


def siglip() -> VisionEncoder:
    return SiglipEncoder(width=16, depth=2, heads=2, mlp_width=24, image_size=28)


def moge() -> VisionEncoder:
    return MogeEncoder(hidden_width=16, depth=3, heads=2, layers=[0, 2], image_size=70)


def pictures() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)
        for count, height, width in SIZES
    ]


def gradients(module: torch.nn.Module, outputs: list[Tensor]) -> dict[str, Tensor]:
    module.zero_grad()
    torch.stack([output.square().sum() for output in outputs]).sum().backward()
    return {name: part.grad.clone() for name, part in module.named_parameters() if part.grad is not None}


@pytest.mark.parametrize("make", [siglip, moge])
def test_sizes_together_give_what_each_gives_alone(make: Callable[[], VisionEncoder]) -> None:
    torch.manual_seed(0)
    encoder = make().double()
    alone = [encoder(images) for images in pictures()]
    together = encoder.encode_images(pictures())
    assert [tokens.shape for tokens in together] == [
        (3, 12, encoder.width),
        (2, 4, encoder.width),
        (1, 10, encoder.width),
    ]
    torch.testing.assert_close(together, alone, atol=1e-12, rtol=1e-10)
    expected, found = gradients(encoder, alone), gradients(encoder, together)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-10, rtol=1e-9, msg=name)


def test_cameras_together_give_what_each_gives_alone(vla: SpearVLA, images: dict[str, Tensor]) -> None:
    vlm = vla.vlm.double()
    alone = {name: vlm.encode_images({name: pixels})[name] for name, pixels in images.items()}
    together = vlm.encode_images(images)
    torch.testing.assert_close(together, alone, atol=1e-12, rtol=1e-10)
    expected, found = gradients(vlm, list(alone.values())), gradients(vlm, list(together.values()))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-10, rtol=1e-9, msg=name)
    assert vlm.encode_images({}) == {}


@pytest.mark.parametrize("make", [siglip, moge])
def test_one_graph_serves_all_blocks_for_all_sizes(make: Callable[[], VisionEncoder]) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    encoder = make()
    expected = encoder.encode_images(pictures())
    (blocks,) = (part for part in encoder.modules() if isinstance(part, torch.nn.ModuleList))
    for block in blocks:
        block.compile(backend=backend, dynamic=False, fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(encoder.encode_images(pictures()), expected, atol=1e-6, rtol=1e-5)
    assert len(graphs) == 1
