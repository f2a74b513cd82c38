"""The table that says what a phase of a freeze schedule trains, and its way into the loggers."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger
from rich.console import Console
from rich.table import Table
from torch import nn

from spear_lightning.training.freeze_plan import named_parameters, plain_name

_LEVELS = 2


@dataclass
class _Row:
    parameters: int = 0
    trainable: int = 0
    rates: set[float] = field(default_factory=set)


def phase_table(title: str, network: nn.Module, rates: Mapping[str, float]) -> Table:
    """Build the table: component, its parameters, how many of them train, and at which peak learning rate.

    Components are the modules two levels down; a `ModuleDict` does not count as a level, so that its entries
    (`vlm.encoders.moge`) are told apart.

    Args:
        title: Title of the table.
        network: The network.
        rates: Parameter name -> peak learning rate, of all that trains.
    """
    rows: dict[str, _Row] = {}
    containers = {
        plain_name(name) for name, module in network.named_modules() if isinstance(module, nn.ModuleDict)
    }
    for name, parameter in named_parameters(network):
        row = rows.setdefault(_component_of(name, containers), _Row())
        row.parameters += parameter.numel()
        if name in rates:
            row.trainable += parameter.numel()
            row.rates.add(rates[name])
    table = Table(title=title, title_justify="left")
    table.add_column("component")
    for heading in ("parameters", "trainable", "learning rate"):
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        shown = ", ".join(f"{rate:.3g}" for rate in sorted(row.rates)) or "frozen"
        table.add_row(name, f"{row.parameters:,}", f"{row.trainable:,}", shown)
    table.add_section()
    total, trainable = (sum(getattr(row, key) for row in rows.values()) for key in ("parameters", "trainable"))
    table.add_row("total", f"{total:,}", f"{trainable:,}", "")
    return table


def table_text(table: Table) -> str:
    """Render a table as plain text of at most 120 columns."""
    file = io.StringIO()
    Console(file=file, width=120, color_system=None).print(table)
    return file.getvalue()


def log_table(loggers: Iterable[Logger], phase: str, text: str, step: int) -> None:
    """Send the table to TensorBoard (text) and MLflow (artifact `freeze_schedule/PHASE.txt`)."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(f"freeze_schedule/{phase}", f"```\n{text}\n```", step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_text(logger.run_id, text, f"freeze_schedule/{phase}.txt")


def _component_of(name: str, containers: set[str]) -> str:
    parts = name.split(".")[:-1] or [name]
    levels, path = 0, ""
    for part in parts:
        path = f"{path}.{part}" if path else part
        levels += path not in containers
        if levels == _LEVELS:
            break
    return path
