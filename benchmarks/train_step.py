"""Training steps per second at SPEAR-1's full size on one GPU, beside transformers' PI0 and the GPU's own limit.

Weights and images are random: speed does not depend on them. A step is the whole of it: tokenising, both passes,
clipping, AdamW on float32 weights. Every contender runs in a process of its own on the same GPU, one after
another, the products of 8192 x 8192 matrices first: their FLOP/s are "the peak".

    python benchmarks/train_step.py --stage vla --batch 64
    python benchmarks/train_step.py --stage vlm --batch 32
    python benchmarks/train_step.py --stage vla --batch 2 --small --device cpu     # does it work at all?
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

SEEN_PI0 = 7.6e12
"""FLOP of PI0 for a sample of two 224 x 224 cameras and 20 text tokens."""

INSTRUCTION = "pick up the mug.  "
"""18 bytes: with bos and newline 20 tokens, as a byte tokenizer counts."""

QUESTION_TOKENS, ANSWER_TOKENS, TEXT_TOKENS = 64, 100, 192
"""Four pairs about an image, and what they are padded to."""


@dataclass(frozen=True)
class Contender:
    """One row of the table.

    Attributes:
        compiled: Whether blocks are compiled.
        packed: Whether the model is packed.
        float8: Recipe of products in 8 bits of Gemma and SigLIP.
        moge: Whether MoGe is there.
        cameras: Camera name -> height and width.
        wrist_share: Share of samples that have the second camera.
    """

    compiled: bool = True
    packed: bool = True
    float8: str | None = None
    moge: bool = True
    cameras: dict[str, tuple[int, int]] = field(
        default_factory=lambda: {"primary": (210, 280), "wrist": (112, 112)}
    )
    wrist_share: float = 1.0


LIKE_PI0 = {"primary": (224, 224), "wrist": (224, 224)}
CONTENDERS = {
    "spear": Contender(),
    "eager": Contender(compiled=False),
    "padded": Contender(packed=False),
    "float8": Contender(float8="tensorwise"),
    "float8-rowwise": Contender(float8="rowwise"),
    "float8-rowwise-gw": Contender(float8="rowwise_with_gw_hp"),
    "half-absent": Contender(wrist_share=0.5),
    "half-absent-padded": Contender(wrist_share=0.5, packed=False),
    "spear-as-pi0": Contender(moge=False, cameras=LIKE_PI0),
}


def build_vlm(contender: Contender, small: bool, new_tokens: int) -> nn.Module:
    """Return the network of SPEAR-VLM, with random weights."""
    from spear_lightning.models import GemmaShape, MogeEncoder, SiglipEncoder, SpearVLM

    if small:
        shape = GemmaShape(64, 128, 2, 4, 1, 32, 2048, new_tokens)
        encoders: dict[str, Any] = {"siglip": SiglipEncoder(width=32, depth=2, heads=2, mlp_width=48)}
        if contender.moge:
            encoders["moge"] = MogeEncoder(hidden_width=32, depth=4, heads=2, layers=range(4))
    else:
        shape = GemmaShape(2048, 16384, 18, 8, 1, 256, 257216, new_tokens)
        encoders = {"siglip": SiglipEncoder()}
        if contender.moge:
            encoders["moge"] = MogeEncoder()
    return SpearVLM(shape, encoders, packed=contender.packed)


def vla_step(contender: Contender, batch: int, small: bool, device: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Return the network and a function that computes a loss; MoGe is frozen, as in the paper."""
    from spear_lightning.batches import RobotBatch
    from spear_lightning.flow import ActionFlow
    from spear_lightning.models import ActionExpert, PromptTokenizer, SpearVLA
    from spear_lightning.policy import ActionNormalizer, Policy

    expert = ActionExpert(width=32, mlp_width=48, depth=2, heads=4, kv_heads=1, head_dim=32) if small else None
    with torch.device(device):
        vla = SpearVLA(build_vlm(contender, small, 0), expert or ActionExpert())
    normalizer = ActionNormalizer()
    normalizer.fit([-1] * 3, [1] * 3, [-1] * 3, [1] * 3)
    policy = Policy(vla, ActionFlow(), PromptTokenizer(tokenizer="byte", max_length=48), normalizer).to(device)
    freeze(vla, vla.unused_parameters())
    pose = torch.tensor([0.1, 0.1, 0.1, 0, 0, 0, 1, 1])
    present = torch.arange(batch) % 100 < 100 * contender.wrist_share
    robot_batch = RobotBatch(
        images=random_images(contender, batch),
        image_mask={"primary": torch.ones(batch, dtype=torch.bool), "wrist": present},
        instructions=[INSTRUCTION] * batch,
        state=pose.expand(batch, 8).clone(),
        actions=pose.expand(batch, 5, 8).clone(),
        action_mask=torch.ones(batch, 5, dtype=torch.bool),
        dataset=torch.zeros(batch, dtype=torch.int64),
        position=torch.arange(batch),
    ).to(device)
    generator = torch.Generator(device).manual_seed(0)
    return vla, lambda: policy.losses(robot_batch, generator)["total"]


def vlm_step(contender: Contender, batch: int, small: bool, device: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Return the network and a function that computes a loss; all of it trains, as in the paper's stage 1b."""
    from spear_lightning.batches import VqaBatch
    from spear_lightning.models import PromptTokenizer
    from spear_lightning.policy import Answerer

    new_tokens = 16 if small else 1024
    prompt = PromptTokenizer(tokenizer="byte", max_length=48)
    with torch.device(device):
        vlm = build_vlm(contender, small, new_tokens)
        answerer = Answerer(vlm, prompt)
    place_L = torch.arange(TEXT_TOKENS)
    token_mask = (place_L < QUESTION_TOKENS + ANSWER_TOKENS).expand(batch, -1)
    answer_mask = token_mask & (place_L >= QUESTION_TOKENS)
    images = {"primary": random_images(contender, batch)["primary"]}
    first = vlm.language.vocab_size
    ids = torch.where(answer_mask, first + place_L % new_tokens, 3 + place_L % 250)
    vqa_batch = VqaBatch(
        images=images,
        image_mask={"primary": torch.ones(batch, dtype=torch.bool)},
        input_ids=ids.clone(),
        token_mask=token_mask.clone(),
        answer_mask=answer_mask.clone(),
        answer_places=answer_mask.flatten().nonzero()[:, 0],
        coordinate_mask=answer_mask.clone(),
        questions=[""] * batch,
        answers=[""] * batch,
        asked=[[] for _ in range(batch)],
        clamped=torch.zeros(batch, dtype=torch.int64),
        unit=torch.ones(batch),
        metric=torch.ones(batch, dtype=torch.bool),
        intrinsics=torch.ones(batch, 4),
        dataset=torch.zeros(batch, dtype=torch.int64),
        position=torch.arange(batch),
    ).to(device)
    return vlm, lambda: answerer.losses(vqa_batch)[0].mean()


def pi0_step(batch: int, small: bool, device: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Return transformers' PI0 in bfloat16, compiled as a whole, and a function that computes its loss."""
    from transformers import PI0Config, PI0ForConditionalGeneration

    config = PI0Config(chunk_size=5, max_state_dim=8, max_action_dim=8)
    if small:
        gemma = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32}
        vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
        text = {"model_type": "gemma", "hidden_size": 64, "intermediate_size": 128, "vocab_size": 2048, **gemma}
        vlm = {
            "model_type": "paligemma",
            "text_config": text,
            "vision_config": {"model_type": "siglip_vision_model", "image_size": 224, "patch_size": 14, **vision},
            "projection_dim": 64,
            "hidden_size": 64,
            "image_token_id": 2047,
        }
        expert = {"model_type": "gemma", "hidden_size": 32, "intermediate_size": 48, **gemma}
        config = PI0Config(vlm_config=vlm, dit_config=expert, chunk_size=5, max_state_dim=8, max_action_dim=8)
    with torch.device(device):
        model = PI0ForConditionalGeneration(config)
    model = model.to(torch.bfloat16).train()
    image_token = config.vlm_config.image_token_id
    cameras = len(LIKE_PI0)
    ids = torch.cat([torch.full((cameras * 256,), image_token), torch.arange(3, 23)]).expand(batch, -1)
    inputs = {
        "pixel_values": torch.rand(batch, cameras, 3, 224, 224, device=device).bfloat16() * 2 - 1,
        "pixel_attention_mask": torch.ones(batch, cameras, dtype=torch.bool, device=device),
        "input_ids": ids.to(device),
        "attention_mask": torch.ones(batch, ids.shape[1], dtype=torch.int64, device=device),
        "state": torch.randn(batch, 8, device=device).bfloat16(),
        "actions": torch.randn(batch, 5, 8, device=device).bfloat16(),
    }
    compiled = torch.compile(model) if device == "cuda" else model
    return model, lambda: compiled(**inputs).loss.mean()


def freeze(network: nn.Module, unused: list[str]) -> None:
    """Freeze what the loss does not reach, and MoGe."""
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name not in unused and ".moge" not in name.rsplit("projections", 1)[0])


def random_images(contender: Contender, batch: int) -> dict[str, Tensor]:
    """Return camera name -> uint8 (B, 3, H, W)."""
    return {
        name: torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8)
        for name, size in contender.cameras.items()
    }


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
    from spear_lightning.training.regional_compile import list_entries

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
            Float8Products(layers, contender.float8, emulate=not cuda).convert(network)  # type: ignore[arg-type]
        if contender.compiled and cuda:
            for block in list_entries(network).values():
                block.compile(dynamic=False)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, weight_decay=0.01, fused=cuda)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=name != "pi0"):
            value = loss()
        value.backward()
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
        profile(step, options.profile)
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


def peak(device: str) -> float:
    """Return the FLOP/s of bfloat16 products of large square matrices, the best of three rounds."""
    side, times = (8192, 20) if device == "cuda" else (512, 3)
    a, b = torch.randn(2, side, side, device=device, dtype=torch.bfloat16)
    best = 0.0
    for _ in range(3):
        a @ b
        wait(device)
        start = time.perf_counter()
        for _ in range(times):
            a @ b
        wait(device)
        best = max(best, 2 * side**3 * times / (time.perf_counter() - start))
    return best


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
    parser.add_argument("--contenders", nargs="+", help=f"pi0 and any of {', '.join(CONTENDERS)}")
    parser.add_argument("--small", action="store_true", help="small networks")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--profile", help="file for the kernels of one step")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(peak(options.device) if options.one == "peak" else run(options.one, options)))
        return
    default = (
        ["pi0", "spear-as-pi0", "spear", "padded", "float8"] if options.stage == "vla" else ["spear", "float8"]
    )
    console = Console(width=120)
    best = measured("peak", console)
    table = Table(title=f"{options.stage}, batch {options.batch}; the peak is {best / 1e12:.0f} TFLOP/s")
    for column in ("", "samples/s", "TFLOP/sample", "of the peak", "over pi0", "GiB", "first two steps"):
        table.add_column(column, justify="right")
    pi0 = None
    for name in options.contenders or default:
        found = measured(name, console)
        if found is None:
            table.add_row(name, "failed")
            continue
        flops = flops_of_a_sample(name, options.stage, options.small)
        pi0 = found["rate"] if name == "pi0" else pi0
        ratio = f"{found['rate'] / pi0:.2f}" if pi0 else "-"
        share, memory = found["rate"] * flops / best, found["memory"]
        row = [f"{found['rate']:.1f}", f"{flops / 1e12:.2f}", f"{share:.1%}", ratio, f"{memory:.0f}"]
        table.add_row(name, *row, f"{found['first']:.0f} s")
        console.print(f"{name}: {row}")
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
