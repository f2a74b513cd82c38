"""What an experiment's YAML says about its data, read without Lightning: for commands that only look at data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from spear_lightning.errors import ConfigError
from spear_lightning.robot_data.chunks import ChunkSpec
from spear_lightning.robot_data.images import CameraSpec

MIXTURE_OPTIONS = (
    "root",
    "mixture",
    "weighting",
    "holdout",
    "keep_without_instruction",
    "seed",
    "index_folder",
    "shares",
    "registry",
)
"""Options of the data module that decide which frames are trained on."""

DEFAULT_CLAMP = 1.5
"""Of the policy's normaliser, where an experiment does not say."""


def read_data_options(configs: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of an experiment's data module.

    Args:
        configs: YAML files; later ones win.

    Raises:
        ConfigError: If a file cannot be read, or they name no data root and mixture.
    """
    options: dict[str, Any] = {}
    for content in _contents(configs):
        data = content.get("data")
        if isinstance(data, dict):
            options.update(data.get("init_args", data))
    if "root" not in options or "mixture" not in options:
        raise ConfigError(
            "The experiment names no robot data",
            where=", ".join(configs),
            expected="data.init_args.root and data.init_args.mixture",
        )
    return options


def mixture_options(data: dict[str, Any]) -> dict[str, Any]:
    """Return those of a data module's arguments that `RobotMixture` takes, under its names.

    Raises:
        ConfigError: If the chunks are wrong.
    """
    given = {name: data[name] for name in MIXTURE_OPTIONS if name in data}
    given["weights"] = given.pop("mixture")
    try:
        return {**given, "chunks": ChunkSpec(**(data.get("chunks") or {}))}
    except TypeError as error:
        raise ConfigError("The experiment's chunks are wrong", where="data.chunks", found=error) from error


def camera_options(data: dict[str, Any]) -> dict[str, CameraSpec]:
    """Return the cameras of a data module's arguments.

    Raises:
        ConfigError: If one is wrong.
    """
    try:
        return {name: CameraSpec(**fields) for name, fields in (data.get("cameras") or {}).items()}
    except (TypeError, AttributeError) as error:
        raise ConfigError("The experiment's cameras are wrong", where="data.cameras", found=error) from error


def normalizer_clamp(configs: Sequence[str]) -> float | None:
    """Return the largest normalised translation that an experiment's policy sees; None: all."""
    clamp: float | None = DEFAULT_CLAMP
    for content in _contents(configs):
        node: Any = content.get("model")
        for name in ("policy", "normalizer"):
            node = _arguments(node).get(name)
        clamp = _arguments(node).get("clamp", clamp)
    return clamp


def _arguments(node: Any) -> dict[str, Any]:
    arguments = node.get("init_args") if isinstance(node, dict) else None
    return arguments if isinstance(arguments, dict) else {}


def _contents(configs: Sequence[str]) -> list[dict[str, Any]]:
    contents = []
    for config in configs:
        try:
            content = yaml.safe_load(Path(config).read_text())
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError("The experiment cannot be read", where=config, found=error) from error
        contents.append(content if isinstance(content, dict) else {})
    return contents
