"""Copies to a GPU, on a GPU that is played: it copies when somebody waits for it, and not before."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

from spear_lightning.batches import RobotBatch, TensorBatch
from spear_lightning.robot_data.batch_slots import BatchSlots
from spear_lightning.robot_data.device_copies import DeviceCopies
from spear_lightning.robot_data.resumable_stream import FinitePass, ResumableStream, StreamBatches

GPU = torch.device("cuda", 0)


class PlayedStream:
    """Does what it was told only when it is waited for: what it reads must be untouched until then."""

    using: PlayedStream | None = None

    def __init__(self, device: torch.device) -> None:
        assert device == GPU
        self.orders: list[tuple[Tensor, Tensor]] = []

    def record_event(self) -> PlayedEvent:
        return PlayedEvent(self, self.orders[-1])

    def synchronize(self) -> None:
        while self.orders:
            there, here = self.orders.pop(0)
            there.copy_(here)


class PlayedEvent:
    def __init__(self, stream: PlayedStream, last: tuple[Tensor, Tensor]) -> None:
        self.stream, self.last = stream, last

    def synchronize(self) -> None:
        while any(order is self.last for order in self.stream.orders):
            there, here = self.stream.orders.pop(0)
            there.copy_(here)


@dataclass
class Numbers(TensorBatch):
    values: Tensor
    instructions: list[str]
    used_by: object = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Numbers:
        assert (device, non_blocking) == (GPU, True)
        assert PlayedStream.using is not None
        there = torch.full_like(self.values, -1)
        PlayedStream.using.orders.append((there, self.values))
        return Numbers(there, self.instructions)

    def record_stream(self, stream: Any) -> None:
        self.used_by = stream


class NumbersDataset:
    def empty(self, size: int, allocate: Any) -> Numbers:
        return Numbers(allocate((size, 3), torch.int64), [""] * size)


class SlotReader:
    """Reads numbers into few slots; an exhausted supply is an error, as it would slow a trainer down."""

    def __init__(self, places: Iterable[list[int]], slots: int) -> None:
        self.slots = BatchSlots(NumbersDataset(), 2, slots, shared=False)  # type: ignore[arg-type]
        self.places = places
        self.read = 0

    def __iter__(self) -> Iterator[Numbers]:
        for places in self.places:
            slot = self.slots.take()
            assert slot is not None, "a batch was held for too long"
            batch: Any = self.slots.lend(slot, 2, [str(place) for place in places])
            batch.values.copy_(torch.tensor(places)[:, None])
            self.read += 1
            yield batch


@pytest.fixture
def stream_of_the_trainer(monkeypatch: pytest.MonkeyPatch) -> object:
    @contextmanager
    def using(stream: PlayedStream) -> Iterator[None]:
        PlayedStream.using = stream
        yield
        PlayedStream.using = None

    current = object()
    monkeypatch.setattr(torch.cuda, "Stream", PlayedStream)
    monkeypatch.setattr(torch.cuda, "stream", using)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    return current


def places_of(count: int) -> list[list[int]]:
    return [[2 * number, 2 * number + 1] for number in range(count)]


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_copies_are_whole_in_order_and_one_ahead(stream_of_the_trainer: object, count: int) -> None:
    # Two slots: of the batch that is copied, and of the one that is read.
    reader = SlotReader(places_of(count), slots=2)
    given = 0
    for given, batch in enumerate(DeviceCopies(reader, GPU), start=1):
        assert reader.read == min(given + 1, count)
        assert batch.values.tolist() == [[2 * given - 2] * 3, [2 * given - 1] * 3]
        assert batch.instructions == [str(2 * given - 2), str(2 * given - 1)]
        assert batch.used_by is stream_of_the_trainer
    assert given == count


def test_what_is_left_early_is_not_let_go_while_it_is_copied(
    stream_of_the_trainer: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams: list[PlayedStream] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: streams.append(PlayedStream(device)) or streams[-1])
    batches = iter(DeviceCopies(SlotReader(places_of(5), slots=2), GPU))
    next(batches)
    assert streams[0].orders
    batches.close()  # type: ignore[attr-defined]
    assert not streams[0].orders


def test_a_state_counts_what_was_given(stream_of_the_trainer: object) -> None:
    class Stream(ResumableStream[Any]):
        def open_at(self, places: StreamBatches) -> SlotReader:
            return SlotReader(places, slots=2)

        def check_state(self, state: dict[str, Any]) -> None:
            pass

    stream = Stream(2, 4, 0, 1, "", GPU)
    first = [batch.values[:, 0].tolist() for batch in stream]
    first += [batch.values[:, 0].tolist() for batch in islice(stream, 1)]
    assert stream.state_dict()["batches"] == 5
    again = Stream(2, 4, 0, 1, "", GPU)
    again.load_state_dict(stream.state_dict())
    rest = [batch.values[:, 0].tolist() for batch in again]
    assert first + rest == places_of(8)


def test_validation_is_copied_in_every_pass(stream_of_the_trainer: object) -> None:
    validation: FinitePass[Any] = FinitePass(range(6), 2, lambda places: SlotReader(places, slots=2), GPU)
    for _ in range(2):
        assert [batch.values[:, 0].tolist() for batch in validation] == places_of(3)


def test_without_a_gpu_batches_are_the_reader_s_own() -> None:
    batches = [Numbers(torch.arange(2), []) for _ in range(3)]
    assert all(ours is theirs for ours, theirs in zip(DeviceCopies(batches, None), batches, strict=True))


def test_every_tensor_of_a_batch_is_named_to_the_allocator() -> None:
    numbers = iter(range(99))
    camera = {name: torch.zeros(1) for name in ("primary", "wrist")}
    fields = {name: torch.zeros(1) for name in ("state", "actions", "action_mask", "dataset", "position")}
    batch = RobotBatch(camera, {name: torch.ones(1) for name in camera}, ["x"], **fields)
    for tensor in batch.tensors():
        tensor.fill_(next(numbers))
    moved = [*batch.images.values(), *batch.image_mask.values(), *(getattr(batch, name) for name in fields)]
    assert sorted(int(tensor) for tensor in moved) == list(range(9))


class PlayedDriver:
    def __init__(self, code: int) -> None:
        self.code, self.locked = code, {}

    def cudaHostRegister(self, begin: int, size: int, flags: int) -> int:
        self.locked.update({begin: size} if self.code == 0 else {})
        return self.code

    def cudaHostUnregister(self, begin: int) -> int:
        del self.locked[begin]
        return 0


def test_slots_are_locked_once_as_long_as_they_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = PlayedDriver(code=0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    slots = BatchSlots(NumbersDataset(), 2, 3, shared=False)  # type: ignore[arg-type]
    assert slots.lock_pages()
    ((begin, size),) = driver.locked.items()
    for slot in range(3):
        values = slots.open(slot, 2).values  # type: ignore[attr-defined]
        assert begin <= values.data_ptr() <= begin + size - values.nbytes
    del slots, values
    gc.collect()
    assert not driver.locked


def test_slots_that_cannot_be_locked_are_reported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: PlayedDriver(code=2))
    slots = BatchSlots(NumbersDataset(), 2, 1, shared=False)  # type: ignore[arg-type]
    # Without a GPU the driver's error cannot be taken note of, which is another error.
    monkeypatch.setattr(torch, "zeros", lambda *arguments, **options: None)
    assert not slots.lock_pages()
    assert "cannot be page-locked (CUDA error 2)" in caplog.text
