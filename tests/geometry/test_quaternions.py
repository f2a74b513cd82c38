"""Quaternions against scipy, roma, closed forms in extended precision, and finite differences."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import roma
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation
from torch import Tensor

from spear_lightning.errors import DataError
from spear_lightning.geometry import quaternions

PAIRS = 10_000
# A float32 quaternion is itself only known to 6e-8 in each component.
FLOAT32_TOLERANCE = 1e-6
SMALLEST, LARGEST = 1e-6, math.pi - 1e-6


def pairs_at_all_angles(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Pairs of unit quaternions at angles on S3 from 1e-6 to pi - 1e-6, dense at both ends."""
    random = torch.Generator().manual_seed(0)
    q0 = quaternions.random_unit((PAIRS,), random, dtype=torch.float64)
    direction = torch.randn((PAIRS, 4), generator=random, dtype=torch.float64)
    direction = quaternions.normalize(direction - (direction * q0).sum(-1, keepdim=True) * q0)
    near = torch.logspace(math.log10(SMALLEST), math.log10(math.pi / 2), PAIRS // 3, dtype=torch.float64)
    middle = torch.linspace(SMALLEST, LARGEST, PAIRS - 2 * len(near), dtype=torch.float64)
    angle = torch.cat([near, middle, math.pi - near])[:, None]
    q1 = torch.cos(angle) * q0 + torch.sin(angle) * direction
    return q0.to(dtype), q1.to(dtype)


def reference_arc(q0: Tensor, q1: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gram-Schmidt in extended precision: start, unit tangent towards the end, angle."""
    start, end = q0.numpy().astype(np.longdouble), q1.numpy().astype(np.longdouble)
    start = start / np.sqrt((start * start).sum(-1, keepdims=True))
    end = end / np.sqrt((end * end).sum(-1, keepdims=True))
    cosine = (start * end).sum(-1, keepdims=True)
    across = end - cosine * start
    sine = np.sqrt((across * across).sum(-1, keepdims=True))
    return start, across / sine, np.arctan2(sine, cosine)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FLOAT32_TOLERANCE), (torch.float64, 1e-9)])
@pytest.mark.parametrize("t", [0.0, 0.1, 0.5, 0.999, 1.0])
def test_slerp_and_its_velocity_agree_with_extended_precision(
    dtype: torch.dtype, tolerance: float, t: float
) -> None:
    q0, q1 = pairs_at_all_angles(dtype)
    start, tangent, angle = reference_arc(q0, q1)
    point = np.cos(t * angle) * start + np.sin(t * angle) * tangent
    velocity = angle * (np.cos(t * angle) * tangent - np.sin(t * angle) * start)
    times = torch.full((PAIRS,), t, dtype=dtype)
    slerp, rate = quaternions.slerp(q0, q1, times), quaternions.slerp_velocity(q0, q1, times)
    assert slerp.dtype == rate.dtype == dtype
    assert np.abs(slerp.numpy() - point).max() < tolerance
    # Relative to the speed: a slow velocity must be as exact as a fast one.
    assert (np.abs(rate.numpy() - velocity) / angle).max() < 2 * tolerance


def test_slerp_agrees_with_roma_and_scipy_on_the_shorter_arc() -> None:
    q0, q1 = pairs_at_all_angles(torch.float64)
    q1 = torch.where((q0 * q1).sum(-1, keepdim=True) < 0, -q1, q1)
    ours = quaternions.slerp(q0, q1, 0.3)
    theirs = roma.unitquat_slerp(q0, q1, torch.tensor(0.3, dtype=torch.float64))
    assert quaternions.rotation_angle(ours, theirs).max() < 1e-9
    first, second = Rotation.from_quat(q0.numpy()), Rotation.from_quat(q1.numpy())
    scipy = first * Rotation.from_rotvec(0.3 * (first.inv() * second).as_rotvec())
    assert (scipy.inv() * Rotation.from_quat(ours.numpy())).magnitude().max() < 1e-9


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FLOAT32_TOLERANCE), (torch.float64, 1e-12)])
def test_angles_agree_with_extended_precision_and_scipy(dtype: torch.dtype, tolerance: float) -> None:
    q0, q1 = pairs_at_all_angles(dtype)
    angle = reference_arc(q0, q1)[2][:, 0]
    assert np.abs(quaternions.sphere_angle(q0, q1).numpy() - angle).max() < tolerance
    assert np.abs(quaternions.rotation_angle(q0, q1).numpy() - 2 * np.minimum(angle, np.pi - angle)).max() < (
        2 * tolerance
    )
    first, second = (Rotation.from_quat(q.double().numpy()) for q in (q0, q1))
    scipy = (first.inv() * second).magnitude()
    assert np.abs(quaternions.rotation_angle(q0, q1).numpy() - scipy).max() < 2 * tolerance
    torch.testing.assert_close(
        quaternions.rotation_angle(q0, q1), quaternions.rotation_angle(-q0, q1), atol=tolerance, rtol=0
    )


def test_small_angles_keep_their_relative_precision_in_float32() -> None:
    q0, q1 = pairs_at_all_angles(torch.float32)
    angle = reference_arc(q0, q1)[2][:, 0].astype(np.float64)
    near = angle < 1e-3
    ours = quaternions.sphere_angle(q0, q1).numpy()
    assert np.abs(ours[near] / angle[near] - 1).max() < 1e-6
    with np.errstate(invalid="ignore"):
        arccos = np.arccos(np.clip((q0 * q1).sum(-1).numpy(), -1, 1))
    assert np.abs(arccos[near] / angle[near] - 1).max() > 0.5, "the naive formula would pass this test"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FLOAT32_TOLERANCE), (torch.float64, 1e-12)])
def test_exp_and_log_are_inverse_and_agree_with_extended_precision(dtype: torch.dtype, tolerance: float) -> None:
    q0, q1 = pairs_at_all_angles(dtype)
    start, tangent, angle = reference_arc(q0, q1)
    v = quaternions.log(q0, q1)
    assert (np.abs(v.numpy() - angle * tangent) / angle).max() < max(2 * tolerance, 1e-9)
    assert (v * q0).sum(-1).abs().max() < 10 * tolerance
    assert (quaternions.exp(q0, v) - q1).abs().max() < tolerance
    assert (torch.linalg.vector_norm(quaternions.exp(q0, v), dim=-1) - 1).abs().max() < tolerance
    expected = np.cos(angle) * start + np.sin(angle) * tangent
    assert np.abs(quaternions.exp(q0, v).numpy() - expected).max() < tolerance


def test_exp_is_the_rotation_by_twice_the_tangents_norm() -> None:
    q = quaternions.random_unit((100,), torch.Generator().manual_seed(1), dtype=torch.float64)
    omega = torch.linspace(-1.5, 1.5, 300, dtype=torch.float64).reshape(100, 3)
    # q (omega, 0) is tangent at q; its exponential is q times the rotation by 2 omega.
    v = quaternions.multiply(q, torch.cat([omega, torch.zeros(100, 1, dtype=torch.float64)], dim=-1))
    scipy = Rotation.from_quat(q.numpy()) * Rotation.from_rotvec(2 * omega.numpy())
    reached = Rotation.from_quat(quaternions.exp(q, v).numpy())
    assert (scipy.inv() * reached).magnitude().max() < 1e-12


@pytest.mark.parametrize("power", range(-12, 1))
def test_exp_has_no_seam_between_series_and_closed_form(power: int) -> None:
    q = torch.tensor([0.0, 0, 0, 1], dtype=torch.float64)
    for norm in (10.0**power, math.sqrt(quaternions.SERIES_BELOW) * (1 + 10.0**power / 1e3)):
        v = torch.tensor([norm, 0, 0, 0], dtype=torch.float64)
        expected = torch.tensor([math.sin(norm), 0, 0, math.cos(norm)], dtype=torch.float64)
        torch.testing.assert_close(quaternions.exp(q, v), expected, atol=1e-16, rtol=1e-15)


def special_pairs(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    q = quaternions.random_unit((), torch.Generator().manual_seed(2), dtype=dtype)
    identity, turn = torch.tensor([0, 0, 0, 1], dtype=dtype), torch.tensor([1, 0, 0, 0], dtype=dtype)
    barely = quaternions.normalize(q + 1e-7 * turn)
    return [(q, q), (q, -q), (identity, identity), (identity, -identity), (identity, turn), (q, -barely)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", range(6))
def test_values_and_gradients_are_finite_at_equal_and_opposite_quaternions(dtype: torch.dtype, case: int) -> None:
    functions = {
        "slerp": lambda a, b: quaternions.slerp(a, b, 0.3),
        "slerp_velocity": lambda a, b: quaternions.slerp_velocity(a, b, 0.3),
        "log": quaternions.log,
        "exp": lambda a, b: quaternions.exp(a, quaternions.project_tangent(a, b)),
        "sphere_angle": quaternions.sphere_angle,
        "rotation_angle": quaternions.rotation_angle,
    }
    for name, function in functions.items():
        q0, q1 = (q.clone().requires_grad_() for q in special_pairs(dtype)[case])
        value = function(q0, q1)
        # Weights differ, so that gradients cannot cancel.
        (value * torch.arange(1, value.numel() + 1).reshape(value.shape)).sum().backward()
        for tensor in (value, q0.grad, q1.grad):
            assert tensor is not None
            assert torch.isfinite(tensor).all(), name


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
def test_slerp_between_opposite_quaternions_stays_on_the_sphere(t: float) -> None:
    q = quaternions.random_unit((100,), torch.Generator().manual_seed(3), dtype=torch.float64)
    middle = quaternions.slerp(q, -q, t)
    assert (torch.linalg.vector_norm(middle, dim=-1) - 1).abs().max() < 1e-14
    assert (quaternions.sphere_angle(q, middle) - t * math.pi).abs().max() < 1e-12
    speed = torch.linalg.vector_norm(quaternions.slerp_velocity(q, -q, t), dim=-1)
    assert (speed - math.pi).abs().max() < 1e-12


@pytest.mark.parametrize("angle", [0.0, 1e-3, 0.7, 2.0, 3.1])
def test_gradients_agree_with_finite_differences(angle: float) -> None:
    q0 = quaternions.random_unit((), torch.Generator().manual_seed(4), dtype=torch.float64)
    sideways = quaternions.multiply(q0, torch.tensor([0.6, 0.0, 0.8, 0.0], dtype=torch.float64))
    q1 = math.cos(angle) * q0 + math.sin(angle) * sideways
    v = angle * sideways
    q0, q1, v = (tensor.requires_grad_() for tensor in (q0, q1, v))
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(quaternions.slerp, (q0, q1, t))
    assert torch.autograd.gradcheck(quaternions.slerp_velocity, (q0, q1, t))
    assert torch.autograd.gradcheck(quaternions.exp, (q0, v))
    assert torch.autograd.gradcheck(quaternions.project_tangent, (q0, v))
    assert torch.autograd.gradcheck(quaternions.multiply, (q0, q1))
    if angle > 0:
        assert torch.autograd.gradcheck(quaternions.sphere_angle, (q0, q1))
        assert torch.autograd.gradcheck(quaternions.rotation_angle, (q0, q1))


def test_conversions_agree_with_scipy() -> None:
    q = quaternions.random_unit((PAIRS,), torch.Generator().manual_seed(5), dtype=torch.float64)
    scipy = Rotation.from_quat(q.numpy())

    def assert_same(ours: Tensor) -> None:
        assert (scipy.inv() * Rotation.from_quat(ours.numpy())).magnitude().max() < 1e-12

    euler, rotvec, matrix = scipy.as_euler("xyz"), scipy.as_rotvec(), scipy.as_matrix()
    np.testing.assert_allclose(quaternions.to_euler_xyz_extrinsic(q).numpy(), euler, atol=1e-9)
    np.testing.assert_allclose(quaternions.to_rotvec(q).numpy(), rotvec, atol=1e-9)
    np.testing.assert_allclose(quaternions.to_matrix(q).numpy(), matrix, atol=1e-12)
    assert_same(quaternions.from_euler_xyz_extrinsic(torch.from_numpy(euler)))
    assert_same(quaternions.from_rotvec(torch.from_numpy(rotvec)))
    assert_same(quaternions.from_matrix(torch.from_numpy(matrix)))
    assert (quaternions.from_matrix(torch.from_numpy(matrix))[:, 3] >= 0).all()
    assert_same(quaternions.from_wxyz(torch.from_numpy(scipy.as_quat(scalar_first=True))))
    np.testing.assert_allclose(quaternions.to_wxyz(q).numpy(), scipy.as_quat(scalar_first=True), atol=1e-15)


def test_products_and_rotations_agree_with_scipy() -> None:
    random = torch.Generator().manual_seed(6)
    a, b = (quaternions.random_unit((50,), random, dtype=torch.float64) for _ in range(2))
    v = torch.randn((50, 3), generator=random, dtype=torch.float64)
    first, second = Rotation.from_quat(a.numpy()), Rotation.from_quat(b.numpy())
    product = Rotation.from_quat(quaternions.multiply(a, b).numpy())
    assert ((first * second).inv() * product).magnitude().max() < 1e-12
    np.testing.assert_allclose(quaternions.rotate(a, v).numpy(), first.apply(v.numpy()), atol=1e-12)
    inverse = quaternions.rotate(quaternions.conjugate(a), v)
    np.testing.assert_allclose(inverse.numpy(), first.inv().apply(v.numpy()), atol=1e-12)
    # Leading dimensions broadcast against each other in both directions.
    table = quaternions.rotate(a[:, None], v[None])
    np.testing.assert_allclose(table[3, 7].numpy(), first[3].apply(v[7].numpy()), atol=1e-12)
    assert quaternions.multiply(a[0], b).shape == quaternions.multiply(a, b[0]).shape == (50, 4)


@pytest.mark.parametrize("roll", [0.0, 1.0])
@pytest.mark.parametrize("pitch", [math.pi / 2, -math.pi / 2, math.pi / 2 - 1e-4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_euler_angles_survive_the_gimbal_lock(roll: float, pitch: float, dtype: torch.dtype) -> None:
    q = quaternions.from_euler_xyz_extrinsic(torch.tensor([roll, pitch, -0.4], dtype=dtype))
    again = quaternions.from_euler_xyz_extrinsic(quaternions.to_euler_xyz_extrinsic(q))
    assert quaternions.rotation_angle(q, again) < (1e-5 if dtype == torch.float32 else 1e-7)


def test_column_major_transforms_are_read_and_row_major_ones_refused() -> None:
    rotation = Rotation.random(20, random_state=0)
    matrix = np.zeros((20, 4, 4))
    matrix[:, :3, :3], matrix[:, :3, 3], matrix[:, 3, 3] = rotation.as_matrix(), np.arange(60).reshape(20, 3), 1
    columns = torch.from_numpy(matrix.transpose(0, 2, 1).reshape(20, 16).copy())
    q, position = quaternions.from_matrix_colmajor(columns)
    assert (rotation.inv() * Rotation.from_quat(q.numpy())).magnitude().max() < 1e-12
    np.testing.assert_array_equal(position.numpy(), matrix[:, :3, 3])
    with pytest.raises(DataError, match="row by row"):
        quaternions.from_matrix_colmajor(torch.from_numpy(matrix.reshape(20, 16)))
    columns[3, 3] = math.nan
    with pytest.raises(DataError, match="nan"):
        quaternions.from_matrix_colmajor(columns)


@given(st.lists(st.sampled_from([-1.0, -0.5, -0.0, 0.0, 0.5, 1.0]), min_size=4, max_size=4))
def test_canonical_sign_is_one_of_two_and_the_same_for_both(components: list[float]) -> None:
    q = torch.tensor(components)
    ours = quaternions.canonicalize(q)
    assert torch.equal(ours, q) or torch.equal(ours, -q)
    assert torch.equal(ours, quaternions.canonicalize(-q))
    x, y, z, w = ours.tolist()
    assert next((value for value in (w, x, y, z) if value != 0), 0.0) >= 0


@pytest.mark.parametrize("half_space", [False, True])
def test_random_quaternions_are_uniform(half_space: bool) -> None:
    q = quaternions.random_unit(
        (200, 500), torch.Generator().manual_seed(7), dtype=torch.float64, half_space=half_space
    )
    assert q.shape == (200, 500, 4)
    assert (torch.linalg.vector_norm(q, dim=-1) - 1).abs().max() < 1e-12
    assert bool((q[..., 3] >= 0).all()) == half_space
    q = q.reshape(-1, 4)
    # Second moments of the uniform distribution on S3 are 1/4; its mean over half of it is 4 / (3 pi).
    second_moments = torch.eye(4, dtype=torch.float64) / 4
    torch.testing.assert_close(q.T @ q / len(q), second_moments, atol=5e-3, rtol=0)
    assert abs(float(q[:, 3].mean()) - (4 / (3 * math.pi) if half_space else 0)) < 5e-3
    repeated = quaternions.random_unit(
        (200, 500), torch.Generator().manual_seed(7), dtype=torch.float64, half_space=half_space
    )
    assert torch.equal(repeated.reshape(-1, 4), q)


def test_normalize_reads_zero_as_the_identity_with_a_finite_gradient() -> None:
    q = torch.tensor([[0.0, 0, 0, 0], [0, 3, 0, 4]], requires_grad=True)
    normal = quaternions.normalize(q)
    assert torch.equal(normal, torch.tensor([[0.0, 0, 0, 1], [0, 0.6, 0, 0.8]]))
    normal.sum().backward()
    assert q.grad is not None
    assert torch.isfinite(q.grad).all()


def test_importing_the_mathematics_does_not_bring_torch_s_compiler() -> None:
    """It takes longer to import than torch itself, in every process that reads episodes."""
    rooms = "cameras, oriented_boxes, poses, quaternions"
    code = f"import sys; from spear_lightning.geometry import {rooms}; print('torch._dynamo' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False"]
