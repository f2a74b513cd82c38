"""Rotation flows: paths against finite differences, losses against closed forms, round trips against scipy."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from spear_lightning.errors import ConfigError
from spear_lightning.flow import (
    EuclideanQuaternionRotation,
    EulerAngleRotation,
    RotationFlow,
    SphereRotation,
)
from spear_lightning.geometry import quaternions

COUNT = 2000
FLOWS: list[RotationFlow] = [
    SphereRotation(),
    SphereRotation(hemisphere="shortest"),
    EuclideanQuaternionRotation(),
    EulerAngleRotation(),
]


def random_ends(flow: RotationFlow, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    noise = flow.noise((COUNT,), random).to(dtype)
    if isinstance(flow, SphereRotation):
        noise = quaternions.normalize(noise)
    target = flow.encode(quaternions.random_unit((COUNT,), random, dtype=dtype))
    return noise, target, torch.rand(COUNT, generator=random, dtype=dtype)


@pytest.mark.parametrize("flow", FLOWS)
def test_encoding_a_rotation_and_back_keeps_it(flow: RotationFlow) -> None:
    q = quaternions.random_unit((COUNT,), torch.Generator().manual_seed(1))
    r = flow.encode(q)
    again = flow.decode(r)
    assert r.shape == (COUNT, flow.width)
    assert (again[:, 3] >= 0).all()
    difference = Rotation.from_quat(q.numpy()).inv() * Rotation.from_quat(again.numpy())
    assert difference.magnitude().max() < 1e-5
    # Both signs of a quaternion are one rotation, hence one target.
    torch.testing.assert_close(flow.encode(-q), r, atol=1e-5, rtol=0)


@pytest.mark.parametrize("flow", FLOWS)
def test_the_path_runs_from_noise_to_target(flow: RotationFlow) -> None:
    noise, target, tau = random_ends(flow)
    start, end = (flow.path(noise, target, torch.full_like(tau, time))[0] for time in (0.0, 1.0))
    torch.testing.assert_close(start, noise)
    assert quaternions.rotation_angle(flow.decode(end), flow.decode(target)).max() < 1e-7


@pytest.mark.parametrize("flow", FLOWS)
def test_the_velocity_is_the_paths_derivative(flow: RotationFlow) -> None:
    noise, target, tau = random_ends(flow)
    tau = 0.01 + 0.98 * tau
    step = 1e-6
    before, after = (flow.path(noise, target, tau + shift)[0] for shift in (-step, step))
    velocity = flow.path(noise, target, tau)[1]
    # Where a "shortest" path crosses to the other sign, it jumps from q to -q.
    smooth = (after - before).norm(dim=-1) < 0.1
    assert smooth.double().mean() > 0.99
    error = (after - before)[smooth] / (2 * step) - velocity[smooth]
    assert error.abs().max() < 1e-8


@pytest.mark.parametrize("hemisphere", ["half_space", "shortest"])
def test_the_sphere_paths_speed_is_the_angle_and_its_velocity_is_tangent(hemisphere: Any) -> None:
    flow = SphereRotation(hemisphere)
    noise, target, tau = random_ends(flow)
    noisy, velocity = flow.path(noise, target, tau)
    angle = quaternions.sphere_angle(noise, target)
    if hemisphere == "shortest":
        angle = torch.minimum(angle, math.pi - angle)
    torch.testing.assert_close(velocity.norm(dim=-1), angle)
    assert (noisy * velocity).sum(-1).abs().max() < 1e-9
    assert (noisy.norm(dim=-1) - 1).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_half_space_paths_stay_in_the_half_space(dtype: torch.dtype) -> None:
    flow = SphereRotation("half_space")
    noise, target, tau = random_ends(flow, dtype)
    # The hardest cases: targets on the boundary, as half turns are, noise next to it, and the end itself.
    target[::2, 3] = 0
    noise[::3, 3] *= 1e-8
    tau[::4] = 1
    noise, target = quaternions.normalize(noise), quaternions.normalize(target)
    noisy, velocity = flow.path(noise, target, tau)
    assert (noisy[:, 3] >= 0).all()
    reached = quaternions.exp(noisy, (1 - tau)[:, None] * velocity)
    # The path does not turn around on the boundary: it ends at the target itself, not at its negative.
    assert (reached - target).norm(dim=-1).max() < 1e-5


def test_shortest_paths_never_turn_by_more_than_half_a_turn() -> None:
    lengths = {}
    for hemisphere in ("half_space", "shortest"):
        flow = SphereRotation(hemisphere)
        noise, target, tau = random_ends(flow)
        noisy, velocity = flow.path(noise, target, tau)
        assert (noisy[:, 3] >= 0).all()
        lengths[hemisphere] = velocity.norm(dim=-1)
        difference = Rotation.from_quat(noise.numpy()).inv() * Rotation.from_quat(target.numpy())
        if hemisphere == "shortest":
            torch.testing.assert_close(2 * lengths[hemisphere], torch.from_numpy(difference.magnitude()))
    assert lengths["half_space"].max() > math.pi / 2 > lengths["shortest"].max()


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_steps_along_the_true_velocity_land_on_the_target(flow: RotationFlow, steps: int) -> None:
    noise, target, _ = random_ends(flow, torch.float32)
    r = noise
    for index in range(steps):
        remaining = torch.full((COUNT,), 1 - index / steps)
        # What is left of the path, walked in the remaining time, is the true velocity field.
        _, whole = flow.path(r, target, torch.zeros(COUNT))
        r = flow.step(r, whole / remaining[:, None], 1 / steps)
    assert quaternions.rotation_angle(flow.decode(r), flow.decode(target)).max() < 1e-5


def test_a_step_ignores_the_radial_part_and_returns_to_the_half_space() -> None:
    flow = SphereRotation()
    q, _, _ = random_ends(flow, torch.float32)
    velocity = torch.randn((COUNT, 4), generator=torch.Generator().manual_seed(1)) * 3
    stepped = flow.step(q, velocity, 1.0)
    torch.testing.assert_close(flow.step(q, velocity + 5 * q, 1.0), stepped, atol=1e-5, rtol=0)
    assert (stepped[:, 3] >= 0).all()
    assert (stepped.norm(dim=-1) - 1).abs().max() < 1e-6
    raw = quaternions.exp(q, quaternions.project_tangent(q, velocity))
    assert (raw[:, 3] < 0).any(), "no step left the half-space, so nothing was mapped back"
    assert quaternions.rotation_angle(raw, stepped).max() < 1e-5


def test_a_sampler_step_is_the_product_with_the_angular_velocitys_rotation() -> None:
    flow = SphereRotation()
    q, target, _ = random_ends(flow)
    velocity = quaternions.log(q, target)
    # Spec section 8: q <- q dq, dq built from the angular velocity 2 Im(q* v).
    omega = 2 * quaternions.multiply(quaternions.conjugate(q), velocity)[:, :3]
    expected = Rotation.from_quat(q.numpy()) * Rotation.from_rotvec(0.1 * omega.numpy())
    reached = Rotation.from_quat(flow.step(q, velocity, 0.1).numpy())
    assert (expected.inv() * reached).magnitude().max() < 1e-12


@pytest.mark.parametrize("velocity_loss", ["cosine", "mse"])
@pytest.mark.parametrize("horizon", ["next", "end"])
@pytest.mark.parametrize("distance", ["sign_min", "angle"])
def test_losses_vanish_at_the_truth_and_have_their_closed_forms_elsewhere(
    velocity_loss: Any, horizon: Any, distance: Any
) -> None:
    flow = SphereRotation(velocity_loss=velocity_loss, geodesic_horizon=horizon, geodesic_distance=distance)
    noise, target, tau = random_ends(flow)
    noisy, velocity = flow.path(noise, target, tau)
    speed = velocity.norm(dim=-1)
    true = flow.losses(velocity, noisy, velocity, tau, 0.1)
    assert true["velocity"].abs().max() < 1e-12
    assert true["geodesic"].abs().max() < 1e-12
    # The right direction at half the speed: the rotation falls short by half the arc that is walked.
    slow = flow.losses(0.5 * velocity, noisy, velocity, tau, 0.1)
    dt = 1 - tau if horizon == "end" else torch.minimum(1 - tau, torch.full_like(tau, 0.1))
    missing = 0.5 * speed * dt
    expected = 2 * missing if distance == "angle" else 2 * torch.sin(missing / 2)
    torch.testing.assert_close(slow["geodesic"], expected)
    expected = torch.zeros_like(speed) if velocity_loss == "cosine" else (0.5 * speed) ** 2 / 4
    torch.testing.assert_close(slow["velocity"], expected)
    # A tangent at 60 degrees to the true velocity, of the same speed.
    across = quaternions.project_tangent(noisy, torch.ones_like(noisy))
    across = quaternions.normalize(across - (across * velocity).sum(-1, True) / speed[:, None] ** 2 * velocity)
    askew = 0.5 * velocity + math.sqrt(0.75) * speed[:, None] * across
    wrong = flow.losses(askew, noisy, velocity, tau, 0.1)["velocity"]
    expected = torch.full_like(speed, 0.5) if velocity_loss == "cosine" else speed**2 / 4
    torch.testing.assert_close(wrong, expected)
    # What is radial in the prediction does not matter.
    radial = flow.losses(askew + 3 * noisy, noisy, velocity, tau, 0.1)["velocity"]
    torch.testing.assert_close(radial, wrong)


def test_the_geodesic_loss_is_blind_to_the_quaternions_sign() -> None:
    for distance in ("sign_min", "angle"):
        flow = SphereRotation(geodesic_horizon="end", geodesic_distance=distance)
        q = quaternions.random_unit((1,), torch.Generator().manual_seed(0), dtype=torch.float64)
        tangent = quaternions.multiply(q, torch.tensor([1.0, 0, 0, 0], dtype=torch.float64))
        # One walks a quarter of the great circle forward, the other backward: q and -q, one rotation.
        losses = flow.losses(
            -math.pi / 2 * tangent, q, math.pi / 2 * tangent, torch.zeros(1, dtype=torch.float64), 0.1
        )
        assert losses["geodesic"] < 1e-9
        assert losses["velocity"] == pytest.approx(2.0)


def test_the_number_of_steps_sets_the_horizon() -> None:
    noise, target, _ = random_ends(FLOWS[0])
    tau = torch.zeros(COUNT, dtype=torch.float64)
    noisy, velocity = FLOWS[0].path(noise, target, tau)
    own = SphereRotation(num_steps=4).losses(0.9 * velocity, noisy, velocity, tau, 0.1)
    given = SphereRotation().losses(0.9 * velocity, noisy, velocity, tau, 0.25)
    other = SphereRotation().losses(0.9 * velocity, noisy, velocity, tau, 0.1)
    assert torch.equal(own["geodesic"], given["geodesic"])
    assert (own["geodesic"] > other["geodesic"]).all()


@pytest.mark.parametrize("velocity_loss", ["cosine", "mse"])
@pytest.mark.parametrize("distance", ["sign_min", "angle"])
@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e-4, 1.0, 1e3])
def test_gradients_are_finite_for_any_prediction(velocity_loss: Any, distance: Any, scale: float) -> None:
    flow = SphereRotation(velocity_loss=velocity_loss, geodesic_distance=distance)
    noise, target, tau = random_ends(flow, torch.float32)
    noise[0], tau[0] = target[0], 0.5
    tau[1] = 1 - 2.0**-24
    noisy, true = flow.path(noise, target, tau)
    for start in (scale * true, scale * torch.ones_like(true), scale * noisy):
        velocity = start.clone().requires_grad_()
        losses = flow.losses(velocity, noisy, true, tau, 0.1)
        (losses["velocity"] + losses["geodesic"]).sum().backward()
        assert velocity.grad is not None
        assert torch.isfinite(velocity.grad).all()
        assert all(torch.isfinite(value).all() for value in losses.values())


def test_loss_gradients_agree_with_finite_differences() -> None:
    for distance in ("sign_min", "angle"):
        flow = SphereRotation(geodesic_horizon="end", geodesic_distance=distance)
        noise, target, tau = (tensor[:3] for tensor in random_ends(flow))
        noisy, true = flow.path(noise, target, tau)
        velocity = (true + 0.3).requires_grad_()
        for part in ("velocity", "geodesic"):
            assert torch.autograd.gradcheck(
                lambda v, part=part, flow=flow, noisy=noisy, true=true, tau=tau: flow.losses(
                    v, noisy, true, tau, 0.1
                )[part],
                velocity,
            )


@pytest.mark.parametrize("flow", FLOWS)
def test_noise_is_repeatable_float32(flow: RotationFlow) -> None:
    first, second = (flow.noise((3, 5), torch.Generator().manual_seed(1), "cpu") for _ in range(2))
    assert first.shape == (3, 5, flow.width)
    assert first.dtype == torch.float32
    assert torch.equal(first, second)


def test_linear_flows_have_closed_forms() -> None:
    flow = EulerAngleRotation()
    euler = torch.tensor([[0.5, -0.2, 1.0]])
    q = torch.from_numpy(Rotation.from_euler("xyz", euler.numpy()).as_quat()).float()
    torch.testing.assert_close(flow.encode(q), euler / math.pi, atol=1e-6, rtol=0)
    velocity, true = torch.tensor([[1.0, 2, 3]]), torch.tensor([[1.0, 0, 0]])
    losses = flow.losses(velocity, euler, true, torch.zeros(1), 0.1)
    assert losses["velocity"].item() == pytest.approx(13 / 3)
    assert losses["geodesic"].item() == 0
    assert torch.equal(flow.step(euler, velocity, 0.5), euler + 0.5 * velocity)
    zero = EuclideanQuaternionRotation().decode(torch.zeros(1, 4))
    assert torch.equal(zero, torch.tensor([[0.0, 0, 0, 1]]))


@pytest.mark.parametrize("name", ["hemisphere", "velocity_loss", "geodesic_horizon", "geodesic_distance"])
def test_unknown_choices_are_refused(name: str) -> None:
    wrong: dict[str, Any] = {name: "other"}
    with pytest.raises(ConfigError, match=rf"flow\.rotation\.{name}"):
        SphereRotation(**wrong)
    with pytest.raises(ConfigError, match="at least one step"):
        SphereRotation(num_steps=0)
