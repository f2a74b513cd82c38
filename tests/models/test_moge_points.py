"""MoGe's networks against straight-line restatements that work on the published names and shapes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from moge_reference import (
    LAYERS_V1,
    LAYERS_V2,
    SMALL,
    V1_LARGE,
    V1_SMALL,
    V2_LARGE,
    V2_SMALL,
    random_state,
    reference_v1,
    reference_v2,
    v1_shapes,
    v2_shapes,
)
from torch import Tensor

from spear_lightning.errors import CheckpointError, ConfigError, ShapeError
from spear_lightning.models import MogeEncoder
from spear_lightning.models.moge import Moge, MogeV1, MogeV2

LAYERS = {MogeV1: LAYERS_V1, MogeV2: LAYERS_V2}


def saved(folder: Path, state: dict[str, Tensor], **config: Any) -> str:
    config = {"remap_output": "exp", "an_unknown_key": [1], **config}
    torch.save({"model_config": config, "model": state}, folder / "model.pt")
    return str(folder)


def small(version: type[Moge], weights: str | None = None, **options: Any) -> Any:
    encoder = MogeEncoder(
        hidden_width=SMALL["width"],
        depth=SMALL["depth"],
        heads=4,
        layers=LAYERS[version],
        image_size=14 * SMALL["side"],
    )
    if version is MogeV1:
        return MogeV1(encoder, **V1_SMALL, weights=weights, **options)
    return MogeV2(encoder, V2_SMALL["widths"], scale_hidden=V2_SMALL["scale"], weights=weights, **options)


def small_v1(folder: Path, **options: Any) -> tuple[MogeV1, dict[str, Tensor]]:
    state = random_state(v1_shapes(**SMALL, **V1_SMALL))
    weights = saved(folder, state, intermediate_layers=4, trained_area_range=[196 * 10, 196 * 40])
    model = small(MogeV1, weights, **options)
    model.load_pretrained()
    return model.eval(), state


def small_v2(folder: Path, **options: Any) -> tuple[MogeV2, dict[str, Tensor]]:
    state = random_state(v2_shapes(**SMALL, **V2_SMALL))
    encoder = {"backbone": "dinov2_vitl14", "intermediate_layers": LAYERS[MogeV2]}
    model = small(MogeV2, saved(folder, state, encoder=encoder, num_tokens_range=[10, 40]), **options)
    model.load_pretrained()
    return model.eval(), state


def pictures(height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randint(0, 256, (2, 3, height // 14 + 1, width // 14 + 1), generator=generator).float()
    return F.interpolate(coarse, (height, width), mode="bilinear").to(torch.uint8)


SIZES = [(84, 112, 48), (70, 70, 25), (97, 61, 20), (60, 150, 40)]
"""Height, width and number of tokens: no resizing at all, the trained grid, two odd sizes."""


@pytest.mark.parametrize(("height", "width", "tokens"), SIZES)
def test_v1_equals_the_reference(tmp_path: Path, height: int, width: int, tokens: int) -> None:
    model, state = small_v1(tmp_path)
    images = pictures(height, width)
    with torch.no_grad():
        found = model(images, tokens)
        points, mask = reference_v1(state, images, tokens)
    assert found.points.shape == (2, height, width, 3)
    torch.testing.assert_close(found.points, points, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.mask, mask, rtol=1e-4, atol=1e-4)
    assert found.scale is None


@pytest.mark.parametrize(("height", "width", "tokens"), SIZES)
def test_v2_equals_the_reference(tmp_path: Path, height: int, width: int, tokens: int) -> None:
    model, state = small_v2(tmp_path)
    images = pictures(height, width)
    with torch.no_grad():
        found = model(images, tokens)
        expected = reference_v2(state, images, tokens)
    torch.testing.assert_close(found.points, expected["points"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.mask_values(found.mask), expected["mask"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.normals, expected["normals"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.scale, expected["scale"], rtol=1e-4, atol=1e-5)


def test_the_published_files_names_and_shapes() -> None:
    large = {"width": 1024, "depth": 24, "side": 37}
    with torch.device("meta"):
        models = [MogeV1(), MogeV2(), MogeV2(normals=False)]
    expected = [
        v1_shapes(**large, **V1_LARGE),
        v2_shapes(**large, **V2_LARGE),
        v2_shapes(**large, **V2_LARGE, normals=False),
    ]
    for model, shapes in zip(models, expected, strict=True):
        assert {name: tuple(value.shape) for name, value in model.published_state().items()} == shapes
    counts = [len(shapes) for shapes in expected]
    millions = [sum(math.prod(shape) for shape in shapes.values()) / 1e6 for shapes in expected]
    # As counted on the published code.
    assert counts[:2] == [421, 521]
    assert millions == pytest.approx([314.17, 330.9, 326.2], abs=0.05)


@pytest.mark.slow
def test_a_file_of_the_published_size_loads(tmp_path: Path) -> None:
    shapes = v1_shapes(width=1024, depth=24, side=37, **V1_LARGE)
    # One number per tensor on disk.
    state = {name: torch.full((1,), 0.01).expand(shape) for name, shape in shapes.items()}
    model = MogeV1(weights=saved(tmp_path, state, intermediate_layers=4, num_tokens_range=[1200, 2500]))
    model.load_pretrained()
    assert all(bool((value == 0.01).all()) for value in model.parameters())
    assert model.num_tokens == 2500


def test_point_maps_lie_on_the_rays_of_their_cameras(tmp_path: Path) -> None:
    for model, metric in ((small_v1(tmp_path)[0], False), (small_v2(tmp_path)[0], True)):
        # Random weights see almost nothing; any pixel counts here.
        model.mask_values = torch.ones_like  # type: ignore[method-assign]
        with torch.no_grad():
            maps = model.point_maps(pictures(84, 112), torch.tensor([0.8, 0.9]))
        assert maps.metric == metric
        assert maps.valid.any()
        assert maps.intrinsics[:, 0].tolist() == pytest.approx([0.8, 0.9])
        assert maps.intrinsics[:, 1].tolist() == pytest.approx([0.8 * 112 / 84, 0.9 * 112 / 84])
        assert (maps.points.isfinite().all(-1) == maps.valid).all()
        index, row, column = maps.valid.nonzero(as_tuple=True)
        x, y, z = maps.points[maps.valid].unbind(-1)
        fx, fy = maps.intrinsics[index, 0] * 112, maps.intrinsics[index, 1] * 84
        torch.testing.assert_close(fx * x / z + 56, column + 0.5, atol=1e-2, rtol=0)
        torch.testing.assert_close(fy * y / z + 42, row + 0.5, atol=1e-2, rtol=0)
        assert (z > 0).all()


def test_a_file_of_ours_serves_as_the_published_one(tmp_path: Path) -> None:
    for version, make in ((MogeV1, small_v1), (MogeV2, small_v2)):
        model, state = make(tmp_path)
        file = model.save(tmp_path / version.__name__ / "model.safetensors")
        ours = model.published_state()
        assert ours.keys() == state.keys()
        for name in ours:
            if "mask_token" not in name:
                assert torch.equal(ours[name], state[name]), name
        again = small(version, str(file.parent))
        again.load_pretrained()
        encoder = MogeEncoder(
            hidden_width=32, depth=6, heads=4, layers=None, image_size=14 * 5, weights=str(file.parent)
        )
        encoder.load_pretrained()
        assert list(encoder.layers) == LAYERS[version]
        with torch.no_grad():
            assert torch.equal(again(pictures(42, 56)).points, model(pictures(42, 56)).points)
            assert torch.equal(encoder(pictures(42, 56)), model.encoder(pictures(42, 56)))


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    state = random_state(v1_shapes(**SMALL, **V1_SMALL))
    for change, message in (
        ({"head.projects.0.bias": None}, r"1 missing \['head.projects.0.bias'\]"),
        ({"head.projects.4.bias": torch.zeros(1)}, r"1 unexpected \['head.projects.4.bias'\]"),
        ({"head.projects.0.bias": torch.zeros(7)}, r"1 of another shape"),
        ({"image_std": None}, "how pixels are normalised"),
        ({"backbone.norm.bias": None}, r"1 missing"),
    ):
        broken = {name: value for name, value in {**state, **change}.items() if value is not None}
        with pytest.raises(CheckpointError, match=message):
            small(MogeV1, saved(tmp_path, broken, intermediate_layers=4)).load_pretrained()
    with pytest.raises(CheckpointError, match="sinh"):
        small(MogeV1, saved(tmp_path, state, intermediate_layers=4, remap_output="sinh")).load_pretrained()
    with pytest.raises(CheckpointError, match="do not fit MogeDecoder"):
        small(MogeV2, saved(tmp_path, state, intermediate_layers=4)).load_pretrained()


def test_detail_chooses_the_number_of_tokens(tmp_path: Path) -> None:
    assert [small(MogeV1, detail=detail).num_tokens for detail in (0, 3, 9)] == [1200, 1633, 2500]
    model, _ = small_v1(tmp_path, detail=0)
    assert model.num_tokens == 10  # 196 * 10 pixels of the older configuration
    with pytest.raises(ConfigError, match="0 to 9"):
        small(MogeV1, detail=10)
    with pytest.raises(ConfigError, match="fewest"):
        small(MogeV1, num_tokens_range=(5, 4))
    with pytest.raises(ShapeError, match="uint8"):
        model(torch.zeros(1, 3, 28, 28))
