"""Workers and threads give what one process reads: in order, to the bit, and nothing held is written over."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spear_lightning.batches import RobotBatch
from spear_lightning.errors import ConfigError, DataError, SpearError
from spear_lightning.robot_data.batch_slots import BatchSlots
from spear_lightning.robot_data.chunks import ChunkSpec, read_chunks
from spear_lightning.robot_data.dataset import EvenSamples, RobotDataset
from spear_lightning.robot_data.images import CameraSpec, fit_image
from spear_lightning.robot_data.loader import FiniteLoader, ResumableLoader
from spear_lightning.robot_data.robot_mixture import RobotMixture
from spear_lightning.robot_data.worker_processes import next_result

CAMERAS = {
    "primary": CameraSpec(56, 42),
    "wrist": CameraSpec(28, 28, fit="pad", source="secondary"),
}
READERS = [
    pytest.param({}, id="prompt"),
    pytest.param({"num_threads": 2}, id="threads"),
    pytest.param({"num_workers": 2}, id="workers", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def mixture(demo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> RobotMixture:
    folder = tmp_path_factory.mktemp("index")
    return RobotMixture(demo_root, {"bridge": 1.0}, ChunkSpec(), holdout=0.2, index_folder=folder)


@pytest.fixture(scope="module")
def dataset(mixture: RobotMixture) -> RobotDataset:
    return RobotDataset(mixture.training, mixture.stream(), CAMERAS, ChunkSpec())


def assert_is_what_the_index_holds(batch: RobotBatch, mixture: RobotMixture, places: range) -> None:
    (source,) = mixture.training
    _, samples = mixture.stream()[np.array(places)]
    frames = source.frames(samples)
    chunks = read_chunks(source.index, frames, ChunkSpec())
    assert batch.position.tolist() == list(places)
    assert torch.equal(batch.state, chunks.state)
    assert torch.equal(batch.actions, chunks.actions)
    assert torch.equal(batch.action_mask, chunks.mask)
    for row, (frame, episode) in enumerate(zip(frames, source.index.episode_of(frames), strict=True)):
        assert batch.instructions[row] == source.index.instructions[source.index.instruction_ids[episode]]
        for name, camera in CAMERAS.items():
            picture = source.index.read_image(camera.source or name, int(frame), int(episode))
            assert torch.equal(batch.images[name][row], fit_image(picture, camera))
            assert batch.image_mask[name][row]


@pytest.mark.parametrize("options", READERS)
def test_all_readers_give_what_the_index_holds(
    mixture: RobotMixture, dataset: RobotDataset, options: dict[str, int]
) -> None:
    # All are held: more than there are slots.
    loader = ResumableLoader(dataset, 4, 16, prefetch=1, **options)
    for number, batch in enumerate(list(loader)):
        assert_is_what_the_index_holds(batch, mixture, range(4 * number, 4 * number + 4))


@pytest.mark.parametrize("options", READERS)
def test_all_readers_resume_within_an_epoch(
    mixture: RobotMixture, dataset: RobotDataset, options: dict[str, int]
) -> None:
    first = ResumableLoader(dataset, 4, 5, **options)
    assert len(list(first)) == 5
    assert len(list(islice(first, 2))) == 2
    second = ResumableLoader(dataset, 4, 5, **options)
    second.load_state_dict(first.state_dict())
    rest = list(second)
    assert len(rest) == 3
    for number, batch in enumerate(rest, start=7):
        assert_is_what_the_index_holds(batch, mixture, range(4 * number, 4 * number + 4))


@pytest.mark.parametrize("options", READERS)
def test_a_pass_that_was_left_starts_anew(mixture: RobotMixture, options: dict[str, int]) -> None:
    samples = EvenSamples([len(source) for source in mixture.held_out], 18)
    dataset = RobotDataset(mixture.held_out, samples, CAMERAS, ChunkSpec())
    loader = FiniteLoader(dataset, range(len(samples)), 4, **options)
    for _ in range(4):
        assert len(list(islice(loader, 2))) == 2
    assert [batch.position.tolist() for batch in loader] == [
        list(range(n, min(n + 4, 18))) for n in range(0, 18, 4)
    ]
    assert len(loader) == 5


def test_a_slot_is_used_again_when_nobody_holds_any_part_of_it(dataset: RobotDataset) -> None:
    slots = BatchSlots(dataset, 2, count=1, shared=False)
    first = slots.borrow(2)
    place = first.images["primary"].data_ptr()
    first.images["primary"].fill_(7)
    assert slots.take() is None
    part = first.images["primary"][1, :, 0]
    del first
    other = slots.borrow(2)
    assert other.images["primary"].data_ptr() != place
    other.images["primary"].zero_()
    assert (part == 7).all()
    del part
    assert slots.borrow(1).images["primary"].data_ptr() == place


def test_slots_that_were_never_lent_are_reclaimed(dataset: RobotDataset) -> None:
    slots = BatchSlots(dataset, 2, count=2, shared=False)
    taken, lent = slots.take(), slots.borrow(1)
    assert slots.take() is None
    slots.reclaim()
    assert slots.take() == taken
    assert slots.take() is None
    assert len(lent) == 1


def test_what_a_frame_lacks_is_black_in_memory_that_was_used(mixture: RobotMixture) -> None:
    samples = EvenSamples([len(mixture.training[0])], 4)
    dataset = RobotDataset(mixture.training, samples, CAMERAS, ChunkSpec())
    batch = dataset.empty(2)
    for image in batch.images.values():
        image.fill_(9)
    dataset._pictures[0].pop("wrist")
    dataset.fill(batch, [0, 1])
    assert not batch.images["wrist"].any()
    assert not batch.image_mask["wrist"].any()
    assert batch.image_mask["primary"].all()


def test_both_workers_and_threads_are_refused(dataset: RobotDataset) -> None:
    with pytest.raises(ConfigError, match="either by worker processes or by threads"):
        next(iter(ResumableLoader(dataset, 4, 5, num_workers=1, num_threads=1)))


@pytest.mark.parametrize(
    ("raised", "shown"),
    [
        (
            DataError(
                "Caught DataError in DataLoader worker process 0.\nTraceback\n  File x\n"
                "spear_lightning.errors.DataError: A shard is gone\n  where: y"
            ),
            r"^A shard is gone\n  where: y$",
        ),
        (
            RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed. "),
            r"has died[\s\S]*pid 3[\s\S]*num_workers",
        ),
    ],
)
def test_errors_of_workers_are_told_without_their_story(raised: Exception, shown: str) -> None:
    def failing() -> Iterator[Any]:
        raise raised
        yield

    with pytest.raises(SpearError, match=shown):
        next_result(failing())


@pytest.mark.slow
def test_a_killed_worker_is_one_error(dataset: RobotDataset) -> None:
    before = set(multiprocessing.active_children())
    loader = ResumableLoader(dataset, 4, 1 << 30, num_workers=1)
    batches = iter(loader)
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - before

    # torch may notice before the next batch is asked for: then the error is its own.
    def read_on() -> None:
        os.kill(worker.pid, signal.SIGKILL)
        deque(batches, maxlen=0)

    with pytest.raises((SpearError, RuntimeError), match=r"has died|killed by signal"):
        read_on()


@pytest.mark.slow
@pytest.mark.parametrize("end", ["pass", "raise KeyError", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_shared_memory_and_workers_end_with_the_trainer(demo_root: Path, tmp_path: Path, end: str) -> None:
    code = f"""
import multiprocessing, os, signal
from pathlib import Path
from spear_lightning.robot_data.chunks import ChunkSpec
from spear_lightning.robot_data.dataset import RobotDataset
from spear_lightning.robot_data.images import CameraSpec
from spear_lightning.robot_data.loader import ResumableLoader
from spear_lightning.robot_data.robot_mixture import RobotMixture
mixture = RobotMixture({str(demo_root)!r}, {{"bridge": 1.0}}, ChunkSpec(), index_folder={str(tmp_path)!r})
dataset = RobotDataset(mixture.training, mixture.stream(), {{"primary": CameraSpec(28, 28)}}, ChunkSpec())
batches = iter(ResumableLoader(dataset, 2, 99, num_workers=2))
held = [next(batches) for _ in range(6)]
pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
named = [path.name for path in Path("/dev/shm").glob("torch_*") if path.name.split("_")[1] in map(str, pids)]
print(*pids, *named, flush=True)
{end}
"""
    run = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=600)
    assert ("KeyError" in run.stderr) == (end == "raise KeyError"), run.stderr
    # No memory had a name in the file system even while it was in use. That `run` returned says that all processes
    # are gone: each would hold the pipe it reads.
    pids = [int(word) for word in run.stdout.split()]
    assert len(pids) == 3
    assert not [path for pid in pids for path in Path("/dev/shm").glob(f"torch_{pid}_*")]
