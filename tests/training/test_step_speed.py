"""Speed and waiting times, read off a clock that only the test moves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spear_lightning.training import StepSpeed


class Recorder:
    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))


def test_waiting_and_working_are_told_apart_and_validation_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def clock() -> float:
        return now

    monkeypatch.setattr("spear_lightning.training.step_speed.perf_counter", clock)
    recorder = Recorder()
    trainer: Any = SimpleNamespace(
        is_global_zero=True,
        world_size=4,
        global_step=0,
        loggers=[recorder],
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    module: Any = None
    speed = StepSpeed(every_n_steps=3)
    speed.on_train_start(trainer, module)
    # The first step takes long (compilation), and a batch of it was waited for long: neither counts.
    waits, works = [100.0, 1.0, 2.0, 0.0, 0.5, 0.5, 0.5], [50.0, 3.0, 4.0, 2.0, 0.5, 0.5, 0.5]
    for step, (wait, work) in enumerate(zip(waits, works, strict=True)):
        now += wait
        speed.on_train_batch_start(trainer, module, [0] * 8, step)
        now += work
        trainer.global_step = step + 1
        speed.on_train_batch_end(trainer, module, None, [0] * 8, step)
        if step == 2:
            now += 1000.0
            speed.on_validation_end(trainer, module)
    (first_step, first), (second_step, second) = recorder.logged
    assert (first_step, second_step) == (4, 7)
    assert first["speed/data_wait"] == pytest.approx(3 / 12)
    assert first["speed/step_ms"] == pytest.approx(4000)
    assert first["speed/samples_per_second"] == pytest.approx(3 * 8 * 4 / 12)
    assert second["speed/data_wait"] == pytest.approx(0.5)
