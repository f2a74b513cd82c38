"""The resolved configuration of a run as plain values: what is kept of it and how two are compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KEPT_SECTIONS = ("seed_everything", "model", "data", "trainer")
"""Top-level keys of a configuration that a checkpoint keeps."""

COMPARED_TRAINER_KEYS = (
    "precision",
    "max_steps",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "limit_train_batches",
    "overfit_batches",
)
"""Trainer options that change the course of training; the others (logging, devices, folders) may differ."""

COMPARED_CALLBACKS = ("FreezeSchedule", "ExponentialMovingAverage")
"""Callbacks that change the course of training."""

FREE_KEYS = (
    "data.num_workers",
    "data.num_threads",
    "data.root",
    "data.index_folder",
    # What it says of the data sets used is compared with the data.
    "data.registry",
    "data.validation_batch_size",
    "data.prefetch",
)
"""Options of the data modules that change speed or place, never the samples."""

_NOTHING = "(absent)"


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings and lists to dotted keys; `class_path`/`init_args` levels are left out of keys."""
    if isinstance(values, Mapping):
        items = [(str(key), value) for key, value in values.items()]
    elif isinstance(values, (list, tuple)):
        items = [(str(index), value) for index, value in enumerate(values)]
    else:
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in items:
        name = prefix if key == "init_args" else f"{prefix}.{key}" if prefix else key
        flat.update(flatten(value, name))
    return flat


def compared_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flat part of a configuration in which a resumed run must equal its beginning."""
    trainer = config.get("trainer") or {}
    part = {
        "seed_everything": config.get("seed_everything"),
        "model": config.get("model"),
        "data": config.get("data"),
        "trainer": {key: trainer.get(key) for key in COMPARED_TRAINER_KEYS},
    }
    for callback in trainer.get("callbacks") or []:
        name = str(callback.get("class_path", "")).rsplit(".", 1)[-1]
        if name in COMPARED_CALLBACKS:
            part[name] = callback.get("init_args")
    flat = flatten(part)
    return {key: value for key, value in flat.items() if not any(key.startswith(free) for free in FREE_KEYS)}


def differing_keys(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return dotted key -> (saved, current) for every key that matters and differs."""
    old, new = compared_part(saved), compared_part(current)
    return {
        key: (old.get(key, _NOTHING), new.get(key, _NOTHING))
        for key in old.keys() | new.keys()
        if old.get(key, _NOTHING) != new.get(key, _NOTHING)
    }
