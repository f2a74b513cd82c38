"""The blocks of a network, by name: what is compiled, sharded and recomputed one by one."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import nn

from spear_lightning.errors import ConfigError


def list_entries(network: nn.Module) -> dict[str, nn.Module]:
    """Return the entries of the network's module lists by name; those inside another entry are part of it."""
    entries: dict[str, nn.Module] = {}
    for name, module in network.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in entries)
        if isinstance(module, nn.ModuleList) and not inside:
            entries.update({f"{name}.{index}": entry for index, entry in enumerate(module)})
    return entries


def matching(network: nn.Module, patterns: list[str]) -> dict[str, nn.Module]:
    """Return the modules whose dotted names fit a pattern, segment by segment.

    Raises:
        ConfigError: If a pattern fits none.
    """
    modules = {name: module for name, module in network.named_modules() if name}
    chosen: dict[str, nn.Module] = {}
    for pattern in patterns:
        found = {name: module for name, module in modules.items() if _fits(name, pattern)}
        if not found:
            raise ConfigError(
                "No module of the network has this name",
                where="blocks",
                found=pattern,
                expected=f"a name under {sorted({name.split('.')[0] for name in modules})}",
            )
        chosen.update(found)
    return chosen


def _fits(name: str, pattern: str) -> bool:
    names, wanted = name.split("."), pattern.split(".")
    return len(names) == len(wanted) and all(
        fnmatchcase(part, want) for part, want in zip(names, wanted, strict=True)
    )
