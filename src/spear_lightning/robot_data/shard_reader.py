"""One TFRecord shard of an RLDS data set -> the arrays of its part of the index."""

from __future__ import annotations

import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from spear_lightning.errors import DataError
from spear_lightning.robot_data.canonical import canonical_pose, gripper_command, gripper_state
from spear_lightning.robot_data.example_wire import ByteSpans, Column, parse_example
from spear_lightning.robot_data.images import decode_image, image_format, is_blank
from spear_lightning.robot_data.registry import DatasetEntry
from spear_lightning.robot_data.rlds_folder import Feature, RldsFolder
from spear_lightning.robot_data.tfrecord import read_records


@dataclass(frozen=True)
class ShardPlan:
    """What to read from every shard; plain values, so that it travels to worker processes.

    Attributes:
        entry: Conventions of the data set.
        features: Its features by key.
        verify_images: Whether every image is decoded (slow), or its first and last bytes are looked at.
    """

    entry: DatasetEntry
    features: dict[str, Feature]
    verify_images: bool = False


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
    if wrong:
        raise DataError(
            f"The folder lacks features that the registry entry {entry.id!r} promises",
            where=folder.path / "features.json",
            found="; ".join(wrong),
            expected=f"step features like those there: {sorted(steps)}",
            remedy="check that it is the right copy of the data set, or the right --dataset",
        )
    return ShardPlan(entry, folder.features, verify_images)


def read_shard(path: Path, plan: ShardPlan, expected: int) -> ShardPart:
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
            episode, instruction = _read_episode(begin, payload, plan, part, where)
        except _SkippedEpisode as reason:
            _note(part, f"episodes skipped: {reason}", where)
            continue
        part.instructions.append(instruction)
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


class _SkippedEpisode(Exception):
    """An episode cannot be used; the text says why."""


def _note(part: ShardPart, problem: str, where: str) -> None:
    part.problems[problem] += 1
    part.examples.setdefault(problem, where)


def _read_episode(
    begin: int, payload: memoryview, plan: ShardPlan, part: ShardPart, where: str
) -> tuple[dict[str, np.ndarray], str]:
    try:
        columns = parse_example(payload)
    except DataError as error:
        raise _SkippedEpisode("not a tf.train.Example") from error
    entry = plan.entry
    streams = {key: _numbers(plan.features[key], columns, payload) for key in entry.required_keys()}
    steps = len(streams[entry.position.key])
    if steps == 0:
        raise _SkippedEpisode("no steps")
    if any(len(values) != steps for values in streams.values()):
        raise _SkippedEpisode("features of different length")
    if not all(np.isfinite(values).all() for values in streams.values()):
        raise _SkippedEpisode("non-finite state or action")
    # The last step has no motion after it.
    usable_T = (np.arange(steps) >= entry.skip_first_steps) & (np.arange(steps) < steps - 1)
    rows: dict[str, np.ndarray] = {f"stream/{key}": values for key, values in streams.items()}
    try:
        with np.errstate(invalid="ignore", divide="ignore"):
            rows["pose"] = canonical_pose(entry, streams)
    except DataError as error:
        raise _SkippedEpisode("matrices that are no poses") from error
    if not np.isfinite(rows["pose"]).all():
        raise _SkippedEpisode("rotation that is none (zero quaternion or matrix)")
    for name, camera in entry.cameras.items():
        feature = plan.features.get(camera.key)
        if feature is None:
            continue
        spans = columns.get(feature.wire_key)
        if not isinstance(spans, ByteSpans) or len(spans) != steps:
            raise _SkippedEpisode(f"camera {name} without one image per step")
        good_T, present = _check_images(spans, payload, plan.verify_images)
        present = present or not camera.optional
        if not good_T.all():
            part.problems[f"frames skipped: broken image of camera {name}"] += int((~good_T).sum())
            part.examples.setdefault(f"frames skipped: broken image of camera {name}", where)
        if not camera.optional:
            usable_T &= good_T
        rows[f"camera/{name}/offset"] = begin + spans.offsets
        rows[f"camera/{name}/length"] = np.where(good_T, spans.lengths, 0).astype(np.uint32)
        rows[f"camera/{name}/present"] = np.array([present])
    rows["gripper_state"] = gripper_state(entry, streams)
    rows["gripper_command"] = gripper_command(entry, streams)
    rows["usable"] = usable_T
    rows["length"] = np.array([steps], np.int64)
    instruction = _instruction(plan, columns, payload)
    if entry.instruction and not instruction:
        _note(part, "episodes without an instruction (kept in the index)", where)
    return rows, instruction


def _numbers(feature: Feature, columns: dict[str, Column], payload: memoryview) -> np.ndarray:
    """Return a step feature as (T, n)."""
    column = columns.get(feature.wire_key)
    if column is None:
        raise _SkippedEpisode(f"feature {feature.key} is missing")
    if isinstance(column, ByteSpans):
        if feature.encoding not in ("zlib", "bytes"):
            raise _SkippedEpisode(f"feature {feature.key} holds bytes")
        raw = [column.take(payload, index) for index in range(len(column))]
        try:
            decoded = [zlib.decompress(item) for item in raw] if feature.encoding == "zlib" else raw
        except zlib.error as error:
            raise _SkippedEpisode(f"feature {feature.key} cannot be decompressed") from error
        column = np.frombuffer(b"".join(decoded), np.dtype(feature.dtype).newbyteorder("<"))
    if feature.size == 0 or len(column) % feature.size:
        raise _SkippedEpisode(f"feature {feature.key} has {len(column)} numbers in all")
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
