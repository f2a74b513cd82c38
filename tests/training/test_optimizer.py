from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from spear_lightning.errors import ConfigError
from spear_lightning.training.freeze_plan import Component
from spear_lightning.training.one_pass_adamw import OnePassAdamW
from spear_lightning.training.optimizer import OptimizerRecipe, WarmupCosine, regroup


def optimizer_with(*groups: tuple[float, int]) -> torch.optim.AdamW:
    """Groups of one parameter each: (peak_lr, start_step)."""
    return torch.optim.AdamW(
        [{"params": [nn.Parameter(torch.ones(2))], "peak_lr": peak, "start_step": start} for peak, start in groups]
    )


def rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


def run(optimizer: torch.optim.Optimizer, scheduler: WarmupCosine, steps: int) -> list[list[float]]:
    history = []
    for _ in range(steps):
        history.append(rates(optimizer))
        optimizer.step()
        scheduler.step()
    return history


def test_learning_rates_against_closed_form() -> None:
    optimizer = optimizer_with((1e-3, 0))
    history = run(optimizer, WarmupCosine(optimizer, 10, 110, 0.1), 130)
    for step, (rate,) in enumerate(history):
        if step < 10:
            expected = 1e-3 * (step + 1) / 11
        elif step < 110:
            expected = 1e-4 + 9e-4 * 0.5 * (1 + math.cos(math.pi * (step - 10) / 100))
        else:
            expected = 1e-4
        assert rate == pytest.approx(expected, rel=1e-12), step
    # The landmarks, by hand: first step, peak, halfway, end.
    assert history[0] == [pytest.approx(1e-3 / 11)]
    assert history[10] == [1e-3]
    assert history[60] == [pytest.approx(5.5e-4)]
    assert history[110] == [pytest.approx(1e-4)]


def test_learning_rates_equal_torch_lambda_scheduler() -> None:
    def factor(step: int) -> float:
        return (step + 1) / 6 if step < 5 else 0.5 * (1 + math.cos(math.pi * min(1.0, (step - 5) / 20)))

    own, reference = optimizer_with((2e-3, 0)), optimizer_with((2e-3, 0))
    reference.param_groups[0]["lr"] = 2e-3
    theirs = LambdaLR(reference, factor)
    for mine in run(own, WarmupCosine(own, 5, 25, 0.0), 30):
        assert mine == pytest.approx(rates(reference), abs=1e-18)
        reference.step()
        theirs.step()


def test_without_warmup_training_begins_at_the_peak() -> None:
    optimizer = optimizer_with((1.0, 0))
    assert run(optimizer, WarmupCosine(optimizer, 0, 4, 0.0), 5) == [
        pytest.approx([value], abs=1e-15)
        for value in (1.0, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125), 0.0)
    ]


def test_a_group_added_later_warms_up_from_its_own_start() -> None:
    optimizer = optimizer_with((1.0, 0))
    scheduler = WarmupCosine(optimizer, 4, 100, 0.0)
    run(optimizer, scheduler, 50)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "peak_lr": 2.0, "start_step": 50})
    scheduler.refresh()
    assert scheduler.get_last_lr() == rates(optimizer)
    assert len(rates(optimizer)) == 2
    history = run(optimizer, scheduler, 50)
    alone = optimizer_with((2.0, 0))
    assert [rate[1] for rate in history] == [rate[0] for rate in run(alone, WarmupCosine(alone, 4, 50, 0.0), 50)]
    assert history[0][1] == 2.0 / 5


def test_resume_continues_exactly_with_another_number_of_groups() -> None:
    whole = optimizer_with((1.0, 0), (3.0, 7))
    expected = run(whole, WarmupCosine(whole, 3, 40, 0.1), 40)
    first = optimizer_with((1.0, 0))
    scheduler = WarmupCosine(first, 3, 40, 0.1)
    assert run(first, scheduler, 12) == [rate[:1] for rate in expected[:12]]
    second = optimizer_with((1.0, 0), (3.0, 7))
    resumed = WarmupCosine(second, 3, 40, 0.1)
    resumed.load_state_dict(scheduler.state_dict())
    resumed.refresh()
    assert run(second, resumed, 28) == expected[12:]


def test_groups_split_by_weight_decay(tiny_module: Any) -> None:
    parameters = dict(tiny_module().components.named_parameters())
    parameters["vit.pos_embed"] = nn.Parameter(torch.zeros(1, 5, 4))
    parameters["vit.embeddings.position_embeddings"] = nn.Parameter(torch.zeros(1, 5, 4))
    parameters["vit.deposit_embedder.weight"] = nn.Parameter(torch.zeros(5, 4))
    by_id = {id(parameter): name for name, parameter in parameters.items()}
    groups = OptimizerRecipe(lr=1.0, weight_decay=0.3).groups([Component("all", None, 5, parameters)])
    found = {group["name"]: sorted(by_id[id(item)] for item in group["params"]) for group in groups}
    assert found == {
        "all": [
            "expert.weight",
            "spare.weight",
            "vit.deposit_embedder.weight",
            "vlm.encoders.moge.0.weight",
            "vlm.encoders.siglip.0.weight",
            "vlm.language.proj.weight",
        ],
        "all/no_decay": [
            "expert.bias",
            "spare.bias",
            "vit.embeddings.position_embeddings",
            "vit.pos_embed",
            "vlm.encoders.moge.0.bias",
            "vlm.encoders.moge.1.bias",
            "vlm.encoders.moge.1.weight",
            "vlm.encoders.siglip.0.bias",
            "vlm.encoders.siglip.1.bias",
            "vlm.encoders.siglip.1.weight",
            "vlm.language.position_embedding.weight",
            "vlm.language.proj.bias",
        ],
    }
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert {(group["peak_lr"], group["start_step"]) for group in groups} == {(1.0, 5)}


def test_weight_decay_moves_matrices_only() -> None:
    parameters = {"weight": nn.Parameter(torch.full((2, 2), 4.0)), "bias": nn.Parameter(torch.full((2,), 4.0))}
    recipe = OptimizerRecipe(lr=0.5, weight_decay=0.1)
    optimizer = torch.optim.AdamW(recipe.groups([Component("all", None, 0, parameters)]))
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    # Decoupled decay: w (1 - lr * decay).
    assert parameters["weight"].tolist() == [[pytest.approx(3.8)] * 2] * 2
    assert parameters["bias"].tolist() == [4.0, 4.0]


def test_training_without_schedule_leaves_unused_and_frozen_parameters_alone(
    fit: Any, tiny_module: Any, recorder: Any
) -> None:
    module = tiny_module(weight_decay=0.5, betas=(0.8, 0.9), eps=1e-6)
    module.components.vlm.encoders["moge"][0].weight.requires_grad_(False)
    trainer = fit(module, [recorder])
    (optimizer,) = trainer.optimizers
    assert type(optimizer) is torch.optim.AdamW
    assert [group["name"] for group in optimizer.param_groups] == ["all", "all/no_decay"]
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.8, 0.9), 1e-6)
    assert not any(parameter.requires_grad for parameter in module.components.spare.parameters())
    still = {"spare.weight", "spare.bias", "vlm.encoders.moge.0.weight"}
    for name, _ in module.components.named_parameters():
        assert torch.equal(recorder.after[0][name], recorder.after[12][name]) == (name in still), name


def test_schedule_length_comes_from_the_trainer_or_the_recipe(fit: Any, tiny_module: Any) -> None:
    trainer = fit(tiny_module(warmup_steps=0, final_lr_fraction=0.25), [], max_steps=6)
    assert rates(trainer.optimizers[0]) == [pytest.approx(0.25e-2)] * 2
    trainer = fit(tiny_module(warmup_steps=0, total_steps=12), [], max_steps=6)
    assert rates(trainer.optimizers[0]) == [pytest.approx(0.55e-2)] * 2
    with pytest.raises(ConfigError, match=r"does not know its length[\s\S]*max_steps"):
        fit(tiny_module(), [], max_steps=-1, max_epochs=1)


def test_learning_rate_advances_with_optimizer_steps_not_batches(fit: Any, tiny_module: Any) -> None:
    trainer = fit(tiny_module(total_steps=100), [], max_steps=4, accumulate_grad_batches=2)
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 4


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
@pytest.mark.parametrize(("largest", "clips"), [(1e-3, True), (None, False), (0.0, False), (-1.0, False)])
def test_gradients_are_clipped_in_the_step_of_an_optimizer_of_one_pass(
    fit: Any, tiny_module: Any, precision: str, largest: float | None, clips: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []
    clip = OnePassAdamW.clip

    def clip_and_tell(self: OnePassAdamW, largest_norm: float) -> Tensor:
        asked.append(largest_norm)
        return clip(self, largest_norm)

    monkeypatch.setattr(OnePassAdamW, "clip", clip_and_tell)
    # Without moments and with an epsilon that is large beside it, a step is the gradient.
    plain = {"betas": (0.0, 0.0), "eps": 1.0, "weight_decay": 0.0, "warmup_steps": 0, "lr": 1.0}
    module = tiny_module(fused=True, **plain)
    before = {name: value.clone() for name, value in module.named_parameters()}
    trainer = fit(module, [], max_steps=1, gradient_clip_val=largest, precision=precision)
    assert type(trainer.optimizers[0]) is OnePassAdamW
    assert asked == ([largest] if clips else [])
    moved = torch.cat(
        [(value - before[name]).detach().flatten() for name, value in module.named_parameters()]
    ).norm()
    assert moved == pytest.approx(1e-3, rel=0.01) if clips else moved > 0.01


@pytest.mark.parametrize("fused", [True, None])
def test_curves_of_learning_rates_have_one_name_for_both_kinds_of_adamw(
    fit: Any, tiny_module: Any, fused: bool | None
) -> None:
    trainer = fit(tiny_module(fused=fused), [], max_steps=1)
    assert trainer.lr_scheduler_configs[0].name == "lr-AdamW"


def test_precisions_with_norms_of_their_own_clip_themselves(
    fit: Any, tiny_module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OwnNorm(Precision):
        def clip_grad_by_norm(self, *_: Any) -> None:
            raise NotImplementedError("its own norm")

    def wrong(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(OnePassAdamW, "clip", wrong)
    with pytest.raises(NotImplementedError, match="its own norm"):
        fit(tiny_module(fused=True), [], max_steps=1, gradient_clip_val=1.0, plugins=[OwnNorm()])


def test_nothing_to_train_is_an_error(fit: Any, tiny_module: Any) -> None:
    module = tiny_module()
    module.requires_grad_(False)
    with pytest.raises(ConfigError, match="No parameter trains"):
        fit(module, [])


def test_regroup_keeps_state_of_what_stays_and_drops_the_rest() -> None:
    kept, dropped, added = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = torch.optim.AdamW([{"params": [kept, dropped], "lr": 1.0}], betas=(0.5, 0.6))
    groups = optimizer.param_groups
    kept.grad = dropped.grad = torch.ones(2)
    optimizer.step()
    moment = optimizer.state[kept]["exp_avg"]
    regroup(optimizer, [{"params": [added], "lr": 2.0}, {"params": [kept], "lr": 3.0, "weight_decay": 0.7}])
    assert optimizer.param_groups is groups
    assert [group["lr"] for group in groups] == [2.0, 3.0]
    assert [group["betas"] for group in groups] == [(0.5, 0.6)] * 2
    assert [group["weight_decay"] for group in groups] == [0.01, 0.7]
    assert list(optimizer.state) == [kept]
    assert optimizer.state[kept]["exp_avg"] is moment


@pytest.mark.parametrize(
    "wrong",
    [{"lr": 0.0}, {"warmup_steps": -1}, {"total_steps": 0}, {"final_lr_fraction": 1.5}, {"weight_decay": -0.1}],
)
def test_wrong_recipes_are_refused(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=rf"recipe\.{name}"):
        OptimizerRecipe(**wrong)


def test_the_recipe_is_configurable_in_yaml() -> None:
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_argument("--recipe", type=OptimizerRecipe)
    arguments = {"lr": "3e-4", "betas": [0.9, 0.99], "total_steps": 50}
    parsed = parser.parse_object(
        {"recipe": {"class_path": "spear_lightning.training.optimizer.OptimizerRecipe", "init_args": arguments}}
    )
    recipe = parser.instantiate_classes(parsed).recipe
    assert (recipe.lr, recipe.betas, recipe.total_steps) == (3e-4, (0.9, 0.99), 50)
