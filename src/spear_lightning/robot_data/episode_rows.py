"""One episode's numbers -> its rows of the index, whatever format it was read from.

Steps whose pose was not measured cut an episode in two: what is left of it are runs, each an episode of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from spear_lightning.errors import DataError
from spear_lightning.geometry import quaternions
from spear_lightning.robot_data.canonical import (
    canonical_pose,
    columns_of,
    gripper_command,
    gripper_state,
    rotation_of,
)
from spear_lightning.robot_data.dataset_entry import DatasetEntry, IdleFilter, RotationColumns

SAME_ROTATION_RAD = 0.02
"""A rotation that is stored twice may differ by this much."""


class SkippedEpisode(Exception):
    """An episode cannot be used; the text says why."""


@dataclass
class EpisodeRows:
    """The N kept steps of an episode of T, in R runs.

    Attributes:
        rows: Name -> (N, ...), see `EpisodeIndex`; also "usable": which steps may start a chunk.
        kept_T: Which of the steps they are.
        lengths_R: int64, steps of each run.
        problems: What was found -> how many steps.
    """

    rows: dict[str, np.ndarray]
    kept_T: np.ndarray
    lengths_R: np.ndarray
    problems: dict[str, int]


def episode_rows(entry: DatasetEntry, streams: Mapping[str, np.ndarray]) -> EpisodeRows:
    """Make the rows of an episode.

    Args:
        entry: The data set's conventions.
        streams: Step feature -> (T, n), all that `DatasetEntry.required_keys` names.

    Raises:
        SkippedEpisode: If it cannot be used.
    """
    steps = len(streams[entry.position.key])
    if steps == 0:
        raise SkippedEpisode("no steps")
    if any(len(values) != steps for values in streams.values()):
        raise SkippedEpisode("features of different length")
    if not all(np.isfinite(values).all() for values in streams.values()):
        raise SkippedEpisode("non-finite state or action")
    try:
        # Commands hold from step to step, so they are read before steps are left out.
        gripper = {
            "gripper_state": gripper_state(entry, streams),
            "gripper_command": gripper_command(entry, streams),
        }
    except DataError as error:
        raise SkippedEpisode("relative gripper commands beyond 1") from error
    kept_T = measured_steps(entry, streams)
    if not kept_T.any():
        raise SkippedEpisode("no measured pose")
    kept = {key: values[kept_T] for key, values in streams.items()}
    lengths_R = _runs(kept_T)
    rows = {f"stream/{key}": values for key, values in kept.items()}
    rows["pose"] = _poses(entry, kept)
    rows |= {name: values[kept_T] for name, values in gripper.items()}
    # The last step of a run has no motion after it.
    usable_N = np.ones(len(rows["pose"]), bool)
    usable_N[np.cumsum(lengths_R) - 1] = False
    usable_N &= np.flatnonzero(kept_T) >= entry.skip_first_steps
    if entry.idle is not None:
        usable_N &= ~_idle(entry.idle, entry.rate_hz, rows["pose"], rows["gripper_command"], lengths_R)
    rows["usable"] = usable_N
    problems = {"steps left out: no measured pose": int((~kept_T).sum())}
    if entry.same_rotation is not None:
        one, other = RotationColumns(entry.rotation, entry.rotation_convention), entry.same_rotation
        apart_N = quaternions.rotation_angle(
            quaternions.normalize(rotation_of(one, kept)), quaternions.normalize(rotation_of(other, kept))
        )
        problems["steps whose two stored rotations disagree (kept)"] = int((apart_N > SAME_ROTATION_RAD).sum())
    return EpisodeRows(rows, kept_T, lengths_R, {name: count for name, count in problems.items() if count})


def measured_steps(entry: DatasetEntry, streams: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return which steps have a measured pose, bool (T,)."""
    position_T3 = columns_of(entry.position, streams)
    kept_T = np.ones(len(position_T3), bool)
    if entry.drop_zero_position:
        kept_T &= (position_T3 != 0).any(axis=1)
    if entry.drop_beyond_m is not None:
        kept_T &= (np.abs(position_T3) < entry.drop_beyond_m).all(axis=1)
    return kept_T


def _poses(entry: DatasetEntry, streams: Mapping[str, np.ndarray]) -> np.ndarray:
    try:
        with np.errstate(invalid="ignore", divide="ignore"):
            pose_N7 = canonical_pose(entry, streams)
    except DataError as error:
        raise SkippedEpisode("matrices that are no poses") from error
    if not np.isfinite(pose_N7).all():
        raise SkippedEpisode("rotation that is none (zero quaternion or matrix)")
    return pose_N7


def _runs(kept_T: np.ndarray) -> np.ndarray:
    """Return the lengths of the runs of kept steps, int64."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], kept_T, [False]]).astype(np.int8)))
    return (edges[1::2] - edges[::2]).astype(np.int64)


def _idle(
    idle: IdleFilter, rate_hz: float, pose_N7: np.ndarray, command_N: np.ndarray, lengths_R: np.ndarray
) -> np.ndarray:
    """Return at which steps nothing moves until `idle.seconds` later (or the end of the run), bool (N,)."""
    window = max(1, round(idle.seconds * rate_hz))
    last_N = np.repeat(np.cumsum(lengths_R) - 1, lengths_R)
    still_N = np.ones(len(pose_N7), bool)
    pose = torch.from_numpy(pose_N7)
    for ahead in range(1, window + 1):
        later_N = np.minimum(np.arange(len(pose_N7)) + ahead, last_N)
        moved_N = torch.linalg.vector_norm(pose[later_N, :3] - pose[:, :3], dim=-1)
        turned_N = quaternions.rotation_angle(pose[later_N, 3:], pose[:, 3:])
        still_N &= ((moved_N < idle.metres) & (turned_N < idle.radians)).numpy()
        # Commands of the steps before count: that of step t leads to t + 1.
        still_N &= command_N[np.minimum(np.arange(len(command_N)) + ahead - 1, last_N)] == command_N
    return still_N
