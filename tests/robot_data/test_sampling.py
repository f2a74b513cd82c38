"""The mixture of 24 data sets: configured shares, and the same samples after every kind of restart."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import yaml
from oxe_layouts import LAYOUTS

from spear_lightning.batches import RobotBatch
from spear_lightning.errors import ConfigError
from spear_lightning.robot_data.chunks import ChunkSpec
from spear_lightning.robot_data.dataset import RobotDataset
from spear_lightning.robot_data.images import CameraSpec
from spear_lightning.robot_data.loader import ResumableLoader
from spear_lightning.robot_data.mixture import SampleStream, mixture_shares
from spear_lightning.robot_data.robot_mixture import RobotMixture

EXPERIMENT = Path(__file__).resolve().parents[2] / "experiments" / "vla_oxe.yaml"
KNOWN = {"droid": 0.35, "bridge": 0.18, "fractal": 0.12, "kuka": 0.04}
# Published numbers of steps; those that are not known are guessed at 10,000.
FRAMES = dict.fromkeys(LAYOUTS, 10_000)
FRAMES |= {"fractal": 3_786_400, "kuka": 2_455_879, "bridge": 2_135_463, "taco_play": 237_798, "jaco_play": 77_965}
FRAMES |= {"viola": 76_324, "ur5": 97_939, "hydra": 358_234, "buds": 34_112, "nyu_franka_play": 44_875}
FRAMES |= {
    "furniture_bench": 3_948_057,
    "sailor": 353_094,
    "sirius": 279_939,
    "bc_z": 6_015_535,
    "dlr_edan": 8_928,
}
FRAMES |= {"mutex": 361_883, "fanuc": 62_613, "fmb": 1_137_459, "droid": 27_040_000, "dobbe": 1_139_911}
FRAMES |= {"robocook": 112_842, "ucsd_pick_place": 67_700}


@pytest.fixture(scope="module")
def data() -> dict:
    return yaml.safe_load(EXPERIMENT.read_text())["data"]["init_args"]


@pytest.fixture(scope="module")
def mixture(oxe_root: Path, data: dict) -> RobotMixture:
    return RobotMixture(
        oxe_root, data["mixture"], ChunkSpec(), shares=data["shares"], holdout=0, index_folder=oxe_root / "index"
    )


def test_the_paper_scale_mixture(data: dict) -> None:
    assert set(data["mixture"]) == set(LAYOUTS)
    assert data["shares"] == KNOWN
    shares = dict(zip(data["mixture"], mixture_shares(data["mixture"], FRAMES, "per_frame", KNOWN), strict=True))
    assert sum(shares.values()) == pytest.approx(1)
    assert {name: shares[name] for name in KNOWN} == KNOWN
    others = {name: data["mixture"][name] * FRAMES[name] for name in LAYOUTS if name not in KNOWN}
    for name, mass in others.items():
        assert shares[name] == pytest.approx(0.31 * mass / sum(others.values()))


def test_100_000_draws_have_the_configured_shares(data: dict) -> None:
    shares = mixture_shares(data["mixture"], FRAMES, "per_frame", KNOWN)
    stream = SampleStream([FRAMES[name] for name in data["mixture"]], shares, seed=0)
    drawn = np.bincount(stream[np.arange(100_000)][0], minlength=len(shares)) / 100_000
    # A hundredth of all samples, with room to spare; and a hundredth of the known shares themselves.
    assert np.abs(drawn - shares).max() < 0.001
    known = np.array([name in KNOWN for name in data["mixture"]])
    assert (np.abs(drawn - shares) / shares)[known].max() < 0.01


@pytest.mark.parametrize(
    "fixed", [{"a": 1.0}, {"a": 0.6, "b": 0.6}, {"c": 0.1}, {"a": -0.1}, {"a": 0.3, "b": 0.3}]
)
def test_shares_that_do_not_work_out(fixed: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"do not work out[\s\S]*data\.shares"):
        mixture_shares({"a": 1.0, "b": 1.0}, {"a": 1, "b": 1}, "share", fixed)
    assert mixture_shares({"a": 1.0, "b": 1.0}, {"a": 1, "b": 1}, "share", {"a": 0.3, "b": 0.7}).tolist() == [
        0.3,
        0.7,
    ]


def test_the_data_module_hands_shares_and_registry_on(oxe_root: Path, tmp_path: Path) -> None:
    from spear_lightning.training import RobotDataModule

    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump({"schema": 1, "datasets": {"viola": {"rate_hz": 10}}}))
    module = RobotDataModule(
        str(oxe_root),
        {"viola": 1.0, "ur5": 1.0},
        {"primary": CameraSpec(28, 28)},
        index_folder=str(tmp_path),
        shares={"ur5": 0.9},
        registry=str(own),
    )
    mixture = module.open_mixture()
    assert mixture.shares.tolist() == pytest.approx([0.1, 0.9])
    assert mixture.training[0].index.rate_hz == 10


def loader(mixture: RobotMixture, batch_size: int, **options: int) -> ResumableLoader:
    cameras = {"primary": CameraSpec(28, 28), "wrist": CameraSpec(28, 28)}
    dataset = RobotDataset(mixture.training, mixture.stream(), cameras, ChunkSpec())
    return ResumableLoader(dataset, batch_size, 10, data=mixture.fingerprint(), **options)


def sample_ids(mixture: RobotMixture, batches: list[RobotBatch]) -> list[tuple[int, int]]:
    """Return (data set, frame) of every sample, found by the state it holds."""
    found = []
    for batch in batches:
        for dataset, state in zip(batch.dataset.tolist(), batch.state.numpy(), strict=True):
            (frame,) = np.flatnonzero((mixture.training[dataset].index.pose == state[:7]).all(axis=1))
            found.append((dataset, int(frame)))
    return found


def endless(ranks: list[ResumableLoader]) -> Iterator[list[RobotBatch]]:
    """Yield the batches of all ranks, step after step, over the ends of epochs."""
    while True:
        yield from (list(step) for step in zip(*ranks, strict=True))


def taken(ranks: list[ResumableLoader], steps: int) -> list[RobotBatch]:
    return [batch for step in islice(endless(ranks), steps) for batch in step]


def resumed(mixture: RobotMixture, state: dict, world_size: int, **options: int) -> list[ResumableLoader]:
    ranks = [
        loader(mixture, 16 // world_size, rank=r, world_size=world_size, **options) for r in range(world_size)
    ]
    for each in ranks:
        each.load_state_dict(state)
    return ranks


@pytest.fixture(scope="module")
def uninterrupted(mixture: RobotMixture) -> list[tuple[int, int]]:
    return sample_ids(mixture, taken([loader(mixture, 16)], 12))


def test_a_whole_run_of_24_data_sets(mixture: RobotMixture, uninterrupted: list[tuple[int, int]]) -> None:
    drawn = np.bincount([dataset for dataset, _ in uninterrupted], minlength=24) / len(uninterrupted)
    assert drawn.argmax() == list(LAYOUTS).index("droid")
    assert len(mixture.training) == 24


def test_one_process_continues_exactly(mixture: RobotMixture, uninterrupted: list[tuple[int, int]]) -> None:
    first = loader(mixture, 16)
    ids = sample_ids(mixture, taken([first], 7))
    ids += sample_ids(mixture, taken(resumed(mixture, first.state_dict(), 1), 5))
    assert ids == uninterrupted


@pytest.mark.slow
def test_two_ranks_with_two_workers_continue_exactly_as_two_and_as_one(
    mixture: RobotMixture, uninterrupted: list[tuple[int, int]]
) -> None:
    ranks = [loader(mixture, 8, rank=rank, world_size=2, num_workers=2) for rank in range(2)]
    before = sample_ids(mixture, taken(ranks, 7))
    state = ranks[0].state_dict()
    assert state == ranks[1].state_dict()
    del ranks
    as_two = sample_ids(mixture, taken(resumed(mixture, state, 2, num_workers=2), 5))
    as_one = sample_ids(mixture, taken(resumed(mixture, state, 1), 5))
    assert before + as_two == uninterrupted
    assert before + as_one == uninterrupted


def test_two_ranks_continue_exactly_as_one_and_one_as_two(
    mixture: RobotMixture, uninterrupted: list[tuple[int, int]]
) -> None:
    ranks = resumed(mixture, loader(mixture, 16).state_dict(), 2)
    ids = sample_ids(mixture, taken(ranks, 4))
    (one,) = resumed(mixture, ranks[1].state_dict(), 1)
    ids += sample_ids(mixture, taken([one], 4))
    ids += sample_ids(mixture, taken(resumed(mixture, one.state_dict(), 2), 4))
    assert ids == uninterrupted
