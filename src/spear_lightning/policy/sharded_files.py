"""Checkpoints that many processes have written together: a folder of safetensors files and one of plain values.

The tensor files are those of torch's distributed checkpoints in the safetensors format: a tensor may lie in
several files, each of which says in its header where its piece begins. `meta.pt` holds all else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from spear_lightning.errors import CheckpointError

META_FILE = "meta.pt"
"""File of plain values; it is written last, so that a folder with it is complete."""

FILE_LIST = "files.json"
"""File name -> bytes of each file of tensors: a copy of the folder that lacks one is told from a whole one."""

STATE, AVERAGES, OPTIMIZER = "state_dict.", "ema.", "optimizer."
"""What names of tensors begin with: weights, their averages, the optimizer's state (`optimizer.KEY.NAME`)."""


@dataclass(frozen=True)
class _Piece:
    file: Path
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


class SavedTensors(Mapping[str, Tensor]):
    """The tensors of a folder whose names begin with a prefix; each is read, and put together, when asked for.

    Args:
        folder: The checkpoint.
        prefix: Beginning of the names, which is left out.

    Raises:
        CheckpointError: If a file cannot be read.
    """

    def __init__(self, folder: Path, prefix: str) -> None:
        self.prefix = prefix
        self._pieces = {
            name[len(prefix) :]: pieces for name, pieces in _pieces_of(folder).items() if name.startswith(prefix)
        }

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        pieces, wanted = self._pieces[name], math.prod(self.shape(name))
        found = sum(math.prod(piece.shape) for piece in pieces)
        if found != wanted:
            raise CheckpointError(
                "A tensor of the checkpoint is not whole: a file is missing",
                where=f"{pieces[0].file.parent}, {name}",
                found=f"{found} numbers in {len(pieces)} files",
                expected=f"{wanted}",
                remedy="copy the folder again",
            )
        whole: Tensor | None = None
        for piece in pieces:
            with safe_open(piece.file, framework="pt") as file:
                part = file.get_tensor(self.prefix + name)
            if len(pieces) == 1:
                return part
            whole = torch.empty(self.shape(name), dtype=part.dtype) if whole is None else whole
            region = tuple(
                slice(start, start + length) for start, length in zip(piece.offsets, part.shape, strict=True)
            )
            whole[region] = part
        assert whole is not None
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a whole tensor."""
        ends = [
            [start + length for start, length in zip(piece.offsets, piece.shape, strict=True)]
            for piece in self._pieces[name]
        ]
        return tuple(max(column) for column in zip(*ends, strict=True))


def read_meta(folder: Path) -> dict[str, Any]:
    """Read the plain values of a checkpoint.

    Raises:
        CheckpointError: If there are none, or they cannot be read.
    """
    path = folder / META_FILE
    _require_whole(folder)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, UnpicklingError) as error:
        raise CheckpointError(
            "The folder is no complete checkpoint",
            where=path,
            found=f"{type(error).__name__}: {error}",
            remedy="take an older checkpoint of the run",
        ) from error


def write_file_list(folder: Path) -> None:
    """Write down which files of tensors there are."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}
    (folder / FILE_LIST).write_text(json.dumps(sizes, indent=1))


def _require_whole(folder: Path) -> None:
    """Compare the files of a checkpoint with its list; checkpoints of older versions have none."""
    path = folder / FILE_LIST
    try:
        listed = json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise CheckpointError("A checkpoint's list of files cannot be read", where=path, found=error) from error
    there = {file.name: file.stat().st_size for file in folder.glob("*.safetensors")}
    wrong = [name for name, size in listed.items() if there.get(name) != size]
    if wrong:
        raise CheckpointError(
            "The folder is no complete checkpoint",
            where=folder,
            found=f"{len(wrong)} of {len(listed)} files missing or of another size, as {wrong[0]}",
            remedy="copy the folder again, or take an older checkpoint of the run",
        )


def read_folder(folder: Path, optimizer: bool = False) -> dict[str, Any]:
    """Read a checkpoint as if one process had written it to one file.

    Args:
        folder: The checkpoint.
        optimizer: Whether to read the optimizers' state too.

    Returns:
        Lightning's entries; `state_dict` and `ema` read their tensors when these are asked for.

    Raises:
        CheckpointError: If it is incomplete.
    """
    meta = read_meta(folder)
    optimizers = meta.pop("optimizer_states", [])
    checkpoint = {**meta, "state_dict": SavedTensors(folder, STATE), "ema": SavedTensors(folder, AVERAGES)}
    if optimizer:
        checkpoint["optimizer_states"] = [_numbered_state(folder, state) for state in optimizers]
    return checkpoint


def _numbered_state(folder: Path, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state as torch has it: parameters are numbered in the order of the groups."""
    names = [name for group in saved["param_groups"] for name in group["params"]]
    numbers = {name: number for number, name in enumerate(names)}
    state: dict[int, dict[str, Any]] = {
        numbers[name]: {key: torch.tensor(value) for key, value in scalars.items()}
        for name, scalars in saved["scalars"].items()
    }
    tensors = SavedTensors(folder, OPTIMIZER)
    for full_name in tensors:
        key, name = full_name.split(".", 1)
        state[numbers[name]][key] = tensors[full_name]
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in saved["param_groups"]]
    return {"state": state, "param_groups": groups}


def _pieces_of(folder: Path) -> dict[str, list[_Piece]]:
    from safetensors import SafetensorError, safe_open

    found: dict[str, list[_Piece]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                places = json.loads((file.metadata() or {})["DCP_SHARDING_INFO"])
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    shape = tuple(file.get_slice(name).get_shape())
                    found.setdefault(name, []).append(_Piece(path, tuple(places[name]["saved_offsets"]), shape))
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                "A file of the checkpoint cannot be read", where=path, found=f"{type(error).__name__}: {error}"
            ) from error
    return found
