from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn

from spear_lightning.errors import CheckpointError, ConfigError
from spear_lightning.training.ema import ExponentialMovingAverage
from spear_lightning.training.freeze_plan import Phase
from spear_lightning.training.freeze_schedule import FreezeSchedule

PREFIX = "network."


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def averaged(values: list[Tensor], decay: float) -> Tensor:
    """The definition, in float64: the average begins as the first value."""
    average = values[0].double()
    for n, value in enumerate(values[1:]):
        d = min(decay, (1 + n) / (10 + n))
        average = d * average + (1 - d) * value.double()
    return average


def trainable(module: Any) -> list[str]:
    return [name for name, _ in module.components.named_parameters() if not name.startswith("spare.")]


@pytest.mark.parametrize(
    ("options", "accumulate", "steps"),
    [
        ({"decay": 0.999}, 1, range(13)),
        ({"decay": 0.2}, 1, range(13)),
        ({"decay": 0.999}, 2, range(13)),
        ({"decay": 0.999, "start_step": 5}, 1, range(5, 13)),
        ({"decay": 0.999, "every_n_steps": 3}, 1, range(0, 13, 3)),
        ({"decay": 0.999, "start_step": 2, "every_n_steps": 4, "on_device": False}, 2, range(2, 13, 4)),
    ],
)
def test_averages_against_their_definition(
    fit: Any, tiny_module: Any, recorder: Any, tmp_path: Path, options: Any, accumulate: int, steps: range
) -> None:
    module = tiny_module()
    fit(module, [ExponentialMovingAverage(**options), recorder], accumulate_grad_batches=accumulate)
    checkpoint = load(tmp_path / "step=12.ckpt")
    assert sorted(checkpoint["ema"]) == sorted(PREFIX + name for name in trainable(module))
    for name in trainable(module):
        expected = averaged([recorder.after[step][name] for step in steps], options["decay"])
        found = checkpoint["ema"][PREFIX + name]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
        # Training itself is not touched, also at its end.
        assert torch.equal(checkpoint["state_dict"][PREFIX + name], recorder.after[12][name])
        assert torch.equal(module.state_dict()[PREFIX + name], recorder.after[12][name])
        assert not torch.equal(found, recorder.after[12][name])


def test_training_is_the_same_with_and_without(fit: Any, tiny_module: Any) -> None:
    plain, averaging = tiny_module(), tiny_module()
    fit(plain, [])
    fit(averaging, [ExponentialMovingAverage()], limit_val_batches=1, val_check_interval=2)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, averaging.state_dict()[name]), name


def phases() -> list[Phase]:
    return [
        Phase("first", {"vlm.encoders.moge": None}, ["vlm", "expert"]),
        Phase("second", {"expert": None, "vlm": None}, ["vlm.encoders.moge"], start=6),
    ]


@pytest.mark.parametrize("ema_first", [True, False])
def test_averages_with_a_freeze_schedule(
    fit: Any, tiny_module: Any, recorder: Any, tmp_path: Path, ema_first: bool
) -> None:
    schedule, ema = FreezeSchedule(phases()), ExponentialMovingAverage(decay=0.5)
    fit(tiny_module(), [ema, schedule, recorder] if ema_first else [schedule, ema, recorder])
    averages = load(tmp_path / "step=12.ckpt")["ema"]
    for name, first in {"vlm.encoders.moge.0.weight": 0, "expert.weight": 6}.items():
        expected = averaged([recorder.after[step][name] for step in range(first, 13)], 0.5)
        torch.testing.assert_close(averages[PREFIX + name].double(), expected, rtol=1e-5, atol=1e-7)
    early = load(tmp_path / "step=6.ckpt")["ema"]
    assert {name.split(".")[-3] for name in early} == {"moge"}
    # What is frozen later converges to its frozen value: halved six times, and slower while warming up.
    name = "vlm.encoders.moge.0.weight"
    before, after = (entry[PREFIX + name] - recorder.after[12][name] for entry in (early, averages))
    assert after.norm() < 0.1 * before.norm()


@pytest.mark.parametrize("step", [3, 6, 9])
def test_resume_is_exact(fit: Any, tiny_module: Any, tmp_path: Path, step: int) -> None:
    def callbacks() -> list[Callback]:
        return [FreezeSchedule(phases()), ExponentialMovingAverage(decay=0.6, every_n_steps=2)]

    fit(tiny_module(), callbacks(), accumulate_grad_batches=2)
    whole = load(tmp_path / "step=12.ckpt")
    again = tmp_path / "again"
    last = ModelCheckpoint(again, filename="last", every_n_train_steps=12)
    fit(
        tiny_module(),
        [*callbacks(), last],
        accumulate_grad_batches=2,
        ckpt_path=str(tmp_path / f"step={step}.ckpt"),
    )
    resumed = load(again / "last.ckpt")
    assert resumed["ema"].keys() == whole["ema"].keys()
    for name, average in whole["ema"].items():
        assert torch.equal(average, resumed["ema"][name]), name
    assert resumed["callbacks"]["ExponentialMovingAverage"] == whole["callbacks"]["ExponentialMovingAverage"]


class Saver(Callback):
    """Saves a checkpoint while validation runs."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.save_checkpoint(self.path / f"during={trainer.global_step}.ckpt")


def test_validation_sees_averages_and_checkpoints_hold_raw_weights(
    fit: Any, tiny_module: Any, recorder: Any, tmp_path: Path
) -> None:
    module = tiny_module()
    at_end = ModelCheckpoint(tmp_path, filename="end={step}", save_top_k=-1, save_on_train_epoch_end=False)
    fit(
        module,
        [ExponentialMovingAverage(decay=0.9), recorder, Saver(tmp_path), at_end],
        max_steps=10,
        limit_val_batches=1,
        num_sanity_val_steps=1,
    )
    assert len(module.validated) == 3
    # Before the first step (sanity check) there is nothing but the initial weights.
    assert torch.equal(module.validated[0]["expert.weight"], recorder.after[0]["expert.weight"])
    for seen, step in zip(module.validated[1:], (5, 10), strict=True):
        during, end = load(tmp_path / f"during={step}.ckpt"), load(tmp_path / f"end=step={step}.ckpt")
        for name in trainable(module):
            expected = averaged([recorder.after[index][name] for index in range(step + 1)], 0.9)
            torch.testing.assert_close(seen[name].double(), expected, rtol=1e-5, atol=1e-7)
            for checkpoint in (during, end):
                assert torch.equal(checkpoint["ema"][PREFIX + name], seen[name])
                assert torch.equal(checkpoint["state_dict"][PREFIX + name], recorder.after[step][name])
                assert not torch.equal(seen[name], recorder.after[step][name])


def test_weights_are_raw_again_after_an_exception_in_validation(
    fit: Any, tiny_module: Any, recorder: Any, tmp_path: Path
) -> None:
    class Fails(Callback):
        def on_validation_batch_end(self, *args: Any) -> None:
            raise RuntimeError("validation failed")

    module, ema = tiny_module(), ExponentialMovingAverage()
    with pytest.raises(RuntimeError, match="validation failed"):
        fit(module, [ema, recorder, Fails()], limit_val_batches=1)
    assert not ema.swapped
    for name, tensor in recorder.after[5].items():
        assert torch.equal(module.components.state_dict()[name], tensor), name


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_evaluation_of_a_checkpoint_uses_its_averages(
    fit: Any, tiny_module: Any, tmp_path: Path, verb: str
) -> None:
    fit(tiny_module(), [ExponentialMovingAverage(decay=0.9)], max_steps=4)
    path = tmp_path / "step=4.ckpt"
    module, checkpoint = tiny_module(), load(path)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[ExponentialMovingAverage(decay=0.9)]
    )
    data = torch.utils.data.DataLoader(torch.arange(1), batch_size=None)
    getattr(trainer, verb)(module, data, ckpt_path=str(path))
    (seen,) = module.validated
    for name in trainable(module):
        assert torch.equal(seen[name], checkpoint["ema"][PREFIX + name]), name
        assert torch.equal(module.components.state_dict()[name], checkpoint["state_dict"][PREFIX + name]), name


def test_low_precision_weights_have_exact_averages_and_come_back_exactly(tiny_module: Any) -> None:
    module, ema = tiny_module().to(torch.bfloat16), ExponentialMovingAverage()
    raw = module.components.expert.weight
    before = raw.detach().clone()
    name = "network.expert.weight"
    ema._averages = {name: raw.detach().float() + 1e-4}
    exact = ema._averages[name].clone()
    ema.swap_in(module)
    assert torch.equal(raw, exact.to(torch.bfloat16))
    ema.swap_in(module)
    ema.swap_out(module)
    ema.swap_out(module)
    assert torch.equal(raw, before)
    assert torch.equal(ema._averages[name], exact)


def test_tied_weights_are_averaged_once_and_saved_under_all_names(
    fit: Any, tiny_module: Any, tmp_path: Path
) -> None:
    network = tiny_module().components
    network.vlm.language.proj.weight = network.vlm.encoders["moge"][0].weight
    module, ema = tiny_module(network), ExponentialMovingAverage()
    fit(module, [ema, Saver(tmp_path)], max_steps=5, limit_val_batches=1)
    checkpoint = load(tmp_path / "during=5.ckpt")
    first, second = PREFIX + "vlm.encoders.moge.0.weight", PREFIX + "vlm.language.proj.weight"
    for entry in ("ema", "state_dict"):
        assert torch.equal(checkpoint[entry][first], checkpoint[entry][second])
    assert torch.equal(checkpoint["state_dict"][second], module.state_dict()[second])
    assert not torch.equal(checkpoint["ema"][second], checkpoint["state_dict"][second])
    assert second not in ema._averages


def test_averages_of_another_architecture_are_refused(fit: Any, tiny_module: Any, tmp_path: Path) -> None:
    fit(tiny_module(), [ExponentialMovingAverage()], max_steps=2)
    checkpoint = load(tmp_path / "step=2.ckpt")
    checkpoint["ema"]["network.expert.weight"] = torch.zeros(3)
    checkpoint["ema"]["network.gone"] = torch.zeros(1)
    torch.save(checkpoint, tmp_path / "wrong.ckpt")
    with pytest.raises(CheckpointError, match=r"2: \['network.expert.weight', 'network.gone'\]"):
        fit(tiny_module(), [ExponentialMovingAverage()], ckpt_path=str(tmp_path / "wrong.ckpt"))


@pytest.mark.parametrize("wrong", [{"decay": 1.0}, {"decay": -0.1}, {"start_step": -1}, {"every_n_steps": 0}])
def test_wrong_arguments_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ExponentialMovingAverage(**wrong)


def test_gradients_flow_while_nothing_is_kept_of_the_graph(fit: Any, tiny_module: Any) -> None:
    ema = ExponentialMovingAverage()
    fit(tiny_module(), [ema], max_steps=2)
    assert not any(
        average.requires_grad or isinstance(average, nn.Parameter) for average in ema._averages.values()
    )
