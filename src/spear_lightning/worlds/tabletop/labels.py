"""Ground truth of a scene as a camera sees it: exact points, masks, 3D boxes and distances, as image labels.

Camera frames are OpenCV's; everything is in metres.

Shape letters: O objects in view, H and W the image.
"""

from __future__ import annotations

from dataclasses import dataclass

import mujoco
import numpy as np
import torch

from spear_lightning.errors import DataError
from spear_lightning.geometry import quaternions
from spear_lightning.geometry.cameras import PixelIntrinsics
from spear_lightning.geometry.oriented_boxes import OrientedBox
from spear_lightning.labeling.object_label import EXACT, label_object
from spear_lightning.labeling.records import ImageLabel
from spear_lightning.worlds.tabletop.ray_camera import CameraPose, RayCamera, RayCaster, RayImage, pixel_rays
from spear_lightning.worlds.tabletop.scene import Scene, object_name

SOURCE = "tabletop"

SAMPLED_PIXELS = 64
"""Random pixels of an image whose points are stored."""


@dataclass(frozen=True)
class GroundTruth:
    """What is true of a picture; objects of which no pixel is seen, or that reach behind the camera, are left out.

    Attributes:
        intrinsics: Of the camera.
        view: What each pixel sees.
        names: What the objects are called.
        masks_OHW: bool, the visible pixels of each object.
        boxes: (O,) float64 boxes in the camera frame, canonical; each is the smallest in the object's own axes.
        visible_O: Share of each object's pixels inside the image that nothing else hides, in (0, 1].
    """

    intrinsics: PixelIntrinsics
    view: RayImage
    names: tuple[str, ...]
    masks_OHW: np.ndarray
    boxes: OrientedBox
    visible_O: np.ndarray


def ground_truth(scene: Scene, data: mujoco.MjData, camera: str) -> GroundTruth:
    """Return what is true of the picture that a camera would take now.

    Args:
        scene: The scene.
        data: Its state; positions must have been computed.
        camera: Name of one of its cameras.
    """
    intrinsics, pose = scene.cameras[camera].intrinsics, scene.cameras[camera].pose(data)
    view = RayCamera(scene.model, intrinsics).see(data, pose)
    boxes = object_boxes(scene, data, pose)
    vertices_O83 = boxes.vertices()
    kept, masks, visible = [], [], []
    for index in range(len(scene.objects)):
        geoms = np.flatnonzero(scene.model.geom_bodyid == scene.model.body(object_name(index)).id)
        mask_HW = np.isin(view.geom_HW, geoms)
        if mask_HW.any() and float(vertices_O83[index, :, 2].min()) > 0:
            kept.append(index)
            masks.append(mask_HW)
            alone = _pixels_alone(scene.model, data, pose, intrinsics, geoms, vertices_O83[index])
            visible.append(mask_HW.sum() / alone)
    return GroundTruth(
        intrinsics=intrinsics,
        view=view,
        names=tuple(scene.objects[index].name for index in kept),
        masks_OHW=np.array(masks, bool).reshape(-1, intrinsics.height, intrinsics.width),
        boxes=OrientedBox(boxes.centre[kept], boxes.quaternion[kept], boxes.extents[kept]),
        visible_O=np.array(visible, np.float64),
    )


def object_boxes(scene: Scene, data: mujoco.MjData, pose: CameraPose) -> OrientedBox:
    """Return the box of every object of a scene: float64, in the camera frame, canonical."""
    bodies = [scene.model.body(object_name(index)).id for index in range(len(scene.objects))]
    to_camera = torch.from_numpy(pose.rotation.T.copy())
    centre = torch.from_numpy(data.xpos[bodies] - pose.position_m) @ to_camera.T
    axes = to_camera @ torch.from_numpy(data.xmat[bodies].reshape(-1, 3, 3))
    half = torch.tensor([thing.half_extents_m for thing in scene.objects], dtype=torch.float64)
    return OrientedBox(centre, quaternions.from_matrix(axes), 2 * half).canonical()


def _pixels_alone(
    model: mujoco.MjModel,
    data: mujoco.MjData,
    pose: CameraPose,
    intrinsics: PixelIntrinsics,
    geoms: np.ndarray,
    vertices_83: torch.Tensor,
) -> int:
    """Return how many pixels would see an object if nothing else were there."""
    corners_82 = intrinsics.project(vertices_83).numpy()
    size = (intrinsics.width, intrinsics.height)
    left, top = np.clip(np.floor(corners_82.min(0)), 0, size).astype(int)
    right, bottom = np.clip(np.ceil(corners_82.max(0)), 0, size).astype(int)
    rays_HW3 = pixel_rays(intrinsics).reshape(intrinsics.height, intrinsics.width, 3)
    rays_N3 = rays_HW3[top:bottom, left:right].reshape(-1, 3)
    caster = RayCaster(model, only=geoms)
    hits = caster.cast(data, pose.position_m, rays_N3 @ pose.rotation.T, normals=False)
    return int((hits.geom_N >= 0).sum())


def image_label(
    truth: GroundTruth, image_id: str, rng: np.random.Generator, least_visible: float = 0.0
) -> ImageLabel:
    """Write down what is true of a picture as a label.

    Args:
        truth: What is true.
        image_id: Name of the picture, unique in its data set.
        rng: Draws the pixels whose points are stored.
        least_visible: Objects of which a smaller share is visible get no label; those of fewer than
            `labeling.object_label.EXACT.min_points` pixels never do.

    Returns:
        The label, metric.

    Raises:
        DataError: If the camera sees nothing at all.
    """
    points_HW3, hit_HW = truth.view.points_HW3, truth.view.hit_HW
    known = np.argwhere(hit_HW)
    if len(known) == 0:
        raise DataError("A camera sees nothing", where=image_id, expected="a surface in at least one pixel")
    chosen = known[rng.choice(len(known), min(SAMPLED_PIXELS, len(known)), replace=False)]
    objects = []
    for index, (name, mask_HW) in enumerate(zip(truth.names, truth.masks_OHW, strict=True)):
        if mask_HW.sum() >= EXACT.min_points and truth.visible_O[index] >= least_visible:
            box = OrientedBox(truth.boxes.centre[index], truth.boxes.quaternion[index], truth.boxes.extents[index])
            visible = float(truth.visible_O[index])
            objects.append(label_object(points_HW3, mask_HW, name, EXACT, box=box, visible_fraction=visible))
    return ImageLabel(
        image_id=image_id,
        width=truth.intrinsics.width,
        height=truth.intrinsics.height,
        source=SOURCE,
        unit="metric",
        median_depth=float(np.median(truth.view.depth_HW[hit_HW])),
        objects=tuple(objects),
        intrinsics=truth.intrinsics,
        pixels=(chosen[:, ::-1] + 0.5).astype(np.float32),
        pixel_points=points_HW3[chosen[:, 0], chosen[:, 1]],
        provenance=dict.fromkeys(("detector", "segmenter", "geometry", "box"), "exact (simulated)"),
    )
