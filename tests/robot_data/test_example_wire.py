"""The wire format against TensorFlow's own message classes, as tensorflow-datasets ships them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorflow_datasets.proto import tf_example_pb2 as example_pb2

from spear_lightning.errors import DataError
from spear_lightning.robot_data.example_wire import ByteSpans, parse_example, serialize_example

names = st.text(min_size=1, max_size=12)
values = st.one_of(
    st.lists(st.binary(max_size=300), min_size=1, max_size=5),
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=300),
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=50),
)


def kind_of(items: Sequence[object]) -> str:
    return {bytes: "bytes_list", float: "float_list", int: "int64_list"}[type(items[0])]


@given(st.dictionaries(names, values, max_size=4))
def test_reads_what_protobuf_writes(content: dict[str, list]) -> None:
    message = example_pb2.Example()
    for name, items in content.items():
        getattr(message.features.feature[name], kind_of(items)).value.extend(items)
    payload = memoryview(message.SerializeToString())
    columns = parse_example(payload)
    assert columns.keys() == content.keys()
    for name, items in content.items():
        column = columns[name]
        if isinstance(column, ByteSpans):
            assert [column.take(payload, index) for index in range(len(column))] == items
        else:
            np.testing.assert_array_equal(column, items)


@given(st.dictionaries(names, values, max_size=4))
def test_protobuf_reads_what_we_write(content: dict[str, list]) -> None:
    columns = {name: items if isinstance(items[0], bytes) else np.array(items) for name, items in content.items()}
    message = example_pb2.Example.FromString(serialize_example(columns))
    assert message.features.feature.keys() == content.keys()
    for name, items in content.items():
        assert list(getattr(message.features.feature[name], kind_of(items)).value) == items


def test_unpacked_numbers_are_read_too() -> None:
    # float_list { value: 1.5 value: -2 } and int64_list { value: 300 }, each number with a tag of its own.
    floats = b"\x12\x0a\x0d\x00\x00\xc0\x3f\x0d\x00\x00\x00\xc0"
    integers = b"\x1a\x03\x08\xac\x02"
    entries = b"".join(
        b"\x0a" + bytes([len(entry)]) + entry
        for entry in (
            b"\x0a\x01f\x12" + bytes([len(floats)]) + floats,
            b"\x0a\x01i\x12" + bytes([len(integers)]) + integers,
        )
    )
    columns = parse_example(memoryview(b"\x0a" + bytes([len(entries)]) + entries))
    assert columns["f"].tolist() == [1.5, -2.0]
    assert columns["i"].tolist() == [300]


@given(st.binary(min_size=1, max_size=80))
def test_noise_never_crashes(noise: bytes) -> None:
    # Protobuf accepts unknown fields, so some noise is a valid message; anything else must be a clear error.
    with suppress(DataError):
        parse_example(memoryview(noise))


@pytest.mark.parametrize("broken", [b"\x0a\x05abc", b"\x0a", b"\xff" * 12, b"\x0a\x04\x0a\x09ab", b"\x0f"])
def test_broken_messages_are_an_error(broken: bytes) -> None:
    with pytest.raises(DataError, match=r"not a tf\.train\.Example"):
        parse_example(memoryview(broken))
