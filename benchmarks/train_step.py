"""Training steps per second at SPEAR-1's full size on one GPU, beside transformers' PI0 and the GPU's own limit.

Weights and images are random: speed does not depend on them. A step is the whole of it: tokenising, both passes,
clipping, AdamW on float32 weights. Every contender runs in a process of its own on the same GPU, one after
another, the products of 8192 x 8192 matrices first: their FLOP/s are "the peak" (and what lasts of it).

    python benchmarks/train_step.py --stage vla --batch 64 --contenders pi0@32 spear padded float8
    python benchmarks/train_step.py --stage vlm --batch 32
    python benchmarks/train_step.py --stage vla --batch 2 --small --device cpu     # does it work at all?
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from step_contenders import (
    ANSWER_TOKENS,
    CONTENDERS,
    QUESTION_TOKENS,
    build_vlm,
    freeze,
    pi0_step,
    vla_step,
    vlm_step,
)
from torch import nn

SEEN_PI0 = 7.6e12
"""FLOP of PI0 for a sample of two 224 x 224 cameras and 20 text tokens."""


def flops_of_a_sample(name: str, stage: str, small: bool) -> float:
    """Return the FLOP of a step of one sample without padding, from a trace on the meta device."""
    if name == "pi0":
        return SEEN_PI0
    from spear_lightning.models import ActionExpert, PromptTokenizer, SpearVLA
    from spear_lightning.planning.trace import trace_step
    from spear_lightning.policy import Answerer
    from spear_lightning.robot_data.images import CameraSpec
    from spear_lightning.training.freeze_plan import named_parameters

    contender = CONTENDERS[name]
    shown = {"primary": 1.0, "wrist": contender.wrist_share} if stage == "vla" else {"primary": 1.0}
    cameras = {key: CameraSpec(width=contender.cameras[key][1], height=contender.cameras[key][0]) for key in shown}

    def traced(chosen: dict[str, CameraSpec]) -> float:
        with torch.device("meta"):
            vlm = build_vlm(contender, small, 0 if stage == "vla" else 16)
            if stage == "vla":
                expert = ActionExpert(32, 48, 2, 4, 1, 32) if small else ActionExpert()
                network: nn.Module = SpearVLA(vlm, expert)
            else:
                network = Answerer(vlm, PromptTokenizer(tokenizer="byte", max_length=48))
        if isinstance(network, SpearVLA):
            freeze(network, network.unused_parameters())
        trained = frozenset(key for key, parameter in named_parameters(network) if parameter.requires_grad)
        text = 20 if stage == "vla" else QUESTION_TOKENS + ANSWER_TOKENS
        return trace_step(network, trained, chosen, text, 5).flops

    whole = traced(cameras)
    if contender.wrist_share == 1.0 or stage == "vlm":
        return whole
    alone = traced({"primary": cameras["primary"]})
    return contender.wrist_share * whole + (1 - contender.wrist_share) * alone


def run(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Time one contender in this process."""
    from spear_lightning.training import Float8Products
    from spear_lightning.training.network_blocks import list_entries
    from spear_lightning.training.one_pass_adamw import OnePassAdamW

    device, cuda = options.device, options.device == "cuda"
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if name == "pi0":
        network, loss = pi0_step(options.batch, options.small, device)
    else:
        contender = CONTENDERS[name]
        make = vla_step if options.stage == "vla" else vlm_step
        network, loss = make(contender, options.batch, options.small, device)
        if contender.float8:
            layers = ["*language_model.layers.*.mlp.*", "*language_model.layers.*.o_proj", "*siglip.*.mlp.*"]
            products = Float8Products(layers, contender.float8, not cuda, contender.whole_mlps)  # type: ignore[arg-type]
            products.convert(network)
        if contender.compiled and cuda:
            for block in list_entries(network).values():
                block.compile(dynamic=False)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    one_pass = name != "pi0" and CONTENDERS[name].one_pass
    make_optimizer = OnePassAdamW if one_pass else partial(torch.optim.AdamW, fused=cuda)
    optimizer = make_optimizer(trained, lr=1e-6, weight_decay=0.01)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=name != "pi0"):
            value = loss()
        value.backward()
        if isinstance(optimizer, OnePassAdamW):
            optimizer.clip(1.0)
        else:
            nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    start = time.perf_counter()
    for _ in range(2):
        step()
    wait(device)
    first = time.perf_counter() - start
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        step()
    wait(device)
    start = time.perf_counter()
    for _ in range(options.steps):
        step()
    wait(device)
    seconds = (time.perf_counter() - start) / options.steps
    if options.profile and cuda:
        profile(step, f"{options.profile}/{options.stage}_{name}.txt")
    memory = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    return {"rate": options.batch / seconds, "first": first, "memory": memory}


def profile(step: Callable[[], None], path: str) -> None:
    """Write where the GPU's time goes."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        torch.cuda.synchronize()
    with open(path, "w") as file:
        file.write(profiler.key_averages().table("self_cuda_time_total", row_limit=70, max_name_column_width=90))


def peak(device: str) -> tuple[float, float]:
    """Return the FLOP/s of bfloat16 products of large square matrices: at their best, and when they go on.

    The first is the best of three rounds of 30 ms. After two seconds a GPU has reached the power that it may draw,
    and slows its clock: that is the state in which it trains.
    """
    side, times, warm = (8192, 20, 2.0) if device == "cuda" else (512, 3, 0.05)
    a, b = torch.randn(2, side, side, device=device, dtype=torch.bfloat16)

    def flops_per_second() -> float:
        start = time.perf_counter()
        for _ in range(times):
            a @ b
        wait(device)
        return 2 * side**3 * times / (time.perf_counter() - start)

    flops_per_second()
    best = max(flops_per_second() for _ in range(3))
    end, lasting = time.perf_counter() + warm, []
    while time.perf_counter() < end:
        lasting.append(flops_per_second())
    return best, statistics.median(lasting[len(lasting) // 2 :])


def wait(device: str) -> None:
    """Wait until the device has done its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Run every contender in a process of its own, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=["vla", "vlm"], default="vla")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument(
        "--contenders", nargs="+", help=f"pi0 and any of {', '.join(CONTENDERS)}; NAME@B for another batch"
    )
    parser.add_argument("--small", action="store_true", help="small networks")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--profile", help="folder for the kernels of one step of each")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        if options.one == "peak":
            print(json.dumps(peak(options.device)))
            return
        name, _, batch = options.one.partition("@")
        options.batch = int(batch or options.batch)
        print(json.dumps(run(name, options)))
        return
    default = (
        ["pi0@32", "spear-as-pi0@32", "spear", "padded", "float8"]
        if options.stage == "vla"
        else ["spear", "float8"]
    )
    console, more = Console(width=120), ("over pi0", "GiB", "first two steps")
    best, lasting = measured("peak", console)
    title = f"the peak is {best / 1e12:.0f} TFLOP/s, {lasting / 1e12:.0f} where products go on for two seconds"
    table = Table(title=f"{options.stage}, batch {options.batch}; {title}")
    for column in ("", "samples/s", "TFLOP/sample", "of the peak", "of what lasts", *more):
        table.add_column(column, justify="right")
    pi0 = None
    for asked in options.contenders or default:
        found = measured(asked, console)
        if found is None:
            table.add_row(asked, "failed")
            continue
        name = asked.partition("@")[0]
        flops = flops_of_a_sample(name, options.stage, options.small)
        pi0 = found["rate"] if name == "pi0" else pi0
        ratio = f"{found['rate'] / pi0:.2f}" if pi0 else "-"
        shares = [f"{found['rate'] * flops / limit:.1%}" for limit in (best, lasting)]
        row = [f"{found['rate']:.1f}", f"{flops / 1e12:.2f}", *shares, ratio, f"{found['memory']:.0f}"]
        table.add_row(asked, *row, f"{found['first']:.0f} s")
        console.print(f"{asked}: {row} first two steps {found['first']:.0f} s")
    console.print(table)


def measured(name: str, console: Console) -> Any:
    """Run this program for one contender, and return what it says; `None` if it fails."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        console.print(f"{name} failed:\n{done.stderr[-3000:]}", markup=False)
        return None
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
