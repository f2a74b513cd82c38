from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import yaml
from scipy.spatial.transform import Rotation
from vla_eval.api import serve_background
from vla_eval.connection import Connection
from vla_eval.model_servers.base import SessionContext
from vla_eval.specs import check_specs

from spear_lightning.errors import ConfigError, ShapeError
from spear_lightning.evaluation.harness import (
    check_plan,
    describe_server,
    evaluate_policy,
    evaluate_scripted,
    harness_config,
    read_episodes,
    weights_digest,
)
from spear_lightning.evaluation.protocol import EvalResult
from spear_lightning.evaluation.shards import EvaluationError
from spear_lightning.geometry.poses import ChunkMode
from spear_lightning.policy import Policy, load_policy
from spear_lightning.policy.vla_eval_server import PolicyServer

Plans = Callable[..., object]


def evaluated(policy: Policy, plan: object, folder: Path, **options: int) -> EvalResult:
    server = PolicyServer(policy, **options)
    return evaluate_policy(server, describe_server(server, "untrained", "raw"), plan, folder)


@pytest.fixture(scope="module")
def reference(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> EvalResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        from spear_lightning.evaluation.harness import EvaluationPlan

        plan = EvaluationPlan(benchmark="point_world:PointBenchmark", episodes=4)
        return evaluated(policy, plan, tmp_path_factory.mktemp("reference"))


def test_the_episodes_are_neither_all_alike_nor_all_failures(reference: EvalResult) -> None:
    assert [(episode.task, episode.number) for episode in reference.episodes] == [
        (task, number) for task in ("shift", "nudge") for number in range(4)
    ]
    assert {episode.success for episode in reference.episodes} == {True, False}
    assert len({episode.first_success_step for episode in reference.episodes}) > 2


def test_repeating_gives_the_same_episodes(
    reference: EvalResult, policy: Policy, point_world: Plans, tmp_path: Path
) -> None:
    again = evaluated(policy, point_world(), tmp_path)
    assert again.episodes == reference.episodes
    assert again.protocol == reference.protocol
    assert again.contestant == reference.contestant


def test_an_episode_does_not_depend_on_the_others(
    reference: EvalResult, policy: Policy, point_world: Plans, tmp_path: Path
) -> None:
    alone = evaluated(policy, point_world(tasks=("nudge",), episodes=2), tmp_path)
    assert list(alone.episodes) == reference.of_task("nudge")[:2]


def test_noise_and_executed_steps_matter(
    reference: EvalResult, policy: Policy, point_world: Plans, tmp_path: Path
) -> None:
    for number, options in enumerate(({"noise_seed": 1}, {"execute_steps": 4}, {"flow_steps": 1})):
        other = evaluated(policy, point_world(), tmp_path / str(number), **options)
        assert other.episodes != reference.episodes, options


@pytest.mark.slow
def test_two_processes_give_the_same_episodes_as_one(
    reference: EvalResult, policy: Policy, point_world: Plans, tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    server = PolicyServer(policy)
    contestant = describe_server(server, "untrained", "raw")
    sharded = evaluate_policy(
        server, contestant, point_world(processes=2), tmp_path, lambda done, of: seen.append((done, of))
    )
    assert sharded.episodes == reference.episodes
    assert seen
    assert all(0 <= done <= of == 8 for done, of in seen)


@pytest.mark.slow
def test_the_harness_own_commands_give_the_same_episodes(
    reference: EvalResult, checkpoint: Path, point_world: Plans, tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = tmp_path / "eval.yaml"
    config.write_text(yaml.safe_dump(harness_config(point_world(), "policy")))
    serve = [sys.executable, "-m", "spear_lightning.policy.vla_eval_server", "--port", str(port)]
    run = [sys.executable, "-m", "vla_eval.cli.main", "run", "--no-docker", "--config", str(config)]
    run += ["--server-url", f"ws://127.0.0.1:{port}", "--output-dir", str(tmp_path)]
    server = subprocess.Popen([*serve, "--args.checkpoint", str(checkpoint), "--args.device", "cpu"])
    try:
        # The command itself waits for half a minute.
        await_port(server, port)
        subprocess.run(run, check=True, capture_output=True, timeout=600)
    finally:
        server.terminate()
        server.wait()
    aggregate = json.loads((tmp_path / "closed_loop_aggregate.json").read_text())
    assert read_episodes(aggregate, reference.protocol, where=tmp_path) == reference.episodes


def await_port(server: subprocess.Popen[bytes], port: int) -> None:
    """Return when the server listens, or is gone."""
    while server.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        with suppress(subprocess.TimeoutExpired):
            server.wait(0.1)


def test_a_padded_batch_gives_each_observation_what_it_gets_alone(policy: Policy) -> None:
    server = PolicyServer(policy, batch_size=4)
    batches = [policy.observe(seen(value), f"go to {value}", state(value)) for value in range(3)]
    noises = [policy.flow.noise((1, 5), torch.Generator().manual_seed(value)) for value in range(3)]
    together = server._targets(batches, noises)
    for row, (batch, noise) in enumerate(zip(batches, noises, strict=True)):
        alone = server._targets([batch], [noise])[0]
        assert (alone == together[row]).all()
        assert (alone != together[row - 1]).any()


def seen(value: int) -> dict:
    return {name: np.full((28, 42, 3), 40 * value, np.uint8) for name in ("primary", "wrist")}


def state(value: int) -> np.ndarray:
    return np.array([0.2 + 0.1 * value, 0, 0.1, 0, 0, 0, 1, 1], np.float32)


@pytest.mark.parametrize("mode", get_args(ChunkMode))
@pytest.mark.parametrize("turned", [[0, 0, 0, 1], [0.1, -0.5, 0.3, 0.8]])
def test_targets_are_the_chunk_applied_to_the_state(
    policy: Policy, mode: ChunkMode, turned: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, "interface", replace(policy.require_interface(), chunk_mode=mode))
    start = np.array([0.3, 0, 0.1, *(turned / np.linalg.norm(turned)), 1], np.float32)
    noise = policy.flow.noise((1, 5), torch.Generator().manual_seed(3))
    batch = policy.observe(seen(1), "go", start)
    chunk = policy.sample_chunk(batch, None, noise=noise)[0].numpy()
    targets = PolicyServer(policy)._targets([batch], [noise])[0]
    before_x, before_R = start[:3], Rotation.from_quat(start[3:7])
    for action, target in zip(chunk, targets, strict=True):
        # Translations are along the base's axes, rotations about the tool's.
        position, rotation = before_x + action[:3], before_R * Rotation.from_quat(action[3:7])
        assert target[:3] == pytest.approx(position, abs=1e-6)
        assert target[3:7] == pytest.approx(rotation.as_quat(canonical=True), abs=1e-5)
        assert target[7] == action[7]
        if mode == "per_step":
            before_x, before_R = position, rotation


def test_episodes_that_ended_or_whose_client_vanished_are_forgotten(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = PolicyServer(policy)
    end, ends_left, all_ended = server.on_episode_end, [1, 2], threading.Event()

    async def told(*arguments) -> None:
        await end(*arguments)
        ends_left.pop()
        if not ends_left:
            all_ended.set()

    monkeypatch.setattr(server, "on_episode_end", told)

    async def come_and_go(url: str) -> None:
        ends, vanishes = [await connected(url, number) for number in range(2)]
        observation = {"images": seen(1), "task_description": "go", "states": state(1)}
        for client in (ends, vanishes):
            await client.act(observation)
        assert len(server._episodes) == 2
        await ends.end_episode({})
        # Of one client, messages are answered in order.
        with pytest.raises(RuntimeError, match="before its episode"):
            await ends.act(observation)
        assert len(server._episodes) == 1
        await vanishes.close()
        assert await asyncio.to_thread(all_ended.wait, 20)
        await ends.close()

    with serve_background(server) as handle:
        asyncio.run(come_and_go(handle.url))
    assert server._episodes == {}


async def connected(url: str, number: int) -> Connection:
    connection = Connection(url)
    await connection.connect()
    await connection.start_episode({"task": {"name": "shift", "number": number}})
    return connection


def test_a_bad_observation_fails_nobody_else(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    server = PolicyServer(policy)
    predict, observe, to_come = server.predict_batch, server.on_observation, [1, 2, 3]
    first_is_asked, all_came = threading.Event(), threading.Event()

    def slowly(*arguments):
        # Meanwhile the others' observations come together.
        first_is_asked.set()
        assert all_came.wait(20)
        return predict(*arguments)

    async def told(*arguments) -> None:
        to_come.pop()
        if not to_come:
            # Once this one waits for its answer.
            asyncio.get_running_loop().call_soon(all_came.set)
        await observe(*arguments)

    monkeypatch.setattr(server, "predict_batch", slowly)
    monkeypatch.setattr(server, "on_observation", told)
    good = {"images": seen(1), "task_description": "go", "states": state(1)}

    async def ask(url: str) -> list[object]:
        clients = [await connected(url, number) for number in range(3)]
        first = asyncio.create_task(clients[0].act(good))
        await asyncio.to_thread(first_is_asked.wait, 20)
        others = [clients[1].act({**good, "states": state(1) * float("nan")}), clients[2].act(good)]
        answers = await asyncio.gather(first, *others, return_exceptions=True)
        for client in clients:
            await client.close()
        return answers

    with serve_background(server) as handle:
        first, bad, other = asyncio.run(ask(handle.url))
    assert "eight finite numbers" in str(bad)
    for answer in (first, other):
        assert isinstance(answer, dict), answer
        assert np.isfinite(answer["actions"]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"states": state(1)[:7]}, "eight finite numbers"),
        ({"images": {**seen(1), "wrist": np.zeros((28, 42), np.uint8)}}, "uint8 RGB"),
        ({"images": {"primary": seen(1)["primary"]}}, r"no images\.wrist"),
        ({"task_description": None}, "instruction is a text"),
    ],
)
def test_observations_are_checked_before_they_are_gathered(
    policy: Policy, changes: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = PolicyServer(policy)
    monkeypatch.setattr(server, "predict_batch", lambda *_: pytest.fail("it was gathered"))
    context = SessionContext("a session", "an episode")
    observation = {"images": seen(1), "task_description": "go", "states": state(1), **changes}
    with pytest.raises(ConfigError, match="before its episode"):
        asyncio.run(server.on_observation(observation, context))
    asyncio.run(server.on_episode_start({}, context))
    with pytest.raises((ConfigError, ShapeError), match=message):
        asyncio.run(server.on_observation(observation, context))


def test_scripted_rows_run_through_the_same_harness(point_world: Plans, tmp_path: Path) -> None:
    expert = evaluate_scripted("expert", point_world(episodes=2), tmp_path / "expert")
    chance = evaluate_scripted("random", point_world(episodes=2), tmp_path / "random")
    assert expert.protocol == chance.protocol
    # 1 cm a step past a line 2.5 cm away, and then it must hold for five steps.
    assert [episode.first_success_step for episode in expert.episodes] == [3] * 4
    assert [episode.steps for episode in expert.episodes] == [7] * 4
    assert not any(episode.first_success for episode in chance.episodes)
    assert [episode.steps for episode in chance.episodes] == [12] * 4


def test_episodes_of_a_killed_run_are_not_counted(policy: Policy, point_world: Plans, tmp_path: Path) -> None:
    (tmp_path / "harness").mkdir()
    (tmp_path / "harness" / "killed.progress").write_text(json.dumps({"completed": 99}))
    seen: list[tuple[int, int]] = []
    server = PolicyServer(policy)
    contestant = describe_server(server, "untrained", "raw")
    evaluate_policy(server, contestant, point_world(), tmp_path, lambda done, of: seen.append((done, of)))
    assert seen
    assert all(0 <= done <= of == 8 for done, of in seen)


def test_a_broken_episode_is_no_failure_of_the_policy(point_world: Plans, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"2 broken and 2 whole.*the table fell over"):
        evaluate_scripted("expert", point_world(episodes=2, benchmark="point_world:BrokenBenchmark"), tmp_path)


def test_a_camera_that_is_not_sent_is_refused(policy: Policy, point_world: Plans, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"no images\.wrist"):
        evaluated(policy, point_world(episodes=1, cameras={"primary": (42, 28)}), tmp_path)
    server = PolicyServer(policy, absent_cameras=["wrist"])
    assert set(server.get_observation_params()["cameras"]) == {"primary"}
    with pytest.raises(ConfigError, match="cameras to be masked"):
        PolicyServer(policy, absent_cameras=["elbow"])


@pytest.mark.slow
def test_a_process_that_dies_is_reported_with_its_last_words(
    policy: Policy, point_world: Plans, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "")
    with pytest.raises(EvaluationError, match="Failed to import 'point_world:PointBenchmark'"):
        evaluated(policy, point_world(processes=2), tmp_path)


def test_plans_are_checked_before_anything_is_simulated(policy: Policy, point_world: Plans) -> None:
    wishes = PolicyServer(policy).get_observation_params()
    for options, wrong, message in (
        ({"tasks": ("juggle",)}, {}, "no such tasks"),
        ({"tasks": ("nudge", "nudge")}, {}, "each once"),
        ({}, {"control_hz": 10.0}, "another control rate"),
        ({"seed": -1}, {}, "Seed"),
        ({"episodes": 100_001}, {}, "not that many"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_plan(point_world(**options), "policy", {**wishes, **wrong})
    for options in ({"episodes": 0}, {"processes": 0}):
        with pytest.raises(ConfigError, match="needs episodes"):
            point_world(**options)
    for wrong in ({"execute_steps": 6}, {"execute_steps": 0}, {"batch_size": 0}, {"flow_steps": 0}):
        with pytest.raises(ConfigError, match="cannot be served"):
            PolicyServer(policy, **wrong)


def test_policy_and_benchmark_declare_the_same_wire(policy: Policy, point_world: Plans) -> None:
    from point_world import PointBenchmark

    server = PolicyServer(policy)
    benchmark = PointBenchmark(**server.get_observation_params(), seed=0)
    specs = (server.get_action_spec(), benchmark.get_action_spec())
    specs += (server.get_observation_spec(), benchmark.get_observation_spec())
    assert check_specs(*specs) == []
    blind = PointBenchmark(seed=0)
    assert len(check_specs(*specs[:3], blind.get_observation_spec())) == 2


def test_the_digest_is_of_the_weights_not_of_the_file(policy: Policy, checkpoint: Path) -> None:
    loaded = load_policy(checkpoint)
    assert weights_digest(loaded) == weights_digest(policy)
    with torch.no_grad():
        loaded.vla.expert.action_out.bias[0] += 1e-6
    assert weights_digest(loaded) != weights_digest(policy)


def test_a_result_with_missing_episodes_is_refused(reference: EvalResult) -> None:
    more = replace(reference.protocol, episodes=5)
    aggregate = {"tasks": [{"task": "shift", "episodes": []}]}
    with pytest.raises(EvaluationError, match="0 whole ones"):
        read_episodes(aggregate, more, where="somewhere")
