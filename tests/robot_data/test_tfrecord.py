"""TFRecord: checksums against an independent implementation, and every way a file can be broken."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spear_lightning.errors import DataError
from spear_lightning.robot_data.tfrecord import masked_crc32c, read_records, write_records


def crc32c_bit_by_bit(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@given(st.binary(max_size=200))
def test_checksum_is_masked_castagnoli(data: bytes) -> None:
    crc = crc32c_bit_by_bit(data)
    rotated = (crc >> 15 | crc << 17) & 0xFFFFFFFF
    assert masked_crc32c(data) == (rotated + 0xA282EAD8) % 2**32


def test_known_value_of_the_castagnoli_checksum() -> None:
    assert crc32c_bit_by_bit(b"123456789") == 0xE3069283


def test_what_is_written_is_read(tmp_path: Path) -> None:
    payloads = [b"", b"one", bytes(range(256)) * 40]
    path = tmp_path / "a.tfrecord"
    assert write_records(path, payloads) == [len(payload) for payload in payloads]
    found = [(begin, bytes(payload)) for begin, payload in read_records(path)]
    assert [payload for _, payload in found] == payloads
    content = path.read_bytes()
    assert all(content[begin : begin + len(payload)] == payload for begin, payload in found)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.tfrecord"]


def test_real_shard(bridge_folder: Path) -> None:
    path = next(bridge_folder.glob("*.tfrecord*"))
    lengths = [len(payload) for _, payload in read_records(path)]
    # numBytes and shardLengths of its dataset_info.json.
    assert (len(lengths), sum(lengths)) == (25, 3_474_742)


@pytest.mark.parametrize("kept", [5, 11, 20, 10 + 16 + 4 + 1])
def test_truncated_file_names_file_and_offset(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "cut.tfrecord"
    write_records(path, [b"0123456789", b"0123456789"])
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"truncated or damaged\n  where: .*cut.tfrecord, byte \d+"):
        for _ in read_records(path):
            pass


@pytest.mark.parametrize("position", [0, 9, 14, 23])
def test_flipped_bit_is_found_wherever_it_is(tmp_path: Path, position: int) -> None:
    path = tmp_path / "flipped.tfrecord"
    write_records(path, [b"0123456789"])
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)
    with pytest.raises(DataError, match="checksum"):
        list(read_records(path))


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing"):
        list(read_records(tmp_path / "none"))
    (tmp_path / "empty").touch()
    with pytest.raises(DataError, match="empty"):
        list(read_records(tmp_path / "empty"))
