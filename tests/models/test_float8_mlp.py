"""MLPs with products in 8 bits, beside a library's layers and exact ones; kernels beside their reference."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from transformers import GemmaConfig, SiglipVisionConfig
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.siglip.modeling_siglip import SiglipMLP

from spear_lightning.errors import ShapeError
from spear_lightning.models.float8 import Float8GatedMlp, Float8Mlp, replace_mlps, rounding
from spear_lightning.models.float8 import mlp as mlp_module
from spear_lightning.models.float8.rounding import FORWARD, GRADIENT, unit_for


class Network(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


def _network(kind: str) -> Network:
    torch.manual_seed(0)
    mlp: nn.Module
    if kind == "gemma":
        mlp = GemmaMLP(GemmaConfig(hidden_size=64, intermediate_size=160, hidden_act="gelu_pytorch_tanh"))
    else:
        mlp = SiglipMLP(SiglipVisionConfig(hidden_size=64, intermediate_size=144))
    for parameter in mlp.parameters():
        nn.init.normal_(parameter, std=0.1 if parameter.ndim == 1 else parameter.shape[1] ** -0.5)
    return Network(mlp)


def _names(network: nn.Module) -> set[str]:
    return {name for name, part in network.named_modules() if isinstance(part, nn.Linear)}


def _results(network: Network, *size: int) -> dict[str, Tensor]:
    """Return the output and all gradients for one random batch."""
    generator = torch.Generator().manual_seed(1)
    size = size or (4, 48)
    x = torch.randn(*size, 64, generator=generator, requires_grad=True)
    out = network(x)
    out.backward(torch.randn(*size, 64, generator=generator))
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    return {"out": out.detach(), "x": x.grad, **gradients}


def _apart(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm() / b.norm()).detach())


@pytest.mark.parametrize("kind", ["gemma", "siglip"])
def test_an_mlp_is_as_far_from_the_exact_one_as_a_librarys_layers(kind: str) -> None:
    exact = _network(kind)
    layers, ours = copy.deepcopy(exact), copy.deepcopy(exact)
    config = Float8LinearConfig(emulate=True)
    convert_to_float8_training(layers, config=config)
    assert replace_mlps(ours, _names(ours), emulate=True) == _names(exact)
    wanted, library, found = _results(exact), _results(layers), _results(ours)
    # Forward the rounding is the same; SigLIP's hidden numbers differ where the bias is added before rounding.
    assert _apart(found["out"], library["out"]) < (1e-5 if kind == "gemma" else 1e-3)
    for name, value in wanted.items():
        if name != "mlp.fc2.bias":
            assert 0.03 < _apart(found[name], value) < 1.05 * _apart(library[name], value) < 0.11, name
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32, name


@pytest.mark.parametrize("kind", ["gemma", "siglip"])
def test_parameters_and_their_names_stay(kind: str) -> None:
    network = _network(kind)
    before = dict(network.named_parameters())
    replace_mlps(network, _names(network))
    assert isinstance(network.mlp, Float8GatedMlp if kind == "gemma" else Float8Mlp)
    after = dict(network.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)


def test_what_is_not_chosen_whole_stays() -> None:
    network = _network("gemma")
    assert replace_mlps(network, {"mlp.gate_proj", "mlp.up_proj"}) == set()
    relu = Network(GemmaMLP(GemmaConfig(hidden_size=64, intermediate_size=160, hidden_act="relu")))
    assert replace_mlps(relu, _names(relu)) == set()
    adapted = peft.get_peft_model(_network("gemma"), peft.LoraConfig(target_modules=["up_proj"], r=2))
    assert replace_mlps(adapted, _names(adapted)) == set()


def test_frozen_weights_and_inputs_get_no_gradient() -> None:
    network = _network("gemma")
    wanted = _results(copy_of(network))
    network.mlp.gate_proj.weight.requires_grad_(False)
    network.mlp.down_proj.weight.requires_grad_(False)
    found = _results(copy_of(network))
    assert found["mlp.gate_proj.weight"] is None
    assert found["mlp.down_proj.weight"] is None
    assert torch.equal(found["mlp.up_proj.weight"], wanted["mlp.up_proj.weight"])
    assert torch.equal(found["x"], wanted["x"])


@pytest.mark.parametrize("kind", ["gemma", "siglip"])
def test_without_a_gradient_any_number_of_tokens_will_do(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = copy_of(_network(kind))
    x = torch.randn(2, 48, 64, generator=torch.Generator().manual_seed(1))
    wanted = network(x)

    def no_turning(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(rounding, "round_both_ways", no_turning)
    with torch.no_grad():
        assert torch.equal(network(x), wanted)
        assert network(x[0, :37]).shape == (37, 64)
    with pytest.raises(AssertionError):
        network(x)


@pytest.mark.parametrize("kind", ["gemma", "siglip"])
def test_with_a_gradient_the_hardware_gets_its_multiple_of_tokens(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, rows = copy_of(_network(kind)), []
    plain = rounding.round_both_ways

    def counted(values: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        rows.append(len(values))
        return plain(values, *others)

    monkeypatch.setattr(rounding, "round_both_ways", counted)
    found = _results(network, 1, 37)
    assert all(count % 16 == 0 for count in rows)
    monkeypatch.setattr(mlp_module, "MULTIPLE", 1)
    wanted = _results(copy_of(_network(kind)), 1, 37)
    assert 37 in rows
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=name)


def copy_of(network: Network) -> Network:
    """Return a copy in 8 bits."""
    made = copy.deepcopy(network)
    replace_mlps(made, _names(made), emulate=True)
    return made


def test_the_kind_of_the_output_is_autocasts() -> None:
    network = copy_of(_network("siglip"))
    x = torch.randn(32, 64)
    assert network(x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        out = network(x)
    assert out.dtype == torch.bfloat16
    assert _apart(out.float(), network(x)) < 0.02


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_what_is_no_number_is_not_hidden(odd: float) -> None:
    network = copy_of(_network("gemma"))
    x = torch.randn(32, 64)
    x[3, 5] = odd
    assert not network(x)[3].isfinite().any()


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    """The kernels, run by Triton's interpreter where there is no GPU (see tests/conftest.py)."""
    pytest.importorskip("triton", reason="Triton is made for Linux alone")
    module = importlib.import_module("spear_lightning.models.float8.kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ASSEMBLY", torch.cuda.is_available())
        yield module


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _same(found: Tensor | None, wanted: Tensor | None, share: float) -> None:
    """Check that numbers of 8 bits are the same but for a share, and these one step apart or both close to zero.

    Triton's interpreter forgets to raise the exponent where rounding fills the mantissa, so such numbers are half
    of what they should be; and subnormal ones may be anything. Both are left out where there is no GPU.
    """
    assert (found is None) == (wanted is None)
    if found is None or wanted is None:
        return
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    assert found.is_contiguous()
    a, b = found.float().cpu(), wanted.float().cpu()
    bits, lowest = (3, 2.0**-6) if found.dtype == FORWARD else (2, 2.0**-14)
    if not torch.cuda.is_available():
        halved = (a.abs() * 2 == b.abs()) & (b.abs().log2() % 1 == 0)
        a = torch.where(halved | (b.abs() <= lowest), b, a)
    step = 2.0 ** (b.abs().clamp(min=lowest).log2().floor() - bits)
    # GELU's slope far from zero is a small difference of large numbers.
    assert bool(((a - b).abs() <= step.clamp(min=1e-6 * torch.finfo(found.dtype).max)).all())
    assert float((a != b).float().mean()) <= share


@pytest.mark.parametrize("kind", [FORWARD, GRADIENT])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_matrix_is_rounded_both_ways(kernels: ModuleType, kind: torch.dtype, dtype: torch.dtype) -> None:
    values = torch.randn(144, 80, generator=torch.Generator().manual_seed(0)).to(_device(), dtype)
    values[3, 5] = 1e6
    unit = unit_for(kind, values[4:].abs().amax())
    found, wanted = (means.round_both_ways(values, unit, kind) for means in (kernels, rounding))
    for one, other in zip(found, wanted, strict=True):
        _same(one, other, 0)
    assert torch.equal(found[0].float().t(), found[1].float())


@pytest.mark.parametrize("gated", [True, False])
def test_kernels_compute_what_their_reference_does(kernels: ModuleType, gated: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(_device(), torch.bfloat16)

    gate, gradient = 2 * random(80, 80), random(80, 80)
    up, bias = (random(80, 80), None) if gated else (None, random(80))
    found, wanted = (means.largest_of_hidden(gate, up, bias) for means in (kernels, rounding))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    unit = unit_for(FORWARD, wanted.hidden)
    small, other = (means.round_hidden(gate, up, bias, unit) for means in (kernels, rounding))
    _same(small, other, 0.02)
    top = gradient.abs().amax().float()
    units = unit, unit_for(GRADIENT, top * wanted.up * rounding.STEEPEST), unit_for(GRADIENT, top * wanted.gate)
    found, wanted = (means.round_gradients(gradient, gate, up, bias, *units) for means in (kernels, rounding))
    for one, other in zip(found[:5], wanted[:5], strict=True):
        _same(one, other, 0.02)
    assert torch.equal(found.gate_TF.float().t(), found.gate_FT.float())
    if not gated:
        torch.testing.assert_close(found.bias_F, wanted.bias_F, rtol=1e-4, atol=1e-4)


def test_a_number_of_tokens_that_cannot_be_multiplied_is_refused(kernels: ModuleType) -> None:
    with pytest.raises(ShapeError, match="multiple of 16"):
        kernels.round_both_ways(torch.randn(37, 64), torch.tensor(1.0), FORWARD)


def test_gelu_is_no_steeper_and_no_larger_than_bounds_say() -> None:
    x = torch.linspace(-30, 30, 100_001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(nn.functional.gelu(x, approximate="tanh").sum(), x)
    assert 1.128 < float(slope.abs().max()) < rounding.STEEPEST
    assert bool((nn.functional.gelu(x, approximate="tanh").abs() <= x.abs()).all())


def _exact_gradients(gradient: Tensor, weight: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of `gate` and `up` of rounded factors, float64."""
    factors = [
        rounding.rounded(value, unit, kind).double() * unit.double()
        for value, kind in ((gradient, GRADIENT), (weight, FORWARD))
        for unit in [unit_for(kind, value.abs().amax())]
    ]
    gate, up = gate.double().requires_grad_(), up.double().requires_grad_()
    hidden = nn.functional.gelu(gate, approximate="tanh") * up
    to_gate, to_up = torch.autograd.grad(hidden, [gate, up], factors[0] @ factors[1])
    return to_gate, to_up


def _reach(gradient: Tensor, weight: Tensor, gate: Tensor, up: Tensor) -> list[float]:
    """Return how much of the range the gradients of `gate` and `up` use at most."""
    largest = rounding.largest_of_hidden(gate, up, None)
    units = rounding.gradient_units(gradient, torch.linalg.vector_norm(weight, dim=0).amax(), largest)
    exact = _exact_gradients(gradient, weight, gate, up)
    end = torch.finfo(GRADIENT).max
    return [float(found.abs().max() / (unit * end)) for found, unit in zip(exact, units, strict=True)]


@pytest.mark.parametrize(("gate_size", "up_size"), [(1.0, 1.0), (0.01, 30.0), (30.0, 0.01)])
def test_gradients_stay_in_their_range(gate_size: float, up_size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(48, 24, generator=generator) * torch.logspace(-3, 1, 48)[:, None]
    weight = torch.randn(24, 80, generator=generator) * torch.logspace(1, -2, 80)
    gate, up = (torch.randn(48, 80, generator=generator) * size for size in (gate_size, up_size))
    assert all(1e-4 < reach <= 1 for reach in _reach(gradient, weight, gate, up))


def test_the_worst_gradient_just_fits() -> None:
    # A row and a column of one direction, longer than all others, whose numbers are rounded up as far as can be;
    # GELU at its steepest, and `up` at its largest.
    row = torch.full((401,), 1.1251 * 2.0**14)
    row[0] = torch.finfo(GRADIENT).max
    column = torch.full((401,), 1.0626 * 2.0**7)
    column[0] = torch.finfo(FORWARD).max
    gradient, weight = torch.ones(16, 401), torch.ones(401, 32)
    gradient[3], weight[:, 5] = row, column
    gate, up = torch.zeros(16, 32), torch.ones(16, 32)
    gate[3, 5], up[3, 5] = 1.4638, 40.0
    to_gate, _ = _reach(gradient, weight, gate, up)
    assert 0.95 < to_gate <= 1
    gate[3, 5] = 50.0
    _, to_up = _reach(gradient, weight, gate, up)
    assert 0.95 < to_up <= 1


def test_a_gradient_along_the_longest_column_is_not_cut_off() -> None:
    exact = _network("gemma")
    row = torch.randn(64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        # One channel with GELU at its steepest, `up` at its largest, and the longest column.
        exact.mlp.gate_proj.weight[5] = 1.4638 * row / row.square().sum()
        exact.mlp.up_proj.weight[5] = 20 * row / row.square().sum()
        exact.mlp.down_proj.weight[:, 5] = 3.0
    gradients = []
    for network in (exact, copy_of(exact)):
        x = row.repeat(32, 1).requires_grad_()
        network(x).backward(torch.ones(32, 64))
        gradients.append(x.grad)
    assert _apart(gradients[1], gradients[0]) < 0.11  # type: ignore[arg-type]
