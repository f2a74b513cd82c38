"""Labels of single objects against exact scenes; run lengths against a reference; every wrong label is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from spear_lightning.errors import DataError
from spear_lightning.geometry.box_iou import box_iou
from spear_lightning.geometry.oriented_boxes import OrientedBox
from spear_lightning.labeling.demo_labels import demo_label
from spear_lightning.labeling.object_label import EXACT, BoxRecipe, label_object, mask_bounds
from spear_lightning.labeling.records import ImageLabel, ObjectLabel, check_label
from spear_lightning.labeling.run_lengths import decode_mask, encode_mask


@given(arrays.arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12))))
def test_run_lengths_are_coco_s(mask_HW: np.ndarray) -> None:
    expected, current, run = [], False, 0
    for column in range(mask_HW.shape[1]):
        for row in range(mask_HW.shape[0]):
            if bool(mask_HW[row, column]) == current:
                run += 1
            else:
                expected.append(run)
                current, run = not current, 1
    expected.append(run)
    counts = encode_mask(mask_HW)
    assert counts.tolist() == expected
    np.testing.assert_array_equal(decode_mask(counts, *mask_HW.shape), mask_HW)


def test_run_lengths_of_another_image_are_refused() -> None:
    with pytest.raises(DataError, match=r"3 x 5 = 15"):
        decode_mask(np.array([4, 8]), 3, 5)


def exact_scene(seed: int) -> tuple[ImageLabel, np.ndarray]:
    """A label, and the point map of its objects: rays through pixel centres cut with the true boxes."""
    label, _ = demo_label(seed, 210, 280)
    assert label.intrinsics is not None
    u, v = np.meshgrid(np.arange(280) + 0.5, np.arange(210) + 0.5)
    pixels = torch.from_numpy(np.stack([u, v], -1))
    rays = label.intrinsics.unproject(pixels, torch.ones(210, 280, dtype=torch.float64)).numpy()
    points = np.full((210, 280, 3), np.inf)
    for item in label.objects:
        mask = decode_mask(item.mask, 210, 280)
        direction = rays[mask] @ item.box.axes.double().numpy()
        origin = -item.centre.astype(np.float64) @ item.box.axes.double().numpy()
        near = ((-np.sign(direction) * item.extents / 2 - origin) / direction).max(-1)
        points[mask] = rays[mask] * near[:, None]
    return label, points


def iou(item: ObjectLabel, other: ObjectLabel) -> float:
    boxes = [OrientedBox(*(t[None] for t in (b.centre, b.quaternion, b.extents))) for b in (item.box, other.box)]
    return box_iou(*boxes).item()


@pytest.mark.parametrize(
    ("noise", "outliers", "least"), [(0.0, 0.0, 0.99), (0.0, 0.005, 0.98), (0.0005, 0.0, 0.75)]
)
def test_fitted_boxes_agree_with_the_true_ones(noise: float, outliers: float, least: float) -> None:
    rng = np.random.default_rng(0)
    recipe = BoxRecipe(erosion=0)
    found = []
    for seed in range(12):
        label, points = exact_scene(seed)
        points = points + noise * rng.normal(size=points.shape)
        wild = rng.uniform(size=points.shape[:2]) < outliers
        points[wild] *= rng.uniform(0.3, 3, (wild.sum(), 1))
        for item in label.objects:
            mask = decode_mask(item.mask, 210, 280)
            fitted = label_object(points, mask, item.name, recipe)
            np.testing.assert_array_equal(fitted.box_2d, mask_bounds(mask))
            found.append(iou(fitted, item))
    assert len(found) > 30
    assert np.median(found) > least
    # Not the median alone: those that fail are hidden, or seen from one side.
    assert np.quantile(found, 0.15) > 0.85 * least


def test_a_known_box_is_kept_and_key_points_are_the_surface_s() -> None:
    label, points = exact_scene(3)
    for item in label.objects:
        mask = decode_mask(item.mask, 210, 280)
        again = label_object(points, mask, item.name, EXACT, box=item.box)
        np.testing.assert_allclose(again.vertices, item.vertices, atol=1e-6)
        distances = np.linalg.norm(points[mask], axis=-1)
        assert np.linalg.norm(again.closest) == pytest.approx(distances.min(), rel=1e-5)
        assert np.linalg.norm(again.furthest) == pytest.approx(distances.max(), rel=1e-5)
        assert again.distance == pytest.approx(np.linalg.norm(item.centre), rel=1e-6)
        assert again.residual < 1e-5
        assert again.points == mask.sum()


def test_erosion_and_depth_edges_take_off_a_ragged_border() -> None:
    label, points = exact_scene(1)
    item = label.objects[0]
    mask = decode_mask(item.mask, 210, 280)
    wide = mask.copy()
    for axis in (0, 1):
        for step in (-1, 1):
            wide |= np.roll(mask, step, axis)
    # Background half a metre behind the object shows at its border.
    points[wide & ~mask] = points[mask].mean(0) * 1.5
    careless = label_object(points, wide, "box", BoxRecipe(erosion=0, edge=None, ratio=None))
    careful = label_object(points, wide, "box", BoxRecipe(erosion=1))
    by_edges = label_object(points, wide, "box", BoxRecipe(erosion=0, ratio=None))
    assert iou(careful, item) > 0.8
    assert iou(by_edges, item) > 0.7
    assert iou(careless, item) < 0.4


def test_too_few_points_are_refused() -> None:
    points = np.full((10, 10, 3), np.nan)
    mask = np.ones((10, 10), bool)
    with pytest.raises(DataError, match="too few points"):
        label_object(points, mask, "cup")
    points[2:4, 2:4] = [0.0, 0.0, 1.0]
    with pytest.raises(DataError, match=r"(?s)'cup'.*4 of 100 pixels"):
        label_object(points, mask, "cup")


WRONG: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"name": "  "}, "An object has no name"),
    ({}, {"closest": np.array([0, 0, -0.1], np.float32)}, "lies behind the camera"),
    ({}, {"centre": np.array([0, np.nan, 1], np.float32)}, "is not finite"),
    ({}, {"quaternion": np.ones(4, np.float32)}, "not of unit norm"),
    ({}, {"extents": np.array([1, -1, 1], np.float32)}, "An extent is negative"),
    ({}, {"box_2d": np.array([0, 0, 141, 20], np.float32)}, "does not lie in its image"),
    ({}, {"mask": np.array([5, 6])}, "mask is that of another image size"),
    ({"image_id": ""}, {}, "no image id"),
    ({"width": 0}, {}, "no pixels"),
    ({"width": 150}, {}, "camera of a label"),
    ({"unit": "feet"}, {}, "unit of a label is unknown"),
    ({"median_depth": 0.0}, {}, "median depth"),
    ({"pixels": np.zeros((3, 2))}, {}, "pixels without points"),
    ({"pixel_points": -np.ones((32, 3))}, {}, "lies behind the camera"),
]


@pytest.mark.parametrize(("image", "item", "message"), WRONG)
def test_wrong_labels_are_refused_by_name(image: dict[str, Any], item: dict[str, Any], message: str) -> None:
    label, _ = demo_label(0)
    check_label(label)
    broken = replace(label, objects=(replace(label.objects[0], **item), *label.objects[1:]), **image)
    with pytest.raises(DataError, match=message):
        check_label(broken, "some.parquet")
