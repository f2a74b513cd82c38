"""Observation -> action chunk: preprocessing, model and postprocessing in one object.

Training, validation, closed-loop evaluation and servers all use this object, so they cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spear_lightning.batches import STATE_WIDTH, RobotBatch
from spear_lightning.errors import ConfigError, ShapeError
from spear_lightning.flow import ActionFlow
from spear_lightning.geometry import quaternions
from spear_lightning.geometry.poses import ChunkMode
from spear_lightning.models import Prefix, PromptTokenizer, SpearVLA
from spear_lightning.models.packing import RealTokens
from spear_lightning.policy.normalizer import ActionNormalizer
from spear_lightning.robot_data.images import CameraSpec, fit_image


@dataclass(frozen=True)
class PolicyInterface:
    """What a policy was trained to see and to emit; travels with its checkpoint.

    Attributes:
        cameras: Camera name -> size and fit, in the order the model sees them.
        horizon: Actions in a chunk (SPEAR-1: 5).
        rate_hz: Rate of the actions in a chunk (SPEAR-1: 5 Hz).
        chunk_mode: "cumulative" (targets relative to the current pose) or "per_step".
    """

    cameras: dict[str, CameraSpec]
    horizon: int
    rate_hz: float
    chunk_mode: ChunkMode

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PolicyInterface:
        """Rebuild from `to_dict`'s values."""
        cameras = {name: CameraSpec(**camera) for name, camera in values["cameras"].items()}
        return cls(cameras, values["horizon"], values["rate_hz"], values["chunk_mode"])


@dataclass
class PolicyInputs:
    """A batch as the network takes it: B samples, L text tokens, H horizon; `real` only for a packed model."""

    images: dict[str, Tensor]
    image_mask: dict[str, Tensor]
    input_ids: Tensor
    text_mask: Tensor
    state: Tensor
    actions: Tensor
    real: RealTokens | None


class Policy(nn.Module):
    """A vision-language-action policy: normaliser, prompt, SPEAR-1 model and flow matching.

    Args:
        vla: The network.
        flow: The flow over action chunks that the network's velocities belong to.
        prompt: Turns instructions into tokens.
        normalizer: Physical units <-> network units.
    """

    def __init__(
        self,
        vla: SpearVLA,
        flow: ActionFlow,
        prompt: PromptTokenizer,
        normalizer: ActionNormalizer | None = None,
    ) -> None:
        super().__init__()
        if vla.expert.action_width != flow.width:
            raise ConfigError(
                "The action expert and the flow disagree about the numbers in an action",
                where="policy.vla.expert.action_width",
                found=vla.expert.action_width,
                expected=f"{flow.width} (3 translation + {flow.rotation.width} rotation + 1 gripper)",
            )
        if len(prompt) > vla.vlm.language.rows:
            raise ConfigError(
                "The tokenizer has more tokens than the language model has embeddings",
                where="policy.vla.vlm.language.vocab_size",
                found=vla.vlm.language.rows,
                expected=f"at least {len(prompt)}",
            )
        self.vla = vla
        self.flow = flow
        self.prompt = prompt
        self.normalizer = normalizer or ActionNormalizer()
        self.interface: PolicyInterface | None = None
        self.config: dict[str, Any] | None = None

    def prepare(self, batch: RobotBatch) -> PolicyInputs:
        """Tokenise and normalise a batch, on the device its tensors are on."""
        input_ids, text_mask = self.prompt.encode(batch.instructions)
        real = None
        if self.vla.vlm.packed:
            present = batch.counted().present
            assert present is not None
            real = RealTokens(present, int(text_mask.sum()))
        device = batch.state.device
        if device.type == "cuda":
            # From ordinary memory the copy would wait until the GPU has done all its work.
            input_ids, text_mask = input_ids.pin_memory(), text_mask.pin_memory()
        return PolicyInputs(
            images=batch.images,
            image_mask=batch.image_mask,
            input_ids=input_ids.to(device, non_blocking=True),
            text_mask=text_mask.to(device, non_blocking=True),
            state=self.normalizer.normalize_state(batch.state),
            actions=self.normalizer.normalize_actions(batch.actions),
            real=real,
        )

    def losses(self, batch: RobotBatch, generator: torch.Generator, flow_samples: int = 1) -> dict[str, Tensor]:
        """Return the flow-matching loss of a batch and its parts (scalars, float32).

        Args:
            batch: Samples in physical units.
            generator: Source of noise and time, on the batch's device.
            flow_samples: Draws of noise and time for every sample; they share one pass over its prefix, which is
                nearly all of the work, and make the gradient less noisy.
        """
        inputs = self.prepare(batch)
        sample = self.flow.sample_path(_repeated(inputs.actions, flow_samples), generator)
        state = _repeated(inputs.state, flow_samples)
        velocity_BHA = self.vla(
            inputs.images,
            inputs.image_mask,
            inputs.input_ids,
            inputs.text_mask,
            state,
            sample.noisy,
            sample.tau,
            inputs.real,
        )
        return self.flow.losses(velocity_BHA, sample, _repeated(batch.action_mask, flow_samples))

    @torch.no_grad()
    def sample_chunk(
        self,
        batch: RobotBatch,
        generator: torch.Generator | None,
        num_steps: int | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Sample one action chunk for every sample of a batch.

        Args:
            batch: Observations; of the actions only the horizon is used.
            generator: Source of the initial noise, on the batch's device.
            num_steps: Euler steps; `None` takes the flow's own.
            noise: Initial noise (B, H, A) instead of the generator's, e.g. `flow.noise` of each sample's own seed.

        Returns:
            float32 (B, H, 8) in physical units, gripper clamped to [0, 1].
        """
        inputs = self.prepare(batch)
        prefix = self._prefix(inputs)

        def velocity(noisy_BHA: Tensor, tau_B: Tensor) -> Tensor:
            return self.vla.velocity(prefix, inputs.state, noisy_BHA, tau_B)

        shape = (batch.actions.shape[0], batch.actions.shape[1])
        device = batch.state.device
        actions_BH8 = self.flow.sample(velocity, shape, generator, device, num_steps, noise)
        actions_BH8 = self.normalizer.unnormalize_actions(actions_BH8)
        pose, gripper = actions_BH8.split([7, 1], dim=-1)
        return torch.cat([pose, gripper.clamp(0, 1)], dim=-1)

    def _prefix(self, inputs: PolicyInputs) -> Prefix:
        return self.vla.encode_prefix(
            inputs.images, inputs.image_mask, inputs.input_ids, inputs.text_mask, inputs.real
        )

    def act(
        self,
        images: Mapping[str, np.ndarray],
        instruction: str,
        state: np.ndarray,
        seed: int = 0,
    ) -> np.ndarray:
        """Predict one chunk from one raw observation.

        Args:
            images: Camera name -> uint8 RGB (height, width, 3) of any size; a camera the policy knows but
                that is not given is masked.
            instruction: What to do.
            state: (8,) current pose [x m, q xyzw, gripper openness] in the robot's base frame.
            seed: Seed of the flow's initial noise.

        Returns:
            float32 (H, 8), the chunk in physical units (see `RobotBatch.actions`).

        Raises:
            ConfigError: If a camera is unknown to the policy, or no camera is given.
            ShapeError: If an image or the state has the wrong shape or type, or the instruction is no text.
        """
        device = self.normalizer.fitted.device
        generator = torch.Generator(device).manual_seed(seed)
        batch = self.observe(images, instruction, state).to(device)
        return self.sample_chunk(batch, generator)[0].float().cpu().numpy()

    def check_observation(self, images: Mapping[str, np.ndarray], instruction: str, state: np.ndarray) -> Tensor:
        """Check all of a raw observation (see `act`); cheap.

        Returns:
            The state, float32 (8,), as training data has it.

        Raises:
            ConfigError: If a camera is unknown to the policy, or no camera is given.
            ShapeError: If an image or the state has the wrong shape or type, or the instruction is no text.
        """
        interface = self.require_interface()
        unknown = sorted(set(images) - set(interface.cameras))
        if unknown or not images:
            raise ConfigError(
                "The observation's cameras do not fit the policy",
                where="images",
                found=sorted(images),
                expected=f"some of {sorted(interface.cameras)}",
            )
        for name, image in images.items():
            if image is None:  # As if it were not given.
                continue
            is_array = isinstance(image, np.ndarray)
            if not is_array or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
                raise ShapeError(
                    "An image must be uint8 RGB (height, width, 3)",
                    where=f"images[{name!r}]",
                    found=f"{image.dtype} {image.shape}" if is_array else type(image).__name__,
                    expected="a NumPy array",
                )
        if not isinstance(instruction, str):
            raise ShapeError("An instruction is a text", where="instruction", found=instruction)
        return canonical_state(state)

    def observe(self, images: Mapping[str, np.ndarray], instruction: str, state: np.ndarray) -> RobotBatch:
        """Turn one raw observation (see `act`) into a batch of one, exactly as the training data path does."""
        interface = self.require_interface()
        pose_8 = self.check_observation(images, instruction, state)
        pixels, present = {}, {}
        for name, camera in interface.cameras.items():
            image = images.get(name)
            present[name] = torch.tensor([image is not None])
            if image is None:
                pixels[name] = torch.zeros((1, 3, camera.height, camera.width), dtype=torch.uint8)
                continue
            pixels[name] = fit_image(image, camera)[None]
        chunk = torch.zeros((1, interface.horizon, STATE_WIDTH))
        chunk[..., 6] = 1.0
        return RobotBatch(
            images=pixels,
            image_mask=present,
            instructions=[instruction.strip()],
            state=pose_8[None],
            actions=chunk,
            action_mask=torch.ones((1, interface.horizon), dtype=torch.bool),
            dataset=torch.zeros(1, dtype=torch.int64),
            position=torch.zeros(1, dtype=torch.int64),
        )

    def require_interface(self) -> PolicyInterface:
        """Return what the policy sees and emits.

        Raises:
            ConfigError: If it was never set: neither trained with a data module nor loaded.
        """
        if self.interface is None:
            raise ConfigError(
                "The policy does not know its cameras and horizon",
                where="policy.interface",
                remedy="load it from a checkpoint, or set `policy.interface` to a PolicyInterface",
            )
        return self.interface


def canonical_state(state: np.ndarray) -> Tensor:
    """Check a state and bring it to the form that training data has.

    Args:
        state: (8,) position in metres, quaternion xyzw, gripper openness.

    Returns:
        float32 (8,), the quaternion of unit norm with w >= 0.

    Raises:
        ShapeError: If it is not eight finite numbers with a unit quaternion and an openness in [0, 1].
    """
    values = torch.as_tensor(np.asarray(state, dtype=np.float32))
    if values.shape != (STATE_WIDTH,) or not bool(torch.isfinite(values).all()):
        raise ShapeError("A state is eight finite numbers [x, q, g]", where="state", found=state)
    position, quaternion, gripper = values.split([3, 4, 1])
    norm = float(torch.linalg.vector_norm(quaternion))
    if abs(norm - 1) > 1e-2 or not -1e-3 <= float(gripper) <= 1 + 1e-3:
        raise ShapeError(
            "The state is no pose with a gripper",
            where="state",
            found=f"quaternion of norm {norm:.4f}, gripper {float(gripper):.4f}",
            expected="a unit quaternion xyzw, and openness from 0 (closed) to 1 (open)",
        )
    quaternion = quaternions.canonicalize(quaternions.normalize(quaternion))
    return torch.cat([position, quaternion, gripper.clamp(0, 1)])


def _repeated(tensor_B: Tensor, times: int) -> Tensor:
    return tensor_B if times == 1 else tensor_B.repeat_interleave(times, dim=0)
