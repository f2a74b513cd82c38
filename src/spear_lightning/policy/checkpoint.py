"""Policies in checkpoints: what a checkpoint must hold so that it alone suffices to predict.

A checkpoint of ours is a Lightning checkpoint with one more entry, ``spear``: a schema version, the policy's
configuration (class paths and arguments), its interface (cameras, horizon, rate) and its tokenizer. The
normalisation statistics are buffers among the weights.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from spear_lightning.errors import CheckpointError
from spear_lightning.models import PromptTokenizer
from spear_lightning.policy.policy import Policy, PolicyInterface
from spear_lightning.policy.sharded_files import META_FILE, read_folder

SCHEMA = 1
"""Version of the ``spear`` entry; a change that old readers cannot read increases it."""


class Configured(Protocol):
    """What was built from a configuration and keeps it."""

    config: dict[str, Any] | None


Built = TypeVar("Built", bound=Configured)

EXPORT_CONFIG = "config.json"
"""File that makes a folder an exported model."""

POLICY_PREFIX = "policy."
"""Where a LightningModule keeps its policy, hence the prefix of its weights."""


def describe_policy(policy: Policy) -> dict[str, Any]:
    """Return the ``spear`` entry of a checkpoint: plain values only."""
    return {
        "schema": SCHEMA,
        "policy": policy.config,
        "interface": policy.interface.to_dict() if policy.interface else None,
        "tokenizer": policy.prompt.to_json(),
    }


def build_policy(config: Mapping[str, Any]) -> Policy:
    """Build a policy from its configuration: class paths and arguments as in the YAML files.

    Args:
        config: `{"class_path": ..., "init_args": {...}}` of a `Policy`.

    Returns:
        The policy with random weights; `policy.config` holds the configuration.

    Raises:
        CheckpointError: If the configuration names classes or arguments that do not exist (any more).
    """
    return build(Policy, config, "policy")


def build(base: type[Built], config: Mapping[str, Any], name: str) -> Built:
    """Build an object that has a `config` from its configuration; see `build_policy`.

    Args:
        base: Class of the object, or a base class.
        config: `{"class_path": ..., "init_args": {...}}`.
        name: What it is called in errors.

    Raises:
        CheckpointError: If the configuration names classes or arguments that do not exist (any more).
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(base, name, required=True)
    try:
        parsed = parser.parse_object({name: copy.deepcopy(dict(config))})
    except (ArgumentError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"The {name}'s configuration cannot be built with this version of the package",
            where=f"spear.{name}",
            found=error,
        ) from error
    built: Built = parser.instantiate(parsed)[name]
    built.config = copy.deepcopy(dict(config))
    return built


def without_network(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration whose tokenizer needs no files: the right one comes out of the checkpoint."""
    offline = copy.deepcopy(dict(config))
    offline["init_args"]["prompt"].setdefault("init_args", {})["tokenizer"] = "byte"
    return offline


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint without unpickling anything but tensors and plain values.

    Args:
        path: A `.ckpt` file, or the folder that several processes have written.

    Returns:
        Its entries; tensors are on the CPU and read when they are used.

    Raises:
        CheckpointError: If the file is missing, unreadable, or was not written by this package.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(
            "There is no such checkpoint", where=path, expected="a .ckpt file", remedy="check the path"
        )
    if (path / EXPORT_CONFIG).is_file() and not (path / META_FILE).is_file():
        raise CheckpointError(
            "This looks like an exported SPEAR-VLM, and is no checkpoint",
            where=path,
            remedy="load it with `load_answerer`, or let a policy start from it: --model.vlm FOLDER",
        )
    try:
        checkpoint = (
            read_folder(path)
            if path.is_dir()
            else torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        )
    except (RuntimeError, OSError, ValueError, EOFError, UnpicklingError) as error:
        raise CheckpointError(
            "The checkpoint cannot be read", where=path, found=f"{type(error).__name__}: {error}"
        ) from error
    spear = checkpoint.get("spear") if isinstance(checkpoint, dict) else None
    if not isinstance(spear, dict) or spear.get("schema") != SCHEMA:
        raise CheckpointError(
            "The checkpoint was not written by this version of the package",
            where=path,
            found="no `spear` entry" if not isinstance(spear, dict) else f"schema {spear.get('schema')}",
            expected=f"a `spear` entry with schema {SCHEMA}",
        )
    return checkpoint


def policy_weights(checkpoint: Mapping[str, Any], weights: Literal["ema", "raw"]) -> dict[str, Tensor]:
    """Return the policy's weights from a checkpoint, names relative to the policy.

    Args:
        checkpoint: What `read_checkpoint` returned.
        weights: "ema" lays the averaged weights over the raw ones where the checkpoint has them.
    """
    return weights_under(checkpoint, POLICY_PREFIX, weights)


def weights_under(checkpoint: Mapping[str, Any], prefix: str, weights: Literal["ema", "raw"]) -> dict[str, Tensor]:
    """Return the weights whose names begin with a prefix, without it; see `policy_weights`."""
    state = dict(checkpoint["state_dict"])
    if weights == "ema":
        state.update(checkpoint.get("ema") or {})
    return {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}


def load_policy(path: str | Path, weights: Literal["ema", "raw"] = "ema", device: str = "cpu") -> Policy:
    """Load a policy that is ready to predict.

    Args:
        path: A checkpoint written by training.
        weights: "ema" for the averaged weights (where there are any), "raw" for the training weights.
        device: Where to put it.

    Returns:
        The policy in eval mode.

    Raises:
        CheckpointError: If the checkpoint is not ours, incomplete, or of another architecture.
    """
    checkpoint = read_checkpoint(path)
    spear = checkpoint["spear"]
    missing = [key for key in ("policy", "interface", "tokenizer") if spear.get(key) is None]
    if missing:
        raise CheckpointError(
            "The checkpoint does not describe its policy",
            where=path,
            found=f"no {', '.join(missing)}",
            remedy="train through `spear fit`, or build the policy yourself and load the weights into it",
        )
    policy = build_policy(without_network(spear["policy"]))
    policy.config = spear["policy"]
    policy.prompt = PromptTokenizer.from_json(spear["tokenizer"])
    policy.interface = PolicyInterface.from_dict(spear["interface"])
    load_policy_weights(policy, policy_weights(checkpoint, weights), where=path)
    policy.normalizer.require_fitted()
    return policy.to(device).eval()


def load_policy_weights(policy: nn.Module, weights: Mapping[str, Tensor], where: object) -> None:
    """Load weights exactly, or say how the architectures differ (see `check_policy_weights`)."""
    check_policy_weights(policy, weights, where)
    policy.load_state_dict(dict(weights))


def check_policy_weights(policy: nn.Module, weights: Mapping[str, Tensor], where: object) -> None:
    """Compare the names and shapes of weights with those of a policy (or an `Answerer`).

    Raises:
        CheckpointError: If any differs.
    """
    own = policy.state_dict()
    shapes = {
        f"{name}: {tuple(weights[name].shape)} in the file, {tuple(own[name].shape)} in the model"
        for name in weights.keys() & own.keys()
        if weights[name].shape != own[name].shape
    }
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if shapes or missing or unexpected:
        raise CheckpointError(
            "The checkpoint holds another architecture than the configuration builds",
            where=where,
            found=f"{len(missing)} missing {missing[:3]}, {len(unexpected)} unexpected {unexpected[:3]}, "
            f"{len(shapes)} of another shape {sorted(shapes)[:3]}",
            remedy="use the configuration the checkpoint was trained with",
        )
