"""AdamW in one pass against torch's, clipping included."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from spear_lightning.training.one_pass_adamw import BLOCK, OnePassAdamW

SIZES = [(5,), (BLOCK,), (3 * BLOCK + 7,), (37, 70), ()]
OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}


@pytest.fixture(params=["program", "torch"])
def emulate(request: pytest.FixtureRequest) -> bool:
    """Whether the Triton program runs, or torch's own kernel."""
    if request.param == "program":
        pytest.importorskip("triton", reason="Triton is made for Linux alone")
    return request.param == "program"


def _parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [nn.Parameter(torch.randn(size, generator=generator).to(device, dtype)) for size in SIZES]


def _groups(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": parameters[:2], "weight_decay": 0.1}, {"params": parameters[2:], "weight_decay": 0.0}]


def _give_gradients(seed: int, *twins: list[nn.Parameter], without: int | None = None) -> None:
    for index, parameters in enumerate(zip(*twins, strict=True)):
        generator = torch.Generator().manual_seed(100 * seed + index)
        gradient = torch.randn(parameters[0].shape, generator=generator)
        for parameter in parameters:
            # In the parameter's order of memory, as autograd gives them.
            parameter.grad = None if index == without else torch.empty_like(parameter).copy_(gradient)


def _assert_same(found: list[nn.Parameter], wanted: list[nn.Parameter]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_steps_are_torch_s_with_gradients_clipped_first(emulate: bool) -> None:
    own, twin, start = _parameters(), _parameters(), _parameters()
    optimizer = OnePassAdamW(_groups(own), emulate=emulate, **OPTIONS)
    other = torch.optim.AdamW(_groups(twin), **OPTIONS)
    for step in range(4):
        # One parameter has no gradient at first: its own count of steps begins later.
        _give_gradients(step, own, twin, without=2 if step < 2 else None)
        norm = optimizer.clip(3.0)
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(twin, 3.0))
        assert norm > 3
        optimizer.step()
        other.step()
        _assert_same(own, twin)
    assert all((one - before).abs().max() > 1e-3 for one, before in zip(own, start, strict=True))
    assert [float(optimizer.state[parameter]["step"]) for parameter in own] == [4, 4, 2, 4, 4]


def test_a_norm_below_the_largest_changes_nothing_and_a_factor_holds_for_one_step(emulate: bool) -> None:
    own, twin = _parameters(), _parameters()
    optimizer = OnePassAdamW(own, emulate=emulate, **OPTIONS)
    other = torch.optim.AdamW(twin, **OPTIONS)
    for step, largest in enumerate((1e6, 0.5, None)):
        _give_gradients(step, own, twin)
        if largest is not None:
            optimizer.clip(largest)
            nn.utils.clip_grad_norm_(twin, largest)
        optimizer.step()
        other.step()
    _assert_same(own, twin)


def test_the_step_s_closure_may_clip(emulate: bool) -> None:
    own, twin = _parameters(), _parameters()
    optimizer = OnePassAdamW(own, emulate=emulate, **OPTIONS)

    def closure() -> Tensor:
        _give_gradients(0, own)
        optimizer.clip(0.5)
        return torch.tensor(7.0)

    assert optimizer.step(closure) == 7
    _give_gradients(0, twin)
    nn.utils.clip_grad_norm_(twin, 0.5)
    torch.optim.AdamW(twin, **OPTIONS).step()
    _assert_same(own, twin)


@pytest.mark.parametrize("ours_first", [True, False])
def test_its_state_is_torch_s(emulate: bool, ours_first: bool) -> None:
    own, twin = _parameters(), _parameters()
    optimizers = [
        OnePassAdamW(_groups(own), emulate=emulate, **OPTIONS),
        torch.optim.AdamW(_groups(twin), fused=True, **OPTIONS),
    ]
    parameters = [own, twin]
    if not ours_first:
        optimizers.reverse()
        parameters.reverse()
    for step in range(3):
        _give_gradients(step, own, twin)
        for optimizer in optimizers if step == 0 else optimizers[1:]:
            optimizer.step()
        if step == 0:
            # The second goes on from the first one's state; the first one starts again from its own weights.
            optimizers[1].load_state_dict(optimizers[0].state_dict())
    reference = _parameters()
    other = torch.optim.AdamW(_groups(reference), **OPTIONS)
    for step in range(3):
        _give_gradients(step, reference)
        other.step()
    _assert_same(parameters[1], reference)


def test_gradients_in_another_order_of_memory_and_at_odd_addresses() -> None:
    pytest.importorskip("triton", reason="Triton is made for Linux alone")
    own, twin = _parameters(), _parameters()
    _give_gradients(0, own, twin)
    own[3].grad = own[3].grad.t().contiguous().t()  # type: ignore[union-attr]
    own[1].grad = torch.cat([torch.zeros(1).to(own[1]), own[1].grad])[1:]  # type: ignore[list-item]
    OnePassAdamW(own, emulate=True, **OPTIONS).step()
    torch.optim.AdamW(twin, **OPTIONS).step()
    _assert_same(own, twin)


@pytest.mark.parametrize("odd", ["type", "order of memory"])
def test_other_parameters_are_left_to_torch(odd: str) -> None:
    own, twin = ([*_parameters(torch.bfloat16 if odd == "type" else torch.float32)] for _ in range(2))
    if odd == "order of memory":
        for parameters in (own, twin):
            parameters[3] = nn.Parameter(parameters[3].detach().t())
    _give_gradients(0, own, twin)
    optimizer = OnePassAdamW(own, emulate=True, **OPTIONS)
    optimizer.clip(0.5)
    optimizer.step()
    nn.utils.clip_grad_norm_(twin, 0.5)
    torch.optim.AdamW(twin, fused=True, **OPTIONS).step()
    for one, other in zip(own, twin, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("odd", [float("inf"), float("nan")])
def test_a_gradient_that_is_no_number_is_not_hidden(emulate: bool, odd: float) -> None:
    own, twin = _parameters(), _parameters()
    optimizer = OnePassAdamW(own, emulate=emulate, **OPTIONS)
    _give_gradients(0, own, twin)
    own[2].grad[3] = twin[2].grad[3] = odd  # type: ignore[index]
    optimizer.clip(1.0)
    optimizer.step()
    nn.utils.clip_grad_norm_(twin, 1.0)
    torch.optim.AdamW(twin, **OPTIONS).step()
    for one, other in zip(own, twin, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert not torch.isfinite(own[2]).all()


def test_a_scaler_leaves_out_a_step_with_infinite_gradients(emulate: bool) -> None:
    own, before = _parameters(), _parameters()
    optimizer = OnePassAdamW(own, emulate=emulate, **OPTIONS)
    scaler = torch.amp.GradScaler(own[0].device.type, init_scale=1024.0)
    scaler.scale(torch.zeros((), device=own[0].device))
    _give_gradients(0, own)
    own[2].grad[3] = torch.inf  # type: ignore[index]
    scaler.unscale_(optimizer)
    optimizer.clip(0.5)
    scaler.step(optimizer)
    scaler.update()
    _assert_same(own, before)
    # Nothing of it is left.
    optimizer.zero_grad()
    _give_gradients(1, own, before)
    optimizer.step()
    torch.optim.AdamW(before, **OPTIONS).step()
    _assert_same(own, before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_copy_goes_on(emulate: bool, copied: Callable[[Any], Any]) -> None:
    own, twin = _parameters(), _parameters()
    _give_gradients(0, own, twin)
    optimizer = OnePassAdamW(own, emulate=emulate, **OPTIONS)
    optimizer.step()
    other = copied(optimizer)
    again = other.param_groups[0]["params"]
    _give_gradients(1, again)
    other.clip(0.5)
    other.step()
    reference = torch.optim.AdamW(twin, **OPTIONS)
    reference.step()
    _give_gradients(1, twin)
    nn.utils.clip_grad_norm_(twin, 0.5)
    reference.step()
    _assert_same(again, twin)


@pytest.fixture
def second_of_two() -> Iterator[DeviceMesh]:
    """A group of two processes, this one the second; the first does not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    yield DeviceMesh("cpu", [0, 1])
    dist.destroy_process_group()


def test_a_process_updates_its_own_part_of_a_parameter_even_if_that_is_nothing(second_of_two: DeviceMesh) -> None:
    pytest.importorskip("triton", reason="Triton is made for Linux alone")
    whole = [torch.randn(7, 5), torch.randn(1, 3)]
    parts = [whole[0][4:].clone(), whole[1][1:].clone()]

    def shared(part: Tensor, value: Tensor) -> DTensor:
        return DTensor.from_local(part, second_of_two, [Shard(0)], shape=value.shape, stride=value.stride())

    own = [nn.Parameter(shared(part, value)) for part, value in zip(parts, whole, strict=True)]
    twin = [nn.Parameter(part.clone()) for part in parts]
    for parameter, other, value in zip(own, twin, whole, strict=True):
        other.grad = torch.randn(other.shape)
        parameter.grad = shared(other.grad.clone(), value)
    OnePassAdamW(own, emulate=True, **OPTIONS).step()
    torch.optim.AdamW(twin, **OPTIONS).step()
    assert [parameter.to_local().numel() for parameter in own] == [15, 0]
    _assert_same([parameter.to_local() for parameter in own], twin)


def test_float16_s_scaler_divides_gradients_before_they_are_clipped(emulate: bool) -> None:
    own, twin = _parameters(), _parameters()
    optimizer = OnePassAdamW(own, emulate=emulate, **OPTIONS)
    scaler = torch.amp.GradScaler(own[0].device.type, init_scale=1024.0)
    _give_gradients(0, own, twin)
    # Makes the scaler know the device.
    scaler.scale(torch.zeros((), device=own[0].device))
    for parameter in own:
        parameter.grad *= 1024  # type: ignore[operator]
    scaler.unscale_(optimizer)
    optimizer.clip(0.5)
    scaler.step(optimizer)
    nn.utils.clip_grad_norm_(twin, 0.5)
    torch.optim.AdamW(twin, **OPTIONS).step()
    _assert_same(own, twin)
