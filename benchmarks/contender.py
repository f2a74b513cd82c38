"""A contender of a benchmark: how it is run, and what was measured of it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from measure import run_measured
from rich.console import Console

console = Console(width=120)


@dataclass
class Contender:
    """One way to load, and what was measured of it in one or more rounds."""

    name: str
    command: list[str]
    rounds: list[dict[str, Any]] = field(default_factory=list)

    def measure(self) -> None:
        """Run once more."""
        with console.status(self.name):
            self.rounds.append(run_measured(self.command))

    def median(self, key: str) -> float:
        """Return the median over rounds of a figure."""
        return statistics.median(measured[key] for measured in self.rounds)

    @property
    def windows(self) -> list[float]:
        """Samples/s of all windows of all rounds."""
        return [rate for measured in self.rounds for rate in measured["windows"]]

    @property
    def rate(self) -> float:
        """Median samples/s."""
        return statistics.median(self.windows)

    def row(self) -> list[str]:
        """Return the figures for the table."""
        first = self.rounds[0]["first_batch_s"]
        return [
            self.name,
            f"{self.rate:,.0f}",
            f"{min(self.windows):,.0f}-{max(self.windows):,.0f}",
            f"{self.median('cpu_ms'):.2f}",
            "-" if first is None else f"{self.median('first_batch_s'):.1f}",
            f"{self.median('rss_mb'):,.0f}",
            f"{self.median('pss_mb'):,.0f}",
        ]


HEADER = ["loader", "samples/s", "windows", "CPU ms/sample", "first batch s", "peak RSS MB", "peak PSS MB"]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]


def ratio(a: Contender, b: Contender) -> tuple[float, float]:
    """Return how many times as fast a is as b: by samples/s and by CPU time per sample.

    Round by round, where both were measured in the same rounds: medians over all would compare a quiet round of
    one with a busy round of the other.
    """
    if len(a.rounds) == len(b.rounds):
        each = [
            statistics.median(x["windows"]) / statistics.median(y["windows"])
            for x, y in zip(a.rounds, b.rounds, strict=True)
        ]
        rate = statistics.median(each)
    else:
        rate = a.rate / b.rate
    return rate, b.median("cpu_ms") / a.median("cpu_ms")
