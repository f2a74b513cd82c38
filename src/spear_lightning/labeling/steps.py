"""An image on its way from step to step, and what happens when a step fails."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass
from typing import TypeVar

from spear_lightning.errors import CheckpointError, ConfigError, SpearError
from spear_lightning.labeling.detections import Detections
from spear_lightning.labeling.detector import Picture
from spear_lightning.labeling.geometry import PointMap
from spear_lightning.labeling.label_folder import ImageFailure
from spear_lightning.labeling.records import ImageLabel
from spear_lightning.labeling.segmenter import Masks
from spear_lightning.labeling.sources import ImageRef

T = TypeVar("T")

RECORDED = (
    *(SpearError, RuntimeError, ValueError, ArithmeticError, LookupError, OSError),
    *(EOFError, zlib.error, struct.error),
)
"""Errors that cost one image its label. Others are mistakes of ours and end the run."""

FATAL = (ConfigError, CheckpointError, BrokenExecutor)
"""Errors that no other image would escape."""


@dataclass(eq=False)
class ImageJob:
    """An image, and what the steps have found so far.

    Attributes:
        ref: Its name.
        data: JPEG or PNG bytes.
        picture: Bytes and pixels.
        detections: Named 2D boxes.
        masks: Their masks.
        point_map: The points that pixels see.
        label: What comes of it,
        failure: or why nothing does; further steps pass it over.
    """

    ref: ImageRef
    data: bytes = b""
    picture: Picture | None = None
    detections: Detections | None = None
    masks: Masks | None = None
    point_map: PointMap | None = None
    label: ImageLabel | None = None
    failure: ImageFailure | None = None


def attempt(
    step: str,
    jobs: Sequence[ImageJob],
    work: Callable[[list[ImageJob]], Sequence[T | SpearError]],
    keep: Callable[[ImageJob, T], None],
) -> None:
    """Do a step for the images that have not failed; a batch that fails as a whole is done one by one.

    Args:
        step: Its name.
        jobs: The images.
        work: Does it for all that it is given; returns a result or an error for each.
        keep: Puts a result into its job.

    Raises:
        Exception: An error of `FATAL`, or one that is not among those of `RECORDED`.
    """
    alive = [job for job in jobs if job.failure is None]
    if not alive:
        return
    results: Sequence[T | Exception]
    try:
        results = work(alive)
    except FATAL:
        raise
    except RECORDED as error:
        if len(alive) > 1:
            for job in alive:
                attempt(step, [job], work, keep)
            return
        results = [error]
    for job, result in zip(alive, results, strict=True):
        if isinstance(result, FATAL):
            raise result
        if isinstance(result, Exception):
            reason = str(result) if isinstance(result, SpearError) else f"{type(result).__name__}: {result}"
            job.failure = ImageFailure(job.ref.image_id, step, reason)
        else:
            keep(job, result)


def present(part: T | None) -> T:
    """Return what an earlier step has put into a job."""
    if part is None:
        raise AssertionError("a step came before the one whose result it needs")
    return part
