"""Boxes fitted by the labelling recipe against the truth of the tabletop world, from exact masks.

Every object that is at least half visible is labelled from exact points, from noisy ones, and from points of
which some are wild; each box is compared with the object's own. The reference is in the same run: the smallest box
around the same points by trimesh, without erosion, outlier removal, smoothing or continuation of the surface.

    .venv/bin/python benchmarks/box_labels.py
    PYTHONPATH=FOLDER .venv/bin/python benchmarks/box_labels.py --before earlier.labeling.object_label
    .venv/bin/python benchmarks/box_labels.py --moge experiments/tabletop/geometry.yaml --weights FILE
"""

from __future__ import annotations

import argparse
import collections
import functools
import importlib
import itertools
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import jsonargparse
import numpy as np
import torch
import trimesh
import yaml
from rich.console import Console
from rich.progress import track
from rich.table import Table

from spear_lightning.geometry import quaternions
from spear_lightning.geometry.box_iou import box_iou
from spear_lightning.geometry.oriented_boxes import OrientedBox
from spear_lightning.labeling import object_label
from spear_lightning.labeling.geometry import NetworkGeometry, PointMap
from spear_lightning.labeling.object_label import BoxRecipe
from spear_lightning.models.moge import Moge
from spear_lightning.worlds.tabletop.depth_errors import DepthErrors, disturbed
from spear_lightning.worlds.tabletop.labels import GroundTruth, ground_truth
from spear_lightning.worlds.tabletop.tasks import TASKS
from spear_lightning.worlds.tabletop.world import Observation, Tabletop

CAMERAS = ("primary", "secondary")
LEAST_VISIBLE = 0.5
NOISE_M = 0.002
OUTLIERS = 0.005

console = Console(width=120)


class Result(NamedTuple):
    """How a fitted box compares with the true one."""

    iou: float
    centre_mm: float
    extent: float  # mean relative error of the sorted edge lengths


MISSED = Result(0.0, float("nan"), float("nan"))


class BareTabletop(Tabletop):
    """The world without pictures, where only geometry is looked at."""

    def observe(self) -> Observation:
        """Take no picture."""
        return Observation({}, self.state, self.instruction)


def scenes(
    count: int, size: tuple[int, int], pictures: bool = False
) -> Iterator[tuple[Tabletop, GroundTruth, np.ndarray | None]]:
    """Yield random scenes of all tasks, seen by two cameras in turn, and their pictures if asked for."""
    for seed in track(range(count), "scenes", console=Console(stderr=True)):
        camera = CAMERAS[seed % len(CAMERAS)]
        world = (Tabletop if pictures else BareTabletop)({camera: size}, (2, 4))
        seen = world.reset(list(TASKS)[seed % len(TASKS)], seed)
        yield world, ground_truth(world.scene, world.data, camera), seen.images.get(camera)


def conditions(points_HW3: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    noise = NOISE_M * rng.standard_normal(points_HW3.shape)
    wild, _ = disturbed(points_HW3, DepthErrors(outliers=OUTLIERS), rng)
    return {"clean": points_HW3, "noise 2 mm": points_HW3 + noise, "outliers 0.5 %": wild}


def network(experiment: str, weights: str) -> NetworkGeometry:
    """Return the network of an experiment such as experiments/tabletop/geometry.yaml, with trained weights."""
    config = yaml.safe_load(Path(experiment).read_text(encoding="utf-8"))["model"]["init_args"]["moge"]
    config["init_args"]["weights"] = weights
    parser = jsonargparse.ArgumentParser()
    parser.add_subclass_arguments(Moge, "moge", required=True)
    geometry = NetworkGeometry(parser.instantiate_classes(parser.parse_object({"moge": config})).moge)
    geometry.prepare("cuda" if torch.cuda.is_available() else "cpu")
    return geometry


def predicted_points(geometry: NetworkGeometry, picture_HW3: np.ndarray, true_HW3: np.ndarray) -> np.ndarray:
    """Return the network's point map in the unit that gives it the true median depth."""
    (found,) = geometry.point_maps([picture_HW3], ["scene"])
    if not isinstance(found, PointMap):
        raise found
    both_HW = found.valid_HW & np.isfinite(true_HW3[..., 2])
    if not both_HW.any():
        return found.points_HW3
    scale = np.median(true_HW3[both_HW, 2]) / np.median(found.points_HW3[both_HW, 2])
    return found.points_HW3 * np.float32(scale)


def recipe_box(code: ModuleType, points_HW3: np.ndarray, mask_HW: np.ndarray) -> OrientedBox | None:
    try:
        return code.label_object(points_HW3, mask_HW, "object", code.BoxRecipe()).box
    except code.DataError:
        return None


def bare_box(points_HW3: np.ndarray, mask_HW: np.ndarray) -> OrientedBox | None:
    points = points_HW3[mask_HW].astype(np.float64)
    points = points[np.isfinite(points).all(-1)]
    if len(points) < BoxRecipe.min_points:
        return None
    to_box, extents = trimesh.bounds.oriented_bounds(points)
    to_camera = torch.from_numpy(np.linalg.inv(to_box))
    return OrientedBox(to_camera[:3, 3], quaternions.from_matrix(to_camera[:3, :3]), torch.from_numpy(extents))


def compare(found: OrientedBox | None, true: OrientedBox) -> Result:
    if found is None:
        return MISSED
    one, other = (
        OrientedBox(*(part.double()[None] for part in (box.centre, box.quaternion, box.extents)))
        for box in (found, true)
    )
    sizes, truth = one.extents.sort().values, other.extents.sort().values
    return Result(
        float(box_iou(one, other)),
        1000 * float((one.centre - other.centre).norm()),
        float(((sizes - truth).abs() / truth).mean()),
    )


def measure(
    count: int,
    size: tuple[int, int],
    geometry: NetworkGeometry | None,
    references: dict[str, Callable[[np.ndarray, np.ndarray], OrientedBox | None]],
    every: int,
) -> tuple[dict[tuple[str, str], list[Result]], list[str], dict[str, list[float]]]:
    """Return results by (method, condition), the kind of each object, and seconds a box by method.

    The references are looked at in every so manieth scene; seconds are those of these scenes.
    """
    recipe = {"recipe": functools.partial(recipe_box, object_label)}
    results: dict[tuple[str, str], list[Result]] = collections.defaultdict(list)
    seconds: dict[str, list[float]] = collections.defaultdict(list)
    kinds = []
    for seed, (world, truth, picture_HW3) in enumerate(scenes(count, size, geometry is not None)):
        nouns = {thing.name: thing.noun for thing in world.scene.objects}
        seen = conditions(truth.view.points_HW3, np.random.default_rng(seed))
        if geometry is not None and picture_HW3 is not None:
            seen["small MoGe"] = predicted_points(geometry, picture_HW3, truth.view.points_HW3)
        methods = recipe | references if seed % every == 0 else recipe
        for index, name in enumerate(truth.names):
            if truth.visible_O[index] < LEAST_VISIBLE:
                continue
            kinds.append(nouns[name])
            box = OrientedBox(truth.boxes.centre[index], truth.boxes.quaternion[index], truth.boxes.extents[index])
            for (method, fit), (condition, points_HW3) in itertools.product(methods.items(), seen.items()):
                start = time.process_time()
                found = fit(points_HW3, truth.masks_OHW[index])
                if seed % every == 0:
                    seconds[method].append(time.process_time() - start)
                results[method, condition].append(compare(found, box))
    return results, kinds, seconds


def summary(results: dict[tuple[str, str], list[Result]]) -> Table:
    table = Table("box from", "points", "IoU", "IoU quartiles", "centre, mm", "extents, %", "no box")
    for (method, condition), rows in results.items():
        iou, centre, extent = np.array(rows).T
        low, high = np.quantile(iou, [0.25, 0.75])
        missed = int(np.isnan(centre).sum())
        table.add_row(
            method,
            condition,
            f"{np.median(iou):.3f}",
            f"{low:.3f} .. {high:.3f}",
            f"{np.nanmedian(centre):.1f}",
            f"{100 * np.nanmedian(extent):.1f}",
            f"{missed}",
        )
    return table


def by_kind(results: dict[tuple[str, str], list[Result]], kinds: list[str]) -> Table:
    table = Table("kind", "objects", *(condition for method, condition in results if method == "recipe"))
    names = np.array(kinds)
    for kind in sorted(set(kinds)):
        medians = [
            f"{np.median(np.array(rows)[names == kind, 0]):.3f}"
            for (method, _), rows in results.items()
            if method == "recipe"
        ]
        table.add_row(kind, str(int((names == kind).sum())), *medians)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--before", help="a module object_label of earlier code, under another name, to compare")
    parser.add_argument(
        "--every", type=int, default=1, help="the references are looked at in every so manieth scene"
    )
    parser.add_argument("--moge", help="an experiment whose network makes points of its own from pictures")
    parser.add_argument("--weights", help="the network's trained weights")
    options = parser.parse_args()
    if (options.moge is None) != (options.weights is None):
        parser.error("--moge and --weights go together")
    torch.set_num_threads(1)
    geometry = network(options.moge, options.weights) if options.moge else None
    references: dict[str, Callable[[np.ndarray, np.ndarray], OrientedBox | None]] = {"bare": bare_box}
    if options.before:
        references["before"] = functools.partial(recipe_box, importlib.import_module(options.before))
    size = options.width, options.height
    results, kinds, seconds = measure(options.scenes, size, geometry, references, options.every)
    console.print(summary(results), by_kind(results, kinds))
    medians = {
        condition: np.median([row.iou for row in results["recipe", condition]])
        for method, condition in results
        if method == "recipe"
    }
    change = medians["outliers 0.5 %"] / medians["clean"] - 1
    console.print(f"Outliers change the median IoU by {100 * change:+.1f} %.")
    console.print(
        f"{options.scenes} scenes at {options.width}x{options.height}, {len(kinds)} objects; "
        + ", ".join(f"{name}: {1000 * np.mean(spent):.1f} ms an object" for name, spent in seconds.items())
        + f". Python {platform.python_version()}, NumPy {np.__version__}, trimesh {trimesh.__version__}."
    )


if __name__ == "__main__":
    main()
