"""The data set registry: entries that ship with the package (oxe_registry.yaml), and a user's own."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from spear_lightning.errors import ConfigError
from spear_lightning.robot_data.dataset_entry import DatasetEntry, parse_entry
from spear_lightning.robot_data.storage import DataPath

Registry = Mapping[str, DatasetEntry]
"""Entries by id."""

SHIPPED = "oxe_registry.yaml"


@cache
def registry() -> Registry:
    """Return the entries that ship with the package, by id."""
    return parse_registry(_shipped_text(), SHIPPED)


def read_registry(path: str | Path | None) -> Registry:
    """Return the entries that ship with the package, and those of a user's file over them.

    Args:
        path: YAML in the form of oxe_registry.yaml; None: only what ships. An entry with the id of one that ships
            changes the fields that it names (a field is replaced as a whole); others are new.

    Raises:
        ConfigError: If the file cannot be read or understood.
    """
    if path is None:
        return registry()
    try:
        own = _parse(Path(path).expanduser().read_text(), str(path))
    except OSError as error:
        raise ConfigError("The registry file cannot be read", where="data.registry", found=error) from error
    shipped = _parse(_shipped_text(), SHIPPED)
    changed = {key: {**shipped.get(key, {}), **fields} for key, fields in own.items()}
    return {**registry(), **{key: parse_entry(key, fields, f"{path}: {key}") for key, fields in changed.items()}}


def entry_of(dataset: str, entries: Registry | None = None) -> DatasetEntry:
    """Return a registry entry by id (e.g. "bridge").

    Raises:
        ConfigError: If there is none; names the nearest.
    """
    entries = registry() if entries is None else entries
    if dataset in entries:
        return entries[dataset]
    close = difflib.get_close_matches(dataset, entries, n=3)
    raise ConfigError(
        "The registry has no such data set",
        where="data.mixture",
        found=dataset,
        expected=f"one of {sorted(entries)}" + (f"; did you mean {close[0]}?" if close else ""),
    )


def entry_for_folder(folder: DataPath, name: str, entries: Registry | None = None) -> DatasetEntry:
    """Return the registry entry of an RLDS folder NAME/VERSION.

    Args:
        folder: The folder.
        name: Its name in dataset_info.json, which may be another (DROID's is r2d2_faceblur).
        entries: The registry; default: what ships.

    Raises:
        ConfigError: If there is none.
    """
    entries = registry() if entries is None else entries
    for entry in entries.values():
        if entry.name in (name, folder.parent.name):
            return entry
    raise ConfigError(
        "The registry has no data set of this name",
        where=folder,
        found=name,
        expected=f"one of {sorted(entry.name for entry in entries.values())}",
        remedy="say which conventions apply with --dataset ID",
    )


def parse_registry(text: str, where: str) -> dict[str, DatasetEntry]:
    """Parse registry YAML.

    Raises:
        ConfigError: If an entry lacks a field or has a wrong one.
    """
    return {key: parse_entry(key, fields, f"{where}: {key}") for key, fields in _parse(text, where).items()}


def _shipped_text() -> str:
    return resources.files("spear_lightning.robot_data").joinpath(SHIPPED).read_text()


def _parse(text: str, where: str) -> dict[str, dict[str, Any]]:
    try:
        # The loader in C is ten times as fast as the one in Python; not every build of PyYAML has it.
        content = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise ConfigError("A registry is no YAML", where=where, found=error) from error
    if (
        not isinstance(content, dict)
        or content.get("schema") != 1
        or not isinstance(content.get("datasets"), dict)
    ):
        raise ConfigError("Not a data set registry", where=where, expected="schema: 1 and datasets: {ID: ...}")
    return {str(key): dict(fields) for key, fields in content["datasets"].items()}
