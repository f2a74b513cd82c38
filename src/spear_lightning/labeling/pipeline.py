"""From images to labels: source -> detector -> segmenter -> geometry -> boxes -> shards, all at the same time."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from spear_lightning.errors import ConfigError, DataError, SpearError
from spear_lightning.geometry.outliers import evenly
from spear_lightning.labeling.assembly import DROPPED, Evidence, ObjectFilter, gather
from spear_lightning.labeling.box_pool import BoxPool
from spear_lightning.labeling.detections import DetectionFilter, Detections
from spear_lightning.labeling.detector import Detector, Picture
from spear_lightning.labeling.geometry import Geometry, PointMap
from spear_lightning.labeling.label_folder import ImageFailure, LabelFolder
from spear_lightning.labeling.object_label import BoxRecipe
from spear_lightning.labeling.records import ImageLabel
from spear_lightning.labeling.segmenter import Masks, Segmenter
from spear_lightning.labeling.sources import ImageRef, ImageSource
from spear_lightning.labeling.stages import Stage, run_stages
from spear_lightning.labeling.steps import ImageJob, attempt, present
from spear_lightning.labeling.work_split import WorkSplit
from spear_lightning.robot_data.images import decode_image

log = logging.getLogger(__name__)

MOST_PROCESSES = 8
"""Processes that fit boxes, unless more are asked for: as many as a fast GPU keeps at work."""

COMPARED = 8
"""Labelled images that are read again before a run goes on, to see that they are those of the labels."""

GPU_THREADS = 2
"""Batches of a network under way at the same time: one is prepared or fetched while the GPU works on another."""

DEFAULT_RECIPE, DEFAULT_DETECTIONS, DEFAULT_OBJECTS = BoxRecipe(), DetectionFilter(), ObjectFilter()


@dataclass
class Tally:
    """What a run has done so far, in this process.

    Attributes:
        images: Images that it has to do.
        labelled: Images with a label.
        failed: Images without.
        skipped: Images that failed in an earlier run and are not tried again.
        objects: Objects with a label.
        dropped: Detections that became no object.
        costs: What the detector says it has cost.
        seconds: Since the first image was read; models are loaded before that.
        busy_s: Step -> seconds that its threads worked, added up.
    """

    images: int
    labelled: int = 0
    failed: int = 0
    skipped: int = 0
    objects: int = 0
    dropped: int = 0
    costs: str = ""
    seconds: float = 0.0
    busy_s: dict[str, float] = field(default_factory=dict)


def default_processes() -> int:
    """Return how many processes fit boxes unless it is said: half of the cores, `MOST_PROCESSES` at most."""
    return min(MOST_PROCESSES, max(1, (os.cpu_count() or 1) // 2))


class LabelingRun:
    """Labels the images of a source. Interrupted, it goes on where it stopped; with any number of processes.

    Args:
        out: Folder of the label store; what is there already is not done again.
        source: Where images are from.
        detector: Finds named 2D boxes.
        segmenter: Finds the masks of boxes.
        geometry: Finds the points that pixels see.
        detections: Which detections are used.
        boxes: How points become 3D boxes.
        objects: Which objects are worth a label.
        shard_size: Images of a shard; a killed process loses at most so many, but no paid reply.
        decode_threads: Threads that decode images.
        geometry_batch: Images that go to the geometry step together.
        box_processes: Processes that fit boxes, for each process of the run; 0: a thread. Default: half of the
            cores, 8 at most.
        max_failures_in_a_row: The run ends when so many images fail one after another.
        limit: Only the first so many images of the source, whether they are done or not; null: all.
    """

    def __init__(
        self,
        out: str,
        source: ImageSource,
        detector: Detector,
        segmenter: Segmenter,
        geometry: Geometry,
        detections: DetectionFilter = DEFAULT_DETECTIONS,
        boxes: BoxRecipe = DEFAULT_RECIPE,
        objects: ObjectFilter = DEFAULT_OBJECTS,
        shard_size: int = 256,
        decode_threads: int = 2,
        geometry_batch: int = 8,
        box_processes: int | None = None,
        max_failures_in_a_row: int = 50,
        limit: int | None = None,
    ) -> None:
        if box_processes is None:
            box_processes = default_processes()
        smallest = min(shard_size, decode_threads, geometry_batch, max_failures_in_a_row, box_processes + 1)
        if smallest < 1:
            raise ConfigError("Sizes of a labelling run must be positive", found=smallest)
        if limit is not None and limit < 1:
            raise ConfigError(
                "A labelling run needs an image", where="limit", found=limit, expected="at least 1, or null"
            )
        self.out, self.source = out, source
        self._detector, self._segmenter, self._geometry = detector, segmenter, geometry
        self._detections, self._recipe, self._objects = detections, boxes, objects
        self._shard_size, self._decode_threads = shard_size, decode_threads
        self._geometry_batch, self._box_processes = geometry_batch, box_processes
        self._max_failures, self._limit = max_failures_in_a_row, limit

    @property
    def provenance(self) -> dict[str, str]:
        """Step -> model and version, as every label says."""
        return {
            "detector": self._detector.version,
            "segmenter": self._segmenter.version,
            "geometry": self._geometry.version,
            "box": f"{self._recipe}, {self._objects}, {self._detections}",
        }

    def run(
        self,
        split: WorkSplit,
        retry_failed: bool = False,
        progress: Callable[[Tally], None] = lambda tally: None,
        device: str | None = None,
    ) -> Tally:
        """Label this process's share of the images that have no label yet.

        Args:
            split: Which process this is.
            retry_failed: Whether images that failed before are tried again.
            progress: Called after each image.
            device: Where to compute; default: the process's GPU, if there is one.

        Returns:
            What was done.

        Raises:
            SpearError: If the run cannot start, or not go on.
        """
        folder = LabelFolder(self.out, split, self._shard_size)
        folder.require_made_by(self.provenance)
        failed_before, hash_of = folder.failures().keys(), folder.done()
        refs = self._refs(split)
        self._require_same_images(refs, hash_of)
        left = [ref for ref in refs if ref.image_id not in hash_of]
        todo = [ref for ref in left if retry_failed or ref.image_id not in failed_before]
        tally = Tally(len(todo), skipped=len(left) - len(todo))
        progress(tally)
        if not todo:
            return tally
        device = device or split.device
        # Its processes start while models are loaded.
        with BoxPool(self._box_processes, self._recipe, self._objects) as pool:
            for part in (self._detector, self._segmenter, self._geometry):
                part.prepare(device)
            pool.wait_for_start()
            network_threads = GPU_THREADS if torch.device(device).type == "cuda" else 1
            stages = self._stages(pool, network_threads, failed_before if retry_failed else ())
            self._work_through(todo, stages, folder, tally, progress)
        return tally

    def _work_through(
        self,
        todo: Sequence[ImageRef],
        stages: list[Stage[ImageJob]],
        folder: LabelFolder,
        tally: Tally,
        progress: Callable[[Tally], None],
    ) -> None:
        start, in_a_row = time.perf_counter(), 0
        with folder:
            for job in run_stages(self._read(todo), stages):
                in_a_row = in_a_row + 1 if self._finish(job, folder, tally) else 0
                tally.seconds = time.perf_counter() - start
                tally.busy_s = {stage.name: stage.busy_s for stage in stages}
                tally.costs = self._detector.costs()
                progress(tally)
                if in_a_row >= self._max_failures and job.failure is not None:
                    raise DataError(
                        f"{in_a_row} images failed one after another",
                        where=f"the last one, {job.ref.image_id!r}, at step {job.failure.step}",
                        found=job.failure.reason,
                        remedy="mend it, and go on with the same command and --retry_failed",
                    )

    def _refs(self, split: WorkSplit) -> list[ImageRef]:
        """Return this process's share of the images."""
        refs = list(itertools.islice(self.source.refs(), self._limit))
        if len({ref.image_id for ref in refs}) < len(refs):
            raise DataError("Two images of the source have one name", where=self.source.name)
        return [ref for ref in refs if split.owns(ref.group)]

    def _require_same_images(self, refs: Sequence[ImageRef], hash_of: Mapping[str, str]) -> None:
        """Refuse a folder whose labels are of other images that bear the same names, going by a few of them."""
        done = [ref for ref in refs if ref.image_id in hash_of]
        alike = []
        for number in evenly(len(done), min(len(done), COMPARED)):
            with suppress(SpearError, OSError):
                found = hashlib.sha256(self.source.read(done[number])).hexdigest()
                alike.append(found == hash_of[done[number].image_id])
        # Another version of a library may turn or encode some in another way: then most are still the same.
        if 2 * sum(alike) < len(alike):
            raise DataError(
                "The folder has labels of other images with the same names",
                where=self.out,
                found=f"{len(alike) - sum(alike)} of the {len(alike)} that were compared differ",
                expected=f"labels of the images of {self.source.name!r}",
                remedy="write into another folder (`out`)",
            )

    def _finish(self, job: ImageJob, folder: LabelFolder, tally: Tally) -> bool:
        """Write a job's outcome; return whether it failed."""
        if job.failure is not None or job.label is None:
            failure = job.failure or ImageFailure(job.ref.image_id, "boxes", "no label came out")
            folder.add_failure(failure)
            tally.failed += 1
            log.info("%s failed at step %s: %s", job.ref.image_id, failure.step, failure.reason)
            return True
        folder.add(job.label, job.data)
        tally.labelled += 1
        tally.objects += len(job.label.objects)
        tally.dropped += len(job.label.provenance.get(DROPPED, "").splitlines())
        return False

    def _read(self, todo: Sequence[ImageRef]) -> Iterator[ImageJob]:
        for ref in todo:
            job = ImageJob(ref)
            attempt("read", [job], lambda jobs: [self._bytes(jobs[0].ref)], _set_data)
            yield job

    def _bytes(self, ref: ImageRef) -> bytes:
        try:
            ref.image_id.encode()
        except UnicodeEncodeError as error:
            # Parquet would refuse the whole shard, after all that was paid for it.
            raise DataError(
                "No label can hold the name of an image: it is no UTF-8",
                where=self.source.name,
                found=ascii(ref.image_id),
                remedy="rename the file",
            ) from error
        return self.source.read(ref)

    def _stages(self, pool: BoxPool, network_threads: int, retried: Collection[str]) -> list[Stage[ImageJob]]:
        def detect(jobs: list[ImageJob]) -> list[Detections | SpearError]:
            pictures = [present(job.picture) for job in jobs]
            for picture in pictures:
                if picture.image_id in retried:
                    self._detector.forget(picture)
            return self._detector.detect(pictures)

        def segment(jobs: list[ImageJob]) -> list[Masks | SpearError]:
            pictures = [present(job.picture) for job in jobs]
            return self._segmenter.segment(pictures, [present(job.detections) for job in jobs])

        def find_points(jobs: list[ImageJob]) -> list[PointMap | SpearError]:
            pictures = [present(job.picture) for job in jobs]
            ids = [job.ref.image_id for job in jobs]
            return self._geometry.point_maps([picture.pixels_HW3 for picture in pictures], ids)

        def fit(jobs: list[ImageJob]) -> list[ImageLabel]:
            return [pool(self._evidence(job)) for job in jobs]

        def with_objects(jobs: list[ImageJob]) -> list[ImageJob]:
            return [job for job in jobs if job.detections]

        detector, segmenter, processes = self._detector, self._segmenter, max(1, self._box_processes)
        return [
            Stage("decode", lambda jobs: attempt("read", jobs, _decode, _set_picture), 1, self._decode_threads),
            Stage(
                "detect",
                lambda jobs: attempt("detect", jobs, detect, self._set_detections),
                detector.batch_size,
                detector.parallel,
            ),
            Stage(
                "segment",
                lambda jobs: attempt("segment", with_objects(jobs), segment, _set_masks),
                segmenter.batch_size,
                network_threads,
            ),
            Stage(
                "geometry",
                lambda jobs: attempt("geometry", jobs, find_points, _set_point_map),
                self._geometry_batch,
                network_threads,
            ),
            # One image more than there are processes: it is packed while they work.
            Stage("boxes", lambda jobs: attempt("boxes", jobs, fit, _set_label), 1, processes + 1),
        ]

    def _evidence(self, job: ImageJob) -> Evidence:
        detections, point_map = present(job.detections), present(job.point_map)
        name = job.ref.image_id
        return gather(name, self.source.name, detections, job.masks, point_map, self.provenance)

    def _set_detections(self, job: ImageJob, found: Detections) -> None:
        height, width = present(job.picture).pixels_HW3.shape[:2]
        job.detections = self._detections(found, width, height)


def _decode(jobs: list[ImageJob]) -> list[Picture]:
    return [Picture(job.ref.image_id, job.data, decode_image(job.data, job.ref.image_id)) for job in jobs]


def _set_data(job: ImageJob, data: bytes) -> None:
    job.data = data


def _set_picture(job: ImageJob, picture: Picture) -> None:
    job.picture = picture


def _set_masks(job: ImageJob, masks: Masks) -> None:
    job.masks = masks


def _set_point_map(job: ImageJob, point_map: PointMap) -> None:
    job.point_map = point_map


def _set_label(job: ImageJob, label: ImageLabel) -> None:
    job.label = label
    # What the label was made from is large, and no longer needed.
    job.picture = job.masks = job.point_map = None
