"""Runs the command line as one of several processes, with noise that does not depend on how many they are.

    python -m torch.distributed.run --nproc-per-node 2 sharded_run.py RESULT.json fit --config ...

RESULT.json gets the mean loss of all processes at every step. Environment variables: HOLD_AT makes the writer of
that step's checkpoint wait until training has gone on, and saves the same state at once to `whole/` of the run's
folder; SIGNAL_AT sends SIGUSR1 to the second process in that step.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter

from spear_lightning import cli
from spear_lightning.flow import ActionFlow
from spear_lightning.flow.action_flow import FlowSample
from spear_lightning.training import vla_module
from spear_lightning.training.sharded_strategy import ShardedStrategy
from spear_lightning.training.vla_module import VLAModule


def processes() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share_of_one_draw() -> None:
    """Draw the noise of the whole batch in every process, and take this process's part."""
    plain_generator, plain_path = vla_module.generator_at, ActionFlow.sample_path
    plain_losses = ActionFlow.losses

    def generator_at(seed: int, stream: int, step: int, rank: int, device: Any) -> torch.Generator:
        return plain_generator(seed, stream, step, 0, device)

    def sample_path(self: ActionFlow, actions: Tensor, generator: torch.Generator | None = None) -> FlowSample:
        rank, count = processes()
        if count == 1:
            return plain_path(self, actions, generator)
        everyone = [torch.empty_like(actions) for _ in range(count)]
        dist.all_gather(everyone, actions)
        whole = plain_path(self, torch.cat(everyone), generator)
        size = len(actions)
        return FlowSample(*(getattr(whole, item.name)[rank * size :][:size] for item in fields(whole)))

    def losses(self: ActionFlow, velocity: Tensor, sample: FlowSample, mask: Tensor) -> dict[str, Tensor]:
        # The mean over all processes is that of the whole batch only if all have equally many targets.
        return plain_losses(self, velocity, sample, torch.ones_like(mask))

    ActionFlow.losses = losses  # type: ignore[method-assign]
    vla_module.generator_at = generator_at  # type: ignore[assignment]
    ActionFlow.sample_path = sample_path  # type: ignore[method-assign]


def record_losses(result: Path) -> None:
    """Write the mean loss of all processes after every step."""
    losses: dict[int, float] = {}
    plain_step = VLAModule.training_step

    def training_step(self: VLAModule, batch: Any, batch_index: int) -> Tensor:
        loss = plain_step(self, batch, batch_index)
        mean = loss.detach().clone()
        rank, count = processes()
        if count > 1:
            dist.all_reduce(mean)
        losses[self.trainer.global_step] = float(mean) / count
        if rank == 0:
            result.write_text(json.dumps(losses))
        return loss

    VLAModule.training_step = training_step  # type: ignore[method-assign]


def hold_the_writer(step: int) -> None:
    """Save one step's state twice: at once, and by a writer that waits for the end of the next step."""
    trained_on, held = threading.Event(), []
    plain_save, plain_write = ShardedStrategy.save_checkpoint, HuggingFaceStorageWriter.write_data
    plain_step = VLAModule.training_step

    def save_checkpoint(self: Any, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if checkpoint["global_step"] == step:
            held.append(Path(filepath))
            plain_save(self, checkpoint, held[0].parents[1] / "whole" / held[0].name)
        plain_save(self, checkpoint, filepath, storage_options)

    def write_data(self: Any, plan: Any, planner: Any) -> Any:
        if held and self.final_path == held[0]:
            assert trained_on.wait(timeout=60)
        return plain_write(self, plan, planner)

    def training_step(self: VLAModule, batch: Any, batch_index: int) -> Tensor:
        if self.trainer.global_step == step + 1:
            assert not held[0].exists()
            trained_on.set()
        return plain_step(self, batch, batch_index)

    ShardedStrategy.save_checkpoint = save_checkpoint  # type: ignore[method-assign]
    HuggingFaceStorageWriter.write_data = write_data  # type: ignore[method-assign]
    VLAModule.training_step = training_step  # type: ignore[method-assign]


def send_a_signal(step: int) -> None:
    plain_step = VLAModule.training_step

    def training_step(self: VLAModule, batch: Any, batch_index: int) -> Tensor:
        if self.trainer.global_step == step and processes()[0] == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return plain_step(self, batch, batch_index)

    VLAModule.training_step = training_step  # type: ignore[method-assign]


def main(result: str, *arguments: str) -> int:
    share_of_one_draw()
    record_losses(Path(result))
    for variable, act in {"HOLD_AT": hold_the_writer, "SIGNAL_AT": send_a_signal}.items():
        if variable in os.environ:
            act(int(os.environ[variable]))
    return cli.main(list(arguments))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
