"""A small MoGe through the real command line: the loss falls, runs resume, weights go where published ones go."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import yaml
from finished_runs import fit_like, values_of, weights

from spear_lightning import cli
from spear_lightning.batches import GeometryBatch
from spear_lightning.errors import ConfigError
from spear_lightning.geometry.point_maps import PointMaps
from spear_lightning.models import GemmaShape, MogeEncoder, MogeV1, SpearVLM
from spear_lightning.models.moge.base import MogeOutput
from spear_lightning.training import GeometryDataModule, GeometryModule, ImageAugmentation, OptimizerRecipe
from spear_lightning.training.geometry_module import geometry_errors, true_points
from spear_lightning.worlds.tabletop.depth_pictures import write_depth_pictures

REPOSITORY = Path(__file__).resolve().parents[2]
TWIN = REPOSITORY / "tests" / "conf" / "geometry.yaml"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_depth_pictures(folder / "depth", 100, size=(56, 42), processes=1, shard_size=50)
    return folder


@pytest.fixture(scope="module")
def whole_run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    assert fit_like(TWIN, root, run) == 0
    return run


def test_the_loss_falls_and_so_do_the_errors(whole_run: Path) -> None:
    for part in ("loss", "points", "edges", "normals", "mask"):
        values = values_of(whole_run, f"train/{part}")
        assert len(values) == 40
        assert all(math.isfinite(value) for value in values)
    losses = values_of(whole_run, "train/loss")
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    first, last = values_of(whole_run, "val/point_error")
    assert last < first
    assert all(len(values_of(whole_run, f"val/{name}")) == 2 for name in ("located_point_error", "fov_error_deg"))


@pytest.mark.slow
def test_a_run_resumes_exactly(root: Path, whole_run: Path, tmp_path: Path) -> None:
    assert fit_like(TWIN, root, tmp_path, "--trainer.max_steps=20", "--model.recipe.total_steps=40") == 0
    allowed = "--resume_allow=[trainer.max_steps, model.recipe.total_steps]"
    assert fit_like(TWIN, root, tmp_path, "--ckpt_path=last", allowed) == 0
    ends = [weights(run, 40) for run in (whole_run, tmp_path)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_checkpoint_alone_can_be_validated(whole_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = whole_run / "checkpoints" / "step_0000040.ckpt"
    assert cli.main(["validate", f"--ckpt_path={checkpoint}", "--trainer.accelerator=cpu"]) == 0
    printed = capsys.readouterr().out
    assert "val/point_error" in printed
    assert "val/fov_error_deg" in printed


def test_the_weights_go_where_published_ones_go(whole_run: Path, root: Path) -> None:
    file = whole_run / "moge" / "model.safetensors"
    sizes = {"hidden_width": 48, "depth": 4, "heads": 4, "image_size": 56}
    shape = GemmaShape(width=32, mlp_width=48, depth=2, heads=2, kv_heads=1, head_dim=16, vocab_size=260)
    vlm = SpearVLM(shape, {"moge": MogeEncoder(**sizes, layers=None, weights=str(file))})
    vlm.load_pretrained()
    arguments = yaml.safe_load(TWIN.read_text())["model"]["init_args"]["moge"]["init_args"]
    arguments |= {"encoder": MogeEncoder(**sizes, layers=[0, 1, 2, 3]), "weights": str(file)}
    moge = MogeV1(**arguments)
    moge.load_pretrained()
    # The encoder of the VLM is that of the trained network; the averages of the run, to be precise.
    checkpoint = torch.load(whole_run / "checkpoints" / "step_0000040.ckpt", weights_only=True)
    name = "encoder.model.layernorm.weight"
    assert torch.equal(moge.get_parameter(name), checkpoint["ema"][f"moge.{name}"])
    assert not torch.equal(moge.get_parameter(name), checkpoint["state_dict"][f"moge.{name}"])
    data = GeometryDataModule(str(root), validation_samples=20)
    images = next(iter(data.val_dataloader())).images
    with torch.no_grad():
        assert torch.equal(vlm.encoders["moge"](images), moge.encoder(images))
        assert moge.point_maps(images).points.shape == (*images.shape[:1], 42, 56, 3)


def test_a_flipped_picture_has_the_flipped_geometry() -> None:
    encoder = MogeEncoder(hidden_width=16, depth=4, heads=2, layers=[0, 1, 2, 3], image_size=28)
    moge = MogeV1(encoder, 8, (8, 8, 8), 1, 1, 8, (4, 4))
    module = GeometryModule(moge, OptimizerRecipe())
    pictures = torch.arange(28).expand(64, 3, 14, 28).to(torch.uint8)
    depth = torch.arange(28.0).expand(64, 14, 28) + 1
    batch = GeometryBatch(pictures, depth, torch.ones(64), torch.arange(64))
    flipped = module._augmented(batch, torch.Generator().manual_seed(0))
    assert torch.equal(flipped.images[:, 0].float() + 1, flipped.depth)
    assert 0.2 < (flipped.depth[:, 0, 0] == 28).float().mean() < 0.8
    with pytest.raises(ConfigError, match="crop"):
        GeometryModule(moge, OptimizerRecipe(), augmentation=ImageAugmentation(crop=0.9))


def test_errors_are_those_that_were_made() -> None:
    depth = 1 + torch.rand(2, 30, 40, generator=torch.Generator().manual_seed(0))
    depth[:, :4] = torch.inf
    batch = GeometryBatch(torch.zeros(2, 3, 30, 40), depth, torch.tensor([0.8, 1.2]), torch.arange(2))
    points, known = true_points(batch)
    x, y, z = points.unbind(-1)
    columns = torch.arange(40) + 0.5
    torch.testing.assert_close((x / z)[:, 10], (columns - 20) / 40 / batch.focal_x[:, None])
    torch.testing.assert_close((y / z)[:, :, 7], ((torch.arange(30) + 0.5 - 15) / 40) / batch.focal_x[:, None])
    wide = torch.tensor([[0.8, 0.8 * 40 / 30, 0.5, 0.5], [0.9, 0.9 * 40 / 30, 0.5, 0.5]])
    holes = known.clone()
    holes[:, :, :20] = False
    maps = PointMaps(torch.where(holes[..., None], 3 * points, torch.inf), holes, wide, False)
    output = MogeOutput((points - torch.tensor([0.0, 0.0, 0.4])) / 2, holes.float())
    errors = geometry_errors(output, maps, points, known, batch.focal_x)
    assert errors["point_error"].item() == pytest.approx(0, abs=1e-5)
    assert errors["located_point_error"].item() == pytest.approx(0, abs=1e-6)
    assert errors["mask_iou"].item() == pytest.approx(0.5)
    fields = [math.degrees(2 * math.atan(0.5 / focal)) for focal in (0.9, 1.2)]
    assert errors["fov_error_deg"].item() == pytest.approx((fields[0] - fields[1]) / 2, rel=1e-4)


def test_wrong_numbers_are_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match="held out"):
        GeometryDataModule(str(root), validation_samples=100).setup("fit")
    with pytest.raises(ConfigError, match="batch_size"):
        GeometryDataModule(str(root), batch_size=0)
