"""Global quantiles of a mixture: one pass, memory that does not grow, weighted as the mixture (spec section 9)."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from spear_lightning.errors import DataError
from spear_lightning.robot_data.chunks import ChunkSpec, read_chunks
from spear_lightning.robot_data.sample_source import SampleSource

RANGE_M = 4.0
"""Values are counted in [-4 m, 4 m]; beyond it they count as the bound."""

BIN_M = 2e-5
"""Width of a bin: quantiles are right to 20 micrometres."""

_BINS = round(2 * RANGE_M / BIN_M)
_AT_ONCE = 1 << 15


@dataclass(frozen=True)
class MixtureStatistics:
    """1 % and 99 % quantiles per axis (x, y, z), metres, base frame.

    Attributes:
        translation_low: Of the translations of chunk targets (valid ones).
        translation_high: Likewise.
        position_low: Of end-effector positions.
        position_high: Likewise.
        samples: Frames looked at per data set.
    """

    translation_low: list[float]
    translation_high: list[float]
    position_low: list[float]
    position_high: list[float]
    samples: dict[str, int]


def mixture_statistics(
    sources: Sequence[SampleSource],
    shares: np.ndarray,
    chunks: ChunkSpec,
    quantile: float = 0.01,
    max_samples: int = 2_000_000,
) -> MixtureStatistics:
    """Compute the quantiles of a mixture.

    Args:
        sources: The training frames of each data set.
        shares: Share of each in the mixture.
        chunks: What a chunk is: translations depend on it.
        quantile: The lower quantile; the upper one is 1 - quantile.
        max_samples: Frames looked at per data set at most, evenly spaced.
    """
    translation_3n, position_3n = np.zeros((3, _BINS)), np.zeros((3, _BINS))
    samples = {}
    for source, share in zip(sources, shares, strict=True):
        counts = np.zeros((2, 3, _BINS), np.int64)
        chosen = np.unique(np.linspace(0, len(source) - 1, min(len(source), max_samples)).astype(np.int64))
        for start in range(0, len(chosen), _AT_ONCE):
            part = read_chunks(source.index, source.frames(chosen[start : start + _AT_ONCE]), chunks)
            _count(counts[0], part.actions[part.mask][:, :3].numpy())
            _count(counts[1], part.state[:, :3].numpy())
        translation_3n += share * counts[0] / max(counts[0, 0].sum(), 1)
        position_3n += share * counts[1] / counts[1, 0].sum()
        samples[source.index.dataset] = len(chosen)
    if translation_3n.sum() == 0:
        raise DataError(
            "No chunk has a target inside its episode",
            where="data.chunks",
            expected="episodes longer than one step of a chunk",
        )
    return MixtureStatistics(
        _quantiles(translation_3n, quantile),
        _quantiles(translation_3n, 1 - quantile),
        _quantiles(position_3n, quantile),
        _quantiles(position_3n, 1 - quantile),
        samples,
    )


def _count(counts_3n: np.ndarray, values_N3: np.ndarray) -> None:
    bins = np.clip(((values_N3.astype(np.float64) + RANGE_M) / BIN_M).astype(np.int64), 0, _BINS - 1)
    for axis in range(3):
        np.add(counts_3n[axis], np.bincount(bins[:, axis], minlength=_BINS), out=counts_3n[axis])


def _quantiles(mass_3n: np.ndarray, quantile: float) -> list[float]:
    cumulative = np.cumsum(mass_3n, axis=1)
    found = [int(np.searchsorted(row, quantile * row[-1])) for row in cumulative]
    return [round((min(place, _BINS - 1) + 0.5) * BIN_M - RANGE_M, 6) for place in found]


def write_statistics(path: Path, statistics: MixtureStatistics) -> None:
    """Write statistics as JSON, at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(asdict(statistics), indent=1))
    os.replace(temporary, path)


def read_statistics(path: Path) -> MixtureStatistics:
    """Read what `write_statistics` wrote.

    Raises:
        DataError: If the file cannot be understood.
    """
    try:
        return MixtureStatistics(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            "The cached statistics cannot be read", where=path, found=error, remedy="delete the file"
        ) from error
