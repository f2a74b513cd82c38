"""Experiment tracking: loggers that know the run's folder, and the record of what a run was started with."""

from __future__ import annotations

import logging
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger

from spear_lightning.training.configuration import KEPT_SECTIONS, flatten

if TYPE_CHECKING:
    import lightning as L
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

log = logging.getLogger(__name__)

RUN_ID_FILE = "mlflow_run_id"
"""Kept beside the checkpoints, so that a resumed run continues its MLflow run."""


class MLflowRunLogger(MLFlowLogger):
    """MLflow with a local SQLite store by default, system metrics, and runs that survive a resume.

    Args:
        experiment_name: MLflow experiment the run belongs to.
        folder: Where the local store and its artifacts are kept (`mlflow.db`, `mlflow_artifacts/`). Look at it
            with `mlflow ui --backend-store-uri sqlite:///FOLDER/mlflow.db`.
        tracking_uri: A tracking server instead of the local store; default: the environment variable
            MLFLOW_TRACKING_URI, else the local store.
        run_name: Name shown in MLflow; default: one MLflow makes up.
        tags: Tags of the run.
        system_metrics: Whether CPU, memory, disk, network and GPU use are sampled while training.
    """

    def __init__(
        self,
        experiment_name: str = "spear-lightning",
        folder: str = "runs",
        tracking_uri: str | None = None,
        run_name: str | None = None,
        tags: dict[str, str] | None = None,
        system_metrics: bool = True,
    ) -> None:
        self._quieten()
        tracking_uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        artifacts = None
        if tracking_uri is None:
            root = Path(folder).absolute()
            root.mkdir(parents=True, exist_ok=True)
            tracking_uri = f"sqlite:///{root / 'mlflow.db'}"
            artifacts = (root / "mlflow_artifacts").as_uri()
        super().__init__(
            experiment_name=experiment_name,
            run_name=run_name,
            tracking_uri=tracking_uri,
            tags=tags,
            save_dir=folder,
            artifact_location=artifacts,
        )
        self._folder = folder
        self._system_metrics = system_metrics
        self._monitor: SystemMetricsMonitor | None = None

    @staticmethod
    def _quieten() -> None:
        # Creating the store logs a line for each of some forty schema migrations.
        for name in ("alembic", "mlflow.store.db.utils", "mlflow.system_metrics"):
            logging.getLogger(name).setLevel(logging.WARNING)

    @property
    def save_dir(self) -> str:
        """Folder for files of Lightning that have no better place."""
        return self._folder

    def continue_run(self, run_id: str) -> None:
        """Log into an existing run; must be called before anything is logged."""
        self._run_id = run_id

    def start_system_metrics(self) -> None:
        """Start sampling the machine in a background thread, if asked for."""
        if not self._system_metrics or self._monitor is not None or self.run_id is None:
            return
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._monitor = SystemMetricsMonitor(self.run_id, resume_logging=True, tracking_uri=self._tracking_uri)
        self._monitor.start()

    def stop_system_metrics(self) -> None:
        """Stop sampling; safe to call twice."""
        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None

    def finalize(self, status: str = "success") -> None:
        """Mark the run as ended."""
        self.stop_system_metrics()
        super().finalize(status)


class RunTensorBoardLogger(TensorBoardLogger):
    """TensorBoard's files in the run's folder: `spear` puts them in `tensorboard` of `trainer.default_root_dir`.

    Args:
        folder: Another folder for them. Without one, and without `begin_in`, it is `tensorboard`.
    """

    def __init__(self, folder: str | None = None) -> None:
        super().__init__(folder or "tensorboard", name="", version="")
        self._folder = folder

    def begin_in(self, run_folder: Path) -> None:
        """Take note of the run's folder; must be called before anything is logged."""
        self._root_dir = self._folder or str(run_folder / "tensorboard")


class RunRecord(SaveConfigCallback):
    """Records what a run was started with: resolved configuration, hyper-parameters, git state, MLflow run id.

    The configuration is written to `config.yaml` in the run's folder (`trainer.default_root_dir`) and, since
    MLflow cuts parameter values at 250 characters, attached to the MLflow run as an artifact too.
    """

    def __init__(self, parser: Any, config: Any, **options: Any) -> None:
        super().__init__(parser, config, save_to_log_dir=False, **options)
        self._loggers: list[MLflowRunLogger] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write the record when a training starts."""
        if stage == "fit":
            super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write the record; called on rank zero only."""
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        dumped = yaml.safe_load(self.parser.dump(self.config, skip_none=False, skip_validation=True))
        # Options such as --ckpt_path belong to one call, not to the experiment.
        kept = {key: dumped[key] for key in KEPT_SECTIONS if key in dumped}
        text = yaml.safe_dump(kept, sort_keys=False)
        write_text(folder / "config.yaml", text)
        resuming = bool(getattr(pl_module, "resuming", False))
        parameters = {key: value for key, value in flatten(kept).items() if value is not None}
        for logger in trainer.loggers:
            if isinstance(logger, MLflowRunLogger):
                self._record_in_mlflow(logger, folder, text, parameters, resuming)
            elif isinstance(logger, TensorBoardLogger) and not resuming:
                logger.log_hyperparams(parameters)
                logger.experiment.add_text("config", f"```yaml\n{text}\n```")

    def _record_in_mlflow(
        self, logger: MLflowRunLogger, folder: Path, text: str, parameters: dict[str, Any], resuming: bool
    ) -> None:
        run_id_file = folder / RUN_ID_FILE
        client, run_id = logger.experiment, logger.run_id
        assert run_id is not None
        if not (resuming and run_id_file.is_file() and run_id_file.read_text() == run_id):
            write_text(run_id_file, run_id)
            # MLflow refuses to change a parameter, so they are logged once, with the run.
            logger.log_hyperparams(parameters)
        client.log_text(run_id, text, "config.yaml")
        for key, value in git_state().items():
            client.set_tag(run_id, key, value)
        client.set_tag(run_id, "run_folder", str(folder.absolute()))
        logger.start_system_metrics()
        self._loggers.append(logger)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Stop background threads, also after an error."""
        for logger in self._loggers:
            logger.stop_system_metrics()


def continue_tracked_run(trainer: L.Trainer) -> None:
    """Let a resumed training log into the MLflow run it began.

    It must happen before the trainer starts: Lightning opens every logger's run even before `setup`.
    """
    run_id_file = Path(trainer.default_root_dir) / RUN_ID_FILE
    for logger in trainer.loggers:
        if isinstance(logger, MLflowRunLogger) and run_id_file.is_file():
            logger.continue_run(run_id_file.read_text())


def git_state() -> dict[str, str]:
    """Return commit, branch and whether the working tree has changes, as tags; empty outside a repository."""
    commands = {
        "mlflow.source.git.commit": ["rev-parse", "HEAD"],
        "mlflow.source.git.branch": ["rev-parse", "--abbrev-ref", "HEAD"],
        "git.changed_files": ["status", "--porcelain"],
    }
    state = {}
    for key, arguments in commands.items():
        try:
            result = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return {}
        if result.returncode == 0:
            state[key] = result.stdout.strip()[:4000] or "(none)"
    return state


def write_text(path: Path, text: str) -> None:
    """Write a file at once or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
