"""An encoder learns names through the real command line, and goes where a VLM expects its weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import yaml
from finished_runs import fit_like, values_of, weights

from spear_lightning import cli
from spear_lightning.batches import IGNORED, NamedPatchBatch
from spear_lightning.errors import CheckpointError, ConfigError
from spear_lightning.labeling.picture_stream import PicturesInOrder
from spear_lightning.models import (
    ConvolutionalEncoder,
    Dinov2Encoder,
    GemmaShape,
    MogeEncoder,
    PatchNamer,
    SiglipEncoder,
    SpearVLM,
)
from spear_lightning.models.encoders.base import VisionEncoder
from spear_lightning.robot_data.images import CameraSpec
from spear_lightning.training import (
    ImageAugmentation,
    OptimizerRecipe,
    PatchNamingDataModule,
    PatchNamingModule,
)
from spear_lightning.worlds.tabletop.labelled_images import write_labelled_images

REPOSITORY = Path(__file__).resolve().parents[2]
TWIN = REPOSITORY / "tests" / "conf" / "names.yaml"
SIZES = yaml.safe_load(TWIN.read_text())["model"]["init_args"]["namer"]["init_args"]["encoder"]["init_args"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_labelled_images(folder / "labels", 60, size=(56, 42), processes=1)
    return folder


@pytest.fixture(scope="module")
def whole_run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    assert fit_like(TWIN, root, run) == 0
    return run


def test_the_loss_falls(whole_run: Path) -> None:
    losses = values_of(whole_run, "train/loss")
    assert len(losses) == 80
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    assert len(values_of(whole_run, "val/patch_accuracy")) == 2


@pytest.mark.slow
def test_a_run_resumes_exactly(root: Path, whole_run: Path, tmp_path: Path) -> None:
    assert fit_like(TWIN, root, tmp_path, "--trainer.max_steps=40", "--model.recipe.total_steps=80") == 0
    allowed = "--resume_allow=[trainer.max_steps, model.recipe.total_steps]"
    assert fit_like(TWIN, root, tmp_path, "--ckpt_path=last", allowed) == 0
    ends = [weights(run, 80) for run in (whole_run, tmp_path)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_the_averaged_encoder_goes_where_a_vlm_expects_it(whole_run: Path) -> None:
    file = whole_run / "encoder" / "model.safetensors"
    shape = GemmaShape(width=32, mlp_width=48, depth=2, heads=2, kv_heads=1, head_dim=16, vocab_size=260)
    vlm = SpearVLM(shape, {"pixels": ConvolutionalEncoder(**SIZES, weights=str(file))})
    vlm.load_pretrained()
    checkpoint = torch.load(whole_run / "checkpoints" / "step_0000080.ckpt", weights_only=True)
    for name, value in vlm.encoders["pixels"].state_dict().items():
        assert torch.equal(value, checkpoint["ema"][f"namer.encoder.{name}"])
    assert checkpoint["spear"]["names"]


@pytest.mark.parametrize(
    "made",
    [
        lambda: SiglipEncoder(width=24, depth=1, heads=3, mlp_width=40, image_size=28),
        lambda: Dinov2Encoder(hidden_width=24, depth=2, heads=3, image_size=28),
    ],
)
def test_other_encoders_load_what_is_written_of_them(made: Callable[[], VisionEncoder], tmp_path: Path) -> None:
    first, second = made(), made()
    second.weights = str(PatchNamer(first, 8).save_encoder(tmp_path / "model.safetensors"))
    second.load_pretrained()
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


def test_moge_learns_no_names() -> None:
    with pytest.raises(ConfigError, match=r"(?s)MoGe.*Dinov2Encoder"):
        PatchNamer(MogeEncoder(hidden_width=24, depth=4, heads=3, layers=range(4)), 8)


def test_weights_of_another_size_are_refused(whole_run: Path) -> None:
    wrong = ConvolutionalEncoder(**{**SIZES, "depth": 2}, weights=str(whole_run / "encoder"))
    with pytest.raises(CheckpointError, match="do not fit ConvolutionalEncoder"):
        wrong.load_pretrained()


def test_other_names_than_the_run_s_are_refused(
    whole_run: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = whole_run / "checkpoints" / "step_0000080.ckpt"
    assert cli.main(["validate", f"--ckpt_path={checkpoint}"]) == 0
    assert "val/patch_accuracy" in capsys.readouterr().out
    stored = torch.load(checkpoint, weights_only=True)
    module = PatchNamingModule(PatchNamer(ConvolutionalEncoder(**SIZES), 8), OptimizerRecipe())
    module.names = ["unicorn"]
    with pytest.raises(CheckpointError, match="other names"):
        module.on_load_checkpoint(stored)


def test_a_flipped_picture_has_the_flipped_names() -> None:
    module = PatchNamingModule(PatchNamer(ConvolutionalEncoder(**SIZES), 8), OptimizerRecipe())
    pictures = torch.arange(42).expand(64, 3, 28, 42).to(torch.uint8)
    names = torch.tensor([[1, 2, 3], [4, 5, 6]]).flatten().expand(64, 6)
    flipped = module._augmented(
        NamedPatchBatch(pictures, names, torch.arange(64)), torch.Generator().manual_seed(0)
    )
    mirrored = flipped.images[:, 0, 0, 0] == 41
    assert 0.2 < mirrored.float().mean() < 0.8
    assert (flipped.names[mirrored] == torch.tensor([3, 2, 1, 6, 5, 4])).all()
    assert (flipped.names[~mirrored] == names[0]).all()


def test_what_is_nothing_counts_less_and_what_is_unknown_not_at_all() -> None:
    module = PatchNamingModule(PatchNamer(ConvolutionalEncoder(**SIZES), 2), OptimizerRecipe(), 0.25)
    logits = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(0))
    losses = -logits[0].log_softmax(-1)
    found, weight = module._loss(logits, torch.tensor([[0, 1, 2, IGNORED]]))
    expected = (0.25 * losses[0, 0] + losses[1, 1] + losses[2, 2]) / 2.25
    torch.testing.assert_close(found, expected)
    assert weight.item() == 2.25
    reference = F.cross_entropy(logits[0], torch.tensor([0, 1, 2, IGNORED]), torch.tensor([0.25, 1.0, 1.0]))
    torch.testing.assert_close(found, reference)


@pytest.mark.parametrize(("weight", "name"), [(0.25, IGNORED), (0.0, 0)])
def test_a_batch_that_teaches_nothing_changes_nothing(weight: float, name: int) -> None:
    module = PatchNamingModule(PatchNamer(ConvolutionalEncoder(**SIZES), 2), OptimizerRecipe(), weight)
    logits = torch.randn(1, 4, 3, requires_grad=True)
    loss, _ = module._loss(logits, torch.full((1, 4), name))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_a_warm_start_takes_the_encoder_from_a_checkpoint_or_a_file(whole_run: Path) -> None:
    checkpoint = whole_run / "checkpoints" / "step_0000080.ckpt"
    encoders = []
    for start in (checkpoint, whole_run / "encoder" / "model.safetensors"):
        namer = PatchNamer(ConvolutionalEncoder(**SIZES), 8)
        PatchNamingModule(namer, OptimizerRecipe(), init_from=str(start)).load_initial_weights()
        encoders.append(namer.encoder.state_dict())
    assert all(torch.equal(value, encoders[1][name]) for name, value in encoders[0].items())


def test_every_process_has_as_many_held_out_pictures(root: Path) -> None:
    data = PatchNamingDataModule(str(root), {"labels": 1.0}, CameraSpec(width=56, height=42), holdout=0.3)
    data.prepare(8, 14)
    places = []
    for rank in range(3):
        data.trainer = SimpleNamespace(  # type: ignore[assignment]
            global_rank=rank, world_size=3, strategy=SimpleNamespace(root_device=torch.device("cpu"))
        )
        loader = data.val_dataloader()
        assert isinstance(loader, PicturesInOrder)
        places.append([int(place) for batch in loader for place in batch.position])
    assert len({len(own) for own in places}) == 1
    assert len(set().union(*places)) == 3 * len(places[0])
    assert 3 * len(places[0]) > data.held_out_images() - 3


def test_worker_processes_read_the_same_batches(root: Path) -> None:
    def first(workers: int) -> NamedPatchBatch:
        data = PatchNamingDataModule(
            str(root), {"labels": 1.0}, CameraSpec(width=56, height=42), batch_size=8, num_workers=workers
        )
        data.prepare(8, 14)
        return next(iter(data.train_dataloader()))

    one, other = first(0), first(2)
    assert torch.equal(one.images, other.images)
    assert torch.equal(one.names, other.names)


def test_a_run_that_would_leave_no_encoder_is_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit_like(TWIN, root, tmp_path, "--data.holdout=0") != 0
    assert "data.holdout" in capsys.readouterr().err


def test_wrong_numbers_are_refused(root: Path) -> None:
    data = PatchNamingDataModule(str(root), {"labels": 1.0}, CameraSpec(width=56, height=42))
    with pytest.raises(ConfigError, match="prepare"):
        data.train_dataloader()
    with pytest.raises(ConfigError, match="crop"):
        PatchNamingModule(
            PatchNamer(ConvolutionalEncoder(**SIZES)), OptimizerRecipe(), augmentation=ImageAugmentation(crop=0.9)
        )
    with pytest.raises(ConfigError, match="names"):
        PatchNamer(ConvolutionalEncoder(**SIZES), 0)
