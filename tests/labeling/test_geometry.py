"""Geometry of images: depth files written here by other means, and a network that says what it was given."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from spear_lightning.errors import ConfigError, DataError
from spear_lightning.geometry.cameras import PixelIntrinsics
from spear_lightning.geometry.point_maps import PointMaps
from spear_lightning.labeling.depth_files import DepthFiles
from spear_lightning.labeling.geometry import NetworkGeometry, PointMap
from spear_lightning.models import MogeEncoder, MogeV1

CAMERA = PixelIntrinsics(40.0, 41.0, 12.5, 7.5, width=24, height=16)


def picture(height: int = 16, width: int = 24, value: int = 0) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def millimetres() -> np.ndarray:
    depth = np.random.default_rng(0).integers(300, 3000, (16, 24)).astype(np.uint16)
    depth[3, 4] = 0
    return depth


def check(found: object, depth_m: np.ndarray) -> None:
    assert isinstance(found, PointMap)
    assert found.unit == "metric"
    assert (found.valid_HW == (depth_m > 0)).all()
    assert np.isposinf(found.points_HW3[3, 4]).all()
    points = torch.from_numpy(found.points_HW3[found.valid_HW]).double()
    rows, columns = np.nonzero(found.valid_HW)
    np.testing.assert_allclose(
        found.intrinsics.project(points).numpy(), np.stack([columns, rows], 1) + 0.5, atol=1e-4
    )
    np.testing.assert_allclose(points[:, 2].numpy(), depth_m[found.valid_HW], rtol=1e-6)
    assert found.median_depth == pytest.approx(np.median(depth_m[depth_m > 0]), rel=1e-6)


@pytest.mark.parametrize("layout", ["matrix", "four", "png", "shared camera", "camera of the pipeline"])
def test_depth_files_become_points(tmp_path: Path, layout: str) -> None:
    depth, numbers = millimetres(), [CAMERA.fx, CAMERA.fy, CAMERA.cx, CAMERA.cy]
    (tmp_path / "kitchen").mkdir()
    place, known = tmp_path / "kitchen" / "cam0.frame7", None
    if layout == "matrix":
        matrix = np.array([[40.0, 0, 12.5], [0, 41.0, 7.5], [0, 0, 1]])
        np.savez(f"{place}.npz", depth=depth / np.float32(1000), intrinsics=matrix)
        geometry = DepthFiles(str(tmp_path))
    elif layout == "four":
        np.savez(f"{place}.npz", depth=depth / np.float32(1000), intrinsics=numbers)
        geometry = DepthFiles(str(tmp_path))
    else:
        Image.fromarray(depth).save(f"{place}.png")
        names = dict(zip(("fx", "fy", "cx", "cy"), numbers, strict=True))
        geometry = DepthFiles(str(tmp_path), depth_unit=0.001)
        if layout == "png":
            Path(f"{place}.json").write_text(json.dumps({**names, "depth_unit": 0.001}))
            geometry = DepthFiles(str(tmp_path))
        elif layout == "shared camera":
            (tmp_path / "kitchen" / "camera.json").write_text(json.dumps(names))
        else:
            known = [CAMERA]
    geometry.prepare()
    (found,) = geometry.point_maps([picture()], ["kitchen/cam0.frame7"], known)
    check(found, depth / 1000)
    (same,) = geometry.point_maps([picture()], ["kitchen/cam0.frame7.jpg"], known)
    check(same, depth / 1000)


def test_a_bad_depth_file_spoils_its_own_image_alone(tmp_path: Path) -> None:
    camera = [40.0, 41.0, 12.5, 7.5]
    np.savez(tmp_path / "good.npz", depth=millimetres() / 1000, intrinsics=camera)
    np.savez(tmp_path / "large.npz", depth=np.ones((32, 48)), intrinsics=camera)
    np.savez(tmp_path / "blind.npz", depth=millimetres())
    np.savez(tmp_path / "pickled.npz", depth=np.array([object()]), intrinsics=camera)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "good.npz").read_bytes()[:100])
    Image.fromarray(picture()).save(tmp_path / "colour.png")
    (tmp_path / "empty.npz").write_bytes(b"")
    np.savez_compressed(tmp_path / "flipped.npz", depth=np.arange(384.0).reshape(16, 24) ** 0.5, intrinsics=camera)
    packed = bytearray((tmp_path / "flipped.npz").read_bytes())
    packed[200:260] = bytes(60)
    (tmp_path / "flipped.npz").write_bytes(packed)
    Image.fromarray(millimetres().astype(np.uint16)).save(tmp_path / "unitless.png")
    (tmp_path / "unitless.json").write_text('{"fx": 40, "fy": 41, "cx": 12, "cy": 7, "depth_unit": null}')
    spoilt = ["empty", "flipped", "unitless"]
    names = ["large", "blind", "pickled", "cut", "colour", *spoilt, "absent", "../secret", "good"]
    np.savez(tmp_path.parent / "secret.npz", depth=millimetres() / 1000, intrinsics=camera)
    results = DepthFiles(str(tmp_path)).point_maps([picture()] * len(names), names)
    check(results[-1], millimetres() / 1000)
    reasons = ["not of its picture", "no camera", *["cannot be read"] * 6]
    for result, reason in zip(results, [*reasons, "no depth file", "no depth file"], strict=False):
        assert isinstance(result, DataError)
        assert reason in str(result)
    with pytest.raises(DataError, match="no such folder"):
        DepthFiles(str(tmp_path / "nowhere")).prepare()


class Flat(nn.Module):
    """Sees a wall at a distance of the picture's first value, 100 focal lengths wide; notes its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: str | None = "some/weights"
        self.batches: list[tuple[int, ...]] = []
        self.loaded = False

    def load_pretrained(self) -> None:
        self.loaded = True

    def point_maps(self, images_B3HW: Tensor, focal_x_B: Tensor | None = None) -> PointMaps:
        assert focal_x_B is not None
        assert images_B3HW.dtype == torch.uint8
        self.batches.append(tuple(images_B3HW.shape))
        batch, _, height, width = images_B3HW.shape
        points = images_B3HW[:, 0, :1, :1, None].float().expand(batch, height, width, 3)
        focal = torch.where(focal_x_B.isnan(), 1.5, focal_x_B)
        middle = torch.full_like(focal, 0.5)
        intrinsics = torch.stack([focal, focal * width / height, middle, middle], -1)
        return PointMaps(points, points[..., 2] > 0, intrinsics, metric=False)


def test_images_of_one_size_share_batches_and_come_back_in_order() -> None:
    network = Flat()
    geometry = NetworkGeometry(network, batch_size=2)
    geometry.prepare("cpu")
    assert network.loaded
    sizes = [(28, 42), (14, 14), (28, 42), (28, 42), (14, 14)]
    pictures = [picture(*size, value=index + 1) for index, size in enumerate(sizes)]
    known = [None, None, PixelIntrinsics(21.0, 21.0, 21.0, 14.0, width=42, height=28), None, None]
    found = geometry.point_maps(pictures, list("abcde"), known)
    assert sorted(network.batches) == [(1, 3, 28, 42), (2, 3, 14, 14), (2, 3, 28, 42)]
    for index, result in enumerate(found):
        assert isinstance(result, PointMap)
        assert result.points_HW3.shape == (*sizes[index], 3)
        assert result.median_depth == index + 1
        assert result.unit == "scale_free"
        assert result.intrinsics.fx == pytest.approx(21.0 if index == 2 else 1.5 * sizes[index][1])
    assert geometry.version == "Flat some/weights"
    with pytest.raises(ConfigError, match="batch_size"):
        NetworkGeometry(network, batch_size=0)


def test_a_moge_serves_as_the_network(tmp_path: Path) -> None:
    encoder = {"hidden_width": 16, "depth": 4, "heads": 2, "layers": [0, 1, 2, 3], "image_size": 28}
    sizes = {"projection": 8, "upsampled": (8, 8, 8), "blocks": 1, "hidden_ratio": 1, "last": 8}
    file = MogeV1(MogeEncoder(**encoder), **sizes, num_tokens_range=(4, 8)).save(tmp_path / "model.safetensors")
    moge = MogeV1(MogeEncoder(**encoder), **sizes, weights=str(file))
    geometry = NetworkGeometry(moge)
    geometry.prepare("cpu")
    assert moge.num_tokens == 8
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in ((30, 50), (41, 29))]
    for image, found in zip(images, geometry.point_maps(images, ["a", "b"]), strict=True):
        assert isinstance(found, PointMap)
        assert found.points_HW3.shape == image.shape
        assert (found.intrinsics.width, found.intrinsics.height) == image.shape[1::-1]
        assert found.intrinsics.fx == pytest.approx(found.intrinsics.fy, rel=1e-5)
        assert (np.isfinite(found.points_HW3).all(-1) == found.valid_HW).all()
