"""Building an index: every shard is read once, in parallel, and described by arrays."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from spear_lightning.errors import DataError
from spear_lightning.robot_data.dataset_entry import DatasetEntry
from spear_lightning.robot_data.dataset_folder import DatasetFolder, find_dataset
from spear_lightning.robot_data.episode_index import EpisodeIndex
from spear_lightning.robot_data.index_store import (
    DESCRIPTION,
    SCHEMA,
    ArrayFolderWriter,
    default_index_root,
)
from spear_lightning.robot_data.rlds_folder import RldsFolder
from spear_lightning.robot_data.shard_reader import ShardPart, plan_shards
from spear_lightning.robot_data.storage import DataPath, file_marks
from spear_lightning.robot_data.worker_processes import worker_context

log = logging.getLogger(__name__)

BESIDE = "spear_index"
"""Folder in a data set's own folder where `spear data index --beside` keeps its index."""

PARALLEL_FROM_BYTES = 256 << 20
"""Smaller data sets are read in one process: starting others takes longer than reading them."""


class ReadsFiles(Protocol):
    """What reads the files of a data set, one after the other or in several processes."""

    def describe(self) -> dict[str, Any]:
        """Return what the index's description must say."""

    def read(self, path: DataPath, episodes: Any) -> ShardPart:
        """Read a file and the episodes promised to be in it."""


def index_path(folder: DatasetFolder, split: str, entry: DatasetEntry, index_root: Path | None = None) -> Path:
    """Return where the index of a split is kept.

    The name holds a hash of the shards' names, sizes and times, and of the conventions: when any of them
    changes, another index is made.
    """
    identity: list[object] = [SCHEMA, entry.fingerprint(), split]
    identity += _marks(folder, split)
    identity.append([str(episodes) for _, episodes in folder.require_split(split)])
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    root = index_root or default_index_root()
    return root / f"{folder.name}-{folder.version}-{split}-{digest}"


def _marks(folder: DatasetFolder, split: str) -> list[tuple[str, int, int | str]]:
    """Return (name, bytes, mark of the content) of the shards of a split."""
    try:
        return file_marks(path for path, _ in folder.require_split(split))
    except OSError as error:
        raise DataError(
            "A shard is missing",
            where=error.filename,
            expected=f"{len(folder.require_split(split))} files, as the data set's description says",
            remedy="download the data set again",
        ) from error


def _plan(folder: DatasetFolder, entry: DatasetEntry, verify_images: bool) -> ReadsFiles:
    if isinstance(folder, RldsFolder):
        return plan_shards(folder, entry, verify_images)
    from spear_lightning.robot_data.lerobot_reader import plan_lerobot

    return plan_lerobot(folder, entry, verify_images)


def ensure_index(
    root: str | DataPath, entry: DatasetEntry, split: str = "train", index_root: Path | None = None
) -> EpisodeIndex:
    """Open the index of a registry entry's data set under a data root.

    An index beside the data is preferred; one is built in `index_root` if there is none, and what had to be left
    out is logged.
    """
    folder = find_dataset(root, entry)
    # An index must be local: it is mapped into memory.
    beside = [folder.path / BESIDE] if isinstance(folder.path, Path) else []
    for place in (*beside, index_root):
        path = index_path(folder, split, entry, place)
        if (path / DESCRIPTION).is_file():
            return EpisodeIndex(path, folder.path)
    index = EpisodeIndex(build_index(folder, split, entry, index_root), folder.path)
    for problem, count in index.description["problems"].items():
        example = index.description["problem_examples"][problem]
        log.warning("%s: %d x %s, first in %s", folder.path, count, problem, example)
    return index


def build_index(
    folder: DatasetFolder,
    split: str,
    entry: DatasetEntry,
    index_root: Path | None = None,
    workers: int | None = None,
    verify_images: bool = False,
) -> Path:
    """Read all shards of a split and write their index.

    Args:
        folder: The data set.
        split: E.g. "train".
        entry: Its conventions.
        index_root: Folder of indexes; default: `default_index_root()`.
        workers: Processes; default: one per core, or just this one for a small data set.
        verify_images: Decode every image instead of looking at its first and last bytes.

    Returns:
        The index's folder.

    Raises:
        DataError: If the folder lacks what the entry promises, a shard is missing or damaged, or no episode
            can be used.
    """
    plan = _plan(folder, entry, verify_images)
    target = index_path(folder, split, entry, index_root)
    shards = folder.require_split(split)
    problems: Counter[str] = Counter()
    examples: dict[str, str] = {}
    instructions: dict[str, int] = {}
    frames = 0
    with ArrayFolderWriter(target) as writer:
        for number, part in enumerate(_with_progress(folder, split, plan, workers)):
            problems += part.problems
            for problem, where in part.examples.items():
                examples.setdefault(problem, where)
            if part.instructions:
                frames = _append(writer, part, number, frames, instructions)
        if frames == 0:
            raise DataError(
                "No episode of the data set can be used",
                where=folder.path,
                found=dict(problems) or "no records",
                expected="at least one whole episode",
            )
        writer.finish(
            {
                "dataset": entry.id,
                "name": folder.name,
                "version": folder.version,
                "split": split,
                "rate_hz": entry.rate_hz,
                "conventions": entry.fingerprint(),
                "data_folder": str(folder.path.resolve() if isinstance(folder.path, Path) else folder.path),
                "shards": [str(path)[len(str(folder.path)) + 1 :] for path, _ in shards],
                "instructions": list(instructions),
                "problems": dict(problems),
                "problem_examples": examples,
                "images_verified": verify_images,
                **plan.describe(),
            }
        )
    return target


def _append(
    writer: ArrayFolderWriter, part: ShardPart, shard: int, frames: int, instructions: dict[str, int]
) -> int:
    """Append one shard's part; returns the number of frames written so far."""
    lengths_E = part.arrays.pop("length")
    usable_N = part.arrays.pop("usable")
    ends_E = np.cumsum(lengths_E)
    for name, rows in part.arrays.items():
        writer.append(name, rows)
    writer.append("episode_start", frames + ends_E - lengths_E)
    writer.append("episode_length", lengths_E)
    writer.append("episode_shard", np.full(len(lengths_E), shard, np.int32))
    ids = [instructions.setdefault(text, len(instructions)) for text in part.instructions]
    writer.append("instruction_id", np.array(ids, np.int32))
    writer.append("sample", frames + np.flatnonzero(usable_N))
    writer.append("episode_samples", np.add.reduceat(usable_N.astype(np.int64), ends_E - lengths_E))
    return frames + int(ends_E[-1])


def _with_progress(
    folder: DatasetFolder, split: str, plan: ReadsFiles, workers: int | None
) -> Iterator[ShardPart]:
    """Yield the shards' parts in order, with a bar that counts bytes."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    sizes = [size for _, size, _ in _marks(folder, split)]
    if workers is None:
        workers = 1 if sum(sizes) < PARALLEL_FROM_BYTES else os.cpu_count() or 1
    columns: tuple[Any, ...] = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(f"indexing {folder.name} {split}", total=sum(sizes))
        for size, part in zip(sizes, _read_all(folder.require_split(split), plan, workers), strict=True):
            yield part
            progress.advance(task, size)


def _read_all(shards: Sequence[tuple[DataPath, Any]], plan: ReadsFiles, workers: int) -> Iterator[ShardPart]:
    workers = min(workers, len(shards))
    if workers <= 1:
        yield from (plan.read(path, expected) for path, expected in shards)
        return
    with ProcessPoolExecutor(workers, mp_context=worker_context()) as pool:
        waiting: deque[Future[ShardPart]] = deque()
        try:
            for path, expected in shards:
                waiting.append(pool.submit(plan.read, path, expected))
                # A bounded queue: finished parts wait in memory until it is their turn.
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
