"""A folder that labels go to: what is done, what failed, and where a run goes on.

There is no list beside the labels that could contradict them: an image is done when a whole shard holds it, and
it has failed when a line of a failure file says so. Shards are written whole or not at all, failures line by line.

| file | what |
|---|---|
| labels-RANK-NUMBER.parquet, .images | a shard: see `store` |
| failures-RANK.jsonl | image_id, step and reason of each image that failed, one a line; later lines count |
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from spear_lightning.errors import DataError
from spear_lightning.labeling.assembly import DROPPED
from spear_lightning.labeling.records import ImageLabel
from spear_lightning.labeling.store import LabelStore, LabelWriter
from spear_lightning.labeling.work_split import ALONE, WorkSplit


@dataclass(frozen=True)
class ImageFailure:
    """An image without a label.

    Attributes:
        image_id: Its name.
        step: Where it ended: "read", "detect", "segment", "geometry" or "boxes".
        reason: Why.
    """

    image_id: str
    step: str
    reason: str


class LabelFolder:
    """Reads the state of a folder of labels, and adds to it; use as a context manager to add.

    Args:
        folder: The folder; made if need be.
        split: Which process this is: each writes files of its own.
        shard_size: Images of a shard.
    """

    def __init__(self, folder: str | Path, split: WorkSplit = ALONE, shard_size: int = 256) -> None:
        self.folder = Path(folder).expanduser()
        self._split, self._shard_size = split, shard_size
        self._writer: LabelWriter | None = None
        self._failures: BinaryIO | None = None

    def done(self) -> dict[str, str]:
        """Return the ids of all images that have a label, and the hash (SHA-256) of each one's bytes.

        Raises:
            DataError: If a shard is broken.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        hash_of: dict[str, str] = {}
        for path in sorted(self.folder.glob("*.parquet")):
            try:
                rows = pq.read_table(path, columns=["image_id", "image_sha256"])
                hash_of.update(zip(*(column.to_pylist() for column in rows.columns), strict=True))
            except (OSError, pa.ArrowInvalid, KeyError) as error:
                raise DataError(
                    "A file of labels cannot be read",
                    where=path,
                    found=error,
                    remedy="delete it; its images are then labelled again",
                ) from error
        return hash_of

    def failures(self) -> dict[str, ImageFailure]:
        """Return image id -> the last failure, for images that have no label.

        Raises:
            DataError: If a line cannot be understood; an unfinished last one is passed over.
        """
        found: dict[str, ImageFailure] = {}
        for path in sorted(self.folder.glob("failures-*.jsonl")):
            lines = path.read_bytes().split(b"\n")
            # A killed process may have left the last line unfinished; whole ones end with a newline.
            for number, line in enumerate(lines[:-1], start=1):
                try:
                    failure = ImageFailure(**json.loads(line))
                except (ValueError, TypeError) as error:
                    raise DataError(
                        "A line of failures cannot be understood", where=f"{path}, line {number}", found=error
                    ) from error
                found[failure.image_id] = failure
        done = self.done() if found else {}
        return {name: failure for name, failure in found.items() if name not in done}

    def require_made_by(self, provenance: Mapping[str, str]) -> None:
        """Check that what is there was made in the same way as what will be added.

        Raises:
            DataError: If not.
        """
        if not any(self.folder.glob("*.parquet")):
            return
        there = {step: made for step, made in LabelStore(self.folder)[0].provenance.items() if step != DROPPED}
        if there != dict(provenance):
            steps = [step for step in there | dict(provenance) if there.get(step) != provenance.get(step)]
            raise DataError(
                "The labels in the folder were made in another way",
                where=self.folder,
                found={step: there.get(step) for step in steps},
                expected={step: provenance.get(step) for step in steps},
                remedy="write into another folder, or go on with the configuration that made them",
            )

    def __enter__(self) -> LabelFolder:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        prefix = _prefix(self._split.rank)
        numbers = [int(path.stem.rsplit("-", 1)[1]) for path in self.folder.glob(f"{prefix}-*.parquet")]
        self._writer = LabelWriter(self.folder, self._shard_size, prefix, max(numbers, default=-1) + 1)
        self._failures = self._open_failures()
        return self

    def _remove_leftovers(self) -> None:
        """Remove unfinished files of killed processes: of all ranks that would be ours were there only so many."""
        for path in self.folder.glob(".labels-*.tmp"):
            rank = path.name.removeprefix(".labels-").split("-")[0]
            if rank.isdecimal() and int(rank) % self._split.world_size == self._split.rank:
                path.unlink(missing_ok=True)

    def _open_failures(self) -> BinaryIO:
        path = self.folder / f"failures-{self._split.rank:04d}.jsonl"
        path.touch()
        file = path.open("r+b")
        file.truncate(path.read_bytes().rfind(b"\n") + 1)
        file.seek(0, os.SEEK_END)
        return file

    def add(self, label: ImageLabel, image: bytes) -> None:
        """Add a label and its image's JPEG or PNG bytes; on disk once its shard is full or the context is left.

        Raises:
            DataError: If the label is wrong.
        """
        assert self._writer is not None, "use the folder as a context manager"
        self._writer.add(label, image)

    def add_failure(self, failure: ImageFailure) -> None:
        """Add a failure; it is on disk when this returns."""
        assert self._failures is not None, "use the folder as a context manager"
        line = json.dumps(vars(failure), sort_keys=True) + "\n"
        self._failures.write(line.encode())
        self._failures.flush()
        os.fsync(self._failures.fileno())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._failures is not None:
            self._failures.close()
        if self._writer is not None:
            # What is finished is worth keeping even if the run broke off.
            self._writer.__exit__(None, None, None)


def _prefix(rank: int) -> str:
    return f"labels-{rank:04d}"
