"""Labels of the tabletop world against the physics' state, and a labelling pipeline against the labels."""

from __future__ import annotations

import copy
import filecmp
from pathlib import Path

import mujoco
import numpy as np
import pytest
import torch

from spear_lightning.errors import ConfigError, DataError
from spear_lightning.geometry.box_iou import box_iou
from spear_lightning.geometry.oriented_boxes import OrientedBox
from spear_lightning.labeling.object_label import EXACT, BoxRecipe, label_object
from spear_lightning.labeling.records import check_label
from spear_lightning.labeling.run_lengths import decode_mask
from spear_lightning.labeling.store import LabelStore
from spear_lightning.worlds.tabletop.depth_errors import LIKE_MOGE, DepthErrors, disturbed
from spear_lightning.worlds.tabletop.labelled_images import labelled_image, write_labelled_images
from spear_lightning.worlds.tabletop.labels import GroundTruth, ground_truth, image_label
from spear_lightning.worlds.tabletop.objects import ObjectSpec
from spear_lightning.worlds.tabletop.ray_camera import RayCamera
from spear_lightning.worlds.tabletop.scene import object_name
from spear_lightning.worlds.tabletop.world import Tabletop

TASKS = ["pick_up", "put_on", "stack", "turn", "touch"]


def scene_of(
    seed: int, camera: str = "primary", size: tuple[int, int] = (112, 84)
) -> tuple[Tabletop, GroundTruth]:
    world = Tabletop({camera: size}, (2, 4))
    world.reset(TASKS[seed % len(TASKS)], seed)
    return world, ground_truth(world.scene, world.data, camera)


def object_named(world: Tabletop, name: str) -> tuple[int, ObjectSpec]:
    index = [thing.name for thing in world.scene.objects].index(name)
    return index, world.scene.objects[index]


def is_box(thing: ObjectSpec) -> bool:
    return len(thing.geoms) == 1 and thing.geoms[0].shape == "box"


def one(boxes: OrientedBox, number: int) -> OrientedBox:
    return OrientedBox(boxes.centre[number], boxes.quaternion[number], boxes.extents[number])


def iou(first: OrientedBox, second: OrientedBox) -> float:
    batches = [
        OrientedBox(*(part.double()[None] for part in (box.centre, box.quaternion, box.extents)))
        for box in (first, second)
    ]
    return float(box_iou(*batches))


@pytest.mark.parametrize("seed", range(5))
def test_masks_are_the_pixels_where_mj_ray_meets_the_object(seed: int) -> None:
    world, truth = scene_of(seed, "secondary", (56, 42))
    pose, camera = world.scene.cameras["secondary"].pose(world.data), truth.intrinsics
    body_HW = np.full((42, 56), -1)
    geom = np.zeros(1, np.int32)
    for row in range(42):
        for column in range(56):
            x, y = (column + 0.5 - camera.cx) / camera.fx, (row + 0.5 - camera.cy) / camera.fy
            ray = pose.rotation @ np.array([x, y, 1.0])
            if mujoco.mj_ray(world.model, world.data, pose.position_m, ray, None, 1, -1, geom, None) >= 0:
                body_HW[row, column] = world.model.geom_bodyid[geom[0]]
    for name, mask_HW in zip(truth.names, truth.masks_OHW, strict=True):
        body = world.model.body(object_name(object_named(world, name)[0])).id
        np.testing.assert_array_equal(mask_HW, body_HW == body)
    seen = {world.model.body(object_name(i)).id for i in range(len(world.scene.objects))} & set(body_HW.flat)
    assert len(seen) == len(truth.names)


@pytest.mark.parametrize("seed", range(10))
def test_boxes_are_the_objects_and_hold_all_their_points(seed: int) -> None:
    world, truth = scene_of(seed)
    pose = world.scene.cameras["primary"].pose(world.data)
    assert len(truth.names) >= 3
    for number, name in enumerate(truth.names):
        index, thing = object_named(world, name)
        box = one(truth.boxes, number)
        body = world.data.body(object_name(index))
        corners = np.array(np.meshgrid(*[[-h, h] for h in thing.half_extents_m])).reshape(3, 8).T
        expected = (corners @ body.xmat.reshape(3, 3).T + body.xpos - pose.position_m) @ pose.rotation
        gaps = np.linalg.norm(box.vertices().numpy()[:, None] - expected, axis=-1)
        assert gaps.min(1).max() < 1e-9
        assert sorted(gaps.argmin(1)) == list(range(8))
        again = box.canonical()
        assert torch.allclose(again.vertices(), box.vertices(), atol=1e-12)
        points = torch.from_numpy(truth.view.points_HW3[truth.masks_OHW[number]]).double()
        assert bool(box.contains(points, margin=1e-5).all())


def test_the_outline_of_a_box_is_that_of_its_projected_corners() -> None:
    checked = 0
    for seed in range(12):
        world, truth = scene_of(seed, size=(224, 168))
        for number, name in enumerate(truth.names):
            thing = object_named(world, name)[1]
            corners = truth.intrinsics.project(one(truth.boxes, number).vertices()).numpy()
            rows, columns = np.nonzero(truth.masks_OHW[number])
            pixels = np.stack([columns, rows], 1) + 0.5
            # No pixel of any object lies outside the corners of its box.
            assert (pixels >= corners.min(0) - 1e-6).all()
            assert (pixels <= corners.max(0) + 1e-6).all()
            if is_box(thing) and truth.visible_O[number] == 1:
                # A corner of a box is the end of its outline; pointed, so that a pixel's centre may miss it.
                assert np.abs(pixels.min(0) - corners.min(0)).max() < 3
                assert np.abs(pixels.max(0) - corners.max(0)).max() < 3
                label = label_object(truth.view.points_HW3, truth.masks_OHW[number], name, EXACT)
                assert label.box_2d[:2] == pytest.approx(pixels.min(0) - 0.5)
                checked += 1
    assert checked > 10


@pytest.mark.parametrize("seed", range(8))
def test_visible_fraction_compares_with_the_object_alone(seed: int) -> None:
    world, truth = scene_of(seed, "secondary")
    pose = world.scene.cameras["secondary"].pose(world.data)
    for number, name in enumerate(truth.names):
        body = world.model.body(object_name(object_named(world, name)[0])).id
        # Independent way: everything else becomes transparent, which rays pass through.
        alone = copy.copy(world.model)
        alone.geom_rgba[alone.geom_bodyid != body, 3] = 0
        pixels = RayCamera(alone, truth.intrinsics).see(world.data, pose).hit_HW.sum()
        assert truth.visible_O[number] == truth.masks_OHW[number].sum() / pixels
    assert ((truth.visible_O > 0) & (truth.visible_O <= 1)).all()


def test_something_is_hidden_sometimes() -> None:
    fractions = np.concatenate([scene_of(seed, "secondary")[1].visible_O for seed in range(12)])
    assert (fractions < 1).any()
    assert (fractions == 1).mean() > 0.5


@pytest.mark.parametrize("seed", range(4))
def test_labels_give_key_points_and_distances(seed: int) -> None:
    world, truth = scene_of(seed)
    label = image_label(truth, "x", np.random.default_rng(0))
    check_label(label)
    camera = world.scene.cameras["primary"].pose(world.data).position_m
    points = torch.from_numpy(label.pixel_points).double()
    assert truth.intrinsics.project(points).numpy() == pytest.approx(label.pixels, abs=1e-3)
    assert label.median_depth == pytest.approx(np.median(truth.view.depth_HW[truth.view.hit_HW]))
    assert label.unit == "metric"
    for item in label.objects:
        number = truth.names.index(item.name)
        place = world.data.body(object_name(object_named(world, item.name)[0])).xpos
        assert item.distance == pytest.approx(np.linalg.norm(place - camera), abs=1e-6)
        own = truth.view.points_HW3[truth.masks_OHW[number]]
        distances = np.linalg.norm(own.astype(float), axis=1)
        assert np.linalg.norm(item.closest) == pytest.approx(distances.min())
        assert np.linalg.norm(item.furthest) == pytest.approx(distances.max())
        np.testing.assert_array_equal(decode_mask(item.mask, 84, 112), truth.masks_OHW[number])
        assert item.visible_fraction == truth.visible_O[number]


def test_objects_that_are_hardly_seen_get_no_label() -> None:
    for seed in range(40):
        truth = scene_of(seed, "secondary")[1]
        hidden = [n for n, visible in zip(truth.names, truth.visible_O, strict=True) if visible < 0.9]
        if hidden:
            break
    kept = image_label(truth, "x", np.random.default_rng(0), least_visible=0.9)
    assert hidden
    assert not {item.name for item in kept.objects} & set(hidden)


def test_a_camera_that_sees_nothing_is_an_error() -> None:
    truth = scene_of(0)[1]
    view = copy.copy(truth.view)
    object.__setattr__(view, "hit_HW", np.zeros_like(view.hit_HW))
    blind = GroundTruth(
        truth.intrinsics, view, (), truth.masks_OHW[:0], one(truth.boxes, slice(0, 0)), np.zeros(0)
    )
    with pytest.raises(DataError, match="sees nothing"):
        image_label(blind, "x", np.random.default_rng(0))


def test_points_without_errors_stay() -> None:
    points = scene_of(1)[1].view.points_HW3
    same, scale = disturbed(points, DepthErrors(), np.random.default_rng(0))
    np.testing.assert_array_equal(same, points)
    assert scale == 1


@pytest.mark.parametrize("patch", [0.0, 3.0])
def test_errors_are_as_large_as_asked_and_leave_pixels_where_they_are(patch: float) -> None:
    camera_points = np.stack(
        [*np.meshgrid(np.linspace(-1, 1, 200), np.linspace(-1, 1, 150)), np.ones((150, 200))], -1
    )
    camera_points[:10] = np.inf
    errors = DepthErrors(scale=(0.5, 2.0), noise=0.02, patch_pixels=patch)
    logarithms, scales = [], []
    for seed in range(20):
        points, scale = disturbed(camera_points, errors, np.random.default_rng(seed))
        assert np.isposinf(points[:10]).all()
        np.testing.assert_allclose(points[10:, :, :2] / points[10:, :, 2:], camera_points[10:, :, :2], atol=1e-6)
        logarithms.append(np.log(points[10:, :, 2] / scale))
        scales.append(np.log2(scale))
    noise = np.array(logarithms)
    assert noise.std() == pytest.approx(0.02, rel=0.1)
    likeness = (noise[:, :, 1:] * noise[:, :, :-1]).mean() / noise.var()
    # White noise blurred by a Gaussian of width s correlates as exp(-(d / 2 s)^2).
    assert likeness == pytest.approx(np.exp(-((1 / (2 * patch)) ** 2)) if patch else 0, abs=0.03)
    assert -1 <= min(scales) < -0.3
    assert 0.3 < max(scales) <= 1


def test_edges_mix_near_and_far_and_outliers_are_rare() -> None:
    points = np.ones((40, 60, 3), np.float32)
    points[:, 30:, 2] = 2
    mixed, _ = disturbed(points, DepthErrors(edge_mixing=1.0), np.random.default_rng(0))
    changed = mixed[..., 2] != points[..., 2]
    assert changed[:, 29:31].mean() > 0.98
    assert not changed[:, :29].any()
    assert not changed[:, 31:].any()
    assert mixed[..., 2].min() >= 1
    assert mixed[..., 2].max() <= 2
    flat = np.ones((200, 200, 3))
    wild, _ = disturbed(flat, DepthErrors(outliers=0.05), np.random.default_rng(0))
    depth = wild[..., 2]
    assert (depth != 1).mean() == pytest.approx(0.05, abs=0.006)
    assert depth.min() < 0.6
    assert depth.max() > 1.7


def test_a_labelling_pipeline_can_be_measured() -> None:
    exact, noisy, scales = [], [], []
    for seed in range(20):
        world, truth = scene_of(seed, size=(280, 210))
        rng = np.random.default_rng(seed)
        points, scale = disturbed(truth.view.points_HW3, LIKE_MOGE, rng)
        scales.append(scale)
        for number, name in enumerate(truth.names):
            thing = object_named(world, name)[1]
            if not is_box(thing) or truth.visible_O[number] < 1:
                continue
            box, mask = one(truth.boxes, number), truth.masks_OHW[number]
            fitted = label_object(truth.view.points_HW3, mask, name, EXACT).box
            exact.append(iou(box, fitted))
            found = label_object(points, mask, name, BoxRecipe()).box
            metric = OrientedBox(found.centre / scale, found.quaternion, found.extents / scale)
            noisy.append(iou(box, metric))
    assert len(exact) >= 6
    assert np.median(exact) > 0.85
    assert 0.3 < np.median(noisy) < np.median(exact)
    assert max(scales) / min(scales) > 1.5


def test_labelled_images_can_be_read_and_repeated(tmp_path: Path) -> None:
    first = write_labelled_images(tmp_path / "a", 6, seed=3, processes=1)
    second = write_labelled_images(tmp_path / "b", 6, seed=3, processes=1)
    names = sorted(path.name for path in first.iterdir())
    assert names == ["labels-00000.images", "labels-00000.parquet"]
    assert filecmp.cmpfiles(first, second, names, shallow=False)[0] == names
    store = LabelStore(first, masks=True)
    assert len(store) == 6
    assert len({label.image_id for label in store}) == 6
    for number in range(6):
        label, picture = store.read(number)
        again, raw = labelled_image(3, number, (112, 84))
        assert label.image_id == again.image_id
        assert [item.name for item in label.objects] == [item.name for item in again.objects]
        # JPEG at quality 92 of a noisy picture.
        assert np.abs(picture.astype(float) - raw).mean() < 4
        assert label.objects
    other = labelled_image(4, 0, (112, 84))[1]
    assert (other != labelled_image(3, 0, (112, 84))[1]).mean() > 0.5


@pytest.mark.slow
def test_processes_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_process = write_labelled_images(tmp_path / "one", 5, 5, (56, 42), processes=1, shard_size=3)
    two = write_labelled_images(tmp_path / "two", 5, 5, (56, 42), processes=2, shard_size=3)
    names = sorted(path.name for path in one_process.iterdir())
    assert len(names) == 4
    assert filecmp.cmpfiles(one_process, two, names, shallow=False)[0] == names


def test_wrong_wishes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no images"):
        write_labelled_images(tmp_path, 0)
    write_labelled_images(tmp_path, 1, processes=1, size=(28, 28))
    with pytest.raises(ConfigError, match="already holds labels"):
        write_labelled_images(tmp_path, 1)
