"""The TFRecord container, read and written without TensorFlow.

A record is: length (uint64, little endian), masked CRC-32C of those 8 bytes, payload, masked CRC-32C of the
payload. In RLDS a payload is one whole episode.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import google_crc32c

from spear_lightning.errors import DataError

_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")
RECORD_OVERHEAD = _HEADER.size + _FOOTER.size
"""Bytes that the container adds to each payload."""


def masked_crc32c(data: bytes) -> int:
    """Return TFRecord's checksum: CRC-32C (Castagnoli), rotated by 15 bits, plus a constant."""
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def read_records(path: Path) -> Iterator[tuple[int, memoryview]]:
    """Yield (offset of the payload in the file, payload) of every record, checking both checksums.

    The payload is a view of the mapped file, valid until the next one is asked for.

    Raises:
        DataError: If the file is missing, truncated, or a checksum does not match.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError("A shard is missing", where=path, remedy="download the data set again") from error
    if size == 0:
        raise _broken(path, 0, "the file is empty")
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as view,
    ):
        start = 0
        while start < size:
            if start + RECORD_OVERHEAD > size:
                raise _broken(path, start, f"{size - start} bytes are left, too few for a record")
            length, length_crc = _HEADER.unpack_from(view, start)
            if masked_crc32c(bytes(view[start : start + 8])) != length_crc:
                raise _broken(path, start, "the checksum of a record's length does not match")
            begin = start + _HEADER.size
            end = begin + length
            if end + _FOOTER.size > size:
                raise _broken(path, start, f"the last record is cut: {length} bytes promised")
            (payload_crc,) = _FOOTER.unpack_from(view, end)
            with view[begin:end] as payload:
                if masked_crc32c(bytes(payload)) != payload_crc:
                    raise _broken(path, start, "the checksum of a record's payload does not match")
                yield begin, payload
            start = end + _FOOTER.size


def _broken(path: Path, offset: int, found: str) -> DataError:
    return DataError(
        "A shard is truncated or damaged",
        where=f"{path}, byte {offset}",
        found=found,
        expected="a TFRecord file whose checksums match",
        remedy="download or write this shard again",
    )


def write_records(path: Path, payloads: Iterable[bytes]) -> list[int]:
    """Write payloads as one TFRecord file, at once or not at all.

    Returns:
        The payloads' lengths in bytes.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    lengths = []
    with temporary.open("wb") as file:
        for payload in payloads:
            length = struct.pack("<Q", len(payload))
            file.write(length + struct.pack("<I", masked_crc32c(length)))
            file.write(payload)
            file.write(_FOOTER.pack(masked_crc32c(payload)))
            lengths.append(len(payload))
    os.replace(temporary, path)
    return lengths
