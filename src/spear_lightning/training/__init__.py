"""The training room: all that knows of Lightning. YAML files name its classes as `spear_lightning.training.CLASS`.

Classes are imported when they are first asked for: the command line must answer before Lightning is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spear_lightning.late_imports import late_imports

if TYPE_CHECKING:
    from spear_lightning.training.activation_checkpointing import ActivationCheckpointing
    from spear_lightning.training.augmentation import Augmentations
    from spear_lightning.training.box_pictures import BoxPictures
    from spear_lightning.training.checkpoint_files import RunCheckpoint
    from spear_lightning.training.closed_loop import ClosedLoopEvaluation
    from spear_lightning.training.constant_mean_baseline import ConstantMeanBaseline
    from spear_lightning.training.ema import ExponentialMovingAverage
    from spear_lightning.training.first_validation import FirstValidation
    from spear_lightning.training.float8_products import Float8Products
    from spear_lightning.training.freeze_schedule import FreezeSchedule, Phase
    from spear_lightning.training.geometry_data_module import GeometryDataModule
    from spear_lightning.training.geometry_module import GeometryModule
    from spear_lightning.training.graphed_network import GraphedNetwork
    from spear_lightning.training.image_augmentation import ImageAugmentation
    from spear_lightning.training.labelled_image_data_module import LabelledImageDataModule
    from spear_lightning.training.mirror_augmentation import MirrorAugmentation
    from spear_lightning.training.muon import MuonRecipe
    from spear_lightning.training.optimizer import OptimizerRecipe
    from spear_lightning.training.patch_naming_data_module import PatchNamingDataModule
    from spear_lightning.training.patch_naming_module import PatchNamingModule
    from spear_lightning.training.preemption import StopOnSignal
    from spear_lightning.training.regional_compile import RegionalCompile
    from spear_lightning.training.robot_data_module import RobotDataModule
    from spear_lightning.training.sharded_strategy import ShardedStrategy
    from spear_lightning.training.step_speed import StepSpeed
    from spear_lightning.training.tracking import MLflowRunLogger, RunTensorBoardLogger
    from spear_lightning.training.validation_pictures import ValidationPictures
    from spear_lightning.training.vla_module import VLAModule
    from spear_lightning.training.vlm_module import VLMModule

_HOMES = {
    "ActivationCheckpointing": "activation_checkpointing",
    "Augmentations": "augmentation",
    "BoxPictures": "box_pictures",
    "ClosedLoopEvaluation": "closed_loop",
    "ConstantMeanBaseline": "constant_mean_baseline",
    "ExponentialMovingAverage": "ema",
    "FirstValidation": "first_validation",
    "Float8Products": "float8_products",
    "FreezeSchedule": "freeze_schedule",
    "GeometryDataModule": "geometry_data_module",
    "GeometryModule": "geometry_module",
    "GraphedNetwork": "graphed_network",
    "ImageAugmentation": "image_augmentation",
    "LabelledImageDataModule": "labelled_image_data_module",
    "MLflowRunLogger": "tracking",
    "MirrorAugmentation": "mirror_augmentation",
    "MuonRecipe": "muon",
    "OptimizerRecipe": "optimizer",
    "PatchNamingDataModule": "patch_naming_data_module",
    "PatchNamingModule": "patch_naming_module",
    "Phase": "freeze_schedule",
    "RegionalCompile": "regional_compile",
    "RobotDataModule": "robot_data_module",
    "RunCheckpoint": "checkpoint_files",
    "RunTensorBoardLogger": "tracking",
    "ShardedStrategy": "sharded_strategy",
    "StepSpeed": "step_speed",
    "StopOnSignal": "preemption",
    "VLAModule": "vla_module",
    "VLMModule": "vlm_module",
    "ValidationPictures": "validation_pictures",
}

__all__ = [
    "ActivationCheckpointing",
    "Augmentations",
    "BoxPictures",
    "ClosedLoopEvaluation",
    "ConstantMeanBaseline",
    "ExponentialMovingAverage",
    "FirstValidation",
    "Float8Products",
    "FreezeSchedule",
    "GeometryDataModule",
    "GeometryModule",
    "GraphedNetwork",
    "ImageAugmentation",
    "LabelledImageDataModule",
    "MLflowRunLogger",
    "MirrorAugmentation",
    "MuonRecipe",
    "OptimizerRecipe",
    "PatchNamingDataModule",
    "PatchNamingModule",
    "Phase",
    "RegionalCompile",
    "RobotDataModule",
    "RunCheckpoint",
    "RunTensorBoardLogger",
    "ShardedStrategy",
    "StepSpeed",
    "StopOnSignal",
    "VLAModule",
    "VLMModule",
    "ValidationPictures",
]

__getattr__ = late_imports(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted(__all__)
