"""Looking through a mixture before training on it: what each data set holds, and what looks wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from spear_lightning.batches import RobotBatch
from spear_lightning.errors import SpearError
from spear_lightning.geometry import quaternions
from spear_lightning.robot_data.canonical import columns_of
from spear_lightning.robot_data.chunks import ChunkSpec, read_chunks
from spear_lightning.robot_data.dataset import EvenSamples, RobotDataset
from spear_lightning.robot_data.dataset_entry import DatasetEntry
from spear_lightning.robot_data.episode_index import EpisodeIndex
from spear_lightning.robot_data.images import CameraSpec
from spear_lightning.robot_data.registry import entry_of, read_registry
from spear_lightning.robot_data.robot_mixture import RobotMixture
from spear_lightning.robot_data.sample_source import SampleSource
from spear_lightning.robot_data.statistics import MixtureStatistics

FRAMES_LOOKED_AT = 50_000
"""Per data set, evenly spaced."""

ROOM_M = 0.05
"""Positions may lie this far outside of the range that is known."""

FASTEST_M_S, FASTEST_RAD_S = 2.0, 6.3
"""Faster motion from one frame to the next is a jump."""

FEW = 0.01
"""A smaller share of frames with something odd is not worth a word."""

NO_ROTATION = 0.02
"""Off by more, a quaternion is not of unit length, a matrix not orthogonal, an angle above a turn."""

AGAINST = -0.5
"""Correlation of the commanded with the measured openness below which the sign of one must be wrong."""


@dataclass
class DatasetFindings:
    """What was found in a data set.

    Attributes:
        dataset: Registry id.
        problems: Sentences; empty if all is well.
        usable: Whether it can be trained on; if not, everything else keeps its default.
        episodes: Number of episodes.
        frames: Number of frames.
        samples: Frames that may start a chunk and are trained on.
        rate_hz: Their rate.
        cameras: Camera -> share of the episodes in which it shows something.
        worded: Share of the episodes with an instruction.
        share: Share of the samples of the mixture.
        position_m: (2, 3) 1 % and 99 % of the positions, base frame.
        translation_m: (2, 3) 1 % and 99 % of its own chunk translations.
        outside: Share of its targets with an axis outside of the mixture's 1 % to 99 %.
        clipped: Share of its targets that the normaliser's clamp cuts.
        examples: A few samples as the model sees them; None if they cannot be shown.
    """

    dataset: str
    problems: list[str] = field(default_factory=list)
    usable: bool = False
    episodes: int = 0
    frames: int = 0
    samples: int = 0
    rate_hz: float = 0.0
    cameras: dict[str, float] = field(default_factory=dict)
    worded: float = 0.0
    share: float = 0.0
    position_m: np.ndarray = field(default_factory=lambda: np.zeros((2, 3)))
    translation_m: np.ndarray = field(default_factory=lambda: np.zeros((2, 3)))
    outside: float = 0.0
    clipped: float = 0.0
    examples: RobotBatch | None = None


@dataclass(frozen=True)
class MixtureFindings:
    """What was found in a mixture; its statistics are those of the data sets that can be used."""

    datasets: list[DatasetFindings]
    statistics: MixtureStatistics | None


def check_mixture(
    options: Mapping[str, Any], cameras: Mapping[str, CameraSpec], clamp: float | None, examples: int = 3
) -> MixtureFindings:
    """Look through a mixture; builds missing indexes.

    Args:
        options: Arguments of `RobotMixture`.
        cameras: What the model sees.
        clamp: Largest normalised translation, None: all.
        examples: Samples to show of every data set.
    """
    entries = read_registry(options.get("registry"))
    findings = [DatasetFindings(dataset) for dataset in options["weights"]]
    for each in findings:
        try:
            entry_of(each.dataset, entries)
            # On its own first: one data set that is missing shall not hide the others.
            RobotMixture(**{**options, "weights": {each.dataset: 1.0}, "shares": None})
            each.usable = True
        except SpearError as error:
            each.problems.append(str(error))
    used = [each.dataset for each in findings if each.usable]
    if not used:
        return MixtureFindings(findings, None)
    weights = {dataset: weight for dataset, weight in options["weights"].items() if dataset in used}
    shares = _shares_left(options.get("shares") or {}, list(weights), len(findings) > len(used))
    mixture = RobotMixture(**{**options, "weights": weights, "shares": shares})
    statistics = mixture.statistics()
    for source, share in zip(mixture.training, mixture.shares, strict=True):
        (each,) = (each for each in findings if each.dataset == source.index.dataset)
        each.share = float(share)
        _describe(each, source)
        _measure(each, source, mixture.chunks, statistics, clamp)
        each.problems += suspicions(source.index, entry_of(each.dataset, entries))
        _show(each, source, mixture.chunks, cameras, examples)
    return MixtureFindings(findings, statistics)


def _shares_left(fixed: Mapping[str, float], used: list[str], some_missing: bool) -> dict[str, float] | None:
    """Return the fixed shares of what is left of a mixture, enlarged by what is missing."""
    left = {dataset: share for dataset, share in fixed.items() if dataset in used}
    if not left or not some_missing:
        return left or None
    whole = sum(left.values()) if len(left) == len(used) else 1 - sum(fixed.values()) + sum(left.values())
    return {dataset: share / whole for dataset, share in left.items()}


def _describe(each: DatasetFindings, source: SampleSource) -> None:
    index = source.index
    each.episodes, each.frames, each.samples = index.num_episodes, len(index), len(source)
    each.rate_hz = index.rate_hz
    each.cameras = {camera: float(index.camera_present(camera).mean()) for camera in index.cameras}
    worded = np.array([bool(text) for text in index.instructions])
    each.worded = float(worded[np.asarray(index.instruction_ids)].mean())
    for problem, count in index.description["problems"].items():
        each.problems.append(f"{problem}: {count:,}, first in {index.description['problem_examples'][problem]}")


def _measure(
    each: DatasetFindings,
    source: SampleSource,
    chunks: ChunkSpec,
    statistics: MixtureStatistics,
    clamp: float | None,
) -> None:
    part = read_chunks(source.index, source.frames(_spread(len(source))), chunks)
    translation_n3 = part.actions[part.mask][:, :3].double().numpy()
    each.position_m = np.quantile(part.state[:, :3].numpy(), (0.01, 0.99), axis=0)
    each.translation_m = np.quantile(translation_n3, (0.01, 0.99), axis=0)
    low_3, high_3 = np.array(statistics.translation_low), np.array(statistics.translation_high)
    normalised_n3 = np.abs(2 * (translation_n3 - low_3) / np.maximum(high_3 - low_3, 1e-9) - 1)
    each.outside = float((normalised_n3 > 1).any(axis=1).mean())
    each.clipped = 0.0 if clamp is None else float((normalised_n3 > clamp).any(axis=1).mean())


def _spread(count: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(count, FRAMES_LOOKED_AT)).astype(np.int64))


def suspicions(index: EpisodeIndex, entry: DatasetEntry) -> list[str]:
    """Return what looks wrong with the numbers of an index, in sentences."""
    found = []
    frames = _spread(len(index))
    pose_n7 = np.asarray(index.pose[frames])
    if entry.position_low_m is not None and entry.position_high_m is not None:
        # What is known was recorded in the robot's own axes.
        own_n3 = pose_n7[:, :3] @ entry.base_matrix()
        low_3, high_3 = np.array(entry.position_low_m) - ROOM_M, np.array(entry.position_high_m) + ROOM_M
        outside = float(((own_n3 < low_3) | (own_n3 > high_3)).any(axis=1).mean())
        if outside > FEW:
            found.append(
                f"{100 * outside:.0f} % of the positions lie outside of what is known of this data set "
                f"({entry.position_low_m} to {entry.position_high_m} m): another unit, frame or version?"
            )
    found += _rotation_suspicions(index, entry, frames)
    inner = frames[~np.isin(frames + 1, index.episode_starts)]
    now_n7, next_n7 = torch.from_numpy(index.pose[inner]), torch.from_numpy(index.pose[inner + 1])
    speed_n = torch.linalg.vector_norm(next_n7[:, :3] - now_n7[:, :3], dim=-1) * index.rate_hz
    turn_n = quaternions.rotation_angle(now_n7[:, 3:], next_n7[:, 3:]) * index.rate_hz
    jumps = int(((speed_n > FASTEST_M_S) | (turn_n > FASTEST_RAD_S)).sum())
    if jumps > FEW * len(inner):
        found.append(
            f"{jumps:,} of {len(inner):,} frames jump (above {FASTEST_M_S:g} m/s or {FASTEST_RAD_S:g} rad/s): "
            "a wrong rotation convention, or a wrong rate?"
        )
    found += _gripper_suspicions(index, entry, frames)
    for camera in index.cameras:
        dark = 1 - float(index.camera_present(camera).mean())
        if dark == 1:
            found.append(f"camera {camera} shows nothing in any episode")
    return found


def _rotation_suspicions(index: EpisodeIndex, entry: DatasetEntry, frames: np.ndarray) -> list[str]:
    """Say if what is stored as rotations is none: other columns would be normalised without a word."""
    stored_n = columns_of(entry.rotation, {entry.rotation.key: np.asarray(index.raw(entry.rotation.key)[frames])})
    if entry.rotation_convention.startswith("quat"):
        off_n = np.abs(np.linalg.norm(stored_n, axis=1) - 1)
    elif entry.rotation_convention == "matrix_colmajor":
        matrix_n33 = stored_n.reshape(-1, 4, 4)[:, :3, :3]
        off_n = np.abs(matrix_n33 @ matrix_n33.transpose(0, 2, 1) - np.eye(3)).max(axis=(1, 2))
        # A reflection is as orthogonal as a rotation.
        off_n = np.maximum(off_n, np.abs(np.linalg.det(matrix_n33) - 1))
    else:
        off_n = np.maximum(np.abs(stored_n).max(axis=1) - 2 * np.pi, 0)
    wrong = float((off_n > NO_ROTATION).mean())
    if wrong <= FEW:
        return []
    return [
        f"{100 * wrong:.0f} % of the stored rotations are none as {entry.rotation_convention} (off by up to "
        f"{off_n.max():.2g}): other columns, or another convention?"
    ]


def _gripper_suspicions(index: EpisodeIndex, entry: DatasetEntry, frames: np.ndarray) -> list[str]:
    later = np.minimum(
        frames + max(1, round(0.5 * index.rate_hz)), index.episode_starts[index.episode_of(frames) + 1] - 1
    )
    command_n, state_n = np.asarray(index.gripper_command[frames]), np.asarray(index.gripper_state[later])
    if np.ptp(command_n) == 0 or np.ptp(state_n) == 0:
        return ["the gripper is never told to move" if np.ptp(command_n) == 0 else "the gripper never moves"]
    both_recorded = entry.gripper_state is not None and entry.gripper_command is not None
    together = float(np.corrcoef(command_n, state_n)[0, 1])
    if both_recorded and len(frames) >= 50 and together < AGAINST:
        return [
            f"the measured gripper does the opposite of what it is told (correlation {together:.2f} half a second "
            "later): the sign of one of them is wrong"
        ]
    return []


def _show(
    each: DatasetFindings, source: SampleSource, chunks: ChunkSpec, cameras: Mapping[str, CameraSpec], count: int
) -> None:
    there = {name: spec for name, spec in cameras.items() if (spec.source or name) in source.index.cameras}
    if not there:
        each.problems.append(
            f"it has none of the cameras {sorted(cameras)}, only {source.index.cameras}: all pictures are masked"
        )
        return
    samples = EvenSamples([len(source)], count)
    dataset = RobotDataset([source], samples, there, chunks)
    try:
        each.examples = dataset.__getitems__(range(len(samples)))
    except SpearError as error:
        each.problems.append(str(error))
    if dataset.broken_images:
        each.problems.append(f"{dataset.broken_images} of the pictures shown here cannot be decoded")
