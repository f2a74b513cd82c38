"""Evaluates a policy, or a scripted controller, through `vla-eval`: one model server here, benchmarks around it.

Nothing of the harness is rewritten. However many processes simulate, the one model server in this process answers
all of them, in batches; what the policy does in an episode depends on the episode alone (see `PolicyServer`).
"""

from __future__ import annotations

import hashlib
import platform
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spear_lightning import __version__
from spear_lightning.errors import ConfigError
from spear_lightning.evaluation.protocol import Contestant, Episode, EvalProtocol, EvalResult, SuccessMode
from spear_lightning.evaluation.shards import EvaluationError, HarnessRun, Progress, quiet, run_here, run_shards

if TYPE_CHECKING:
    from torch import nn
    from vla_eval.model_servers.base import ModelServer

    from spear_lightning.policy.vla_eval_server import PolicyServer

TABLETOP = "spear_lightning.worlds.tabletop.benchmark:TabletopBenchmark"
PLAIN_TABLETOP = "spear_lightning.worlds.tabletop.benchmark:PlainTabletopBenchmark"

_NAME = "closed_loop"
"""Name of the benchmark entry in the harness's files."""

_ANSWER_SECONDS = 600.0
"""How long a benchmark waits for an answer: the first batch may compile kernels."""

_SPECTATOR = {"primary": (168, 126)}
"""What is rendered where pictures are recorded of a controller that needs none."""


@dataclass(frozen=True)
class EvaluationPlan:
    """Which episodes are run, and how.

    Attributes:
        tasks: Names of tasks; `None` takes all of the benchmark's.
        episodes: Episodes of each task.
        seed: Which block of held-out episodes.
        processes: Processes that simulate; 1 simulates in this process.
        success_mode: See `EvalProtocol`.
        hold_steps: See `EvalProtocol`.
        cameras: Camera -> (width, height) of the images that are rendered; `None` renders what the policy sees.
        recorded: Episodes of each task that keep their pictures.
        benchmark: The benchmark, "module:Class"; it takes the parameters of `TabletopBenchmark`.
    """

    tasks: tuple[str, ...] | None = None
    episodes: int = 75
    seed: int = 0
    processes: int = 1
    success_mode: SuccessMode = "held"
    hold_steps: int = 5
    cameras: Mapping[str, tuple[int, int]] | None = None
    recorded: int = 0
    benchmark: str = TABLETOP

    def __post_init__(self) -> None:
        if self.episodes < 1 or self.processes < 1 or self.recorded < 0:
            raise ConfigError(
                "An evaluation needs episodes and a process",
                where="episodes, processes, recorded",
                found=(self.episodes, self.processes, self.recorded),
                expected="at least 1, at least 1, at least 0",
            )


def evaluate_policy(
    server: PolicyServer,
    contestant: Contestant,
    plan: EvaluationPlan,
    folder: Path,
    progress: Progress | None = None,
    frames: Path | None = None,
) -> EvalResult:
    """Evaluate a policy.

    Args:
        server: Serves the policy.
        contestant: What to write into the result (see `describe_server`).
        plan: Which episodes.
        folder: For the harness's files (`harness/`).
        progress: Called with the episodes that are done and all there are, now and then.
        frames: Folder for the pictures of the plan's recorded episodes; without it none are kept.

    Raises:
        ConfigError: If plan and policy do not fit each other or the world.
        EvaluationError: If an episode or a process broke off.
    """
    return _evaluate(server, "policy", contestant, plan, folder, progress, frames)


def evaluate_scripted(
    controller: str,
    plan: EvaluationPlan,
    folder: Path,
    progress: Progress | None = None,
    frames: Path | None = None,
) -> EvalResult:
    """Evaluate the benchmark's "expert" or "random" controller on the same episodes (see `evaluate_policy`)."""
    require_harness()
    from spear_lightning.evaluation.standing_server import StandingServer

    if plan.recorded and plan.cameras is None:
        plan = replace(plan, cameras=_SPECTATOR)
    contestant = Contestant(name=controller, source="scripted")
    return _evaluate(StandingServer(), controller, contestant, plan, folder, progress, frames)


def require_harness() -> None:
    """Raise unless what an evaluation needs is installed.

    Raises:
        ConfigError: If it is not.
    """
    try:
        import mujoco  # noqa: F401
        import vla_eval  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "Evaluation in closed loop needs packages that are not installed",
            found=error,
            remedy="pip install 'spear-lightning[sim]'",
        ) from error


def describe_server(server: PolicyServer, source: str, weights: str) -> Contestant:
    """Return the record of a served policy.

    Args:
        server: The server.
        source: Checkpoint file or training step it is from.
        weights: "ema" or "raw".
    """
    return Contestant(
        name="policy",
        source=source,
        weights=weights,
        weights_sha256=weights_digest(server.policy),
        horizon=server.policy.require_interface().horizon,
        execute_steps=server.execute_steps,
        flow_steps=server.flow_steps,
        noise_seed=server.noise_seed,
    )


def weights_digest(module: nn.Module) -> str:
    """Return the SHA-256 of a module's weights and buffers: the same for a file and for the module it is from."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_plan(plan: EvaluationPlan, controller: str, wishes: Mapping[str, Any]) -> EvalProtocol:
    """Ask the benchmark whether it can do what is planned; nothing is simulated.

    Args:
        plan: Which episodes.
        controller: "policy", "expert" or "random".
        wishes: What the policy asks of the benchmark: its cameras and control rate.

    Returns:
        The protocol of the evaluation.

    Raises:
        ConfigError: If there is no such task, or the policy is made for another control rate.
    """
    require_harness()
    from vla_eval.registry import resolve_import_string

    benchmark = resolve_import_string(plan.benchmark)(**{**wishes, **_parameters(plan, controller, None)})
    facts = benchmark.get_metadata()
    if plan.episodes > facts["max_episodes_per_task"]:
        raise ConfigError(
            "There are not that many held-out episodes of a task",
            where="episodes",
            found=plan.episodes,
            expected=f"at most {facts['max_episodes_per_task']}",
        )
    return EvalProtocol(
        world=facts["world"],
        world_version=facts["world_version"],
        simulator=facts["simulator"],
        tasks=tuple(task["name"] for task in benchmark.get_tasks()),
        episodes=plan.episodes,
        seed=plan.seed,
        first_episode_seed=facts["first_episode_seed"],
        control_hz=facts["control_hz"],
        success_mode=plan.success_mode,
        hold_steps=plan.hold_steps,
    )


def harness_config(plan: EvaluationPlan, controller: str, frames: Path | None = None) -> dict[str, Any]:
    """Return the plan as a configuration of the harness, such as `vla-eval run --config` takes.

    Args:
        plan: Which episodes.
        controller: "policy", "expert" or "random".
        frames: Folder for the pictures of recorded episodes.
    """
    entry = {
        "benchmark": plan.benchmark,
        "name": _NAME,
        "episodes_per_task": plan.episodes,
        "params": _parameters(plan, controller, frames),
        "recording": {"record_step": False},
    }
    return {"server": {"timeout": _ANSWER_SECONDS}, "render": "cpu", "benchmarks": [entry]}


def _parameters(plan: EvaluationPlan, controller: str, frames: Path | None) -> dict[str, Any]:
    parameters: dict[str, Any] = {
        "tasks": None if plan.tasks is None else list(plan.tasks),
        "seed": plan.seed,
        "controller": controller,
        "success_mode": plan.success_mode,
        "hold_steps": plan.hold_steps,
    }
    if plan.cameras is not None:
        parameters["cameras"] = {name: list(size) for name, size in plan.cameras.items()}
    if plan.recorded and frames is not None:
        parameters |= {"recorded": plan.recorded, "frames_folder": str(frames.absolute())}
    return parameters


def _evaluate(
    server: ModelServer,
    controller: str,
    contestant: Contestant,
    plan: EvaluationPlan,
    folder: Path,
    progress: Progress | None,
    frames: Path | None,
) -> EvalResult:
    wishes = server.get_observation_params()
    protocol = check_plan(plan, controller, wishes)
    from vla_eval.api import serve_background

    started = time.monotonic()
    cameras = wishes.get("cameras") if plan.cameras is None else plan.cameras
    output = (folder / "harness").absolute()
    output.mkdir(parents=True, exist_ok=True)
    for left in output.glob("*.progress"):
        # Of a run that was killed: its episodes would be counted as done.
        left.unlink()
    config = harness_config(plan, controller, frames)
    report = progress or (lambda done, of: None)
    with quiet(), serve_background(server) as handle:
        config["server"]["url"] = handle.url
        run = HarnessRun(config, output, uuid.uuid4().hex[:12], len(protocol.tasks) * plan.episodes)
        aggregate = run_here(run, report) if plan.processes == 1 else run_shards(run, plan.processes, report)
    return EvalResult(
        protocol=protocol,
        contestant=replace(contestant, cameras={name: list(size) for name, size in (cameras or {}).items()}),
        episodes=read_episodes(aggregate, protocol, where=output),
        software=software_versions(),
        wall_seconds=round(time.monotonic() - started, 3),
    )


def software_versions() -> dict[str, str]:
    """Return what else might make a difference; it does not keep results from being compared."""
    import torch
    import vla_eval

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "spear-lightning": __version__,
        "vla-eval": vla_eval.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device,
    }


def read_episodes(aggregate: Mapping[str, Any], protocol: EvalProtocol, where: object) -> tuple[Episode, ...]:
    """Return the episodes of the harness's aggregate, in the order of tasks and numbers.

    Args:
        aggregate: What `vla-eval run` writes as `..._aggregate.json`.
        protocol: What should be in it.
        where: What to name in an error.

    Raises:
        EvaluationError: If an episode broke off or is missing: it must not pass for a failure of the policy.
    """
    of_task = {task["task"]: task["episodes"] for task in aggregate["tasks"]}
    rows = [(task, row) for task in protocol.tasks for row in of_task.get(task, [])]
    broken = [(task, row) for task, row in rows if row.get("failure_reason")]
    if broken or len(rows) != len(protocol.tasks) * protocol.episodes:
        raise EvaluationError(
            "Episodes broke off or are missing",
            where=where,
            found=f"{len(broken)} broken and {len(rows) - len(broken)} whole ones"
            + "".join(
                f"; {task} {row['episode_id']}, {row['failure_reason']}: {_last_words(row.get('failure_detail'))}"
                for task, row in broken[:1]
            ),
            expected=f"{protocol.episodes} whole episodes of each of {', '.join(protocol.tasks)}",
        )
    episodes = [
        Episode(
            task=task,
            number=row["episode_id"],
            seed=row["metrics"]["episode_seed"],
            success=bool(row["metrics"]["success"]),
            first_success=bool(row["metrics"]["first_success"]),
            final_success=bool(row["metrics"]["final_success"]),
            first_success_step=row["metrics"]["first_success_step"],
            steps=row["steps"],
        )
        for task, row in rows
    ]
    return tuple(sorted(episodes, key=lambda episode: (protocol.tasks.index(episode.task), episode.number)))


def _last_words(detail: str | None) -> str:
    """Return what follows a traceback of the harness; a message may have several lines."""
    return (detail or "").rpartition("\nvla_eval.runners.base.")[2].strip()
