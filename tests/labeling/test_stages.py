"""The line of steps: everything goes through every step once, in batches, at the same time; errors stop it."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spear_lightning.errors import ConfigError
from spear_lightning.labeling.stages import Stage, _Belt, run_stages


class Thing:
    def __init__(self, number: int) -> None:
        self.number, self.steps = number, list[str]()


def mark(name: str, sizes: list[int] | None = None) -> Stage[Thing]:
    def work(batch: list[Thing]) -> None:
        if sizes is not None:
            sizes.append(len(batch))
        for thing in batch:
            thing.steps.append(name)

    return Stage(name, work)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 40),
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4)), min_size=1, max_size=4),
)
def test_everything_passes_every_step_once(count: int, shapes: list[tuple[int, int]]) -> None:
    sizes: list[list[int]] = [[] for _ in shapes]
    stages = []
    for number, (batch, threads) in enumerate(shapes):
        stage = mark(str(number), sizes[number])
        stage.batch, stage.threads = batch, threads
        stages.append(stage)
    out = list(run_stages(map(Thing, range(count)), stages))
    assert sorted(thing.number for thing in out) == list(range(count))
    assert all(thing.steps == [stage.name for stage in stages] for thing in out)
    for (batch, _), seen in zip(shapes, sizes, strict=True):
        assert sum(seen) == count
        assert all(1 <= size <= batch for size in seen)


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"threads": 0}])
def test_a_step_that_could_not_work_is_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"(?s)step detect.*`parallel`"):
        Stage("detect", lambda things: None, **sizes)


def test_steps_work_at_the_same_time() -> None:
    """Thing 0 in the last step and three others in the first one wait for each other: all are at work at once."""
    barrier = threading.Barrier(4, timeout=300)

    def first(batch: list[Thing]) -> None:
        if batch[0].number in (1, 2, 3):
            barrier.wait()

    def last(batch: list[Thing]) -> None:
        if batch[0].number == 0:
            barrier.wait()

    out = list(run_stages(map(Thing, range(40)), [Stage("first", first, threads=4), Stage("last", last)]))
    assert len(out) == 40
    assert barrier.n_waiting == 0


def test_a_step_takes_what_waits_for_it() -> None:
    """While the first batch is held up, others arrive; the second batch is a full one."""
    sizes: list[int] = []
    arrived = threading.Semaphore(0)

    def hold_up(batch: list[Thing]) -> None:
        if not sizes:
            for _ in range(6):
                assert arrived.acquire(timeout=300)
        sizes.append(len(batch))

    def arrive(batch: list[Thing]) -> None:
        if batch[0].number > 0:
            arrived.release()

    # One thread between them, so that six releases mean that five things are there or taken.
    stages = [Stage("arrive", arrive), Stage("hold up", hold_up, batch=3)]
    assert len(list(run_stages(map(Thing, range(13)), stages))) == 13
    assert max(sizes) == 3
    assert sum(sizes) == 13


@pytest.mark.parametrize("where", ["source", "first", "second"])
def test_an_error_stops_the_line_and_is_raised(where: str) -> None:
    def source() -> Iterator[Thing]:
        for number in range(10_000):
            if where == "source" and number == 7:
                raise KeyError("source")
            yield Thing(number)

    def step(name: str) -> Stage[Thing]:
        def work(batch: list[Thing]) -> None:
            if where == name and batch[0].number >= 7:
                raise KeyError(name)

        return Stage(name, work, threads=2)

    before = set(threading.enumerate())
    with pytest.raises(KeyError, match=where):
        list(run_stages(source(), [step("first"), step("second")]))
    assert set(threading.enumerate()) <= before


def test_leaving_early_ends_the_threads() -> None:
    before = set(threading.enumerate())
    line = run_stages(map(Thing, range(10_000)), [mark("a"), mark("b")])
    assert next(line).steps == ["a", "b"]
    line.close()  # type: ignore[attr-defined]
    assert set(threading.enumerate()) <= before


def test_batches_are_put_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for a batch is not woken for its first thing alone."""
    belt, seen = _Belt[int](6, 1), list[int]()
    monkeypatch.setattr(belt._changed, "notify_all", lambda: seen.append(len(belt._things)))
    belt.put_together([0, 1, 2, 3])
    assert seen == [4]
    assert belt.take(3) == [0, 1, 2]
    belt.put_together([4, 5])
    assert belt.take(8) == [3, 4, 5]
