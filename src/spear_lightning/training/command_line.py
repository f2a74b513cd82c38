"""`spear fit | validate | test | predict`: Lightning's command line on our modules."""

from __future__ import annotations

import argparse
import copy
import logging
import os
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.strategies import DDPStrategy

from spear_lightning.errors import CheckpointError, ConfigError, SpearError
from spear_lightning.policy import read_checkpoint
from spear_lightning.robot_data.storage import data_path
from spear_lightning.training.base_module import SpearModule
from spear_lightning.training.checkpoint_files import WholeFileCheckpointIO, newest_checkpoint
from spear_lightning.training.configuration import KEPT_SECTIONS
from spear_lightning.training.meta_construction import is_first_process, networks_on_meta
from spear_lightning.training.option_help import explain_options
from spear_lightning.training.progress_bar import LossProgressBar
from spear_lightning.training.tracking import RunRecord, RunTensorBoardLogger, continue_tracked_run

log = logging.getLogger(__name__)

ALLOCATOR = "PYTORCH_ALLOC_CONF"
"""Variable with the settings of torch's allocator of GPU memory."""

MACHINE_OPTIONS = ("accelerator", "devices", "num_nodes", "strategy")
"""Options of the trainer that belong to a machine."""


class SpearCLI(LightningCLI):
    """LightningCLI with our rules for checkpoints (see `SpearModule`) and our record of a run."""

    config_dump: dict[str, Any]

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options that are neither the trainer's, nor the model's, nor the data's."""
        parser.add_argument(
            "--resume_allow",
            type=list[str],
            default=[],
            help="Configuration keys (or prefixes of keys) that may differ from those of the run that "
            "--ckpt_path resumes, e.g. '[trainer.max_steps]'. Any other difference is refused.",
        )

    def _dump_config(self) -> None:
        if not hasattr(self, "config_dump"):
            # It was validated when it was parsed; once more would take half a second.
            dumped = self.parser.dump(self.config, skip_link_targets=False, skip_none=False, skip_validation=True)
            self.config_dump = yaml.safe_load(dumped)[self.subcommand]

    def _parse_ckpt_path(self) -> None:
        # Lightning would let hyper-parameters of the checkpoint silently win over YAML and options.
        return

    def instantiate_classes(self) -> None:
        """Give networks no memory where the strategy hands out weights and another process has them."""
        strategy = self._get(self.config, "trainer.strategy")
        class_path = strategy if isinstance(strategy, str) else getattr(strategy, "class_path", "")
        elsewhere = class_path.rsplit(".", 1)[-1] == "ShardedStrategy" and not is_first_process()
        with networks_on_meta(self.parser) if elsewhere else nullcontext():
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Build the trainer; what it writes goes to the run's folder unless callback or logger name another."""
        if self.subcommand == "predict":
            # A prediction is no run to be tracked; its result is a file and a table.
            kwargs["logger"] = False
        options = self._get(self.config_init, "trainer")
        plugins = options.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        whole_weights = isinstance(options.get("strategy"), (str, DDPStrategy))
        if whole_weights and not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, WholeFileCheckpointIO()]
        callbacks = list(options.get("callbacks") or [])
        if not any(isinstance(callback, ModelCheckpoint) for callback in callbacks):
            # Lightning's default writes a checkpoint per epoch, under another name and in another place.
            kwargs["enable_checkpointing"] = False
        if options.get("enable_progress_bar") is not False and not any(
            isinstance(callback, ProgressBar) for callback in callbacks
        ):
            kwargs["callbacks"] = [*callbacks, LossProgressBar()]
        trainer = super().instantiate_trainer(**kwargs)
        if self.subcommand == "predict" and isinstance(self.model, SpearModule):
            trainer.callbacks.append(self.model.prediction_writer())  # type: ignore[attr-defined]
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(self._checkpoint_folder_of(trainer))
        for logger in trainer.loggers:
            if isinstance(logger, RunTensorBoardLogger):
                logger.begin_in(Path(trainer.default_root_dir))
        return trainer

    @staticmethod
    def _checkpoint_folder_of(trainer: L.Trainer) -> Path:
        return Path(trainer.default_root_dir).absolute() / "checkpoints"

    @property
    def _checkpoint_folder(self) -> Path:
        return self._checkpoint_folder_of(self.trainer)

    def after_instantiate_classes(self) -> None:
        """Hand the resolved configuration to the module and find the checkpoint to start from."""
        self._dump_config()
        # A checkpoint must find its data from any working directory.
        data = self.config_dump.get("data", {}).get("init_args", {})
        for key in ("root", "registry", "index_folder"):
            if data.get(key) is not None:
                place = data_path(data[key])
                data[key] = str(place.absolute() if isinstance(place, Path) else place)
        options = self.config_init[self.subcommand]
        options["ckpt_path"] = self._resolve_checkpoint(options.get("ckpt_path"))
        if self.subcommand == "fit" and options["ckpt_path"] is not None:
            continue_tracked_run(self.trainer)
        if isinstance(self.model, SpearModule):
            self.model.run_config = self.config_dump
            self.model.resume_allow = options["resume_allow"]
            self.model.resuming = options["ckpt_path"] is not None
            self.model.set_configuration(self.config_dump["model"])

    def _resolve_checkpoint(self, path: str | None) -> str | None:
        """Return the checkpoint file meant by `--ckpt_path`; "last" is the newest one of the run's folder."""
        if path is None:
            if self.subcommand != "fit":
                raise CheckpointError(
                    f"`spear {self.subcommand}` needs a checkpoint",
                    where="--ckpt_path",
                    expected="a file, or `last` for the newest of the run's folder",
                )
            there = newest_checkpoint(self._checkpoint_folder)
            if there is not None:
                raise ConfigError(
                    "The run's folder already holds a run",
                    where="--trainer.default_root_dir",
                    found=there,
                    remedy="continue it with --ckpt_path last, or name another folder",
                )
            return None
        if path == "last":
            newest = newest_checkpoint(self._checkpoint_folder)
            if newest is None and self.subcommand == "fit":
                log.warning("There is no checkpoint in %s yet: starting a new run", self._checkpoint_folder)
                return None
            path = str(newest or self._checkpoint_folder / "last")
        if not Path(path).exists():
            raise CheckpointError(
                "There is no such checkpoint", where="--ckpt_path", found=path, remedy="check the path"
            )
        return path


def with_configuration_of_checkpoint(arguments: list[str]) -> list[str]:
    """Let a checkpoint bring its own configuration: `spear predict --ckpt_path FILE` needs no --config.

    Args:
        arguments: The command line from the verb on.

    Returns:
        The command line, with the checkpoint's configuration before all other options if it named none.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config")
    parser.add_argument("--ckpt_path")
    known, _ = parser.parse_known_args(arguments[1:])
    if known.config is not None or known.ckpt_path is None or arguments[0] == "fit":
        return arguments
    if known.ckpt_path == "last":
        raise CheckpointError(
            "`last` is the newest checkpoint of a run's folder, and no run was named",
            where="--ckpt_path",
            remedy="give the file, or the run's --config",
        )
    run = read_checkpoint(known.ckpt_path)["spear"].get("run")
    if run is None:
        raise CheckpointError(
            "The checkpoint does not hold the configuration of its run",
            where=known.ckpt_path,
            remedy="give --config",
        )
    kept = copy.deepcopy({key: run[key] for key in KEPT_SECTIONS if key in run})
    # The machine the run was trained on is not this one.
    for key in MACHINE_OPTIONS:
        kept.get("trainer", {}).pop(key, None)
    # The tokenizer comes out of the checkpoint: the one that is named may need a network.
    for part in ("policy", "answerer"):
        built = kept.get("model", {}).get("init_args", {}).get(part, {})
        if "prompt" in built.get("init_args", {}):
            built["init_args"]["prompt"].setdefault("init_args", {})["tokenizer"] = "byte"
    # Where a file is expected, jsonargparse takes the content itself too.
    # Order matters in some places: of cameras, of tasks.
    return [arguments[0], "--config", yaml.safe_dump(kept, sort_keys=False), *arguments[1:]]


def main(arguments: list[str]) -> int:
    """Run one of the trainer's verbs.

    Args:
        arguments: The command line from the verb on.

    Returns:
        Exit status 0; errors are raised.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        # Batches of packed tokens differ in size: with segments of fixed size, a full-size step of 118 GiB left
        # holes of 21 GiB and ran out of 140.
        os.environ.setdefault(ALLOCATOR, "expandable_segments:True")
    for noise in (
        ".*LeafSpec.*",
        "The number of training batches .* is smaller than the logging interval",
        "LightningCLI's args parameter is intended",
    ):
        # Remarks that a user can do nothing about: Lightning's own use of torch, short epochs, our own call.
        warnings.filterwarnings("ignore", message=noise)
    if arguments[1:] in (["--help"], ["-h"]):
        # Printed before Lightning's help, which ends the process.
        sys.stdout.write(explain_options() + "\n")
    arguments = with_configuration_of_checkpoint(arguments)
    try:
        SpearCLI(
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=RunRecord,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            # Lightning warns when it is given arguments beside those of the process, even if they are the same.
            args=None if arguments == sys.argv[1:] else arguments,
        )
    except MisconfigurationException as error:
        raise ConfigError("The trainer cannot be set up like this", where="trainer", found=error) from error
    except (TypeError, ValueError) as error:
        # jsonargparse wraps what a constructor raises in the story of everything it tried.
        explained = explained_cause(error)
        if explained is None:
            raise
        raise explained from error
    return 0


def explained_cause(error: BaseException | None) -> SpearError | None:
    """Return the first error of ours in a chain of causes, or `None`."""
    while error is not None and not isinstance(error, SpearError):
        error = error.__cause__ or error.__context__
    return error
