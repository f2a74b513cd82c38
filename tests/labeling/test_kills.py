"""Labelling killed at random moments and started again: nothing lost, nothing doubled, nothing paid twice."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from cheap_parts import contents, label_with_gemini, write_images
from fake_gemini import KEY, Answer, FakeGemini, fake_gemini

from spear_lightning.labeling.gemini import Gemini
from spear_lightning.labeling.label_folder import LabelFolder

pytest.importorskip("google.genai")

# Children start from a clean process that has everything imported: they are there in an instant.
CONTEXT = multiprocessing.get_context("forkserver")

PATIENCE_S = 300.0
"""For what takes seconds on an idle machine."""

PRELOAD = ["cheap_parts", "google.genai.types", "httpx2", "scipy.spatial", "scipy.ndimage", "pyarrow.parquet"]


def in_new_process(function: Callable[..., None], *arguments: object) -> None:
    """Run a test in a new process: in this one the clean process may be there already, without key and imports."""
    process = multiprocessing.get_context("spawn").Process(target=_prepared, args=(function, *arguments))
    process.start()
    process.join()
    assert process.exitcode == 0, "see its traceback"


def _prepared(function: Callable[..., None], *arguments: object) -> None:
    os.environ["GEMINI_API_KEY"] = KEY
    # The clean process does not know where the tests are, and passes over what it cannot import.
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    CONTEXT.set_forkserver_preload(PRELOAD)
    function(*arguments)


# How many images one life can finish at most: up to 3 before the bell rings, up to 2 after it.
MOST_BEFORE_THE_BELL = 3
MOST_AFTER_THE_BELL = 2


class Cashier:
    """Notes questions whose reply lay in the cache already when they were asked, and rings at a chosen one.

    Two replies after the bell it serves nobody until the process that asks is gone: however fast the machine is,
    not everything can be finished before the kill.
    """

    def __init__(self, images: Path, replies: Path) -> None:
        detector = Gemini(str(replies))
        self._place = {}
        for path in images.iterdir():
            key = detector.cache.key(path.read_bytes(), *detector._question())
            self._place[_hash(path.read_bytes())] = replies / key[:2] / f"{key}.json"
        self.paid_twice: list[str] = []
        self.bell = threading.Event()
        self.ring_at = 0
        self.reopened = threading.Event()

    def ring_after(self, requests: int) -> None:
        self.bell.clear()
        self.reopened = threading.Event()
        self.ring_at = requests

    def answer(self, number: int, image: str) -> Answer:
        if self._place[image].exists():
            self.paid_twice.append(image)
        if number >= self.ring_at:
            self.bell.set()
        if number > self.ring_at + MOST_AFTER_THE_BELL:
            return Answer(wait=self.reopened)
        return Answer()


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def kill_and_go_on(tmp_path: Path, kills: int, images: int) -> None:
    names = [f"{number:03d}.jpg" for number in range(images)]
    write_images(tmp_path / "images", names)
    out = tmp_path / "killed"
    cashier = Cashier(tmp_path / "images", out / "replies")
    draw = random.Random(kills)
    with fake_gemini(cashier.answer) as fake:
        for _ in range(kills):
            # A few more requests, and then up to a fifth of a second, in which labels are made and written.
            cashier.ring_after(len(fake.images) + draw.randint(1, MOST_BEFORE_THE_BELL))
            child = start(tmp_path, out, fake)
            assert cashier.bell.wait(PATIENCE_S), f"no request came; the process ended with {child.exitcode}"
            child.join(draw.uniform(0, 0.2))
            assert child.is_alive(), "there was too little to do"
            child.kill()
            child.join()
            cashier.reopened.set()
        cashier.ring_after(10**9)
        last = start(tmp_path, out, fake)
        last.join(PATIENCE_S)
        assert last.exitcode == 0
        assert cashier.paid_twice == []
        # What was under way when a process died was lost; three requests are under way at the most.
        assert images <= len(fake.images) <= images + 3 * kills
        repeated = fake.images
    assert len(set(repeated)) == images
    assert LabelFolder(out / "labels").failures() == {}
    assert not list((out / "labels").glob(".*.tmp"))

    expected = tmp_path / "uninterrupted"
    with fake_gemini(lambda number, image: Answer()) as fake:
        straight = start(tmp_path, expected, fake)
        straight.join(PATIENCE_S)
    assert contents(out / "labels").keys() == set(names)
    assert contents(out / "labels") == contents(expected / "labels")


def start(tmp_path: Path, out: Path, fake: FakeGemini) -> multiprocessing.process.BaseProcess:
    child = CONTEXT.Process(target=label_with_gemini, args=(str(tmp_path / "images"), str(out), fake.url))
    child.start()
    return child


@pytest.mark.slow
def test_killed_twenty_times(tmp_path: Path) -> None:
    kills = 20
    images = kills * (MOST_BEFORE_THE_BELL + MOST_AFTER_THE_BELL) + 1
    in_new_process(kill_and_go_on, tmp_path, kills, images)


@pytest.mark.slow
def test_a_process_that_fits_boxes_ends_with_the_one_that_was_killed(tmp_path: Path) -> None:
    in_new_process(kill_the_parent_of_a_box_process, tmp_path)


def kill_the_parent_of_a_box_process(tmp_path: Path) -> None:
    write_images(tmp_path / "images", [f"{number:02d}.jpg" for number in range(6)])
    asked = threading.Event()
    never = threading.Event()

    def answer(number: int, image: str) -> Answer:
        # One image goes through, so that there is a process to fit its boxes; then silence.
        if number > 1:
            asked.set()
        return Answer(wait=never if number > 1 else None)

    try:
        with fake_gemini(answer) as fake:
            arguments = (str(tmp_path / "images"), str(tmp_path), fake.url)
            child = CONTEXT.Process(target=label_with_gemini, args=arguments, kwargs={"box_processes": 1})
            child.start()
            assert asked.wait(PATIENCE_S)
            parent = psutil.Process(child.pid)
            workers: list[psutil.Process] = []
            while child.is_alive() and not workers:
                workers = [p for p in parent.children() if "spawn_main" in " ".join(p.cmdline())]
            assert len(workers) == 1
            child.kill()
            child.join()
            gone, alive = psutil.wait_procs(workers, timeout=PATIENCE_S)
            assert (len(gone), alive) == (1, [])
    finally:
        never.set()
