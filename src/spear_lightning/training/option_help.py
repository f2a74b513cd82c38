"""What `spear fit --help` adds to Lightning's own help: every option of our classes, from its docstring."""

from __future__ import annotations

import re
from importlib import import_module

EXPLAINED = {
    "--model.init_args": "spear_lightning.training.VLAModule",
    "--model.init_args.recipe.init_args": "spear_lightning.training.OptimizerRecipe",
    "--model.init_args.recipe.init_args (Muon)": "spear_lightning.training.MuonRecipe",
    "--model.init_args.policy.init_args": "spear_lightning.policy.Policy",
    "--model...policy...prompt.init_args": "spear_lightning.models.PromptTokenizer",
    "--model...policy...normalizer.init_args": "spear_lightning.policy.ActionNormalizer",
    "--model...policy...flow.init_args": "spear_lightning.flow.ActionFlow",
    "--model...flow...rotation.init_args": "spear_lightning.flow.SphereRotation",
    "--model...flow...rotation (baseline)": "spear_lightning.flow.EuclideanQuaternionRotation",
    "--model...flow...rotation (second baseline)": "spear_lightning.flow.EulerAngleRotation",
    "--model...flow...time.init_args": "spear_lightning.flow.BetaTime",
    "--model...flow...time (alternative)": "spear_lightning.flow.UniformTime",
    "--model...policy...vla.init_args": "spear_lightning.models.SpearVLA",
    "--model...vla...vlm.init_args": "spear_lightning.models.SpearVLM",
    "--model...vlm...language": "spear_lightning.models.GemmaShape",
    "--model...vlm...encoders.NAME.init_args (meaning)": "spear_lightning.models.SiglipEncoder",
    "--model...vlm...encoders.NAME.init_args (geometry)": "spear_lightning.models.MogeEncoder",
    "--model...vlm...encoders.NAME.init_args (alternative)": "spear_lightning.models.Dinov2Encoder",
    "--model...vlm...encoders.NAME.init_args (from scratch)": "spear_lightning.models.ConvolutionalEncoder",
    "--model...vlm...fusion.init_args": "spear_lightning.models.MeanFusion",
    "--model...vla...expert.init_args": "spear_lightning.models.ActionExpert",
    "--model.init_args.augmentation.init_args": "spear_lightning.training.ImageAugmentation",
    "--model.init_args.augmentation.init_args (mirrored)": "spear_lightning.training.MirrorAugmentation",
    "--model.init_args.augmentation.init_args (several)": "spear_lightning.training.Augmentations",
    "--model.init_args (SPEAR-VLM)": "spear_lightning.training.VLMModule",
    "--model.init_args.answerer.init_args (SPEAR-VLM)": "spear_lightning.policy.Answerer",
    "--model.init_args (MoGe)": "spear_lightning.training.GeometryModule",
    "--model.init_args.moge.init_args (MoGe)": "spear_lightning.models.MogeV1",
    "--model.init_args.moge.init_args (MoGe-2)": "spear_lightning.models.MogeV2",
    "--model.init_args.loss.init_args (MoGe)": "spear_lightning.models.moge.loss.GeometryLoss",
    "--model.init_args (names)": "spear_lightning.training.PatchNamingModule",
    "--model.init_args.namer.init_args (names)": "spear_lightning.models.PatchNamer",
    "--data.init_args": "spear_lightning.training.RobotDataModule",
    "--data.init_args (names)": "spear_lightning.training.PatchNamingDataModule",
    "--data.init_args (MoGe)": "spear_lightning.training.GeometryDataModule",
    "--data.init_args (SPEAR-VLM)": "spear_lightning.training.LabelledImageDataModule",
    "--data...views (SPEAR-VLM)": "spear_lightning.vqa.augment.ViewRecipe",
    "--data...chunks": "spear_lightning.robot_data.chunks.ChunkSpec",
    "--data...cameras.NAME": "spear_lightning.robot_data.images.CameraSpec",
    "--trainer.callbacks (freeze schedule)": "spear_lightning.training.FreezeSchedule",
    "--trainer.callbacks...phases": "spear_lightning.training.Phase",
    "--trainer.callbacks (averages)": "spear_lightning.training.ExponentialMovingAverage",
    "--trainer.strategy (FSDP2)": "spear_lightning.training.ShardedStrategy",
    "--trainer.callbacks (recomputed blocks)": "spear_lightning.training.ActivationCheckpointing",
    "--trainer.callbacks (signals)": "spear_lightning.training.StopOnSignal",
    "--trainer.callbacks (checkpoints)": "spear_lightning.training.RunCheckpoint",
    "--trainer.callbacks (first figures)": "spear_lightning.training.FirstValidation",
    "--trainer.callbacks (pictures)": "spear_lightning.training.ValidationPictures",
    "--trainer.callbacks (pictures of 3D boxes)": "spear_lightning.training.BoxPictures",
    "--trainer.callbacks (baseline of SPEAR-VLM)": "spear_lightning.training.ConstantMeanBaseline",
    "--trainer.callbacks (compilation)": "spear_lightning.training.RegionalCompile",
    "--trainer.callbacks (CUDA graphs)": "spear_lightning.training.GraphedNetwork",
    "--trainer.callbacks (8-bit products)": "spear_lightning.training.Float8Products",
    "--trainer.callbacks (speed)": "spear_lightning.training.StepSpeed",
    "--trainer.callbacks (success rates)": "spear_lightning.training.ClosedLoopEvaluation",
    "--trainer.strategy (sharded)": "spear_lightning.training.ShardedStrategy",
    "--trainer.logger (MLflow)": "spear_lightning.training.MLflowRunLogger",
    "--trainer.logger (TensorBoard)": "spear_lightning.training.RunTensorBoardLogger",
}
"""Where an option stands in a configuration -> the class whose arguments it takes."""


def explain_options() -> str:
    """Return the arguments of our classes as their docstrings explain them."""
    sections = []
    for place, class_path in EXPLAINED.items():
        module, name = class_path.rsplit(".", 1)
        documented = getattr(import_module(module), name).__doc__ or ""
        sections.append(f"{place}: {class_path}\n{_arguments(documented)}")
    return (
        "\nOptions of our own classes (in YAML under the place named, `...` stands for init_args):\n\n"
        + "\n".join(sections)
    )


def _arguments(documented: str) -> str:
    """Return the Args (or Attributes) section of a docstring."""
    found = re.search(r"^    (?:Args|Attributes):\n((?:        .*\n|\s*\n)*)", documented + "\n", re.MULTILINE)
    return found[1].rstrip() + "\n" if found else "        (none)\n"
