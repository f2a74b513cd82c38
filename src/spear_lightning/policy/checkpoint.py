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
from typing import Any, Literal

import torch
from torch import Tensor

from spear_lightning.errors import CheckpointError
from spear_lightning.models import PromptTokenizer
from spear_lightning.policy.policy import Policy, PolicyInterface

SCHEMA = 1
"""Version of the ``spear`` entry; a change that old readers cannot read increases it."""

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
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Policy, "policy", required=True)
    try:
        parsed = parser.parse_object({"policy": copy.deepcopy(dict(config))})
    except (ArgumentError, TypeError, ValueError) as error:
        raise CheckpointError(
            "The policy's configuration cannot be built with this version of the package",
            where="spear.policy",
            found=error,
        ) from error
    policy: Policy = parser.instantiate_classes(parsed).policy
    policy.config = copy.deepcopy(dict(config))
    return policy


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint without unpickling anything but tensors and plain values.

    Args:
        path: A `.ckpt` file.

    Returns:
        Its entries, tensors on the CPU and memory-mapped.

    Raises:
        CheckpointError: If the file is missing, unreadable, or was not written by this package.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            "There is no such checkpoint", where=path, expected="a .ckpt file", remedy="check the path"
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
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
    state = dict(checkpoint["state_dict"])
    if weights == "ema":
        state.update(checkpoint.get("ema") or {})
    start = len(POLICY_PREFIX)
    return {name[start:]: tensor for name, tensor in state.items() if name.startswith(POLICY_PREFIX)}


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
    # The tokenizer comes from the checkpoint: the one the configuration names may need a network.
    offline = copy.deepcopy(spear["policy"])
    offline["init_args"]["prompt"]["init_args"]["tokenizer"] = "byte"
    policy = build_policy(offline)
    policy.config = spear["policy"]
    policy.prompt = PromptTokenizer.from_json(spear["tokenizer"])
    policy.interface = PolicyInterface.from_dict(spear["interface"])
    load_policy_weights(policy, policy_weights(checkpoint, weights), where=path)
    policy.normalizer.require_fitted()
    return policy.to(device).eval()


def load_policy_weights(policy: Policy, weights: Mapping[str, Tensor], where: object) -> None:
    """Load weights exactly, or say how the architectures differ (see `check_policy_weights`)."""
    check_policy_weights(policy, weights, where)
    policy.load_state_dict(dict(weights))


def check_policy_weights(policy: Policy, weights: Mapping[str, Tensor], where: object) -> None:
    """Compare the names and shapes of weights with those of a policy.

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
