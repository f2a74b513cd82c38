"""The TFRecord container, read and written without TensorFlow.

A record is: length (uint64, little endian), masked CRC-32C of those 8 bytes, payload, masked CRC-32C of the
payload. In RLDS a payload is one whole episode.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import google_crc32c

from spear_lightning.errors import DataError
from spear_lightning.robot_data.storage import DataPath, file_marks

_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")
RECORD_OVERHEAD = _HEADER.size + _FOOTER.size
"""Bytes that the container adds to each payload."""


def masked_crc32c(data: bytes) -> int:
    """Return TFRecord's checksum: CRC-32C (Castagnoli), rotated by 15 bits, plus a constant."""
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def read_records(path: DataPath) -> Iterator[tuple[int, memoryview]]:
    """Yield (offset of the payload in the file, payload) of every record, checking both checksums.

    A local file is mapped; one in a bucket is read from end to end. A payload is valid until the next one comes.

    Raises:
        DataError: If the file is missing, truncated, or a checksum does not match.
    """
    try:
        ((_, size, _),) = file_marks([path])
    except OSError as error:
        raise DataError("A shard is missing", where=path, remedy="download the data set again") from error
    if size == 0:
        raise _broken(path, 0, "the file is empty")
    if isinstance(path, Path):
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as view,
        ):
            yield from _records(path, size, lambda start, end: view[start:end])
        return
    with path.open() as stream:

        def take(start: int, end: int) -> memoryview:
            # Parts are asked for one after the other, so the file never has to seek.
            part = stream.read(end - start)
            if len(part) != end - start:
                raise _broken(path, start, f"{len(part)} bytes arrived of {end - start}")
            return memoryview(part)

        yield from _records(path, size, take)


def _records(
    path: DataPath, size: int, take: Callable[[int, int], memoryview]
) -> Iterator[tuple[int, memoryview]]:
    start = 0
    while start < size:
        if start + RECORD_OVERHEAD > size:
            raise _broken(path, start, f"{size - start} bytes are left, too few for a record")
        with take(start, start + _HEADER.size) as header:
            length, length_crc = _HEADER.unpack(header)
            if masked_crc32c(bytes(header[:8])) != length_crc:
                raise _broken(path, start, "the checksum of a record's length does not match")
        begin = start + _HEADER.size
        end = begin + length
        if end + _FOOTER.size > size:
            raise _broken(path, start, f"the last record is cut: {length} bytes promised")
        with take(begin, end) as payload, take(end, end + _FOOTER.size) as footer:
            if (masked_crc32c(bytes(payload)),) != _FOOTER.unpack(footer):
                raise _broken(path, start, "the checksum of a record's payload does not match")
            yield begin, payload
        start = end + _FOOTER.size


def _broken(path: DataPath, offset: int, found: str) -> DataError:
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
