"""What a folder of labels holds, in numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.table import Table

from spear_lightning.labeling.assembly import DROPPED
from spear_lightning.labeling.label_folder import LabelFolder
from spear_lightning.labeling.records import ImageLabel
from spear_lightning.labeling.store import LabelStore

QUANTILES = (0.05, 0.5, 0.95)


@dataclass(eq=False)
class LabelStatistics:
    """Numbers of a folder of labels: N images with M objects.

    Attributes:
        folder: The folder.
        image_sizes: (width, height) -> images.
        units: Unit -> images.
        provenance: What made them: (step, model and version) -> images.
        names: Name -> objects.
        per_image_N: Objects of each image.
        depth_M: z of the box's centre as a share of the image's median depth: comparable across units.
        distance_M: From the camera, in the labels' unit.
        size_M: Longest edge as a share of the distance: how large an object looks.
        points_M: Points the boxes were fitted to.
        residual_M: See `ObjectLabel`.
        score_M: Confidence of the detector; NaN where there is none.
        dropped: Why detections became no object -> how many.
        failures: (step, first line of the reason) -> images without a label.
    """

    folder: Path
    image_sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    units: Counter[str] = field(default_factory=Counter)
    provenance: Counter[tuple[str, str]] = field(default_factory=Counter)
    names: Counter[str] = field(default_factory=Counter)
    per_image_N: np.ndarray = field(default_factory=lambda: np.zeros(0))
    depth_M: np.ndarray = field(default_factory=lambda: np.zeros(0))
    distance_M: np.ndarray = field(default_factory=lambda: np.zeros(0))
    size_M: np.ndarray = field(default_factory=lambda: np.zeros(0))
    points_M: np.ndarray = field(default_factory=lambda: np.zeros(0))
    residual_M: np.ndarray = field(default_factory=lambda: np.zeros(0))
    score_M: np.ndarray = field(default_factory=lambda: np.zeros(0))
    dropped: Counter[str] = field(default_factory=Counter)
    failures: Counter[tuple[str, str]] = field(default_factory=Counter)


def measure(folder: str | Path) -> LabelStatistics:
    """Read all labels of a folder once.

    Raises:
        DataError: If there are none, or some are broken.
    """
    found = LabelStatistics(Path(folder))
    per_image, rows = [], []
    for label in LabelStore(folder):
        found.image_sizes[label.width, label.height] += 1
        found.units[label.unit] += 1
        found.names.update(item.name for item in label.objects)
        for step, made in label.provenance.items():
            if step == DROPPED:
                found.dropped.update(line.rpartition(": ")[2] for line in made.splitlines())
            else:
                found.provenance[step, made] += 1
        per_image.append(len(label.objects))
        rows.extend(_numbers(label))
    for failure in LabelFolder(folder).failures().values():
        found.failures[failure.step, failure.reason.splitlines()[0]] += 1
    found.per_image_N = np.array(per_image)
    columns = np.array(rows, np.float64).reshape(len(rows), 6).T
    found.depth_M, found.distance_M, found.size_M, found.points_M, found.residual_M, found.score_M = columns
    return found


def _numbers(label: ImageLabel) -> list[tuple[float, ...]]:
    return [
        (
            float(item.centre[2]) / label.median_depth,
            item.distance,
            float(item.extents.max()) / item.distance,
            item.points,
            item.residual,
            item.detection_score,
        )
        for item in label.objects
    ]


def statistics_tables(found: LabelStatistics, most_names: int = 20) -> list[Table]:
    """Return the numbers as tables for a terminal."""
    overview = Table(title=str(found.folder), show_header=False)
    images, objects = len(found.per_image_N), int(found.per_image_N.sum())
    overview.add_row("images", f"{images:,}, {(found.per_image_N == 0).sum():,} of them without an object")
    overview.add_row("objects", f"{objects:,}, {objects / images:.1f} an image, {len(found.names):,} names")
    overview.add_row("unit", _shares(found.units, images))
    sizes = Counter({f"{width} x {height}": count for (width, height), count in found.image_sizes.items()})
    overview.add_row("image sizes", _shares(sizes, images))
    for (step, made), count in sorted(found.provenance.items()):
        overview.add_row(step, made + ("" if count == images else f" ({count:,} images)"))

    numbers = Table(title="Objects")
    for column in ("", *(f"{100 * quantile:g} %" for quantile in QUANTILES)):
        numbers.add_column(column, justify="right")
    rows = {
        "depth / median depth of the image": found.depth_M,
        "distance": found.distance_M,
        "longest edge / distance": found.size_M,
        "points": found.points_M,
        "residual": found.residual_M,
        "detector's score": found.score_M[~np.isnan(found.score_M)],
    }
    for name, values in rows.items():
        if len(values):
            numbers.add_row(name, *(f"{value:.3g}" for value in np.quantile(values, QUANTILES)))

    names = Table(title=f"Most frequent of {len(found.names):,} names")
    names.add_column("name")
    names.add_column("objects", justify="right")
    for name, count in found.names.most_common(most_names):
        names.add_row(name, f"{count:,}")
    return [overview, numbers, names, *_troubles(found)]


def _troubles(found: LabelStatistics) -> list[Table]:
    tables = []
    if found.dropped:
        dropped = Table(title=f"{found.dropped.total():,} detections without a box")
        dropped.add_column("why")
        dropped.add_column("detections", justify="right")
        for reason, count in found.dropped.most_common():
            dropped.add_row(reason, f"{count:,}")
        tables.append(dropped)
    if found.failures:
        failures = Table(title=f"{found.failures.total():,} images without a label")
        for column in ("step", "why"):
            failures.add_column(column)
        failures.add_column("images", justify="right")
        for (step, reason), count in found.failures.most_common():
            failures.add_row(step, reason, f"{count:,}")
        tables.append(failures)
    return tables


def _shares(counts: Counter[str], total: int) -> str:
    most = counts.most_common(4)
    text = ", ".join(f"{name} {count / total:.0%}" for name, count in most)
    return text + (f" and {len(counts) - len(most)} more" if len(counts) > len(most) else "")
