"""Writing RLDS folders that tensorflow-datasets reads too: TFRecord shards, features.json, dataset_info.json."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spear_lightning.errors import DataError
from spear_lightning.robot_data.example_wire import serialize_example
from spear_lightning.robot_data.rlds_folder import Feature
from spear_lightning.robot_data.tfrecord import write_records

_CORE = "tensorflow_datasets.core.features"
_CLASSES = {
    "tensor": f"{_CORE}.tensor_feature.Tensor",
    "scalar": f"{_CORE}.scalar.Scalar",
    "image": f"{_CORE}.image_feature.Image",
    "text": f"{_CORE}.text_feature.Text",
}
_STEP_FLAGS = ("is_first", "is_last", "is_terminal")


def scalar(key: str, dtype: str, per_step: bool = True) -> Feature:
    """Describe a single number."""
    return Feature(key, per_step, "tensor", (), dtype, "none")


def vector(key: str, width: int, dtype: str = "float32", per_step: bool = True) -> Feature:
    """Describe `width` numbers."""
    return Feature(key, per_step, "tensor", (width,), dtype, "none")


def jpeg(key: str, height: int, width: int) -> Feature:
    """Describe a JPEG picture per step."""
    return Feature(key, True, "image", (height, width, 3), "uint8", "jpeg")


def png(key: str, height: int, width: int) -> Feature:
    """Describe a PNG picture per step."""
    return Feature(key, True, "image", (height, width, 3), "uint8", "png")


def text(key: str, per_step: bool = True) -> Feature:
    """Describe a text."""
    return Feature(key, per_step, "text", (), "", "none")


STEP_FLAGS = tuple(scalar(key, "bool") for key in _STEP_FLAGS)
"""The three flags that every RLDS step has."""

STEP_ENDS = (scalar("discount", "float32"), scalar("reward", "float32"), *STEP_FLAGS)
"""What else RLDS knows of a step; see `step_ends`."""


def step_ends(steps: int) -> dict[str, np.ndarray]:
    """Return the values of `STEP_ENDS` of an episode of some steps that ends in success: reward 1 at its last."""
    number_T = np.arange(steps)
    return {
        "discount": np.ones(steps, np.float32),
        "reward": (number_T == steps - 1).astype(np.float32),
        "is_first": number_T == 0,
        "is_last": number_T == steps - 1,
        "is_terminal": number_T == steps - 1,
    }


@dataclass(frozen=True)
class RldsLayout:
    """Name, version and features of a data set to be written.

    Attributes:
        name: Name of the data set, of which its shards' names are made.
        version: "major.minor.patch".
        features: Everything an episode holds, `STEP_FLAGS` included.
    """

    name: str
    version: str
    features: tuple[Feature, ...]

    def serialize(self, episode: Mapping[str, np.ndarray | Sequence[bytes] | Sequence[str]]) -> bytes:
        """Serialise one episode of T steps.

        Args:
            episode: Feature key -> T values (one value for features of the episode): arrays for tensors,
                encoded pictures or strings otherwise.

        Raises:
            DataError: If a feature is missing, unknown, or has the wrong size.
        """
        keys = {feature.key for feature in self.features}
        if keys != set(episode):
            raise DataError(
                "The episode does not have the layout's features",
                where=self.name,
                found=f"missing {sorted(keys - set(episode))}, unknown {sorted(set(episode) - keys)}",
            )
        steps = len(next(episode[feature.key] for feature in self.features if feature.per_step))
        columns: dict[str, Sequence[bytes] | np.ndarray] = {}
        for feature in self.features:
            values = episode[feature.key]
            expected = steps if feature.per_step else 1
            if isinstance(values, np.ndarray):
                count, expected = values.size, expected * feature.size
                columns[feature.wire_key] = values
            else:
                count = len(values)
                columns[feature.wire_key] = [v.encode() if isinstance(v, str) else v for v in values]
            if count != expected:
                raise DataError(
                    "A feature of the episode has the wrong size",
                    where=f"{self.name}: {feature.key}",
                    found=f"{count} values",
                    expected=expected,
                )
        return serialize_example(columns)


def shard_name(layout: RldsLayout, split: str, index: int, count: int) -> str:
    """Return the file name of a shard."""
    return f"{layout.name}-{split}.tfrecord-{index:05d}-of-{count:05d}"


def write_shard(
    folder: Path, layout: RldsLayout, split: str, index: int, count: int, episodes: Iterable[bytes]
) -> list[int]:
    """Write one shard of serialised episodes; returns their lengths in bytes."""
    return write_records(folder / shard_name(layout, split, index, count), episodes)


def write_description(
    folder: Path, layout: RldsLayout, splits: Mapping[str, Sequence[Sequence[int]]], about: str
) -> None:
    """Write features.json and dataset_info.json: last, so that a folder with them is whole.

    Args:
        folder: The data set's version folder.
        layout: What was written.
        splits: Split -> for each shard the lengths of its episodes in bytes.
        about: What the data set is.
    """
    info = {
        "description": about,
        "fileFormat": "tfrecord",
        "moduleName": layout.name,
        "name": layout.name,
        "splits": [
            {
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "name": split,
                "numBytes": str(sum(sum(lengths) for lengths in shards)),
                "shardLengths": [str(len(lengths)) for lengths in shards],
            }
            for split, shards in splits.items()
        ],
        "version": layout.version,
    }
    for name, content in (("features.json", _features_json(layout.features)), ("dataset_info.json", info)):
        temporary = folder / f".{name}.{os.getpid()}.tmp"
        temporary.write_text(json.dumps(content, indent=2))
        os.replace(temporary, folder / name)


def _features_json(features: Iterable[Feature]) -> dict[str, Any]:
    steps = _dictionary()
    episode = _dictionary()
    for feature in features:
        _place(steps if feature.per_step else episode, feature.key.split("/"), _leaf(feature))
    episode["featuresDict"]["features"]["steps"] = {
        "pythonClassName": f"{_CORE}.dataset_feature.Dataset",
        "sequence": {"feature": steps, "length": "-1"},
    }
    return episode


def _dictionary() -> dict[str, Any]:
    return {"pythonClassName": f"{_CORE}.features_dict.FeaturesDict", "featuresDict": {"features": {}}}


def _place(node: dict[str, Any], path: list[str], leaf: dict[str, Any]) -> None:
    children = node["featuresDict"]["features"]
    if len(path) == 1:
        children[path[0]] = leaf
        return
    _place(children.setdefault(path[0], _dictionary()), path[1:], leaf)


def _leaf(feature: Feature) -> dict[str, Any]:
    shape = {"dimensions": [str(size) for size in feature.shape]} if feature.shape else {}
    if feature.kind == "image":
        image = {"shape": shape, "dtype": feature.dtype, "encodingFormat": feature.encoding}
        return {"pythonClassName": _CLASSES["image"], "image": image}
    if feature.kind == "text":
        return {"pythonClassName": _CLASSES["text"], "text": {}}
    name = _CLASSES["tensor"] if feature.shape else _CLASSES["scalar"]
    tensor = {"shape": shape, "dtype": feature.dtype, "encoding": feature.encoding}
    return {"pythonClassName": name, "tensor": tensor}
