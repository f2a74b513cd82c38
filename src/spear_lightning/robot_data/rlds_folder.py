"""What an RLDS folder says about itself: `features.json` and `dataset_info.json`, read without TensorFlow."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, Literal

from spear_lightning.errors import DataError, SpearError
from spear_lightning.robot_data.storage import DataPath, data_path

Kind = Literal["tensor", "image", "text", "other"]


@dataclass(frozen=True)
class Feature:
    """One leaf of features.json.

    Attributes:
        key: Its name, levels joined by "/"; features of a step have no "steps/" in front.
        per_step: Whether it has a value for every step, or one for the episode.
        kind: What it is.
        shape: Shape of one value; () for a scalar or text.
        dtype: NumPy name of the type it was declared with ("float32", "bool", ...; "" for text).
        encoding: How tensors are stored: "none", "zlib" or "bytes"; for images "jpeg" or "png".
    """

    key: str
    per_step: bool
    kind: Kind
    shape: tuple[int, ...]
    dtype: str
    encoding: str

    @property
    def wire_key(self) -> str:
        """Name of the feature inside a `tf.train.Example`."""
        return f"steps/{self.key}" if self.per_step else self.key

    @property
    def size(self) -> int:
        """Numbers in one value."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class RldsFolder:
    """An RLDS data set on disk: one version of one data set.

    Attributes:
        path: Folder with features.json, dataset_info.json and the shards.
        name: Name in dataset_info.json, of which the shards' names are made (not always the folder's).
        version: Version in dataset_info.json.
        features: Step features by key (without "steps/") and episode features by key.
        shards: Split -> (shard file, episodes in it).
    """

    path: DataPath
    name: str
    version: str
    features: dict[str, Feature]
    shards: dict[str, list[tuple[DataPath, int]]]

    def require_split(self, split: str) -> list[tuple[DataPath, int]]:
        """Return the shards of a split.

        Raises:
            DataError: If there is no such split.
        """
        if split not in self.shards:
            raise DataError(
                "The data set has no such split",
                where=self.path / "dataset_info.json",
                found=split,
                expected=f"one of {sorted(self.shards)}",
            )
        return self.shards[split]


def find_rlds(root: str | DataPath, name: str, version: str) -> DataPath:
    """Return the folder `root/name/version`.

    Raises:
        DataError: If it is not there; says what is.
    """
    root = data_path(root)
    if not root.is_dir():
        raise DataError(
            "The data root does not exist",
            where="data.root",
            found=root,
            expected=f"a folder that holds {name}/{version}",
            remedy="set --data.root to the folder your RLDS data sets are in",
        )
    folder = root / name / version
    if folder.is_dir():
        return folder
    inside = root / name if (root / name).is_dir() else root
    there = sorted(path.name for path in inside.iterdir() if path.is_dir())[:20]
    raise DataError(
        f"The data set {name} {version} is not under the data root",
        where=folder,
        found=f"{inside} holds {there or 'no folders'}",
        expected=f"{name}/{version}",
        remedy="download it, or name another data root or version",
    )


def open_rlds(folder: str | DataPath) -> RldsFolder:
    """Read the description of an RLDS folder.

    Raises:
        DataError: If a file is missing or cannot be understood.
    """
    folder = data_path(folder)
    description = _read_json(folder, "dataset_info.json")
    tree = _read_json(folder, "features.json")
    features: dict[str, Feature] = {}
    _collect(tree, "", False, features)
    if not any(feature.per_step for feature in features.values()):
        raise DataError(
            "The folder holds no episodes",
            where=folder / "features.json",
            found=sorted(features)[:10],
            expected="a feature `steps` that is a Dataset (RLDS)",
        )
    name = str(description.get("name", ""))
    shards = {split["name"]: _shards(folder, name, split) for split in description.get("splits", [])}
    return RldsFolder(folder, name, str(description.get("version", "")), features, shards)


def _read_json(folder: DataPath, name: str) -> dict[str, Any]:
    path = folder / name
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        inside = sorted(entry.name for entry in folder.iterdir())[:10] if folder.is_dir() else "nothing there"
        raise DataError(
            "This is not an RLDS folder",
            where=folder,
            found=inside,
            expected=f"{name} beside the TFRecord shards",
            remedy="give the folder of one version of one data set, e.g. bridge_dataset/1.0.0",
        ) from error
    except SpearError:
        raise
    except (ValueError, OSError) as error:
        raise DataError("A description file cannot be read", where=path, found=error) from error
    if not isinstance(content, dict):
        raise DataError("A description file cannot be read", where=path, expected="a JSON object")
    return content


def _shards(folder: DataPath, name: str, split: dict[str, Any]) -> list[tuple[DataPath, int]]:
    lengths = [int(length) for length in split.get("shardLengths", [])]
    template = split.get("filepathTemplate") or "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    shards = []
    for index, length in enumerate(lengths):
        file = template
        for field, value in {
            "{DATASET}": name,
            "{SPLIT}": split["name"],
            "{FILEFORMAT}": "tfrecord",
            "{SHARD_X_OF_Y}": f"{index:05d}-of-{len(lengths):05d}",
        }.items():
            file = file.replace(field, value)
        shards.append((folder / file, length))
    return shards


def _collect(node: dict[str, Any], prefix: str, per_step: bool, into: dict[str, Feature]) -> None:
    if "featuresDict" in node:
        for name, child in node["featuresDict"].get("features", {}).items():
            if name == "steps" and "sequence" in child and not prefix:
                _collect(child["sequence"]["feature"], "", True, into)
            else:
                _collect(child, f"{prefix}/{name}" if prefix else name, per_step, into)
        return
    kind: Kind = "other"
    shape: tuple[int, ...] = ()
    dtype, encoding = "", "none"
    for candidate in ("tensor", "image", "text"):
        if candidate in node:
            details = node[candidate]
            kind = candidate
            # Proto3 JSON writes 64-bit numbers as strings and leaves default values out.
            shape = tuple(int(size) for size in details.get("shape", {}).get("dimensions", []))
            dtype = details.get("dtype", "")
            encoding = details.get("encodingFormat") or details.get("encoding") or "none"
    into[prefix] = Feature(prefix, per_step, kind, shape, dtype, encoding)
