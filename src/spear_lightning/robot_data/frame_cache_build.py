"""Making caches of frames: every picture is decoded, resized and written once; an interrupted run goes on."""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch

from spear_lightning.errors import DataError
from spear_lightning.robot_data.episode_index import EpisodeIndex
from spear_lightning.robot_data.frame_cache import (
    DESCRIPTION,
    LENGTHS,
    OFFSETS,
    CacheKind,
    FrameCache,
    cache_folder,
    part_file,
)
from spear_lightning.robot_data.images import BrokenImage, CameraSpec
from spear_lightning.robot_data.pictures import EncodedPictures

log = logging.getLogger(__name__)

PART_BYTES = 128 << 20
"""About; of pictures as they are. What is lost when a run is interrupted."""

QUALITY = 95

TOGETHER = 256
"""Pictures fetched at a time, where they are in a bucket."""


def ensure_frame_caches(
    root: Path, indexes: Sequence[EpisodeIndex], cameras: Mapping[str, CameraSpec], kind: CacheKind
) -> list[dict[str, FrameCache]]:
    """Open the caches of some data sets; makes those that are missing.

    Args:
        root: Folder of indexes.
        indexes: The data sets.
        cameras: Camera name -> what the model sees of it.
        kind: How pictures are kept.

    Returns:
        Per data set, camera name -> its pictures; a data set lacks the cameras it does not have.

    Raises:
        DataError: If a shard cannot be read, or the disk is too small.
    """
    caches: list[dict[str, FrameCache]] = []
    for index in indexes:
        caches.append({})
        for name, spec in cameras.items():
            camera = spec.source or name
            if camera in index.cameras:
                folder = cache_folder(root, index, camera, spec, kind)
                if not (folder / DESCRIPTION).is_file():
                    _build(folder, index, camera, spec, kind)
                caches[-1][name] = FrameCache(folder)
    return caches


def _build(folder: Path, index: EpisodeIndex, camera: str, spec: CameraSpec, kind: CacheKind) -> None:
    picture_bytes = 3 * spec.width * spec.height
    # Only frames that may start a chunk are ever shown.
    frames = np.asarray(index.samples)
    parts = np.array_split(frames, max(1, -(-len(frames) * picture_bytes // PART_BYTES)))
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "exact":
        _check_room(folder, len(frames) * picture_bytes)
    job = _PartJob(folder, index, camera, spec, kind)
    title = f"frames of {index.dataset} {camera} at {spec.width}x{spec.height}"
    try:
        lengths = list(_with_progress(job, parts, title))
        totals = [int(each.sum(dtype=np.int64)) for each in lengths]
        starts = np.concatenate([[0], np.cumsum(totals)])[:-1]
        length_N, offset_N = np.zeros(len(index), np.int32), np.zeros(len(index), np.int64)
        for shown, start, each in zip(parts, starts, lengths, strict=True):
            length_N[shown] = each
            offset_N[shown] = start + np.cumsum(each, dtype=np.int64) - each
        missing = int((length_N[frames] == 0).sum())
        about: dict[str, Any] = {
            "kind": kind,
            "camera": camera,
            "width": spec.width,
            "height": spec.height,
            "fit": spec.fit,
            "frames": len(index),
            "pictures": len(frames) - missing,
            "without_picture": missing,
            "bytes": sum(totals),
            "part_starts": starts.tolist(),
        }
        _write(folder / OFFSETS, offset_N.tobytes())
        _write(folder / LENGTHS, length_N.tobytes())
        _write(folder / DESCRIPTION, json.dumps(about, indent=1).encode())
    except OSError as error:
        raise DataError(
            "The cache of frames cannot be written",
            where=folder,
            found=error,
            remedy="make room, choose another data.index_folder, or set data.frame_cache to jpeg or null",
        ) from error
    log.info("%s: %d pictures, %.1f MB in %s", title, about["pictures"], about["bytes"] / 1e6, folder)


def _check_room(folder: Path, needed: int) -> None:
    there = sum(path.stat().st_size for path in folder.glob("*.pictures"))
    free = shutil.disk_usage(folder).free
    if needed - there > free:
        raise DataError(
            "The disk is too small for an exact cache of frames",
            where=folder,
            found=f"{free / 1e9:.1f} GB free",
            expected=f"{(needed - there) / 1e9:.1f} GB",
            remedy="set data.frame_cache to jpeg (a tenth of the size or less), or another data.index_folder",
        )


class _PartJob:
    """Makes one part: picture after picture in one file, and their lengths in another, which says it is whole."""

    def __init__(self, folder: Path, index: EpisodeIndex, camera: str, spec: CameraSpec, kind: CacheKind) -> None:
        self._folder, self._index, self._camera, self._spec, self._kind = folder, index, camera, spec, kind

    def __call__(self, number: int, frames: np.ndarray) -> np.ndarray:
        """Return the lengths, int32 (n,), of the pictures of n frames; makes them unless they are there."""
        file = part_file(self._folder, number)
        done = file.with_suffix(".lengths")
        if done.is_file():
            lengths = np.fromfile(done, np.int32)
            if len(lengths) == len(frames) and file.stat().st_size == lengths.sum(dtype=np.int64):
                return lengths
        # Open files belong to an index: each part gets its own.
        index = copy.deepcopy(self._index)
        pictures = EncodedPictures(index, self._camera, self._spec)
        pixels_HW3 = torch.empty((self._spec.height, self._spec.width, 3), dtype=torch.uint8)
        lengths = np.zeros(len(frames), np.int32)
        temporary = _temporary(file)
        try:
            with temporary.open("wb") as part:
                episodes = index.episode_of(frames)
                for place, (frame, episode) in enumerate(zip(frames, episodes, strict=True)):
                    if place % TOGETHER == 0:
                        ahead = slice(place, place + TOGETHER)
                        pictures.fetch(frames[ahead], episodes[ahead])
                    try:
                        there = pictures.read_into(int(frame), int(episode), pixels_HW3.permute(2, 0, 1))
                    except BrokenImage as error:
                        log.warning("%s\n  The camera is masked in this frame.", error)
                        continue
                    if there:
                        lengths[place] = part.write(self._encoded(pixels_HW3.numpy()))
                part.flush()
                os.fsync(part.fileno())
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
            index.close()
        _write(done, lengths.tobytes())
        return lengths

    def _encoded(self, pixels_HW3: np.ndarray) -> Any:
        if self._kind == "exact":
            return pixels_HW3.data.cast("B")
        return simplejpeg.encode_jpeg(pixels_HW3, QUALITY, colorspace="RGB", colorsubsampling="420")


def _with_progress(job: _PartJob, parts: list[np.ndarray], title: str) -> Iterator[np.ndarray]:
    """Yield the parts' lengths in order, with a bar that counts pictures."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns: tuple[Any, ...] = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    # Decoding, resizing and encoding run outside of Python's lock.
    pool = ThreadPoolExecutor(os.cpu_count() or 1)
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=sum(len(part) for part in parts))
        try:
            for part, lengths in zip(parts, pool.map(job, range(len(parts)), parts), strict=True):
                yield lengths
                progress.advance(task, len(part))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")


def _write(path: Path, content: bytes) -> None:
    """Write a file under another name, and give it its own when it is whole."""
    temporary = _temporary(path)
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
