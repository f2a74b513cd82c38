"""The wire format of `tf.train.Example`, as far as RLDS uses it, in both directions.

An Example is a map from names to lists of bytes, float32 or int64. Reading does not copy: numbers are views or
small arrays, byte strings are (offset, length) spans, so that an image can later be fetched alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from spear_lightning.errors import DataError

_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class ByteSpans:
    """The elements of a list of byte strings, as places in the payload they were read from.

    Attributes:
        offsets: int64 (n,), first byte of each element.
        lengths: int64 (n,), bytes of each element.
    """

    offsets: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets)

    def take(self, payload: memoryview, index: int) -> bytes:
        """Return one element."""
        start = int(self.offsets[index])
        return bytes(payload[start : start + int(self.lengths[index])])


Column = ByteSpans | np.ndarray
"""What an Example holds under a name: byte strings, float32 (n,) or int64 (n,)."""


def parse_example(payload: memoryview) -> dict[str, Column]:
    """Parse a serialised Example.

    Args:
        payload: The bytes of one record.

    Returns:
        Name -> values. An empty feature gives an empty float32 array.

    Raises:
        DataError: If the bytes are not a valid Example.
    """
    columns: dict[str, Column] = {}
    try:
        for _, start, end in _fields(payload, 0, len(payload), wanted=1):
            for _, entry_start, entry_end in _fields(payload, start, end, wanted=1):
                name, values = _map_entry(payload, entry_start, entry_end)
                columns[name] = values
    except (IndexError, ValueError) as error:
        raise DataError(
            "A record is not a tf.train.Example", found=str(error), expected="an RLDS episode in wire format"
        ) from error
    return columns


def _read_varint(data: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a number is longer than 64 bits")


def _fields(data: memoryview, start: int, end: int, wanted: int) -> list[tuple[int, int, int]]:
    """Return (number, start, end) of the length-delimited fields with a wanted number; others are skipped."""
    found = []
    position = start
    while position < end:
        tag, position = _read_varint(data, position)
        kind = tag & 7
        if kind == _LENGTH_DELIMITED:
            length, position = _read_varint(data, position)
            if position + length > end:
                raise ValueError("a field is longer than what holds it")
            if tag >> 3 == wanted:
                found.append((wanted, position, position + length))
            position += length
        elif kind == _VARINT:
            _, position = _read_varint(data, position)
        elif kind in (_FIXED32, _FIXED64):
            position += 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {kind} does not exist")
    return found


def _map_entry(data: memoryview, start: int, end: int) -> tuple[str, Column]:
    name, values = "", np.zeros(0, np.float32)
    for _, key_start, key_end in _fields(data, start, end, wanted=1):
        name = str(data[key_start:key_end], "utf-8")
    column: Column = values
    for _, feature_start, feature_end in _fields(data, start, end, wanted=2):
        column = _feature(data, feature_start, feature_end)
    return name, column


def _feature(data: memoryview, start: int, end: int) -> Column:
    position = start
    column: Column = np.zeros(0, np.float32)
    while position < end:
        tag, position = _read_varint(data, position)
        length, position = _read_varint(data, position)
        stop = position + length
        if tag & 7 != _LENGTH_DELIMITED or stop > end:
            raise ValueError("a feature is not a list")
        if tag >> 3 not in _LISTS:
            raise ValueError(f"a feature has kind {tag >> 3}")
        column = _LISTS[tag >> 3](data, position, stop)
        position = stop
    return column


def _byte_spans(data: memoryview, start: int, end: int) -> ByteSpans:
    spans = _fields(data, start, end, wanted=1)
    table = np.array([(first, last - first) for _, first, last in spans], np.int64).reshape(-1, 2)
    return ByteSpans(table[:, 0], table[:, 1])


def _floats(data: memoryview, start: int, end: int) -> np.ndarray:
    parts = []
    position = start
    while position < end:
        tag, position = _read_varint(data, position)
        # Protobuf allows numbers to be packed together or one by one.
        length = 4
        if tag & 7 == _LENGTH_DELIMITED:
            length, position = _read_varint(data, position)
        if position + length > end or length % 4:
            raise ValueError("a list of floats is cut")
        parts.append(np.frombuffer(data[position : position + length], "<f4"))
        position += length
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def _integers(data: memoryview, start: int, end: int) -> np.ndarray:
    parts: list[np.ndarray] = []
    position = start
    while position < end:
        tag, position = _read_varint(data, position)
        if tag & 7 == _LENGTH_DELIMITED:
            length, position = _read_varint(data, position)
            if position + length > end:
                raise ValueError("a list of integers is cut")
            parts.append(_packed_varints(np.frombuffer(data[position : position + length], np.uint8)))
            position += length
        else:
            value, position = _read_varint(data, position)
            parts.append(np.array([value], np.uint64).view(np.int64))
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _packed_varints(data_n: np.ndarray) -> np.ndarray:
    """Decode varints that follow one another, all at once."""
    last_n = data_n < 0x80
    if not len(data_n):
        return np.zeros(0, np.int64)
    if not last_n[-1]:
        raise ValueError("a list of integers is cut")
    ends = np.flatnonzero(last_n)
    starts = np.concatenate([[0], ends[:-1] + 1])
    index_n: np.ndarray = np.cumsum(last_n) - last_n
    shift_n = (np.arange(len(data_n)) - starts[index_n]).astype(np.uint64) * np.uint64(7)
    parts_n = (data_n & 0x7F).astype(np.uint64) << shift_n
    return np.add.reduceat(parts_n, starts).view(np.int64)


_LISTS: dict[int, Callable[[memoryview, int, int], Column]] = {1: _byte_spans, 2: _floats, 3: _integers}


def serialize_example(columns: Mapping[str, Sequence[bytes] | np.ndarray]) -> bytes:
    """Serialise an Example: the inverse of `parse_example`.

    Args:
        columns: Name -> list of byte strings, or an array of floats, integers or booleans (flattened).
    """
    entries = []
    for name, values in columns.items():
        key = name.encode()
        feature = _serialize_feature(values)
        entries.append(_delimited(1, _delimited(1, key) + _delimited(2, feature)))
    return _delimited(1, b"".join(entries))


def _serialize_feature(values: Sequence[bytes] | np.ndarray) -> bytes:
    if not isinstance(values, np.ndarray):
        return _delimited(1, b"".join(_delimited(1, value) for value in values))
    flat = values.reshape(-1)
    if np.issubdtype(flat.dtype, np.floating):
        return _delimited(2, _delimited(1, flat.astype("<f4").tobytes()))
    packed = b"".join(_varint(int(value) & 0xFFFFFFFFFFFFFFFF) for value in flat)
    return _delimited(3, _delimited(1, packed))


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def _delimited(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | _LENGTH_DELIMITED) + _varint(len(content)) + content
