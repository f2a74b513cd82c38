"""A small module with the structure of the real ones, and a trainer for it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from spear_lightning.training.base_module import SpearModule
from spear_lightning.training.optimizer import OptimizerRecipe

# What several tests read (`finished_runs.py`); pytest's import mode leaves test folders out of the path.
sys.path.append(str(Path(__file__).parent))

from warm_start import WarmServer

WIDTH = 4


class TinyNetwork(nn.Module):
    """Two encoders, a language part with a position table, an expert, and a part that the loss never reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.vlm = nn.Module()
        self.vlm.encoders = nn.ModuleDict(
            {
                "siglip": nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Dropout(0.5)),
                "moge": nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.5)),
            }
        )
        self.vlm.language = nn.Module()
        self.vlm.language.position_embedding = nn.Embedding(8, WIDTH)
        self.vlm.language.proj = nn.Linear(WIDTH, WIDTH)
        self.expert = nn.Linear(WIDTH, 1)
        self.spare = nn.Linear(WIDTH, WIDTH)

    def forward(self, x_BW: Tensor) -> Tensor:
        features = (self.vlm.encoders["siglip"](x_BW) + self.vlm.encoders["moge"](x_BW)) / 2
        features = features + self.vlm.language.position_embedding(torch.arange(len(x_BW), device=x_BW.device))
        return self.expert(torch.tanh(self.vlm.language.proj(features)))[:, 0]


class TinyModule(SpearModule):
    """Every batch is a function of its index alone, so that runs can be compared bit by bit."""

    def __init__(self, recipe: OptimizerRecipe, network: nn.Module | None = None) -> None:
        super().__init__(recipe)
        torch.manual_seed(0)
        self.network = network or TinyNetwork()
        self.validated: list[dict[str, Tensor]] = []

    @property
    def components(self) -> nn.Module:
        return self.network

    def unused_parameters(self) -> list[str]:
        return [name for name, _ in self.network.named_parameters() if name.startswith("spare.")]

    def load_initial_weights(self) -> None:
        pass

    def set_configuration(self, config: Mapping[str, Any]) -> None:
        pass

    def describe(self) -> dict[str, Any]:
        return {"schema": 0}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        index = self.trainer.fit_loop.epoch_loop.total_batch_idx
        torch.manual_seed(1000 * (1 + self.global_rank) + index)
        x_BW = torch.randn(6, WIDTH, device=self.device)
        target_B = x_BW.sum(-1).sin()
        return (self.network(x_BW) - target_B).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.validated.append(copy_of(self.network))

    test_step = predict_step = validation_step


def copy_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


class Recorder(Callback):
    """Keeps a copy of all weights after each optimizer step; place it after the callbacks under test."""

    def __init__(self) -> None:
        self.after: dict[int, dict[str, Tensor]] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.after[trainer.global_step] = copy_of(pl_module.components)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.after.setdefault(trainer.global_step, copy_of(pl_module.components))


@pytest.fixture(scope="session")
def warm_server() -> Iterator[WarmServer]:
    """Starts processes that have Lightning imported already."""
    server = WarmServer()
    yield server
    server.stop()


@pytest.fixture
def tiny_module() -> Callable[..., TinyModule]:
    """Builds a TinyModule; arguments are the recipe's."""

    def build(network: nn.Module | None = None, **recipe: Any) -> TinyModule:
        return TinyModule(OptimizerRecipe(**{"lr": 1e-2, "warmup_steps": 3, **recipe}), network)

    return build


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def fit(tmp_path: Path) -> Callable[..., L.Trainer]:
    """Trains a module with callbacks; keeps a checkpoint `step=N.ckpt` of every step in `tmp_path`."""

    def run(
        module: L.LightningModule,
        callbacks: list[Callback],
        *,
        batches: int = 5,
        ckpt_path: str | None = None,
        **options: Any,
    ) -> L.Trainer:
        checkpoints = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        settings = {
            "max_steps": 12,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "limit_val_batches": 0,
            "gradient_clip_val": 1.0,
            "default_root_dir": tmp_path,
            **options,
        }
        trainer = L.Trainer(callbacks=[*callbacks, checkpoints], **settings)
        data = DataLoader(torch.arange(batches), batch_size=None)
        trainer.fit(module, data, DataLoader(torch.arange(2), batch_size=None), ckpt_path=ckpt_path)
        return trainer

    return run
