"""Success in closed loop while training: every so many steps the policy acts in the embedded world."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger
from torch import nn
from torch.distributed.tensor import DTensor

from spear_lightning.errors import ConfigError
from spear_lightning.evaluation.contact_sheet import SHEET, draw_episodes
from spear_lightning.evaluation.harness import (
    TABLETOP,
    EvaluationPlan,
    check_plan,
    describe_server,
    evaluate_policy,
)
from spear_lightning.evaluation.protocol import Contestant, Episode, EvalResult, SuccessMode
from spear_lightning.evaluation.report import RESULT_FILE, rate_of, read_result, write_result
from spear_lightning.evaluation.shards import EvaluationError
from spear_lightning.policy import Policy
from spear_lightning.training.ema import ExponentialMovingAverage
from spear_lightning.training.preemption import StopOnSignal
from spear_lightning.training.vla_module import VLAModule

if TYPE_CHECKING:
    from spear_lightning.policy.vla_eval_server import PolicyServer

log = logging.getLogger(__name__)


class ClosedLoopEvaluation(Callback):
    """Lets the policy act in a world every so many steps, with the averaged weights where there are any.

    Logged for each TASK, and without `TASK/` over all: `closed_loop/TASK/success` with the bounds of its 95 %
    Wilson interval, `.../success_low` and `.../success_high`; `.../first_success` and `.../final_success`, the
    share done at any time and at the end; `.../steps`, the mean length of an episode. The run's folder gets
    `closed_loop/step_N/` with the result and pictures, which MLflow and TensorBoard show too.

    The episodes are those of `spear eval` with the same options, and so are the outcomes. They are held out from
    the demonstrations; where they were used to choose a checkpoint, report another `seed`. Training is not
    touched: no random number is drawn from its streams, and weights and modes are put back. The first process
    evaluates, with weights that are whole on it, while others wait.

    An evaluation runs after the checkpoint of its step is written, and a resumed run does not repeat it. One that
    breaks off is reported in the log, and training goes on.

    Args:
        every_steps: Optimizer steps between evaluations.
        tasks: Names of tasks; default: all.
        episodes: Episodes of each task.
        at_end: Whether the end of training is evaluated whatever its step.
        processes: Processes that simulate; 1 simulates in the training process.
        execute_steps: Actions of a chunk that are executed before the next one; default: half of it.
        flow_steps: Euler steps of the flow; default: the flow's own number.
        noise_seed: Seed of the policy's noise.
        seed: Which block of held-out episodes.
        success_mode: "held" or "first", when an episode counts as a success (see `EvalProtocol`).
        hold_steps: Control steps that a task must stay done for, if "held".
        cameras: Camera -> (width, height) at which the world is rendered; default: what the policy sees.
        recorded: Episodes of each task that are filmed; at most two successes and two failures are shown.
        benchmark: The benchmark of `vla-eval`, "module:Class"; it takes the parameters of `TabletopBenchmark`.
    """

    def __init__(
        self,
        every_steps: int,
        tasks: list[str] | None = None,
        episodes: int = 20,
        at_end: bool = True,
        processes: int = 1,
        execute_steps: int | None = None,
        flow_steps: int | None = None,
        noise_seed: int = 0,
        seed: int = 0,
        success_mode: SuccessMode = "held",
        hold_steps: int = 5,
        cameras: dict[str, tuple[int, int]] | None = None,
        recorded: int = 4,
        benchmark: str = TABLETOP,
    ) -> None:
        if every_steps < 1:
            raise ConfigError("Evaluations need steps between them", where="every_steps", found=every_steps)
        self.plan = EvaluationPlan(
            tasks=None if tasks is None else tuple(tasks),
            episodes=episodes,
            seed=seed,
            processes=processes,
            success_mode=success_mode,
            hold_steps=hold_steps,
            cameras=cameras,
            recorded=recorded,
            benchmark=benchmark,
        )
        self.every_steps = every_steps
        self.at_end = at_end
        self.execute_steps = execute_steps
        self.flow_steps = flow_steps
        self.noise_seed = noise_seed
        self._evaluated_at = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find out what could not work before hours are spent.

        Raises:
            ConfigError: If world and policy do not fit each other, or the weights are sharded.
        """
        if any(isinstance(parameter, DTensor) for parameter in pl_module.parameters()):
            raise ConfigError(
                "The first process does not hold the whole policy",
                where="ClosedLoopEvaluation",
                found="sharded weights",
                remedy="leave this callback out and use `spear eval --checkpoint` on the run's checkpoints",
            )
        if trainer.is_global_zero:
            wishes = self._server(cast(VLAModule, pl_module).policy).get_observation_params()
            check_plan(self.plan, "policy", wishes)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Evaluate before the next step: by now averages are updated and the checkpoint is written."""
        self._evaluate_if_due(trainer, pl_module, due=False)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate the last step, unless the machine is about to be taken away."""
        if any(isinstance(callback, StopOnSignal) and callback.stopped for callback in trainer.callbacks):  # type: ignore[attr-defined]
            return
        self._evaluate_if_due(trainer, pl_module, due=self.at_end)

    def _evaluate_if_due(self, trainer: L.Trainer, pl_module: L.LightningModule, due: bool) -> None:
        step = trainer.global_step
        if step == self._evaluated_at or not (due or step % self.every_steps == 0):
            return
        self._evaluated_at = step
        if trainer.is_global_zero:
            try:
                self._evaluate(trainer, cast(VLAModule, pl_module))
            except EvaluationError as error:
                log.error("No success rate at step %d: %s", step, error)
        trainer.strategy.barrier("closed_loop")

    def _evaluate(self, trainer: L.Trainer, module: VLAModule) -> None:
        folder = Path(trainer.default_root_dir) / "closed_loop" / f"step_{trainer.global_step:07d}"
        with TemporaryDirectory(prefix="spear_closed_loop_") as frames:
            with averages_in_eval_mode(trainer, module) as weights:
                server = self._server(module.policy)
                contestant = describe_server(server, f"step {trainer.global_step}", weights)
                if self._is_known(folder, server, contestant):
                    return
                result = evaluate_policy(server, contestant, self.plan, folder, frames=Path(frames))
            write_result(result, folder)
            pictures = draw_episodes(result, Path(frames), folder)
        rates = ", ".join(f"{task} {rate_of(result.of_task(task))}" for task in result.protocol.tasks)
        log.info("Closed loop at step %d: %s", trainer.global_step, rates)
        metrics = closed_loop_metrics(result)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
            show_pictures(logger, pictures, trainer.global_step)

    def _is_known(self, folder: Path, server: PolicyServer, contestant: Contestant) -> bool:
        """Whether the run was interrupted after this evaluation and before the next checkpoint."""
        if not (folder / RESULT_FILE).is_file():
            return False
        known = read_result(folder)
        protocol = check_plan(self.plan, "policy", server.get_observation_params())
        return known.protocol == protocol and known.contestant == replace(
            contestant, cameras=known.contestant.cameras
        )

    def _server(self, policy: Policy) -> PolicyServer:
        # Imports the harness, which training without this callback does not need.
        from spear_lightning.policy.vla_eval_server import PolicyServer

        return PolicyServer(policy, self.execute_steps, self.flow_steps, self.noise_seed)


def closed_loop_metrics(result: EvalResult) -> dict[str, float]:
    """Return what is logged of a result (see `ClosedLoopEvaluation`)."""
    groups: dict[str, list[Episode]] = {f"{task}/": result.of_task(task) for task in result.protocol.tasks}
    groups[""] = list(result.episodes)
    metrics: dict[str, float] = {}
    for name, episodes in groups.items():
        rate = rate_of(episodes)
        values = {
            "success": rate.value,
            "success_low": rate.low,
            "success_high": rate.high,
            "first_success": mean(episode.first_success for episode in episodes),
            "final_success": mean(episode.final_success for episode in episodes),
            "steps": mean(episode.steps for episode in episodes),
        }
        metrics |= {f"closed_loop/{name}{key}": float(value) for key, value in values.items()}
    return metrics


def show_pictures(logger: Any, pictures: list[Path], step: int) -> None:
    """Give the pictures of episodes to MLflow, and the contact sheet to TensorBoard."""
    if isinstance(logger, MLFlowLogger) and logger.run_id is not None:
        for path in pictures:
            logger.experiment.log_artifact(logger.run_id, str(path), f"closed_loop/step_{step:07d}")
    elif isinstance(logger, TensorBoardLogger):
        from PIL import Image

        for path in pictures:
            if path.name == SHEET:
                pixels = np.asarray(Image.open(path).convert("RGB"))
                logger.experiment.add_image("closed_loop/episodes", pixels, step, dataformats="HWC")


@contextmanager
def averages_in_eval_mode(trainer: L.Trainer, module: L.LightningModule) -> Iterator[str]:
    """Put averaged weights into a module, and the module into eval mode, for a while.

    Yields:
        "ema", or "raw" where there are no averages (yet).
    """
    averages = next((item for item in _callbacks(trainer) if isinstance(item, ExponentialMovingAverage)), None)
    modes: dict[nn.Module, bool] = {part: part.training for part in module.modules()}
    if averages is not None:
        averages.swap_in(module)
    module.eval()
    try:
        yield "ema" if averages is not None and averages.swapped else "raw"
    finally:
        # Some parts may have been in eval mode on purpose.
        for part, training in modes.items():
            part.training = training
        if averages is not None:
            averages.swap_out(module)


def _callbacks(trainer: L.Trainer) -> list[Callback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks
