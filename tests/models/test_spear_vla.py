"""SPEAR-1's network: masks, positions, gradients, and what it leaves alone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spear_lightning.errors import ConfigError, ShapeError
from spear_lightning.models import ActionExpert, Prefix, SpearVLA
from spear_lightning.models.rotary import rotate, rotation_at

Images = dict[str, Tensor]
Text = tuple[Tensor, Tensor]
FlowPoint = tuple[Tensor, Tensor, Tensor]


@torch.no_grad()
def test_a_prefix_serves_any_number_of_velocities(
    vla: SpearVLA, images: Images, image_mask: Images, text: Text, flow_point: FlowPoint
) -> None:
    prefix = vla.encode_prefix(images, image_mask, *text)
    before = copy.deepcopy(prefix)
    first, second = vla.velocity(prefix, *flow_point), vla.velocity(prefix, *flow_point)
    assert torch.equal(first, second)
    assert first.shape == (2, 5, 8)
    assert first.dtype == torch.float32
    for found, expected in zip(prefix.key_values, before.key_values, strict=True):
        assert torch.equal(found.key, expected.key)
        assert torch.equal(found.value, expected.value)


@torch.no_grad()
def test_padding_changes_nothing(
    vla: SpearVLA, images: Images, image_mask: Images, text: Text, flow_point: FlowPoint
) -> None:
    """Each sample alone, without the tokens it lacks and without masks, against the padded batch."""
    input_ids, text_mask = text
    padded = vla.velocity(vla.encode_prefix(images, image_mask, input_ids, text_mask), *flow_point)
    for row in range(2):
        one = slice(row, row + 1)
        present = {name: pixels[one] for name, pixels in images.items() if image_mask[name][row]}
        prefix = vla.encode_prefix(present, None, input_ids[one, text_mask[row]], None)
        assert prefix.mask is None
        state, noisy, tau = (tensor[one] for tensor in flow_point)
        torch.testing.assert_close(vla.velocity(prefix, state, noisy, tau), padded[one], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_is_masked_has_no_influence(
    vla: SpearVLA, images: Images, image_mask: Images, text: Text, flow_point: FlowPoint
) -> None:
    input_ids, text_mask = text
    before = vla.velocity(vla.encode_prefix(images, image_mask, input_ids, text_mask), *flow_point)
    other_ids = torch.where(text_mask, input_ids, input_ids.flip(0) % 7)
    other_images = {**images, "wrist": images["wrist"].clone()}
    other_images["wrist"][1] = 255 - other_images["wrist"][1]
    after = vla.velocity(vla.encode_prefix(other_images, image_mask, other_ids, text_mask), *flow_point)
    assert torch.equal(before, after)
    other_images["front"] = 255 - images["front"]
    changed = vla.velocity(vla.encode_prefix(other_images, image_mask, other_ids, text_mask), *flow_point)
    assert float((changed - before).abs().amin(dim=(1, 2)).min()) > 0


def dependencies(outputs: list[Tensor], inputs: Tensor) -> list[list[bool]]:
    """Which rows of `inputs` (B, L, D) each of the outputs depends on."""
    rows = []
    for output in outputs:
        (gradient,) = torch.autograd.grad(output.sum(), inputs, retain_graph=True, allow_unused=True)
        rows.append((gradient != 0).any(-1).any(0).tolist() if gradient is not None else [False] * inputs.shape[1])
    return rows


def test_state_sees_prefix_and_itself_and_actions_see_everything(
    vla: SpearVLA, images: Images, text: Text, flow_point: FlowPoint
) -> None:
    prefix = vla.encode_prefix(images, None, text[0], None)
    state, noisy, tau = flow_point
    noisy = noisy.requires_grad_()
    tokens = vla.expert.embed(state, noisy, tau).detach().requires_grad_()
    seen: list[Tensor] = []

    def embed(*_: Tensor) -> Tensor:
        return tokens

    def read(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return hidden

    vla.expert.embed, vla.expert.read_velocity = embed, read  # type: ignore[method-assign]
    vla.velocity(prefix, state, noisy, tau)
    rows = dependencies([seen[0][:, index] for index in range(6)], tokens)
    assert rows == [[True] + [False] * 5] + [[True] * 6] * 5
    key = prefix.key_values[0].key
    reached = torch.autograd.grad(seen[0][:, 0].sum(), key, retain_graph=True)[0]
    assert bool((reached != 0).any(-1).all())


def test_exactly_the_unused_parameters_get_no_gradient(
    vla: SpearVLA, images: Images, image_mask: Images, text: Text, flow_point: FlowPoint
) -> None:
    prefix = vla.encode_prefix(images, image_mask, *text)
    vla.velocity(prefix, *flow_point).square().sum().backward()
    without = [name for name, parameter in vla.named_parameters() if parameter.grad is None]
    assert sorted(vla.unused_parameters()) == sorted(without)
    # Key biases shift all attention scores alike and so drop out of a softmax.
    zero = [name for name, value in vla.named_parameters() if value.grad is not None and not value.grad.any()]
    assert all("k_proj.bias" in name for name in zero)
    assert "vlm.language_model.layers.2.mlp.down_proj.weight" in without
    assert any(name.startswith("vlm.encoders.moge.model.encoder.layer.2.") for name in without)
    assert not any(name.startswith(("expert.", "vlm.encoders.siglip.", "vlm.projections.")) for name in without)


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float(torch.linalg.vector_norm(found.detach() - exact) / torch.linalg.vector_norm(exact))


def test_bfloat16_autocast_trains_the_encoders_and_returns_float32(
    vla: SpearVLA, images: Images, image_mask: Images, text: Text, flow_point: FlowPoint
) -> None:
    with torch.no_grad():
        exact = vla.velocity(vla.encode_prefix(images, image_mask, *text), *flow_point)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prefix = vla.encode_prefix(images, image_mask, *text)
        found = vla.velocity(prefix, *flow_point)
    assert prefix.key_values[0].key.dtype == torch.bfloat16
    assert found.dtype == torch.float32
    assert relative_error(found, exact) < 0.03
    found.square().sum().backward()
    for encoder, patches in (
        ("siglip", "embeddings.patch_embedding"),
        ("moge", "embeddings.patch_embeddings.projection"),
    ):
        gradient = vla.vlm.encoders[encoder].model.get_submodule(patches).weight.grad
        assert bool(gradient.isfinite().all())
        assert bool(gradient.any())


@torch.no_grad()
def test_bfloat16_parameters_work(
    vla: SpearVLA, images: Images, image_mask: Images, text: Text, flow_point: FlowPoint
) -> None:
    exact = vla.velocity(vla.encode_prefix(images, image_mask, *text), *flow_point)
    narrow = vla.bfloat16()
    found = narrow.velocity(narrow.encode_prefix(images, image_mask, *text), *flow_point)
    assert found.dtype == torch.float32
    assert relative_error(found, exact) < 0.05


def test_time_features_are_sinusoids_of_geometric_periods() -> None:
    expert = ActionExpert(width=6, mlp_width=8, depth=1, heads=1, head_dim=4)
    features = expert.time_features(torch.tensor([0.0, 0.25]))
    periods = torch.tensor([4e-3, (4e-3 * 4.0) ** 0.5, 4.0])
    phase = 2 * torch.pi * 0.25 / periods.double()
    assert features[0].tolist() == [0, 0, 0, 1, 1, 1]
    expected = torch.cat([phase.sin(), phase.cos()]).float()
    torch.testing.assert_close(features[1], expected, atol=1e-4, rtol=0)


def test_rotation_depends_on_differences_of_positions_alone() -> None:
    query, key = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(query_at: int, key_at: int) -> Tensor:
        rotated = [
            rotate(x, rotation_at(torch.tensor([[at]]), 16)) for x, at in ((query, query_at), (key, key_at))
        ]
        return (rotated[0] * rotated[1]).sum()

    torch.testing.assert_close(score(5, 2), score(363, 360), atol=1e-4, rtol=1e-4)
    assert abs(float(score(5, 2) - score(5, 3))) > 1e-3


@pytest.mark.parametrize(("name", "value"), [("depth", 2), ("kv_heads", 1), ("head_dim", 16)])
def test_an_expert_that_cannot_read_the_vlm_is_refused(vla: SpearVLA, name: str, value: int) -> None:
    sizes = {"width": 24, "mlp_width": 40, "depth": 3, "heads": 2, "kv_heads": 2, "head_dim": 8}
    with pytest.raises(ConfigError, match=rf"vla\.expert\.{name}\n  found: {value}\n"):
        SpearVLA(vla.vlm, ActionExpert(**{**sizes, name: value}))


def test_shapes_that_do_not_fit_are_refused(
    vla: SpearVLA, images: Images, text: Text, flow_point: FlowPoint
) -> None:
    prefix = vla.encode_prefix(images, None, text[0], None)
    state, noisy, tau = flow_point
    for wrong in ((state[:1], noisy, tau), (state, noisy[..., :7], tau), (state, noisy, tau[:, None])):
        with pytest.raises(ShapeError, match=r"do not fit"):
            vla.velocity(prefix, *wrong)


def test_the_default_expert_has_about_300_million_parameters() -> None:
    with torch.device("meta"):
        expert = ActionExpert()
    # 311.5 M in the blocks (facts on pi0), and the projections.
    assert 311e6 < sum(parameter.numel() for parameter in expert.parameters()) < 316e6


def test_a_configuration_file_can_build_it(make_vla: Callable[[], SpearVLA]) -> None:
    from jsonargparse import ArgumentParser

    models = "spear_lightning.models"
    encoder = {"hidden_width": 16, "depth": 3, "heads": 2, "layers": [0, 1], "image_size": 70}
    siglip = {"width": 16, "depth": 2, "heads": 2, "mlp_width": 24, "image_size": 56}
    sizes = {"mlp_width": 48, "depth": 3, "heads": 4, "kv_heads": 2, "head_dim": 8}
    config = {
        "vlm": {
            "class_path": f"{models}.SpearVLM",
            "init_args": {
                "language": {"width": 32, "vocab_size": 300, **sizes},
                "encoders": {
                    "siglip": {"class_path": f"{models}.SiglipEncoder", "init_args": siglip},
                    "moge": {"class_path": f"{models}.MogeEncoder", "init_args": encoder},
                },
                "fusion": {"class_path": f"{models}.MeanFusion"},
            },
        },
        "expert": {
            "class_path": f"{models}.ActionExpert",
            "init_args": {**sizes, "width": 24, "heads": 2, "mlp_width": 40},
        },
    }
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(SpearVLA, "vla")
    parsed = parser.parse_object({"vla": {"class_path": f"{models}.SpearVLA", "init_args": config}})
    built = parser.instantiate_classes(parsed).vla
    expected = {name: value.shape for name, value in make_vla().state_dict().items()}
    assert {name: value.shape for name, value in built.state_dict().items()} == expected
    assert isinstance(built, SpearVLA)
    assert Prefix.__dataclass_params__.frozen  # type: ignore[attr-defined]
