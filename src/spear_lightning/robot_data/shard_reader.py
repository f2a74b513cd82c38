"""One TFRecord shard of an RLDS data set -> the arrays of its part of the index."""

from __future__ import annotations

import zlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from spear_lightning.errors import DataError
from spear_lightning.robot_data.dataset_entry import DatasetEntry, EpisodeFilter
from spear_lightning.robot_data.episode_rows import SkippedEpisode, episode_rows
from spear_lightning.robot_data.example_wire import ByteSpans, Column, parse_example
from spear_lightning.robot_data.images import decode_image, image_format, is_blank
from spear_lightning.robot_data.rlds_folder import Feature, RldsFolder
from spear_lightning.robot_data.storage import DataPath
from spear_lightning.robot_data.tfrecord import read_records


@dataclass(frozen=True)
class ShardPlan:
    """What to read from every shard; plain values, so that it travels to worker processes.

    Attributes:
        entry: Conventions of the data set.
        features: Its features by key.
        blue_first: Cameras whose pictures this copy stores blue first.
        verify_images: Whether every image is decoded (slow), or its first and last bytes are looked at.
    """

    entry: DatasetEntry
    features: dict[str, Feature]
    blue_first: tuple[str, ...] = ()
    verify_images: bool = False

    def describe(self) -> dict[str, Any]:
        """Return what the index must know to read pictures."""
        return {"format": "rlds", "blue_first": list(self.blue_first)}

    def read(self, path: DataPath, episodes: int) -> ShardPart:
        """Read a shard (see `read_shard`)."""
        return read_shard(path, self, episodes)


@dataclass
class ShardPart:
    """What a shard adds to the index: N frames in E episodes.

    Attributes:
        arrays: Name -> rows, see `EpisodeIndex`.
        instructions: E instructions, "" where there is none.
        problems: What was skipped or missing -> how often.
        examples: The same -> where it was seen first.
    """

    arrays: dict[str, np.ndarray]
    instructions: list[str]
    problems: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)


def plan_shards(folder: RldsFolder, entry: DatasetEntry, verify_images: bool = False) -> ShardPlan:
    """Decide what to read, and check that the folder has what its entry promises.

    Raises:
        DataError: If a key is missing or too narrow.
    """
    steps = {key: feature for key, feature in folder.features.items() if feature.per_step}
    wrong = [
        f"{key}: {steps[key].size} numbers instead of at least {width}" if key in steps else f"{key}: missing"
        for key, width in entry.required_keys().items()
        if key not in steps or steps[key].size < width
    ]
    wrong += [
        f"{camera.key}: missing or no image"
        for camera in entry.cameras.values()
        if not camera.optional and (camera.key not in steps or steps[camera.key].kind != "image")
    ]
    if entry.instruction and not any(key in folder.features for key in entry.instruction):
        wrong.append(f"{' or '.join(entry.instruction)}: missing")
    if entry.episodes is not None and entry.episodes.key not in folder.features:
        wrong.append(f"{entry.episodes.key}: missing (says which episodes are used)")
    if wrong:
        raise DataError(
            f"The folder lacks features that the registry entry {entry.id!r} promises",
            where=folder.path / "features.json",
            found="; ".join(wrong),
            expected=f"step features like those there: {sorted(steps)}",
            remedy="check that it is the right copy of the data set, or the right --dataset",
        )
    there = {name: folder.features.get(camera.key) for name, camera in entry.cameras.items()}
    blue_first = tuple(
        name
        for name, feature in there.items()
        if feature is not None and entry.cameras[name].blue_first(feature.shape, feature.encoding)
    )
    return ShardPlan(entry, folder.features, blue_first, verify_images)


def read_shard(path: DataPath, plan: ShardPlan, expected: int) -> ShardPart:
    """Read a shard once.

    Args:
        path: The TFRecord file.
        plan: What to read.
        expected: Episodes that dataset_info.json promises.

    A broken episode inside a good shard is skipped and counted; so is a broken frame, whose neighbours stay.

    Raises:
        DataError: If the shard itself is missing, truncated or damaged.
    """
    part = ShardPart({}, [])
    rows: dict[str, list[np.ndarray]] = {}
    number = -1
    for number, (begin, payload) in enumerate(read_records(path)):
        where = f"{path.name}, episode {number}"
        try:
            episode, instructions = _read_episode(begin, payload, plan, part, where)
        except SkippedEpisode as reason:
            note(part, f"episodes skipped: {reason}", where)
            continue
        part.instructions.extend(instructions)
        for name, values in episode.items():
            rows.setdefault(name, []).append(values)
    if number + 1 != expected:
        raise DataError(
            "A shard does not hold the episodes that dataset_info.json promises",
            where=path,
            found=f"{number + 1} episodes",
            expected=expected,
            remedy="download this shard again: it may be cut between two episodes",
        )
    part.arrays = {name: np.concatenate(parts) for name, parts in rows.items()}
    return part


def note(part: ShardPart, problem: str, where: str, count: int = 1) -> None:
    """Count something that was skipped or missing."""
    part.problems[problem] += count
    part.examples.setdefault(problem, where)


def _read_episode(
    begin: int, payload: memoryview, plan: ShardPlan, part: ShardPart, where: str
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return the rows of an episode's runs, and the instruction of each run."""
    try:
        columns = parse_example(payload)
    except DataError as error:
        raise SkippedEpisode("not a tf.train.Example") from error
    entry = plan.entry
    if entry.episodes is not None and not _chosen(entry.episodes, plan, columns, payload):
        raise SkippedEpisode(f"left out on purpose, by {entry.episodes.key}")
    streams = {key: _numbers(plan.features[key], columns, payload) for key in entry.required_keys()}
    episode = episode_rows(entry, streams)
    for problem, count in episode.problems.items():
        note(part, problem, where, count)
    rows, kept_T, runs = episode.rows, episode.kept_T, len(episode.lengths_R)
    for name, camera in entry.cameras.items():
        feature = plan.features.get(camera.key)
        if feature is None:
            continue
        spans = columns.get(feature.wire_key)
        if not isinstance(spans, ByteSpans) or len(spans) != len(kept_T):
            raise SkippedEpisode(f"camera {name} without one image per step")
        good_T, present = _check_images(spans, payload, plan.verify_images)
        good_N = good_T[kept_T]
        if not good_N.all():
            note(part, f"frames skipped: broken image of camera {name}", where, int((~good_N).sum()))
        if not camera.optional:
            rows["usable"] &= good_N
        rows[f"camera/{name}/offset"] = begin + spans.offsets[kept_T]
        rows[f"camera/{name}/length"] = np.where(good_N, spans.lengths[kept_T], 0).astype(np.uint32)
        rows[f"camera/{name}/present"] = np.full(runs, present or not camera.optional)
    rows["length"] = episode.lengths_R
    instruction = _instruction(plan, columns, payload)
    if entry.instruction and not instruction:
        note(part, "episodes without an instruction (kept in the index)", where)
    return rows, [instruction] * runs


def _chosen(wanted: EpisodeFilter, plan: ShardPlan, columns: dict[str, Column], payload: memoryview) -> bool:
    """Return whether an episode is one of those that are used."""
    feature = plan.features[wanted.key]
    if wanted.contains is None:
        return bool(_numbers(feature, columns, payload).any())
    column = columns.get(feature.wire_key)
    texts = [column.take(payload, index) for index in range(len(column))] if isinstance(column, ByteSpans) else []
    return any(wanted.contains in text.decode("utf-8", "replace") for text in texts)


def _numbers(feature: Feature, columns: dict[str, Column], payload: memoryview) -> np.ndarray:
    """Return a step feature as (T, n)."""
    column = columns.get(feature.wire_key)
    if column is None:
        raise SkippedEpisode(f"feature {feature.key} is missing")
    if isinstance(column, ByteSpans):
        if feature.encoding not in ("zlib", "bytes"):
            raise SkippedEpisode(f"feature {feature.key} holds bytes")
        raw = [column.take(payload, index) for index in range(len(column))]
        try:
            decoded = [zlib.decompress(item) for item in raw] if feature.encoding == "zlib" else raw
        except zlib.error as error:
            raise SkippedEpisode(f"feature {feature.key} cannot be decompressed") from error
        column = np.frombuffer(b"".join(decoded), np.dtype(feature.dtype).newbyteorder("<"))
    if feature.size == 0 or len(column) % feature.size:
        raise SkippedEpisode(f"feature {feature.key} has {len(column)} numbers in all")
    narrow = {"bool": np.bool_, "float64": np.float32}.get(feature.dtype)
    values = column.astype(narrow) if narrow else column
    return values.reshape(-1, feature.size)


def _check_images(spans: ByteSpans, payload: memoryview, verify: bool) -> tuple[np.ndarray, bool]:
    """Return which images are whole (T,), and whether the first whole one shows anything."""
    good_T = np.zeros(len(spans), bool)
    present: bool | None = None
    for index in range(len(spans)):
        data = spans.take(payload, index)
        if image_format(data) == "broken":
            continue
        if not verify and present is not None:
            good_T[index] = True
            continue
        try:
            image_HW3 = decode_image(data, where="")
        except DataError:
            continue
        good_T[index] = True
        if present is None:
            present = not is_blank(image_HW3)
    return good_T, bool(present)


def _instruction(plan: ShardPlan, columns: dict[str, Column], payload: memoryview) -> str:
    for key in plan.entry.instruction:
        feature = plan.features.get(key)
        column = columns.get(feature.wire_key) if feature is not None else None
        if isinstance(column, ByteSpans) and len(column):
            text = column.take(payload, 0).decode("utf-8", "replace").strip()
            if text:
                return text
    return ""
