"""`spear plan`: memory of a process, samples a second and days of an experiment; needs no GPU, data or weights."""

from __future__ import annotations

import argparse
import itertools

from rich.console import Console
from rich.table import Table

from spear_lightning.errors import ConfigError
from spear_lightning.planning.experiment import Experiment, read_experiment
from spear_lightning.planning.memory import OUTSIDE_BYTES, Memory, memory_of
from spear_lightning.planning.throughput import GPUS, Gpu, Speed, speed_of
from spear_lightning.planning.trace import trace_step

TEXT_TOKENS_VLA, TEXT_TOKENS_VLM = 20, 200


def main(arguments: list[str]) -> int:
    """Print the plan of an experiment.

    Args:
        arguments: Command line after the verb.

    Returns:
        0 if it fits, 1 if it does not.
    """
    options = _options(arguments)
    experiment = read_experiment(options.config)
    if options.batch_size is not None:
        experiment = _with_batch(experiment, options.batch_size)
    if experiment.batch_size % options.gpus:
        raise ConfigError(
            "The batch cannot be divided among the GPUs",
            where="data.batch_size, --gpus",
            found=f"{experiment.batch_size} samples, {options.gpus} GPUs",
            expected="a multiple of the number of GPUs",
        )
    group = experiment.shard_size
    if group is not None and options.gpus % group:
        raise ConfigError(
            "The GPUs cannot be divided into groups of this size",
            where="shard_size",
            found=group,
            expected=f"a divisor of {options.gpus}",
        )
    gpu = GPUS[options.gpu]
    usual = TEXT_TOKENS_VLA if experiment.horizon else TEXT_TOKENS_VLM
    text_tokens = options.text_tokens or experiment.text_tokens or usual
    plans = {}
    for phase, trained in experiment.phases.items():
        trace = trace_step(
            experiment.module.components, trained, experiment.cameras, text_tokens, experiment.horizon
        )
        trace = trace.recomputing(experiment.recomputed)
        plans[phase] = (
            memory_of(experiment, phase, options.gpus, trace),
            speed_of(experiment, phase, options.gpus, trace, gpu),
        )
    return _print(experiment, plans, options.gpus, options.gpu, gpu)


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="spear plan", description=__doc__)
    parser.add_argument(
        "--config", action="append", required=True, help="an experiment; given again: an overlay over it"
    )
    parser.add_argument("--gpus", type=_positive, required=True, help="number of GPUs")
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h200-141", help="kind of GPU (default h200-141)")
    parser.add_argument(
        "--batch_size", type=_positive, help="samples of a step on all GPUs, instead of the data's"
    )
    parser.add_argument(
        "--text_tokens",
        type=_positive,
        help="tokens of text of a sample (default: prompt.max_length if all instructions are padded to it, else "
        f"{TEXT_TOKENS_VLA} of an instruction, {TEXT_TOKENS_VLM} of questions with their answers)",
    )
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return value


def _with_batch(experiment: Experiment, batch_size: int) -> Experiment:
    from dataclasses import replace

    return replace(experiment, batch_size=batch_size)


def _print(experiment: Experiment, plans: dict[str, tuple[Memory, Speed]], gpus: int, name: str, gpu: Gpu) -> int:
    console = Console()
    table = Table(title=f"One of {gpus} x {name}, {experiment.batch_size // gpus} samples each: GiB")
    table.add_column("")
    for phase in plans:
        table.add_column(phase, justify="right")
    rows = {
        "weights": lambda memory: memory.weights,
        "optimizer": lambda memory: memory.optimizer,
        "averages": lambda memory: memory.averages,
        "gradients": lambda memory: memory.gradients,
        "communication": lambda memory: memory.communication,
        "activations": lambda memory: memory.activations,
        "optimizer step": lambda memory: memory.step,
        "CUDA and fragments": lambda memory: OUTSIDE_BYTES,
        "peak": lambda memory: memory.peak,
    }
    for label, value in rows.items():
        table.add_row(label, *(f"{value(memory) / 2**30:.1f}" for memory, _ in plans.values()))
    table.add_section()
    speeds = [speed for _, speed in plans.values()]
    table.add_row("compute s/batch", *(f"{speed.compute:.3f}" for speed in speeds))
    table.add_row("messages s/batch", *(f"{speed.communication:.3f}" for speed in speeds))
    table.add_row("samples/s", *(f"{speed.samples_per_second:.0f}" for speed in speeds))
    days = _days(experiment, [speed.step for speed in speeds])
    table.add_row("days", *(f"{value:.2f}" if value is not None else "?" for value in days))
    console.print(table)
    peak = max(memory.peak for memory, _ in plans.values())
    fits = peak <= gpu.memory
    verdict = "fits" if fits else "does NOT fit"
    console.print(f"It {verdict}: {peak / 2**30:.0f} GiB of {gpu.memory / 2**30:.0f}.")
    return 0 if fits else 1


def _days(experiment: Experiment, step_seconds: list[float]) -> list[float | None]:
    if experiment.max_steps < 1:
        return [None] * len(step_seconds)
    starts = [*experiment.starts.values(), experiment.max_steps]
    lengths = [max(0, later - earlier) for earlier, later in itertools.pairwise(starts)]
    # An optimizer step of several batches is counted as so many steps: a little too long.
    batches = [length * experiment.batches for length in lengths]
    return [number * seconds / 86400 for number, seconds in zip(batches, step_seconds, strict=True)]
