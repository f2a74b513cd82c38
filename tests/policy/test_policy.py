"""The policy: normalisation both ways, one path for training and serving, checkpoints that explain themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spear_lightning.batches import RobotBatch
from spear_lightning.errors import CheckpointError, ConfigError, ShapeError
from spear_lightning.policy import (
    ActionNormalizer,
    Policy,
    PolicyInterface,
    build_policy,
    describe_policy,
    load_answerer,
    load_policy,
    read_checkpoint,
)
from spear_lightning.policy.answerer_files import CONFIG, TOKENIZER, WEIGHTS
from spear_lightning.robot_data.chunks import ChunkSpec
from spear_lightning.robot_data.dataset import EvenSamples, RobotDataset
from spear_lightning.robot_data.demo_episodes import write_demo_episodes
from spear_lightning.robot_data.images import CameraSpec
from spear_lightning.robot_data.robot_mixture import RobotMixture

TWIN = Path(__file__).resolve().parents[1] / "conf" / "vla.yaml"
CAMERAS = {"primary": CameraSpec(42, 28), "wrist": CameraSpec(28, 28, "pad", source="secondary")}


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return yaml.safe_load(TWIN.read_text())["model"]["init_args"]["policy"]


@pytest.fixture
def policy(config: dict[str, Any]) -> Policy:
    torch.manual_seed(0)
    policy = build_policy(config).eval()
    policy.interface = PolicyInterface(CAMERAS, horizon=5, rate_hz=5.0, chunk_mode="cumulative")
    policy.normalizer.fit([-0.1, -0.2, -0.1], [0.1, 0.1, 0.3], [0.2, -0.3, 0.0], [0.5, 0.3, 0.4])
    return policy


def save(policy: Policy, path: Path, change: Callable[[dict], None] = lambda _: None) -> Path:
    weights = {f"policy.{name}": tensor for name, tensor in policy.state_dict().items()}
    checkpoint = {"state_dict": weights, "spear": describe_policy(policy)}
    change(checkpoint)
    torch.save(checkpoint, path)
    return path


coordinates = st.lists(st.floats(-2, 2, width=32), min_size=8, max_size=8)


@given(
    coordinates,
    st.lists(st.floats(-1, 1), min_size=3, max_size=3),
    st.lists(st.floats(0.01, 2), min_size=3, max_size=3),
)
def test_normaliser_round_trip(numbers: list[float], low: list[float], span: list[float]) -> None:
    normalizer = ActionNormalizer(clamp=None)
    high = [a + b for a, b in zip(low, span, strict=True)]
    normalizer.fit(low, high, low, high)
    action = torch.tensor(numbers)
    for there, back in (
        (normalizer.normalize_actions, normalizer.unnormalize_actions),
        (normalizer.normalize_state, normalizer.unnormalize_state),
    ):
        torch.testing.assert_close(back(there(action)), action, atol=2e-5, rtol=1e-4)
        assert torch.equal(there(action)[3:7], action[3:7])


def test_quantiles_map_to_one_and_tails_are_cut() -> None:
    normalizer = ActionNormalizer(clamp=1.5)
    normalizer.fit([-0.1, 0.0, 0.1], [0.1, 0.2, 0.5], [0.0] * 3, [1.0] * 3)
    action = torch.tensor([[-0.1, 0.2, 0.3, 0, 0, 0, 1, 1], [9.0, -9.0, 0.3, 0, 0, 0, 1, 0]])
    normalised = normalizer.normalize_actions(action)
    expected = torch.tensor([[-1.0, 1.0, 0.0, 0, 0, 0, 1, 1], [1.5, -1.5, 0.0, 0, 0, 0, 1, -1]])
    torch.testing.assert_close(normalised, expected, atol=1e-6, rtol=0)


INFINITE = ([-float("inf")] * 3, [1.0] * 3)


def test_normaliser_refuses_what_would_be_silently_wrong() -> None:
    normalizer = ActionNormalizer()
    with pytest.raises(CheckpointError, match="no normalisation statistics"):
        normalizer.require_fitted()
    for low, high in (
        ([0.0] * 2, [1.0] * 2),
        ([0.0] * 3, [1.0, 1.0, 0.0]),
        ([float("nan")] * 3, [1.0] * 3),
        INFINITE,
    ):
        with pytest.raises(ConfigError, match="cannot be used"):
            normalizer.fit(low, high, [0.0] * 3, [1.0] * 3)
    with pytest.raises(ShapeError, match="eight numbers"):
        normalizer.normalize_actions(torch.zeros(2, 7))
    with pytest.raises(ConfigError, match="clamp"):
        ActionNormalizer(clamp=0.5)
    normalizer.set_identity()
    action = torch.tensor([0.3, -0.2, 0.9, 0, 0, 0, 1, 0.5])
    torch.testing.assert_close(normalizer.normalize_actions(action)[:7], action[:7])


def test_statistics_are_part_of_the_weights(policy: Policy) -> None:
    names = {name for name in policy.state_dict() if name.startswith("normalizer.")}
    assert names == {
        f"normalizer.{kind}_{bound}" for kind in ("translation", "position") for bound in ("low", "high")
    } | {"normalizer.fitted"}


def test_serving_sees_exactly_what_training_sees(policy: Policy, tmp_path: Path) -> None:
    write_demo_episodes(tmp_path, episodes=3, steps=6, height=60, width=80)
    mixture = RobotMixture(tmp_path, {"bridge": 1.0}, ChunkSpec(), holdout=0, index_folder=tmp_path / "index")
    source = mixture.training[0]
    dataset = RobotDataset(mixture.training, EvenSamples([len(source)], 4), CAMERAS, ChunkSpec())
    trained = dataset.__getitems__([2])
    _, samples = EvenSamples([len(source)], 4)[np.array([2])]
    frame = int(source.frames(samples)[0])
    episode = int(source.index.episode_of(np.array([frame]))[0])
    served = policy.observe(
        {
            "primary": source.index.read_image("primary", frame, episode),
            "wrist": source.index.read_image("secondary", frame, episode),
        },
        trained.instructions[0],
        trained.state[0].numpy(),
    )
    for name in CAMERAS:
        assert torch.equal(served.images[name], trained.images[name])
        assert torch.equal(served.image_mask[name], trained.image_mask[name])
    assert torch.equal(served.state, trained.state)
    assert served.instructions == trained.instructions


def observation(cameras: tuple[str, ...] = ("primary", "wrist")) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.integers(0, 256, (48, 64, 3), dtype=np.uint8) for name in cameras}


STATE = np.array([0.3, 0, 0.1, 0, 0, 0, 1, 1], np.float32)


def test_a_chunk_is_physical_and_depends_on_what_is_seen(policy: Policy) -> None:
    chunk = policy.act(observation(), "reach for it", STATE, seed=1)
    assert chunk.shape == (5, 8)
    np.testing.assert_allclose(np.linalg.norm(chunk[:, 3:7], axis=1), 1, atol=1e-5)
    assert np.array_equal(chunk, policy.act(observation(), "reach for it", STATE, seed=1))
    changed = {
        "seed": policy.act(observation(), "reach for it", STATE, seed=2),
        "words": policy.act(observation(), "go away", STATE, seed=1),
        "state": policy.act(observation(), "reach for it", STATE + np.float32([0.05] + [0] * 7), seed=1),
        "camera": policy.act(observation(("primary",)), "reach for it", STATE, seed=1),
        "black": policy.act({n: p * 0 for n, p in observation().items()}, "reach for it", STATE, seed=1),
    }
    for reason, other in changed.items():
        assert not np.array_equal(chunk, other), reason


def test_pixels_of_an_absent_camera_do_not_matter(policy: Policy) -> None:
    def sampled(fill: int, absent: dict[str, None]) -> Tensor:
        batch = policy.observe({**observation(("primary",)), **absent}, "reach", STATE)
        batch.images["wrist"] = torch.full_like(batch.images["wrist"], fill)
        return policy.sample_chunk(batch, torch.Generator().manual_seed(0))

    assert torch.equal(sampled(0, {}), sampled(255, {"wrist": None}))


@pytest.mark.parametrize(
    ("images", "state", "message"),
    [
        ({}, STATE, "cameras do not fit"),
        (observation(("side",)), STATE, "cameras do not fit"),
        ({"primary": np.zeros((48, 64, 3), np.float32)}, STATE, "uint8 RGB"),
        ({"primary": np.zeros((3, 48, 64), np.uint8)}, STATE, "uint8 RGB"),
        ({"primary": np.zeros((0, 64, 3), np.uint8)}, STATE, "uint8 RGB"),
        ({"primary": np.zeros((48, 64, 3), np.uint8).tolist()}, STATE, "uint8 RGB"),
        ({"primary": torch.zeros((48, 64, 3), dtype=torch.uint8)}, STATE, "uint8 RGB"),
        (observation(), STATE[:7], "eight finite numbers"),
        (observation(), STATE * np.float32("nan"), "eight finite numbers"),
        (observation(), np.array([0.3, 0, 0.1, 0, 0, 0, 0, 1]), "unit quaternion"),
        (observation(), np.array([0.3, 0, 0.1, 0, 0, 0, 1, 40]), "openness"),
    ],
)
def test_wrong_observations_are_refused(policy: Policy, images: dict, state: np.ndarray, message: str) -> None:
    with pytest.raises((ConfigError, ShapeError), match=message):
        policy.act(images, "reach", state)


def test_both_signs_of_a_quaternion_are_one_state(policy: Policy) -> None:
    q = np.array([0.1, -0.5, 0.3, 0.8]) / np.linalg.norm([0.1, -0.5, 0.3, 0.8])
    chunks = [policy.act(observation(), "reach", np.array([0.3, 0, 0.1, *(sign * q), 1])) for sign in (1, -1)]
    assert np.array_equal(*chunks)


def test_pictures_may_be_views(policy: Policy) -> None:
    bgr = {name: image[:, :, ::-1].copy() for name, image in observation().items()}
    rgb = {name: image[:, :, ::-1] for name, image in bgr.items()}
    assert np.array_equal(policy.act(rgb, "reach", STATE), policy.act(observation(), "reach", STATE))


def test_space_around_an_instruction_does_not_matter(policy: Policy) -> None:
    plain = policy.act(observation(), "reach", STATE)
    assert np.array_equal(policy.act(observation(), " reach\n", STATE), plain)
    with pytest.raises(ShapeError, match="instruction is a text"):
        policy.act(observation(), None, STATE)  # type: ignore[arg-type]


def test_losses_have_all_parts_and_gradients(policy: Policy) -> None:
    batch = policy.observe(observation(), "reach", STATE)
    losses = policy.losses(batch, torch.Generator().manual_seed(0))
    assert set(losses) == {
        "total", "translation", "rotation", "rotation_velocity", "rotation_geodesic", "gripper",
    }  # fmt: skip
    losses["total"].backward()
    unused = set(policy.vla.unused_parameters())
    for name, parameter in policy.vla.named_parameters():
        assert (parameter.grad is None) == (name in unused), name


def test_checkpoint_round_trip(policy: Policy, tmp_path: Path) -> None:
    loaded = load_policy(save(policy, tmp_path / "policy.ckpt"))
    assert loaded.interface == policy.interface
    assert loaded.config == policy.config
    expected = policy.act(observation(), "reach for it", STATE)
    assert np.array_equal(loaded.act(observation(), "reach for it", STATE), expected)


def test_averages_are_preferred_and_raw_weights_available(policy: Policy, tmp_path: Path) -> None:
    name = "policy.vla.expert.action_out.bias"

    def add_averages(checkpoint: dict) -> None:
        checkpoint["ema"] = {name: checkpoint["state_dict"][name] + 1}

    path = save(policy, tmp_path / "policy.ckpt", add_averages)
    raw, averaged = load_policy(path, weights="raw"), load_policy(path)
    torch.testing.assert_close(averaged.vla.expert.action_out.bias, raw.vla.expert.action_out.bias + 1)


def forget_statistics(checkpoint: dict) -> None:
    del checkpoint["state_dict"]["policy.normalizer.translation_low"]


def unfit(checkpoint: dict) -> None:
    checkpoint["state_dict"]["policy.normalizer.fitted"] = torch.tensor(False)


def rename_class(checkpoint: dict) -> None:
    checkpoint["spear"]["policy"] = {
        "class_path": "spear_lightning.policy.Polizei",
        "init_args": {"prompt": {"init_args": {}}},
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("spear"), "not written by this version"),
        (lambda c: c["spear"].update(schema=99), "schema 99"),
        (lambda c: c["spear"].update(interface=None), "does not describe its policy"),
        (forget_statistics, "1 missing"),
        (unfit, "no normalisation statistics"),
        (rename_class, "cannot be built"),
    ],
)
def test_incomplete_checkpoints_are_refused(
    policy: Policy, tmp_path: Path, change: Callable[[dict], None], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_policy(save(policy, tmp_path / "policy.ckpt", change))


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        read_checkpoint(tmp_path / "none.ckpt")
    (tmp_path / "text.ckpt").write_text("hello")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_checkpoint(tmp_path / "text.ckpt")


def test_an_exported_vlm_is_no_broken_checkpoint(tmp_path: Path) -> None:
    for name in (WEIGHTS, CONFIG, TOKENIZER):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=r"exported SPEAR-VLM.*\n.*\n.*load_answerer"):
        load_policy(tmp_path)


@pytest.mark.parametrize("path", ["runs/last.ckpt", "runs/vlm", "./runs/vlm"])
def test_a_mistyped_file_is_not_looked_for_on_the_hub(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: object, **__: object) -> None:
        pytest.fail("the hub was asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", asked)
    monkeypatch.chdir(tmp_path)
    if not path.endswith(".ckpt"):
        Path("runs").mkdir()
    with pytest.raises(CheckpointError, match="There is no such SPEAR-VLM"):
        load_answerer(path)


class Bomb:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        return (Path.touch, (Path("exploded"),))


def test_checkpoints_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"spear": Bomb()}, "bomb.ckpt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_checkpoint("bomb.ckpt")
    assert not Path("exploded").exists()


def test_interface_travels_as_plain_values(policy: Policy) -> None:
    assert policy.interface is not None
    assert PolicyInterface.from_dict(policy.interface.to_dict()) == policy.interface
    policy.interface = None
    with pytest.raises(ConfigError, match="does not know its cameras"):
        policy.require_interface()


def test_a_batch_moves_whole(policy: Policy) -> None:
    batch = policy.observe(observation(), "reach", STATE).to("meta")
    tensors = [batch.state, batch.actions, *batch.images.values(), *batch.image_mask.values()]
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert isinstance(batch, RobotBatch)
    assert len(batch) == 1


def test_flow_samples_share_a_prefix_but_count_like_samples(policy: Policy) -> None:
    batch = policy.observe(
        {"primary": np.full((28, 42, 3), 90, np.uint8)}, "go", np.array([0.3, 0, 0.1, 0, 0, 0, 1, 1])
    )
    batch = replace(batch, actions=torch.tensor([[[0.02, -0.01, 0.0, 0.0, 0.0, 0.1, 0.995, 1.0]] * 5]))
    thrice = RobotBatch(
        images={name: pixels.repeat(3, 1, 1, 1) for name, pixels in batch.images.items()},
        image_mask={name: mask.repeat(3) for name, mask in batch.image_mask.items()},
        instructions=batch.instructions * 3,
        state=batch.state.repeat(3, 1),
        actions=batch.actions.repeat(3, 1, 1),
        action_mask=batch.action_mask.repeat(3, 1),
        dataset=batch.dataset.repeat(3),
        position=batch.position.repeat(3),
    )
    shared = policy.losses(batch, torch.Generator().manual_seed(5), flow_samples=3)
    repeated = policy.losses(thrice, torch.Generator().manual_seed(5))
    for name, value in repeated.items():
        torch.testing.assert_close(shared[name], value, atol=1e-5, rtol=1e-5)
