"""Recording a step: who may be recorded, when, and that what is replayed is the network's own step.

CUDA graphs need a GPU; in their place a recorder that computes and counts.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from spear_lightning.errors import ConfigError
from spear_lightning.models import SpearVLA
from spear_lightning.policy import Answerer, build_policy
from spear_lightning.policy.checkpoint import build
from spear_lightning.robot_data.images import CameraSpec
from spear_lightning.training import (
    GraphedNetwork,
    LabelledImageDataModule,
    OptimizerRecipe,
    VLAModule,
    VLMModule,
)
from spear_lightning.training.graphed_network import RecordedForward

KEY_POINTS = "spear_lightning.vqa.object_tasks.KeyPoints"
TWIN = Path(__file__).resolve().parents[1] / "conf" / "vla.yaml"


@pytest.fixture
def module() -> VLAModule:
    torch.manual_seed(0)
    config = yaml.safe_load(TWIN.read_text())["model"]["init_args"]["policy"]
    return VLAModule(build_policy(config), OptimizerRecipe(lr=1e-3)).train()


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    made: list[nn.Module] = []

    def record(function: nn.Module, examples: tuple[Tensor, ...], allow_unused_input: bool) -> nn.Module:
        assert allow_unused_input
        assert all(isinstance(example, Tensor) for example in examples)
        made.append(function)
        return function

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    return made


def inputs(samples: int = 2, draws: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(samples)
    sizes = {"primary": (28, 42), "wrist": (28, 28)}
    points = samples * draws
    return {
        "images": {
            name: torch.randint(0, 256, (samples, 3, *size), dtype=torch.uint8, generator=generator)
            for name, size in sizes.items()
        },
        "image_mask": {name: torch.tensor([True, name == "primary"] * (samples // 2)) for name in sizes},
        "input_ids": torch.randint(3, 200, (samples, 8), generator=generator),
        "text_mask": torch.arange(8).expand(samples, 8) < 6,
        "state": torch.randn(points, 8, generator=generator),
        "noisy": torch.randn(points, 5, 8, generator=generator),
        "tau": torch.rand(points, generator=generator),
    }


def spear_vlm() -> VLMModule:
    torch.manual_seed(0)
    config = yaml.safe_load((TWIN.parent / "vlm.yaml").read_text())["model"]["init_args"]["answerer"]
    return VLMModule(build(Answerer, config, "answerer"), OptimizerRecipe(lr=1e-3))


def step(vla: SpearVLA, given: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    vla.zero_grad()
    velocity = vla(*given.values())
    velocity.square().mean().backward()
    return velocity.detach(), {
        name: parameter.grad.clone() for name, parameter in vla.named_parameters() if parameter.grad is not None
    }


def test_a_recorded_step_is_the_networks_own(module: VLAModule, recordings: list[nn.Module]) -> None:
    vla = module.policy.vla
    expected = step(vla, inputs())
    vla.forward = RecordedForward(vla)  # type: ignore[method-assign]
    for _ in range(2):
        velocity, gradients = step(vla, inputs())
        assert torch.equal(velocity, expected[0])
        assert gradients.keys() == expected[1].keys()
        assert all(torch.equal(gradients[name], value) for name, value in expected[1].items())
    assert len(recordings) == 1
    assert {id(parameter) for parameter in recordings[0].parameters()} == {id(p) for p in vla.parameters()}
    # Neither validation nor sampling is recorded, nor what comes without masks.
    with torch.no_grad():
        assert torch.equal(vla(*inputs().values()), velocity)
    vla.eval()(*inputs(4).values())
    vla.train()(*{**inputs(4), "image_mask": None, "text_mask": None}.values())
    assert len(recordings) == 1


def test_other_sizes_and_another_phase_are_recorded_anew(module: VLAModule, recordings: list[nn.Module]) -> None:
    vla = module.policy.vla
    vla.forward = RecordedForward(vla)  # type: ignore[method-assign]
    step(vla, inputs(2))
    step(vla, inputs(4))
    assert len(recordings) == 2
    vla.vlm.requires_grad_(False)
    _, gradients = step(vla, inputs(2))
    assert len(recordings) == 3
    assert all(name.startswith("expert.") for name in gradients)
    step(vla, inputs(2))
    step(vla, inputs(6))
    with pytest.raises(ConfigError, match="too many sizes"):
        step(vla, inputs(8))


@pytest.mark.parametrize(
    ("trainer", "packed", "message"),
    [
        ({"world_size": 2}, False, "2 processes"),
        ({"accumulate_grad_batches": 4}, False, "4"),
        ({}, True, "packed"),
    ],
)
def test_what_cannot_be_recorded_is_refused(
    module: VLAModule, trainer: dict[str, int], packed: bool, message: str
) -> None:
    module.policy.vla.vlm.packed = packed
    given: Any = SimpleNamespace(**{"world_size": 1, "accumulate_grad_batches": 1, **trainer})
    GraphedNetwork().setup(given, module, "validate")
    with pytest.raises(ConfigError, match=message):
        GraphedNetwork().setup(given, module, "fit")


def test_prompts_of_several_lengths_are_refused(module: VLAModule) -> None:
    module.policy.prompt.multiple = 8
    given: Any = SimpleNamespace(world_size=1, accumulate_grad_batches=1)
    with pytest.raises(ConfigError, match=r"prompt\.multiple: 8"):
        GraphedNetwork().setup(given, module, "fit")


def test_spear_vlm_is_recorded_with_its_answers(recordings: list[nn.Module]) -> None:
    module = spear_vlm().train()
    vlm, given = module.answerer.vlm, inputs()
    length = given["input_ids"].shape[1]
    arguments = [given[key] for key in ("images", "image_mask", "input_ids", "text_mask")]
    arguments += [torch.arange(length).expand(2, length) >= 4, None]
    expected = vlm(*arguments)
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda")))
    callback = GraphedNetwork()
    callback.on_fit_start(trainer, module)
    assert torch.equal(vlm(*arguments), expected)
    assert len(recordings) == 1
    callback.teardown(trainer, module, "fit")
    vlm(*arguments)
    assert len(recordings) == 1


def test_spear_vlm_needs_batches_of_one_length() -> None:
    module = spear_vlm()
    cameras = {"primary": CameraSpec(width=42, height=28)}
    data = LabelledImageDataModule("nowhere", {"labels": 1.0}, cameras, {KEY_POINTS: 1.0})
    trainer: Any = SimpleNamespace(datamodule=data, world_size=1, accumulate_grad_batches=1)
    with pytest.raises(ConfigError, match="one_length"):
        GraphedNetwork().setup(trainer, module, "fit")
    data.one_length = True
    GraphedNetwork().setup(trainer, module, "fit")


def test_the_network_gets_its_own_forward_back(module: VLAModule, recordings: list[nn.Module]) -> None:
    vla = module.policy.vla
    callback = GraphedNetwork()
    for device, recorded in (("cpu", False), ("cuda", True)):
        trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)))
        callback.on_fit_start(trainer, module)
        assert isinstance(vla.forward, RecordedForward) == recorded
        callback.teardown(trainer, module, "fit")
        assert not isinstance(vla.forward, RecordedForward)
