"""Read an experiment without its data: the network without memory, what trains, how the work is divided."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from inspect import Parameter, signature
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser

from spear_lightning.errors import ConfigError
from spear_lightning.robot_data.chunks import ChunkSpec
from spear_lightning.robot_data.images import CameraSpec
from spear_lightning.training.activation_checkpointing import chosen_blocks
from spear_lightning.training.base_module import SpearModule
from spear_lightning.training.freeze_plan import FreezePlan, Phase
from spear_lightning.training.meta_construction import networks_on_meta
from spear_lightning.training.optimizer import everything


@dataclass(frozen=True)
class Experiment:
    """What a plan is made from.

    Attributes:
        module: The training module, its network on the meta device.
        phases: Phase name -> names of the parameters that train, relative to the module's `components`.
        starts: Phase name -> optimizer step at which it begins.
        cameras: Camera name -> size.
        horizon: Actions in a chunk; 0 for a VLM.
        text_tokens: Tokens of every prompt; `None` where they follow from the texts.
        batch_size: Samples of a batch, over all processes.
        batches: Batches of an optimizer step, whose gradients are added up.
        max_steps: Optimizer steps.
        sharded: Whether weights and state are divided among processes.
        shard_size: Processes among which one copy is divided; `None` for all.
        regathers: Whether the backward pass gathers the weights of a block again.
        averaged: Whether averages of the weights are kept beside them.
        mixed: Whether products are computed in bfloat16 from float32 weights.
        compiled: Whether blocks are compiled.
        recomputed: Names of the blocks that the backward pass computes again.
        fused: Whether the optimizer is one kernel.
    """

    module: SpearModule
    phases: dict[str, frozenset[str]]
    starts: dict[str, int]
    cameras: dict[str, CameraSpec]
    horizon: int
    text_tokens: int | None
    batch_size: int
    batches: int
    max_steps: int
    sharded: bool
    shard_size: int | None
    regathers: bool
    averaged: bool
    mixed: bool
    compiled: bool
    recomputed: frozenset[str]
    fused: bool


def read_experiment(paths: Sequence[str | Path]) -> Experiment:
    """Read configurations, later ones over earlier ones, and build the network on the meta device.

    Raises:
        ConfigError: If a file is missing, or something that a plan needs is.
    """
    config: dict[str, Any] = {}
    for path in paths:
        try:
            config = merged(config, yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {})
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError("The configuration cannot be read", where=path, found=error) from error
    for section in ("model", "data", "trainer"):
        if section not in config:
            raise ConfigError("A plan needs a whole experiment", where=section, found="nothing")
    module = build_module(config["model"])
    data, trainer = _data_arguments(config["data"]), config["trainer"]
    callbacks = {str(item["class_path"]).rsplit(".", 1)[-1]: item for item in trainer.get("callbacks") or []}
    phases, starts = _phases(module, callbacks.get("FreezeSchedule"))
    strategy = trainer.get("strategy", "auto")
    options = strategy.get("init_args", {}) if isinstance(strategy, Mapping) else {}
    average = callbacks.get("ExponentialMovingAverage")
    return Experiment(
        module=module,
        phases=phases,
        starts=starts,
        cameras={name: CameraSpec(**camera) for name, camera in data.get("cameras", {}).items()},
        horizon=_horizon(data["chunks"]) if hasattr(module, "policy") else 0,
        text_tokens=_text_tokens(module),
        batch_size=data["batch_size"],
        batches=trainer.get("accumulate_grad_batches", 1),
        max_steps=trainer.get("max_steps", -1),
        sharded=isinstance(strategy, Mapping) and str(strategy["class_path"]).endswith("ShardedStrategy"),
        shard_size=options.get("shard_size"),
        regathers=options.get("reshard_after_forward", True),
        averaged=average is not None and average.get("init_args", {}).get("on_device", True),
        mixed=str(trainer.get("precision", "32-true")).startswith("bf16"),
        compiled="RegionalCompile" in callbacks,
        recomputed=_recomputed(module, callbacks.get("ActivationCheckpointing")),
        fused=bool(module.recipe.fused),
    )


def _data_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a data module's arguments, those that are not given as its constructor has them."""
    path = str(config.get("class_path"))
    module, _, name = path.rpartition(".")
    try:
        parameters = signature(getattr(import_module(module), name)).parameters.values()
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            "There is no such data module", where="data.class_path", found=path, expected=error
        ) from error
    defaults = {item.name: item.default for item in parameters if item.default is not Parameter.empty}
    return {**defaults, **config.get("init_args", {})}


def _horizon(chunks: ChunkSpec | Mapping[str, Any]) -> int:
    return (chunks if isinstance(chunks, ChunkSpec) else ChunkSpec(**chunks)).horizon


def _text_tokens(module: SpearModule) -> int | None:
    """Return the length to which a policy pads all prompts, if it does and computes the padding too."""
    policy = getattr(module, "policy", None)
    if policy is None or policy.vla.vlm.packed or policy.prompt.multiple is not None:
        return None
    return int(policy.prompt.max_length)


def merged(base: Mapping[str, Any], change: Mapping[str, Any], whole: Collection[str] = ()) -> dict[str, Any]:
    """Lay a configuration over another, as the command line does.

    Mappings are merged key by key, but for arguments that are mappings by their type, such as cameras or tasks:
    these are replaced, like all other values. A list under a key that ends in `+` is added to the one there.

    Args:
        base: The configuration below.
        change: The configuration above.
        whole: Keys whose mappings are replaced.
    """
    result = dict(base)
    for key, value in change.items():
        if key.endswith("+"):
            result[key[:-1]] = [*(result.get(key[:-1]) or []), *value]
            continue
        old, new = result.get(key), value
        if isinstance(old, Mapping) and isinstance(value, Mapping) and key not in whole:
            same_class = value.get("class_path", old.get("class_path")) == old.get("class_path")
            arguments = _mappings(str(base.get("class_path"))) if key == "init_args" else ()
            new = merged(old, value, arguments) if same_class else value
        result[key] = new
    return result


def _mappings(path: str) -> set[str]:
    """Return the names of the arguments of a class that take a mapping."""
    module, _, name = path.rpartition(".")
    try:
        hints = get_type_hints(getattr(import_module(module), name).__init__)
    except (ImportError, AttributeError, ValueError, NameError):
        return set()
    return {argument for argument, hint in hints.items() if _takes_mapping(hint)}


def _takes_mapping(hint: Any) -> bool:
    kind = get_origin(hint)
    if kind in (Union, UnionType):
        return any(_takes_mapping(part) for part in get_args(hint))
    return isinstance(kind, type) and issubclass(kind, Mapping)


def build_module(config: Mapping[str, Any]) -> SpearModule:
    """Build a training module from its configuration, without memory and without a network.

    Raises:
        ConfigError: If the configuration cannot be built.
    """
    wanted = copy.deepcopy(dict(config))
    for part in ("policy", "answerer"):
        inner = wanted.get("init_args", {}).get(part, {}).get("init_args", {})
        if "prompt" in inner:
            # A real tokenizer would be downloaded; sizes do not depend on it.
            inner["prompt"].setdefault("init_args", {})["tokenizer"] = "byte"
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(SpearModule, "model", required=True)
    try:
        with networks_on_meta(parser):
            return parser.instantiate(parser.parse_object({"model": wanted})).model
    except Exception as error:
        raise ConfigError("The model cannot be built", where="model", found=error) from error


def _recomputed(module: SpearModule, callback: Mapping[str, Any] | None) -> frozenset[str]:
    if callback is None:
        return frozenset()
    return frozenset(chosen_blocks(module.components, callback.get("init_args", {}).get("blocks")))


def _phases(
    module: SpearModule, schedule: Mapping[str, Any] | None
) -> tuple[dict[str, frozenset[str]], dict[str, int]]:
    if schedule is None:
        return {"all": frozenset(everything(module).parameters)}, {"all": 0}
    phases = [Phase(**values) for values in schedule["init_args"]["phases"]]
    plan = FreezePlan(phases, module.components, module.unused_parameters())
    trained = {
        phase.name: frozenset(
            name for component in plan.components(module.components, index) for name in component.parameters
        )
        for index, phase in enumerate(phases)
    }
    return trained, {phase.name: phase.start for phase in phases}
