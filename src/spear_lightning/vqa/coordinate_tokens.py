"""3D tokens: numbers of a scene as words `<3d_0000>` ... `<3d_1023>` of the language model (spec section 4).

All coordinates share one vocabulary of scalars; a point is three tokens, x y z. A quantiser says which number is
which token. Bins may have any widths; a token means the middle of its bin, so a number inside the range comes back
with an error of at most half its bin. Numbers outside the range become the outermost token, and are counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

import numpy as np

from spear_lightning.errors import CheckpointError, ConfigError, DataError
from spear_lightning.labeling.records import ImageLabel

BINS = 1024
"""3D tokens of SPEAR-1."""

SCHEMA = 1
"""Version of the plain form."""

TOKEN = re.compile(r"<3d_(\d{4})>")

Scale = Literal["median_depth", "metric"]
"""The unit of coordinates: the image's median depth (labels of unknown scale), or metres."""


Numbers = Callable[[ImageLabel], np.ndarray]
"""Label -> the lengths, float64 (n,) in its unit, that some answers about it are made of."""


def object_numbers(label: ImageLabel) -> np.ndarray:
    """Return points of objects, their distances, and differences of their centres, float64 (n,)."""
    if not label.objects:
        return np.zeros(0)
    centres = np.stack([item.centre for item in label.objects])
    parts = [centres[:, None] - centres]
    for item in label.objects:
        parts += [item.vertices, item.closest, item.furthest, item.centre, np.array([item.distance])]
    differences = parts[0][~np.eye(len(centres), dtype=bool)]
    return np.concatenate([differences.ravel(), *(part.ravel() for part in parts[1:])]).astype(np.float64)


def token_name(index: int) -> str:
    """Return the name of a 3D token."""
    return f"<3d_{index:04d}>"


def token_names(bins: int = BINS) -> list[str]:
    """Return the names of all 3D tokens, in order."""
    return [token_name(index) for index in range(bins)]


class Quantizer:
    """Numbers -> bins -> numbers.

    Attributes:
        edges: float64 (bins + 1,), the borders of the bins, increasing.

    Args:
        edges: Borders of the bins.

    Raises:
        ConfigError: If they do not increase.
    """

    def __init__(self, edges: np.ndarray) -> None:
        self.edges = np.asarray(edges, np.float64)
        if self.edges.ndim != 1 or len(self.edges) < 2 or not (np.diff(self.edges) > 0).all():
            raise ConfigError(
                "The borders of the 3D tokens' bins must increase",
                where="quantizer.edges",
                found=f"{len(self.edges)} borders from {self.edges.min()} to {self.edges.max()}",
            )
        self._inner = self.edges[1:-1]
        self._middles = (self.edges[1:] + self.edges[:-1]) / 2

    @classmethod
    def uniform(cls, low: float, high: float, bins: int = BINS) -> Quantizer:
        """Divide [low, high] into equal bins."""
        return cls(np.linspace(low, high, bins + 1))

    @classmethod
    def fit(
        cls, values: np.ndarray, bins: int = BINS, tails: float = 1e-4, weights: np.ndarray | None = None
    ) -> Quantizer:
        """Choose bins such that each holds equally many of some values: fine where they are dense.

        Args:
            values: Any shape; what is to be encoded.
            bins: Number of bins.
            weights: Of the same shape, positive: how often each value is to be encoded; default: equally often.
            tails: Share of the values at either end that is left outside, so that single bad labels do not
                stretch the outermost bins.

        Raises:
            DataError: If the values are not finite, or all the same.
        """
        values = np.asarray(values, np.float64).ravel()
        if values.size == 0 or not np.isfinite(values).all() or values.min() == values.max():
            raise DataError(
                "3D tokens cannot be fitted to these coordinates",
                where="Quantizer.fit",
                found=f"{values.size} values, {np.unique(values[:100])[:3]}...",
                expected="finite values that differ",
            )
        wanted = np.linspace(tails, 1 - tails, bins + 1)
        if weights is None:
            edges = np.quantile(values, wanted)
        else:
            order = values.argsort()
            below = weights.ravel()[order].cumsum()
            # As np.quantile, whose numbers have equal weights: the first is at 0, the last at 1.
            edges = np.interp(wanted, (below - below[0]) / (below[-1] - below[0]), values[order])
        if edges[0] == edges[-1]:
            edges[0], edges[-1] = values.min(), values.max()
        # Values that repeat would make bins without width: a millionth of the range is added per bin.
        return cls(np.maximum.accumulate(edges) + np.linspace(0, 1e-6 * bins, bins + 1) * np.ptp(edges))

    def __len__(self) -> int:
        """Return the number of bins."""
        return len(self._middles)

    def encode(self, values: np.ndarray) -> np.ndarray:
        """Return the bins, int64 of the same shape, of finite values; those outside get the outermost bin."""
        # Without the outermost borders nothing lies outside.
        return self._inner.searchsorted(values, side="right")

    def decode(self, bins: np.ndarray) -> np.ndarray:
        """Return the middles of bins, float64 of the same shape."""
        return self._middles[bins]

    def half_width(self, bins: np.ndarray) -> np.ndarray:
        """Return half the widths of bins: the greatest error of a value inside."""
        return np.diff(self.edges)[bins] / 2

    def outside(self, values: np.ndarray) -> np.ndarray:
        """Return which values lie outside the range."""
        return (values < self.edges[0]) | (values > self.edges[-1])


class CoordinateTokens:
    """The 3D tokens of a model: a quantiser and the unit in which it takes lengths.

    Args:
        quantizer: Numbers -> bins.
        scale: Unit of the numbers.

    Attributes:
        encoded: Numbers encoded so far in this process.
        clamped: How many of them lay outside the range.
    """

    def __init__(self, quantizer: Quantizer, scale: Scale = "median_depth") -> None:
        if scale not in get_args(Scale):
            raise ConfigError(
                "Unknown unit of coordinates", where="scale", found=scale, expected=" or ".join(get_args(Scale))
            )
        if len(quantizer) > 10_000:
            raise ConfigError("Too many 3D tokens", where="bins", found=len(quantizer), expected="at most 10000")
        self.quantizer = quantizer
        self._names = token_names(len(quantizer))
        self.scale: Scale = scale
        self.encoded = 0
        self.clamped = 0

    @classmethod
    def fit(
        cls,
        labels: Iterable[ImageLabel],
        scale: Scale = "median_depth",
        bins: int = BINS,
        max_images: int = 5000,
        numbers: Mapping[Numbers, float] | None = None,
    ) -> CoordinateTokens:
        """Fit quantile bins to what answers about training labels are made of.

        Args:
            labels: Training labels.
            scale: Unit of the numbers.
            bins: Number of tokens.
            max_images: Labels that are looked at.
            numbers: What the answers are made of -> how often it is asked (`TaskMixture.numbers`); default: the
                objects' coordinates.

        Raises:
            DataError: If there is nothing of that kind in them.
        """
        tokens = cls(Quantizer.uniform(-1, 1, bins), scale)
        shares: Mapping[Numbers, float] = {object_numbers: 1.0} if numbers is None else numbers
        found: dict[Numbers, list[np.ndarray]] = {kind: [np.zeros(0)] for kind in shares}
        for label, _ in zip(labels, range(max_images), strict=False):
            for kind, parts in found.items():
                parts.append(kind(label) / tokens.unit(label))
        values = {kind: np.concatenate(parts) for kind, parts in found.items()}
        weights = None
        if len(values) > 1:
            each = {kind: shares[kind] / max(1, len(part)) for kind, part in values.items()}
            weights = np.concatenate([np.full(len(part), each[kind]) for kind, part in values.items()])
        tokens.quantizer = Quantizer.fit(np.concatenate(list(values.values())), bins, weights=weights)
        return tokens

    def unit(self, label: ImageLabel) -> float:
        """Return the length, in the unit of a label, that counts as one.

        Raises:
            ConfigError: If metres are wanted of a label whose scale is unknown.
        """
        if self.scale == "median_depth":
            return label.median_depth
        if label.unit != "metric":
            raise ConfigError(
                "A label has no metric scale",
                where=f"image {label.image_id!r}",
                found=label.unit,
                expected="metric",
                remedy="use the scale median_depth, or metric labels (MoGe-2, simulation)",
            )
        return 1.0

    def text(self, values: np.ndarray) -> str:
        """Return numbers as tokens, one after another without spaces.

        Args:
            values: Any shape, finite, in units of `unit`.
        """
        return "".join(self.words(values))

    def words(self, values: np.ndarray) -> list[str]:
        """Return numbers as tokens, a word each (see `text`)."""
        values = np.asarray(values, np.float64).ravel()
        self.encoded += values.size
        self.clamped += int(np.count_nonzero(self.quantizer.outside(values)))
        names = self._names
        return [names[index] for index in self.quantizer.encode(values).tolist()]

    def values(self, text: str) -> np.ndarray | None:
        """Return the numbers of a text of nothing but 3D tokens (spaces may lie between), else None."""
        found = TOKEN.findall(text)
        bins = np.array(found, dtype=np.int64)
        if TOKEN.sub("", text).strip() or (bins >= len(self.quantizer)).any():
            return None
        return self.quantizer.decode(bins)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values from which the tokens can be rebuilt."""
        return {"schema": SCHEMA, "scale": self.scale, "edges": self.quantizer.edges.tolist()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CoordinateTokens:
        """Rebuild from `to_dict`'s values.

        Raises:
            CheckpointError: If they do not come from there.
        """
        try:
            if values["schema"] != SCHEMA:
                raise ValueError(f"schema {values['schema']}, known is {SCHEMA}")
            return cls(Quantizer(np.array(values["edges"], np.float64)), values["scale"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                "The stored 3D tokens cannot be read", found=f"{type(error).__name__}: {error}"
            ) from error
