"""Batches, the loader's exact resume, statistics, and pictures."""

from __future__ import annotations

import io
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spear_lightning.batches import RobotBatch
from spear_lightning.errors import CheckpointError, ConfigError, DataError
from spear_lightning.robot_data.chunks import ChunkSpec, read_chunks
from spear_lightning.robot_data.dataset import EvenSamples, RobotDataset
from spear_lightning.robot_data.demo_episodes import write_demo_episodes
from spear_lightning.robot_data.images import CameraSpec, decode_image, fit_image
from spear_lightning.robot_data.loader import FiniteLoader, ResumableLoader
from spear_lightning.robot_data.robot_mixture import RobotMixture
from spear_lightning.robot_data.sample_source import SampleSource

CAMERAS = {
    "primary": CameraSpec(56, 42),
    "wrist": CameraSpec(28, 28, fit="pad", source="secondary"),
}


@pytest.fixture(scope="module")
def mixture(demo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> RobotMixture:
    folder = tmp_path_factory.mktemp("index")
    return RobotMixture(demo_root, {"bridge": 1.0}, ChunkSpec(), holdout=0.2, index_folder=folder)


@pytest.fixture(scope="module")
def dataset(mixture: RobotMixture) -> RobotDataset:
    return RobotDataset(mixture.training, mixture.stream(), CAMERAS, ChunkSpec())


def test_batch_holds_what_the_index_holds(mixture: RobotMixture, dataset: RobotDataset) -> None:
    batch = dataset.__getitems__([5, 70_000, 3])
    source = mixture.training[0]
    _, samples = mixture.stream()[np.array([5, 70_000, 3])]
    frames = source.frames(samples)
    chunks = read_chunks(source.index, frames, ChunkSpec())
    assert torch.equal(batch.state, chunks.state)
    assert torch.equal(batch.actions, chunks.actions)
    assert torch.equal(batch.action_mask, chunks.mask)
    assert batch.images["primary"].shape == (3, 3, 42, 56)
    assert batch.position.tolist() == [5, 70_000, 3]
    for row, frame in enumerate(frames):
        episode = int(source.index.episode_of(np.array([frame]))[0])
        picture = source.index.read_image("secondary", int(frame), episode)
        assert torch.equal(batch.images["wrist"][row], fit_image(picture, CAMERAS["wrist"]))
        assert batch.instructions[row].startswith("reach for the ")


def test_training_and_held_out_episodes_are_apart(mixture: RobotMixture) -> None:
    training, held = mixture.training[0].episodes, mixture.held_out[0].episodes
    assert len(held) == 4
    assert sorted([*training, *held]) == list(range(20))
    frames = mixture.training[0].frames(np.arange(len(mixture.training[0])))
    assert set(mixture.training[0].index.episode_of(frames)) == set(training)


def places(loader: ResumableLoader, batches: int) -> list[list[int]]:
    found: list[list[int]] = []
    while len(found) < batches:
        for batch in loader:
            found.append(batch.position.tolist())
            if len(found) == batches:
                break
    return found


def pixels_of(batches: list[RobotBatch]) -> torch.Tensor:
    return torch.cat([batch.images["primary"] for batch in batches])


@pytest.mark.parametrize("stop", [1, 4, 5, 7, 10])
def test_loader_resumes_exactly_within_and_between_epochs(dataset: RobotDataset, stop: int) -> None:
    whole = places(ResumableLoader(dataset, 4, 5), 12)
    assert whole == [list(range(4 * n, 4 * n + 4)) for n in range(12)]
    first = ResumableLoader(dataset, 4, 5)
    before = places(first, stop)
    second = ResumableLoader(dataset, 4, 5)
    second.load_state_dict(first.state_dict())
    assert before + places(second, 12 - stop) == whole
    assert len(list(ResumableLoader(dataset, 4, 5))) == 5


def test_a_resumed_epoch_has_only_the_rest_of_its_batches(dataset: RobotDataset) -> None:
    loader = ResumableLoader(dataset, 4, 5)
    loader.load_state_dict({"batches": 8, "global_batch_size": 4, "data": ""})
    assert len(list(loader)) == 2
    assert len(list(loader)) == 5


@pytest.mark.slow
def test_workers_and_ranks_do_not_change_the_stream(dataset: RobotDataset) -> None:
    alone = ResumableLoader(dataset, 4, 6)
    reference = [next(iter(alone)) for _ in range(6)]
    ranks = [ResumableLoader(dataset, 2, 6, rank, 2, num_workers=2) for rank in range(2)]
    parts = [list(islice(loader, 3)) for loader in ranks]
    merged = [both for pair in zip(*parts, strict=True) for both in pair]
    resumed = ResumableLoader(dataset, 4, 6)
    resumed.load_state_dict(ranks[0].state_dict())
    merged += [next(iter(resumed)) for _ in range(3)]
    assert torch.equal(
        torch.cat([batch.position for batch in merged]), torch.cat([batch.position for batch in reference])
    )
    assert torch.equal(pixels_of(merged), pixels_of(reference))


def test_another_global_batch_size_is_refused(dataset: RobotDataset) -> None:
    loader = ResumableLoader(dataset, 4, 5)
    with pytest.raises(CheckpointError, match="another global batch size"):
        loader.load_state_dict({"batches": 3, "global_batch_size": 8, "data": ""})


def test_other_data_are_refused(dataset: RobotDataset) -> None:
    loader = ResumableLoader(dataset, 4, 5, data="now")
    with pytest.raises(CheckpointError, match=r"other data[\s\S]*expected: then"):
        loader.load_state_dict({"batches": 3, "global_batch_size": 4, "data": "then"})


def test_fingerprint_follows_the_data_and_not_its_place(
    mixture: RobotMixture, demo_root: Path, tmp_path: Path
) -> None:
    shutil.copytree(demo_root, tmp_path / "copy")
    options = {"holdout": 0.2, "index_folder": tmp_path / "index"}
    same = RobotMixture(tmp_path / "copy", {"bridge": 1.0}, ChunkSpec(), **options)
    other_split = RobotMixture(tmp_path / "copy", {"bridge": 1.0}, ChunkSpec(), seed=1, **options)
    assert same.fingerprint() == mixture.fingerprint()
    assert other_split.fingerprint() != mixture.fingerprint()


def test_data_that_are_read_otherwise_are_other_data_with_statistics_of_their_own(
    demo_root: Path, tmp_path: Path
) -> None:
    def mixture_at(scale: float) -> RobotMixture:
        registry = tmp_path / f"{scale}.yaml"
        position = f"{{key: observation/state, slice: [0, 3], scale: {scale}}}"
        registry.write_text(f"schema: 1\ndatasets:\n  bridge:\n    position: {position}\n")
        options = {"index_folder": tmp_path / "index", "registry": registry}
        return RobotMixture(demo_root, {"bridge": 1.0}, ChunkSpec(), **options)

    whole, half = mixture_at(1.0), mixture_at(0.5)
    assert whole.fingerprint() != half.fingerprint()
    np.testing.assert_allclose(
        np.array(half.statistics().position_high), np.array(whole.statistics().position_high) / 2, atol=1e-3
    )


def test_a_data_set_without_a_whole_chunk_is_named(tmp_path: Path) -> None:
    write_demo_episodes(tmp_path, episodes=4, steps=4)
    with pytest.raises(DataError, match=r"(?s)long enough.*of 4 frames.*leave bridge out"):
        RobotMixture(tmp_path, {"bridge": 1.0}, ChunkSpec(rate_hz=1.0), index_folder=tmp_path / "index")


@pytest.mark.parametrize("rate_hz", [5.0, 2.0, 1.0])
def test_every_sample_has_a_target_inside_its_episode(mixture: RobotMixture, rate_hz: float) -> None:
    index, spec = mixture.training[0].index, ChunkSpec(rate_hz=rate_hz)
    source = SampleSource(index, np.arange(index.num_episodes), spec)
    masks = read_chunks(index, source.frames(np.arange(len(source))), spec).mask
    assert masks.any(dim=1).all()
    left_out = np.setdiff1d(index.samples, source.frames(np.arange(len(source))))
    assert not read_chunks(index, left_out, spec).mask.any()


def test_validation_samples_are_spread_evenly(mixture: RobotMixture) -> None:
    sizes = [len(source) for source in mixture.held_out]
    samples = EvenSamples(sizes, 10)
    dataset = RobotDataset(mixture.held_out, samples, CAMERAS, ChunkSpec())
    batches = list(FiniteLoader(dataset, range(len(samples)), 4))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    _, chosen = samples[np.arange(10)]
    assert chosen[0] == 0
    assert chosen[-1] == sizes[0] - 1
    assert np.ptp(np.diff(chosen)) <= 1
    assert len(EvenSamples([3, 0, 4], 100)) == 7
    assert EvenSamples([3, 0, 4], 100)[np.arange(7)][0].tolist() == [0, 0, 0, 2, 2, 2, 2]


def test_unknown_cameras_are_refused(mixture: RobotMixture) -> None:
    with pytest.raises(ConfigError, match="tertiary"):
        RobotDataset(mixture.training, mixture.stream(), {"tertiary": CameraSpec(14, 14)}, ChunkSpec())


def test_statistics_equal_numpy_quantiles(mixture: RobotMixture) -> None:
    statistics = mixture.statistics()
    source = mixture.training[0]
    chunks = read_chunks(source.index, source.frames(np.arange(len(source))), ChunkSpec())
    translation = chunks.actions[chunks.mask][:, :3].numpy()
    position = chunks.state[:, :3].numpy()
    for name, values in (("translation", translation), ("position", position)):
        for bound, quantile in (("low", 0.01), ("high", 0.99)):
            expected = np.quantile(values, quantile, axis=0, method="inverted_cdf")
            np.testing.assert_allclose(getattr(statistics, f"{name}_{bound}"), expected, atol=2.1e-5)
    assert mixture.statistics() == statistics


def test_statistics_of_other_chunks_are_others(mixture: RobotMixture, demo_root: Path, tmp_path: Path) -> None:
    options = {"holdout": 0.2, "index_folder": tmp_path}
    per_step = RobotMixture(demo_root, {"bridge": 1.0}, ChunkSpec(mode="per_step"), **options).statistics()
    cumulative = RobotMixture(demo_root, {"bridge": 1.0}, ChunkSpec(), **options).statistics()
    assert cumulative == mixture.statistics()
    # A step is shorter than what five steps add up to; positions do not depend on the chunk.
    spans = [np.subtract(s.translation_high, s.translation_low) for s in (per_step, cumulative)]
    assert (spans[0] < spans[1]).all()
    assert per_step.position_high == cumulative.position_high


def test_statistics_weigh_data_sets_as_the_mixture_does(mixture: RobotMixture) -> None:
    from spear_lightning.robot_data.statistics import mixture_statistics

    index = mixture.training[0].index
    sources = [SampleSource(index, np.array([episode]), ChunkSpec()) for episode in (0, 1)]
    shares = np.array([0.999, 0.001])
    mixed, alone = (
        mixture_statistics(sources, shares, ChunkSpec()),
        mixture_statistics(sources[:1], [1], ChunkSpec()),
    )
    assert mixed.position_high == alone.position_high


def test_decoding_png_and_jpeg(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="png")
    assert np.array_equal(decode_image(buffer.getvalue(), "x"), picture)
    with pytest.raises(DataError, match="cannot be decoded"):
        decode_image(b"GIF89a", "x")


def test_fit_never_stretches() -> None:
    # A centred disc stays a disc under crop and pad, whatever the aspect ratio.
    rows, columns = np.mgrid[:120, :200]
    disc = (rows - 59.5) ** 2 + (columns - 99.5) ** 2 < 40**2
    picture = np.repeat(np.where(disc, 255, 60)[..., None], 3, axis=2).astype(np.uint8)
    for camera in (
        CameraSpec(280, 210),
        CameraSpec(112, 112, "pad"),
        CameraSpec(112, 112),
        CameraSpec(42, 84, "pad"),
    ):
        bright = fit_image(picture, camera)[0].numpy() > 157
        height, width = np.ptp(np.flatnonzero(bright.any(1))) + 1, np.ptp(np.flatnonzero(bright.any(0))) + 1
        assert abs(height - width) <= 2, camera
    padded = fit_image(picture, CameraSpec(112, 112, "pad"))
    assert (padded[:, 0] == 0).all()
    assert (padded[:, 56] > 0).any()


def test_resize_equals_pil_bilinear_antialiased() -> None:
    picture = np.random.default_rng(1).integers(0, 256, (210, 280, 3), dtype=np.uint8)
    ours = fit_image(picture, CameraSpec(112, 84)).permute(1, 2, 0).numpy().astype(int)
    theirs = np.asarray(Image.fromarray(picture).resize((112, 84), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(ours - theirs).max() <= 1


def test_resizing_keeps_channels_last() -> None:
    # Planes would cost three times the resize and a transposition.
    picture = np.zeros((256, 256, 3), np.uint8)
    for camera in (CameraSpec(280, 210), CameraSpec(112, 112), CameraSpec(112, 84, "pad")):
        assert fit_image(picture, camera).stride()[0] == 1, camera


def test_camera_sizes_must_be_whole_patches() -> None:
    with pytest.raises(ConfigError, match="280"):
        CameraSpec(282, 210)
