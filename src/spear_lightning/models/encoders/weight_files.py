"""Reading published weights from a file, a folder or the Hugging Face hub, and loading them exactly."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spear_lightning.errors import CheckpointError

INDEX_SUFFIX = ".safetensors.index.json"
"""End of the name of a file that lists the shards of a safetensors checkpoint."""

TRANSFORMERS_FILES = (f"model{INDEX_SUFFIX}", "model.safetensors", "pytorch_model.bin")
"""Names under which transformers saves weights, in the order they are looked for."""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def read_state_dict(weights: str, filenames: Sequence[str]) -> tuple[dict[str, Any], str]:
    """Read a weight file.

    Args:
        weights: A file, a folder, or a hub id such as `google/paligemma-3b-pt-224`.
        filenames: Names to look for in a folder or on the hub; the first that exists is taken. A name that
            ends in `.safetensors.index.json` stands for the shards it lists.

    Returns:
        What the file holds (tensors stay memory-mapped where the format allows it), and its path.

    Raises:
        CheckpointError: If there is no such file, it cannot be downloaded, or cannot be read.
    """
    given = Path(weights)
    if given.is_file():
        path = given
    elif given.is_dir():
        path = _find_in_folder(given, filenames)
    elif HUB_ID.fullmatch(weights):
        path = _find_on_hub(weights, filenames)
    else:
        raise CheckpointError(
            "There are no such weights",
            where=weights,
            expected="a file, a folder, or a hub id of the form owner/name",
            remedy="check the path",
        )
    if not path.name.endswith(INDEX_SUFFIX):
        return _read_file(path), str(path)
    state: dict[str, Any] = {}
    for shard in _shards_of(path):
        shard_path = path.parent / shard if given.exists() else _download(weights, shard)
        state.update(_read_file(shard_path))
    return state, str(path)


def load_exactly(
    module: nn.Module, state: Mapping[str, Any], where: object, allow_missing: Sequence[str] = ()
) -> None:
    """Load weights into a module, or say how the two differ and load nothing.

    Args:
        module: What to load into; values are cast to its parameters' types.
        state: Name -> tensor, names relative to the module.
        where: The weights' origin, for the error.
        allow_missing: Patterns (shell style) of names that may be absent and then keep their values.

    Raises:
        CheckpointError: If names are missing or unexpected, or shapes differ; three of each are listed.
    """
    own = module.state_dict()
    absent = sorted(own.keys() - state.keys())
    missing = [name for name in absent if not any(fnmatchcase(name, pattern) for pattern in allow_missing)]
    unexpected = sorted(state.keys() - own.keys())
    mismatched = sorted(
        f"{name}: {_shape(state[name])} in the file, {tuple(own[name].shape)} in the model"
        for name in state.keys() & own.keys()
        if _shape(state[name]) != tuple(own[name].shape)
    )
    if missing or unexpected or mismatched:
        raise CheckpointError(
            f"The weights do not fit {type(module).__name__}",
            where=where,
            found=f"{len(missing)} missing {missing[:3]}, {len(unexpected)} unexpected {unexpected[:3]}, "
            f"{len(mismatched)} of another shape {mismatched[:3]}",
            expected="exactly the model's names and shapes",
            remedy="set the model's sizes to those of the weights, or name other weights",
        )
    module.load_state_dict(dict(state), strict=False)


def write_weights(path: str | Path, state: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """Write a safetensors file, whole or not at all.

    Args:
        path: A file name that ends in .safetensors; folders are made.
        state: Name -> tensor.
        metadata: For the file's header.

    Returns:
        The file.
    """
    from safetensors.torch import save_file

    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    tensors = {name: tensor.detach().contiguous().cpu().clone() for name, tensor in state.items()}
    try:
        save_file(tensors, unfinished, metadata=metadata)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
    return target


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _find_in_folder(folder: Path, filenames: Sequence[str]) -> Path:
    for name in filenames:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(
        "The folder holds no weights",
        where=folder,
        found=sorted(path.name for path in folder.iterdir())[:10],
        expected=f"one of {list(filenames)}",
    )


def _find_on_hub(repository: str, filenames: Sequence[str]) -> Path:
    from huggingface_hub.errors import EntryNotFoundError

    failures = []
    for name in filenames:
        try:
            return _download(repository, name)
        except CheckpointError as error:
            # No such file: the next name may exist. Without a network, the cache may hold another one.
            if not isinstance(error.__cause__, EntryNotFoundError):
                raise
            failures.append(error)
    raise failures[0]


def _download(repository: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(hf_hub_download(repository, name))
    except (HFValidationError, OSError) as error:  # the hub's network and access errors are all OSError
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            "The weights cannot be fetched from the hub",
            where=f"{repository}/{name}",
            found=f"{type(error).__name__}: {reason}",
            remedy="check the name and the network; for gated weights accept their licence on the hub and "
            "run `hf auth login`; or download them elsewhere and give the folder",
        ) from error


def _shards_of(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError("The index of shards cannot be read", where=index, found=error) from error


def _read_file(path: Path) -> dict[str, Any]:
    import pickle

    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, RuntimeError, OSError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            "The weight file cannot be read", where=path, found=f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(
            "The weight file holds no named tensors", where=path, found=type(state).__name__, expected="dict"
        )
    return state
