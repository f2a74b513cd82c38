"""What was evaluated and how: the record without which a success rate cannot be compared with another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from spear_lightning.errors import ConfigError, DataError

SuccessMode = Literal["held", "first"]
"""When an episode counts as a success: see `EvalProtocol.success_mode`."""


@dataclass(frozen=True)
class EvalProtocol:
    """How success was measured; results are compared only if this is the same.

    Attributes:
        world: World or benchmark, e.g. "tabletop".
        world_version: Changes whenever a seed would give another episode.
        simulator: Physics engine with its version.
        tasks: Names of the tasks.
        episodes: Episodes of each task.
        seed: Which block of held-out episodes; with task and number it fixes an episode.
        first_episode_seed: The world's seed of episode 0; episode i has that plus i.
        control_hz: Targets per second.
        success_mode: "held": the task must be done at the end, where an episode ends once it has been done for
            `hold_steps` control steps in a row, or is out of time. "first": an episode ends the first time the
            task is done.
        hold_steps: See `success_mode`.
    """

    world: str
    world_version: str
    simulator: str
    tasks: tuple[str, ...]
    episodes: int
    seed: int
    first_episode_seed: int
    control_hz: float
    success_mode: SuccessMode
    hold_steps: int


@dataclass(frozen=True)
class Contestant:
    """What was evaluated: its results are what a comparison is about.

    Attributes:
        name: "policy", or the scripted "expert" or "random".
        source: Checkpoint file or training step it is from.
        weights: "ema" for averaged weights, "raw" for those of the optimizer; empty for a scripted one.
        weights_sha256: Digest of the weights, whatever file they are in; empty for a scripted one.
        horizon: Actions in a predicted chunk.
        execute_steps: How many of them are executed before the next is predicted.
        flow_steps: Euler steps that make a chunk.
        noise_seed: Together with the episode and its step it fixes a chunk's initial noise.
        cameras: Camera -> [width, height] of the images it was given, pixels.
    """

    name: str
    source: str = ""
    weights: str = ""
    weights_sha256: str = ""
    horizon: int = 1
    execute_steps: int = 1
    flow_steps: int = 0
    noise_seed: int = 0
    cameras: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Episode:
    """The outcome of one episode.

    Attributes:
        task: Name of the task.
        number: Number of the episode within its task.
        seed: The world's seed.
        success: Whether it counts as a success.
        first_success: Whether the task was done at any time.
        final_success: Whether the task was done at the end.
        first_success_step: Control steps until the task was done first; `None` if it never was.
        steps: Control steps of the episode.
        failure: What went wrong, for a person who watched it to fill in.
    """

    task: str
    number: int
    seed: int
    success: bool
    first_success: bool
    final_success: bool
    first_success_step: int | None
    steps: int
    failure: str | None = None


@dataclass(frozen=True)
class EvalResult:
    """Outcomes of all episodes of an evaluation, with what is needed to repeat it.

    Attributes:
        protocol: How it was measured.
        contestant: What was measured.
        episodes: In the order of tasks and numbers.
        software: Versions and machine, which may differ between results that are compared.
        wall_seconds: How long it took.
    """

    protocol: EvalProtocol
    contestant: Contestant
    episodes: tuple[Episode, ...]
    software: dict[str, str]
    wall_seconds: float

    def of_task(self, task: str) -> list[Episode]:
        """Return the episodes of one task."""
        return [episode for episode in self.episodes if episode.task == task]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for a JSON file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: object) -> EvalResult:
        """Rebuild from `to_dict`'s values.

        Raises:
            DataError: If something is missing or unknown.
        """
        try:
            protocol = dict(values["protocol"])
            protocol["tasks"] = tuple(protocol["tasks"])
            return cls(
                protocol=EvalProtocol(**protocol),
                contestant=Contestant(**values["contestant"]),
                episodes=tuple(Episode(**episode) for episode in values["episodes"]),
                software=dict(values["software"]),
                wall_seconds=float(values["wall_seconds"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                "This is no result of an evaluation by this version",
                where=where,
                found=f"{type(error).__name__}: {error}",
                expected="a result.json written by `spear eval`",
            ) from error


def require_same_protocol(results: Sequence[EvalResult]) -> EvalProtocol:
    """Return the protocol that results share, with the tasks in the order of the first.

    Raises:
        ConfigError: If one was measured in another way than the first.
    """
    first = results[0].protocol
    for other in (result.protocol for result in results[1:]):
        # An episode depends on its task and number, not on those before it.
        if sorted(other.tasks) == sorted(first.tasks):
            other = replace(other, tasks=first.tasks)
        differing = [
            f"{item.name}: {getattr(first, item.name)!r} and {getattr(other, item.name)!r}"
            for item in fields(EvalProtocol)
            if getattr(first, item.name) != getattr(other, item.name)
        ]
        if differing:
            raise ConfigError(
                "These results were not measured in the same way and cannot be compared",
                where="protocol",
                found="; ".join(differing),
                remedy="evaluate both with the same tasks, episodes, seed and success mode",
            )
    return first
