"""Random materials and light for a scene; an object keeps the colour it is named after."""

from __future__ import annotations

import mujoco
import numpy as np

from spear_lightning.worlds.tabletop.patterns import Pattern
from spear_lightning.worlds.tabletop.shading import Look

_TABLE_TONES = np.array(
    [
        [0.62, 0.50, 0.36],
        [0.45, 0.33, 0.24],
        [0.74, 0.70, 0.62],
        [0.40, 0.42, 0.45],
        [0.58, 0.62, 0.60],
        [0.30, 0.30, 0.32],
    ]
)
"""Muted colours of tables and floors: no object is named after one."""

_TABLE_PATTERNS = (Pattern.WOOD, Pattern.WOOD, Pattern.CHECKER, Pattern.CLOUDS, Pattern.SPECKLE)
_OBJECT_PATTERNS = (Pattern.PLAIN, Pattern.PLAIN, Pattern.STRIPES, Pattern.SPECKLE, Pattern.CLOUDS)
_OBJECT_PREFIX = "object_"


def draw_look(model: mujoco.MjModel, rng: np.random.Generator) -> Look:
    """Return materials for all geoms of a scene, and its light.

    Args:
        model: The scene; objects' geoms have the prefix "object_" and their colour as rgba.
        rng: Source of everything.
    """
    names = [model.geom(geom).name for geom in range(model.ngeom)]
    base = model.geom_rgba[:, :3].astype(np.float64)
    second = base.copy()
    pattern = np.full(model.ngeom, Pattern.PLAIN)
    scale = np.full(model.ngeom, 0.02)
    for surface in ("table", "floor"):
        geom = names.index(surface)
        base[geom] = np.clip(_TABLE_TONES[rng.integers(len(_TABLE_TONES))] + rng.normal(0, 0.03, 3), 0, 1)
        second[geom] = base[geom] * rng.uniform(0.7, 0.9)
        pattern[geom] = _TABLE_PATTERNS[rng.integers(len(_TABLE_PATTERNS))]
        scale[geom] = rng.uniform(0.015, 0.05)
    drawn: dict[str, tuple[Pattern, float, float]] = {}
    for geom, name in enumerate(names):
        if name.startswith(_OBJECT_PREFIX):
            # All pieces of an object are of one material.
            body = name.rsplit("_", 1)[0]
            if body not in drawn:
                chosen = _OBJECT_PATTERNS[rng.integers(len(_OBJECT_PATTERNS))]
                drawn[body] = (chosen, rng.uniform(0.7, 0.85), rng.uniform(0.006, 0.012))
            pattern[geom], darker, scale[geom] = drawn[body]
            second[geom] = base[geom] * darker
    brightness = rng.uniform(0.6, 0.85)
    tint = rng.uniform(0.93, 1.0, 3)
    return Look(
        base_rgb=base.astype(np.float32),
        second_rgb=second.astype(np.float32),
        pattern=pattern,
        pattern_scale_m=scale,
        pattern_offset=rng.uniform(0.1, 0.9, (model.ngeom, 3)),
        specular=np.full(model.ngeom, rng.uniform(0.05, 0.3)),
        light_position_m=rng.uniform([0.0, -1.0, 1.1], [0.9, 1.0, 1.8]),
        light_rgb=brightness * tint,
        ambient_rgb=np.full(3, rng.uniform(0.25, 0.4)),
        horizon_rgb=np.array([0.75, 0.78, 0.82]),
        zenith_rgb=np.array([0.45, 0.6, 0.8]),
    )
