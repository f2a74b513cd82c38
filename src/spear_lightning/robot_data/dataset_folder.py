"""Data sets of either format under one root: found and opened."""

from __future__ import annotations

from spear_lightning.errors import DataError
from spear_lightning.robot_data.dataset_entry import DatasetEntry
from spear_lightning.robot_data.lerobot_folder import LerobotFolder, is_lerobot, open_lerobot
from spear_lightning.robot_data.rlds_folder import RldsFolder, find_rlds, open_rlds
from spear_lightning.robot_data.storage import DataPath, data_path

DatasetFolder = RldsFolder | LerobotFolder
"""A data set on disk or in a bucket."""


def open_folder(folder: str | DataPath) -> DatasetFolder:
    """Open a data set: LeRobot if it has meta/info.json, else RLDS.

    Raises:
        DataError: If it is neither.
    """
    return open_lerobot(folder) if is_lerobot(folder) else open_rlds(folder)


def find_dataset(root: str | DataPath, entry: DatasetEntry) -> DatasetFolder:
    """Open a registry entry's data set under a data root: NAME/VERSION (RLDS) or NAME (LeRobot).

    Raises:
        DataError: If it is not there; says what is.
    """
    if entry.format == "rlds":
        return open_rlds(find_rlds(root, entry.name, entry.version))
    root = data_path(root)
    folder = root / entry.name
    if is_lerobot(folder):
        return open_lerobot(folder)
    there = sorted(path.name for path in root.iterdir())[:20] if root.is_dir() else "nothing: it does not exist"
    raise DataError(
        f"The LeRobot data set {entry.name} is not under the data root",
        where=folder,
        found=f"{root} holds {there}",
        expected=f"{entry.name}/meta/info.json",
        remedy="download it, or name another data root",
    )
