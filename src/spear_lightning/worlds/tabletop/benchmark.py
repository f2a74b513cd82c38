"""The tabletop world as a benchmark of the evaluation harness `vla-eval`.

    benchmarks:
      - benchmark: spear_lightning.worlds.tabletop.benchmark:TabletopBenchmark
        episodes_per_task: 75
        params: {tasks: [touch, pick_up], seed: 0}

The wire carries what `policy.vla_eval_server` describes: camera images, instruction and state to the policy, and
absolute targets (8,) [x m, q xyzw, openness] in the robot's base frame back.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal, Protocol, get_args

import numpy as np
from vla_eval.benchmarks.base import StepBenchmark, StepResult
from vla_eval.protocol.numpy_codec import set_image_format
from vla_eval.specs import IMAGE_RGB, LANGUAGE, POSITION_ABSOLUTE, ROTATION_QUAT, DimSpec

from spear_lightning.errors import ConfigError

FIRST_EVALUATION_SEED = 2**40
"""Seeds of the world from here on are for evaluation; demonstrations are made from those below."""

EPISODES_PER_BLOCK = 100_000
"""Held-out episodes of one task that belong to one `seed` of the benchmark."""

Controller = Literal["policy", "expert", "random"]


class Acting(Protocol):
    """What moves the robot without the wire: it knows the world's state, which no policy is sent."""

    def act(self) -> np.ndarray:
        """Return the next absolute target, (8,)."""


class TabletopBenchmark(StepBenchmark):
    """Held-out episodes of the tabletop's tasks.

    Args:
        tasks: Names of tasks; default: all.
        cameras: Camera -> (width, height) in pixels of what the policy is sent; default: what the policy asks for
            when it says hello.
        seed: Which block of held-out episodes. Episode i of a task is the world's episode with seed
            `FIRST_EVALUATION_SEED + EPISODES_PER_BLOCK * seed + i`.
        controller: "policy" executes what comes over the wire. "expert" and "random" (see `RandomTargets`) are
            scripted, run here and ignore it: they give a table its upper and lower row.
        success_mode: "held": the task must be done at the end, where an episode ends once it has been done for
            `hold_steps` control steps in a row, or is out of time. "first": an episode ends, successful, the
            first time the task is done.
        hold_steps: See `success_mode`.
        control_hz: Rate that the policy's targets are made for, Hz; told by the policy.
        frames_folder: Where the first `recorded` episodes of each task leave their pictures, as TASK_NUMBER.npz
            with `frames` uint8 (T, height, width, 3), the cameras side by side, and `instruction`.
        recorded: See `frames_folder`.

    Raises:
        ConfigError: If there is no such task or camera, or a rate, mode or seed makes no sense.
    """

    render_backends: ClassVar[frozenset[str]] = frozenset({"cpu", "gpu"})

    def __init__(
        self,
        tasks: Sequence[str] | None = None,
        cameras: Mapping[str, Sequence[int]] | None = None,
        seed: int = 0,
        controller: Controller = "policy",
        success_mode: Literal["held", "first"] = "held",
        hold_steps: int = 5,
        control_hz: float | None = None,
        frames_folder: str | None = None,
        recorded: int = 0,
    ) -> None:
        super().__init__()
        # The harness would compress every picture as PNG, which takes as long as making it.
        set_image_format("raw")
        self.tasks = list(tasks or self.all_tasks())
        self.cameras = {name: (int(width), int(height)) for name, (width, height) in (cameras or {}).items()}
        self.seed = seed
        self.controller = controller
        self.success_mode = success_mode
        self.hold_steps = hold_steps
        self.frames_folder = frames_folder
        self.recorded = recorded
        self._check(control_hz)
        self._world: Any = None
        self._acting: Acting | None = None
        self._frames: list[np.ndarray] | None = None

    def all_tasks(self) -> list[str]:
        """Return the names of all tasks."""
        from spear_lightning.worlds.tabletop.tasks import TASKS

        return list(TASKS)

    def all_cameras(self) -> list[str]:
        """Return the names of all cameras."""
        from spear_lightning.worlds.tabletop.scene import CAMERAS

        return list(CAMERAS)

    def make_world(self) -> Any:
        """Build the world; called once, at the first episode."""
        from spear_lightning.worlds.tabletop.world import Tabletop

        return Tabletop(self.cameras)

    def world_facts(self) -> dict[str, Any]:
        """Return what identifies the world: name, version, physics engine, control rate in Hz, most steps."""
        import mujoco

        from spear_lightning.worlds.tabletop.tasks import TASKS
        from spear_lightning.worlds.tabletop.world import CONTROL_HZ, WORLD_VERSION

        return {
            "world": "tabletop",
            "world_version": WORLD_VERSION,
            "simulator": f"mujoco {mujoco.__version__}",
            "control_hz": CONTROL_HZ,
            "max_steps": max(TASKS[task].max_steps for task in TASKS),
        }

    def make_acting(self, rng: np.random.Generator) -> Acting:
        """Build the scripted controller of an episode that was just reset."""
        if self.controller == "expert":
            from spear_lightning.worlds.tabletop.experts import Expert

            return Expert(self._world, rng)
        from spear_lightning.worlds.tabletop.random_targets import RandomTargets

        return RandomTargets(self._world.state, rng)

    def _check(self, control_hz: float | None) -> None:
        unknown = sorted(set(self.tasks) - set(self.all_tasks()))
        if unknown or len(set(self.tasks)) != len(self.tasks):
            raise ConfigError(
                "The world has no such tasks",
                where="tasks",
                found=self.tasks,
                expected=f"some of {self.all_tasks()}, each once",
            )
        if not set(self.cameras) <= set(self.all_cameras()) or min(sum(self.cameras.values(), (1,))) < 1:
            raise ConfigError(
                "The world has no such cameras",
                where="cameras",
                found=self.cameras,
                expected=f"some of {self.all_cameras()}, with at least 1 pixel",
                remedy="a policy of other cameras cannot be evaluated in this world",
            )
        rate = self.world_facts()["control_hz"]
        if control_hz is not None and control_hz != rate:
            raise ConfigError(
                "The policy's targets are made for another control rate",
                where="control_hz",
                found=f"{control_hz:g} Hz",
                expected=f"{rate:g} Hz",
                remedy="train with data.chunks at the world's rate",
            )
        for name, allowed in (("controller", Controller), ("success_mode", Literal["held", "first"])):
            if getattr(self, name) not in get_args(allowed):
                raise ConfigError(
                    "Unknown choice",
                    where=name,
                    found=getattr(self, name),
                    expected=" or ".join(get_args(allowed)),
                )
        if self.seed < 0 or self.hold_steps < 1:
            raise ConfigError(
                "Seed and steps are wrong",
                where="seed, hold_steps",
                found=(self.seed, self.hold_steps),
                expected="at least 0, at least 1",
            )

    def get_tasks(self) -> list[dict[str, Any]]:
        """Return a task of the harness for each of the world's; with the episode's number it fixes an episode."""
        return [{"name": task, "suite": "tabletop", "seed": self.seed} for task in self.tasks]

    def get_metadata(self) -> dict[str, Any]:
        """Return how many steps an episode may have, what the world is, and which episodes these are."""
        first = FIRST_EVALUATION_SEED + EPISODES_PER_BLOCK * self.seed
        return {
            **self.world_facts(),
            "first_episode_seed": first,
            "max_episodes_per_task": EPISODES_PER_BLOCK,
        }

    def reset(self, task: dict[str, Any]) -> Any:
        """Start an episode and return the world's observation."""
        if self._world is None:
            self._world = self.make_world()
        number = int(task["episode_idx"])
        self._number = number
        self._episode_seed = int(self.get_metadata()["first_episode_seed"]) + number
        self._steps = 0
        self._done_for = 0
        self._first_success_step: int | None = None
        observation = self._world.reset(task["name"], self._episode_seed)
        self._acting = None
        if self.controller != "policy":
            which = self.all_tasks().index(task["name"])
            self._acting = self.make_acting(np.random.default_rng([self._episode_seed, which]))
        self._frames = [] if self.frames_folder is not None and number < self.recorded else None
        self._keep_frame(observation)
        self._idle_target = np.asarray(observation.state, np.float64)
        return observation

    def step(self, action: dict[str, Any]) -> StepResult:
        """Execute a target for one control step."""
        observation = self._act(self._target(action))
        self._steps += 1
        done = bool(self._world.success)
        self._done_for = self._done_for + 1 if done else 0
        if done and self._first_success_step is None:
            self._first_success_step = self._steps
        self._keep_frame(observation)
        enough = 1 if self.success_mode == "first" else self.hold_steps
        over = self._done_for >= enough or self._steps >= self._world.max_steps
        return StepResult(obs=observation, reward=float(done), done=over, info={})

    def _act(self, target: np.ndarray) -> Any:
        if self._acting is None or self._frames is not None:
            return self._world.step(target)
        # Nobody looks: no picture needs to be made.
        self._world.act(target)
        return SimpleNamespace(images={}, state=self._world.state, instruction=self._world.instruction)

    def _target(self, action: dict[str, Any]) -> np.ndarray:
        if self._acting is None:
            return np.asarray(action["actions"], np.float64)
        # Experts know when they are done; what they would do afterwards is nobody's demonstration.
        if not (self.controller == "expert" and self._world.success):
            self._idle_target = self._acting.act()
        return self._idle_target

    def make_obs(self, raw_obs: Any, task: dict[str, Any]) -> dict[str, Any]:
        """Return what is sent to the policy; to the scripted controllers' stand-in nothing that takes time."""
        images = raw_obs.images if self._acting is None else {}
        return {"images": images, "task_description": raw_obs.instruction, "states": raw_obs.state}

    def get_step_result(self, step_result: StepResult) -> dict[str, Any]:
        """Return the outcome of the episode, by all ways of counting."""
        final = self._done_for > 0
        first = self._first_success_step is not None
        self._write_frames()
        return {
            "success": first if self.success_mode == "first" else final,
            "first_success": first,
            "final_success": final,
            "first_success_step": self._first_success_step,
            "episode_seed": self._episode_seed,
        }

    def get_metric_keys(self) -> dict[str, str]:
        """Say how outcomes are summed up."""
        return {
            "success": "mean",
            "first_success": "mean",
            "final_success": "mean",
            "first_success_step": "mean",
        }

    def get_action_spec(self) -> dict[str, DimSpec]:
        """Declare what is executed."""
        openness = DimSpec("gripper", 1, "openness_01", (0.0, 1.0), description="0 closed, 1 open")
        return {"position": POSITION_ABSOLUTE, "rotation": ROTATION_QUAT, "gripper": openness}

    def get_observation_spec(self) -> dict[str, DimSpec]:
        """Declare what is sent."""
        state = DimSpec("state", 8, "eef_pos3_quat_xyzw4_openness1", description="metres, robot base frame")
        return {**{f"image_{name}": IMAGE_RGB for name in self.cameras}, "state": state, "language": LANGUAGE}

    @classmethod
    def configure_render(cls, mode: str) -> dict[str, str]:
        """Nothing to set: the world's pictures are computed on the CPU, with or without a display."""
        return {}

    def _keep_frame(self, observation: Any) -> None:
        pictures = list(observation.images.values())
        if not pictures:
            return
        if self._frames is not None:
            self._frames.append(beside(pictures))
        # The harness's own videos, where they are asked for.
        self._recorder.record_video(pictures[0])

    def _write_frames(self) -> None:
        if not self._frames or self.frames_folder is None:
            return
        folder = Path(self.frames_folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self._task['name']}_{self._number:05d}.npz"
        temporary = path.with_suffix(f".{os.getpid()}.tmp.npz")
        np.savez_compressed(temporary, frames=np.stack(self._frames), instruction=self._world.instruction)
        os.replace(temporary, path)
        self._frames = None


def beside(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Return pictures uint8 (height, width, 3) side by side, lower ones padded at the bottom; at least one."""
    height = max(picture.shape[0] for picture in pictures)
    padded = [np.pad(picture, ((0, height - picture.shape[0]), (0, 0), (0, 0))) for picture in pictures]
    return np.concatenate(padded, axis=1)


class PlainTabletopBenchmark(TabletopBenchmark):
    """The same tasks in the easy world: one table and light, cameras in the same place, no distractors."""

    def make_world(self) -> Any:
        """Build the world; called once, at the first episode."""
        from spear_lightning.worlds.tabletop.world import Tabletop

        return Tabletop(self.cameras, distractors=(0, 0), plain=True)

    def world_facts(self) -> dict[str, Any]:
        """Return what identifies the world; its name differs, so that results are not compared by mistake."""
        return {**super().world_facts(), "world": "tabletop-plain"}
