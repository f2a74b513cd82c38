"""Our policies as model servers of the evaluation harness `vla-eval`, in this process or in one of their own.

    python -m spear_lightning.policy.vla_eval_server --args.checkpoint FILE --address 127.0.0.1:8000

The wire carries, from benchmark to policy: `images` (camera -> uint8 RGB (height, width, 3)), `task_description`
and `states` (8,) [x m, q xyzw, gripper openness] in the robot's base frame; back: `actions` (8,), the absolute
target of the next control step in the same form.

Legend: B observations, H horizon.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from vla_eval.model_servers.base import SessionContext
from vla_eval.model_servers.predict import PredictModelServer
from vla_eval.specs import IMAGE_RGB, LANGUAGE, POSITION_ABSOLUTE, ROTATION_QUAT, DimSpec

from spear_lightning.batches import RobotBatch
from spear_lightning.errors import ConfigError, SpearError
from spear_lightning.geometry.poses import chunk_to_poses
from spear_lightning.policy.checkpoint import load_policy
from spear_lightning.policy.policy import Policy

OPENNESS = DimSpec("gripper", 1, "openness_01", (0.0, 1.0), description="0 closed, 1 open")
STATE = DimSpec("state", 8, "eef_pos3_quat_xyzw4_openness1", description="metres, robot base frame")

ACCELERATOR_BATCH = 16
LOOPBACK = "127.0.0.1"


class PolicyServer(PredictModelServer):
    """Serves a policy: observation in, absolute target of the next control step out.

    Same episodes, same actions: the initial noise of a chunk depends on the episode, its step and `noise_seed`
    alone, and the network always sees batches of one size, since the rounding of a matrix product depends on it.
    How many benchmarks ask at once, and in which order, therefore does not matter, but for one thing: where
    `prompt.multiple` is set or the network is packed, the rounding in batches of more than one depends on how long
    the others' instructions are.

    Args:
        policy: The policy, in eval mode, on its device.
        execute_steps: Actions of a chunk that are executed before the next one is predicted; default: half of
            the horizon (SPEAR-1: 2 of 5).
        flow_steps: Euler steps of the flow; default: the flow's own number.
        noise_seed: Seed of the initial noise.
        batch_size: Observations in every forward pass, the last of a batch repeated where there are fewer;
            default: 1 on a CPU, where batches save little, and 16 on an accelerator.
        absent_cameras: Cameras of the policy that the benchmark does not have; they are masked. Any other that is
            missing is an error.

    Raises:
        ConfigError: If the policy does not know its interface, or a number or camera makes no sense.
    """

    def __init__(
        self,
        policy: Policy,
        execute_steps: int | None = None,
        flow_steps: int | None = None,
        noise_seed: int = 0,
        batch_size: int | None = None,
        absent_cameras: Sequence[str] = (),
    ) -> None:
        interface = policy.require_interface()
        policy.normalizer.require_fitted()
        on_cpu = policy.normalizer.fitted.device.type == "cpu"
        self.policy = policy
        self.execute_steps = max(1, interface.horizon // 2) if execute_steps is None else execute_steps
        self.flow_steps = policy.flow.num_steps if flow_steps is None else flow_steps
        self.batch_size = (1 if on_cpu else ACCELERATOR_BATCH) if batch_size is None else batch_size
        self.noise_seed = noise_seed
        if not 1 <= self.execute_steps <= interface.horizon or self.batch_size < 1 or self.flow_steps < 1:
            raise ConfigError(
                "The policy cannot be served like this",
                where="execute_steps, batch_size, flow_steps",
                found=(self.execute_steps, self.batch_size, self.flow_steps),
                expected=f"from 1 to the horizon, {interface.horizon}; at least 1; at least 1",
            )
        self.cameras = {name: size for name, size in interface.cameras.items() if name not in absent_cameras}
        if len(self.cameras) != len(interface.cameras) - len(absent_cameras) or not self.cameras:
            raise ConfigError(
                "The cameras to be masked are not some of the policy's",
                where="absent_cameras",
                found=list(absent_cameras),
                expected=f"some, not all, of {sorted(interface.cameras)}",
            )
        # The harness keeps the rest of a chunk and hands it out; it collects what asks at the same time.
        super().__init__(
            chunk_size=self.execute_steps, max_batch_size=max(self.batch_size, 2), max_wait_time=0.002
        )
        self._episodes: dict[str, int] = {}

    async def on_episode_start(self, config: dict[str, Any], ctx: SessionContext) -> None:
        """Take note of which episode it is: all that the harness says of it is hashed."""
        self._episodes[ctx.session_id] = episode_key(config.get("task") or {})
        await super().on_episode_start(config, ctx)

    async def on_episode_end(self, result: dict[str, Any], ctx: SessionContext) -> None:
        """Forget the episode."""
        self._episodes.pop(ctx.session_id, None)
        await super().on_episode_end(result, ctx)

    async def on_observation(self, obs: dict[str, Any], ctx: SessionContext) -> None:
        """Check an observation before it is put into a batch: an error there would reach all that are in it.

        Raises:
            ConfigError: If it belongs to no episode, or lacks something.
            ShapeError: If an image, the instruction or the state has the wrong shape or type.
        """
        if ctx.session_id not in self._episodes:
            raise ConfigError(
                "An observation came before its episode",
                where=f"session {ctx.session_id}",
                remedy="let the benchmark start an episode first",
            )
        self.policy.check_observation(*self._seen(obs))
        await super().on_observation(obs, ctx)

    def predict_batch(
        self, obs_batch: list[dict[str, Any]], ctx_batch: list[SessionContext]
    ) -> list[dict[str, Any]]:
        """Predict targets for several benchmarks at once.

        Args:
            obs_batch: Observations (see the module).
            ctx_batch: Which episode and step each is from.

        Returns:
            For each `{"actions": float32 (H, 8)}`: absolute targets in the base frame.
        """
        noises = [self._noise(ctx) for ctx in ctx_batch]
        batches = [self.policy.observe(*self._seen(observation)) for observation in obs_batch]
        targets: list[dict[str, Any]] = []
        for start in range(0, len(batches), self.batch_size):
            several = slice(start, start + self.batch_size)
            targets += [{"actions": chunk} for chunk in self._targets(batches[several], noises[several])]
        return targets

    def _noise(self, ctx: SessionContext) -> Tensor:
        seed = np.random.SeedSequence([self.noise_seed, self._episodes[ctx.session_id], ctx.step])
        # Drawn on the CPU, so that it is the same whatever the policy runs on. torch takes signed 64-bit seeds.
        generator = torch.Generator().manual_seed(int(seed.generate_state(1, np.uint64)[0] >> np.uint64(1)))
        return self.policy.flow.noise((1, self.policy.require_interface().horizon), generator)

    def _seen(self, observation: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], str, np.ndarray]:
        """Return the images, instruction and state that the policy sees of an observation."""
        images = observation.get("images") or {}
        missing = [key for key in ("task_description", "states") if key not in observation]
        missing += [f"images.{camera}" for camera in self.cameras if camera not in images]
        if missing:
            raise ConfigError(
                "The benchmark does not send what the policy was trained to see",
                where="observation",
                found=f"{sorted(observation)} with images {sorted(images)}, no {', '.join(missing)}",
                expected=f"images of {sorted(self.cameras)}, task_description, states (8,) [x, q xyzw, openness]",
                remedy="let the benchmark send them; a camera it does not have can be named in absent_cameras",
            )
        seen = {camera: images[camera] for camera in self.cameras}
        return seen, observation["task_description"], observation["states"]

    def _targets(self, batches: list[RobotBatch], noises: list[Tensor]) -> np.ndarray:
        """Return absolute targets, float32 (B, H, 8), for at most `batch_size` observations."""
        count = len(batches)
        fill = self.batch_size - count
        device = self.policy.normalizer.fitted.device
        batch = joined(batches + batches[-1:] * fill).to(device)
        noise_BHA = torch.cat(noises + noises[-1:] * fill).to(device)
        chunk_BH8 = self.policy.sample_chunk(batch, None, self.flow_steps, noise=noise_BHA)
        mode = self.policy.require_interface().chunk_mode
        pose_BH7 = chunk_to_poses(batch.state, chunk_BH8, mode)
        targets_BH8 = torch.cat([pose_BH7, chunk_BH8[..., 7:]], dim=-1)
        return targets_BH8[:count].float().cpu().numpy()

    def get_action_spec(self) -> dict[str, DimSpec]:
        """Declare what is sent, so that the harness can compare it with what the benchmark takes."""
        return {"position": POSITION_ABSOLUTE, "rotation": ROTATION_QUAT, "gripper": OPENNESS}

    def get_observation_spec(self) -> dict[str, DimSpec]:
        """Declare what is needed."""
        cameras = {f"image_{name}": IMAGE_RGB for name in self.cameras}
        return {**cameras, "state": STATE, "language": LANGUAGE}

    def get_observation_params(self) -> dict[str, Any]:
        """Ask for the cameras at the size the policy sees, and for control at the rate of its chunks."""
        sizes = {name: [camera.width, camera.height] for name, camera in self.cameras.items()}
        return {"cameras": sizes, "control_hz": self.policy.require_interface().rate_hz}


class CheckpointServer(PolicyServer):
    """Serves the policy of a checkpoint.

    Args:
        checkpoint: A checkpoint written by training.
        weights: "ema" for the averaged weights (where there are any), "raw" for those of the optimizer.
        device: Where to run it; default: a GPU if there is one.
        execute_steps: See `PolicyServer`.
        flow_steps: See `PolicyServer`.
        noise_seed: See `PolicyServer`.
        batch_size: See `PolicyServer`.
        absent_cameras: See `PolicyServer`.
    """

    def __init__(
        self,
        checkpoint: str,
        weights: Literal["ema", "raw"] = "ema",
        device: str | None = None,
        execute_steps: int | None = None,
        flow_steps: int | None = None,
        noise_seed: int = 0,
        batch_size: int | None = None,
        absent_cameras: Sequence[str] = (),
    ) -> None:
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        policy = load_policy(checkpoint, weights, device)
        super().__init__(policy, execute_steps, flow_steps, noise_seed, batch_size, absent_cameras)


def episode_key(task: Mapping[str, Any]) -> int:
    """Return a number that stands for an episode: a hash of what the harness tells of it, in any order."""
    text = json.dumps(dict(task), sort_keys=True, default=str)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def joined(batches: list[RobotBatch]) -> RobotBatch:
    """Return one batch of several that have the same cameras."""
    # Cameras are counted anew.
    values: dict[str, Any] = {"present": None}
    for item in fields(RobotBatch):
        if item.name in values:
            continue
        parts = [getattr(batch, item.name) for batch in batches]
        if isinstance(parts[0], Tensor):
            values[item.name] = torch.cat(parts)
        elif isinstance(parts[0], dict):
            values[item.name] = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        else:
            values[item.name] = [entry for part in parts for entry in part]
    return replace(batches[0], **values)


def main() -> int:
    """Serve a checkpoint; the harness's own options, but on the loopback interface unless told otherwise.

    Returns:
        Exit status: 1 if the policy cannot be served.
    """
    from jsonargparse import capture_parser
    from vla_eval.model_servers.serve import run_server

    # Asked for help, it ends here and says which host is ours.
    parser = capture_parser(run_server, CheckpointServer)
    parser.set_defaults(host=LOOPBACK)
    parser.parse_args()
    # First, so that a host that is told wins; an address without one, as `:8001`, does not open all interfaces.
    sys.argv[1:1] = ["--host", LOOPBACK]
    try:
        run_server(CheckpointServer)
    except SpearError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
