"""Windows and intrinsics: properties over all sizes, and agreement between pixels and projected points."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from spear_lightning.errors import ConfigError, ShapeError
from spear_lightning.geometry.cameras import (
    NormalizedIntrinsics,
    PixelIntrinsics,
    Rectangle,
    check_divisible,
    fit_window,
)

FITS: list[Any] = ["crop", "pad"]
sides = st.integers(1, 700)


@given(sides, sides, sides, sides, st.sampled_from(FITS))
def test_windows_are_inside_centred_largest_and_unstretched(
    source_height: int, source_width: int, height: int, width: int, fit: Any
) -> None:
    window = fit_window(source_height, source_width, height, width, fit)
    for part, rows, columns in (
        (window.source, source_height, source_width),
        (window.destination, height, width),
    ):
        assert 0 <= part.top <= part.top + part.height <= rows
        assert 0 <= part.left <= part.left + part.width <= columns
        assert 0 <= rows - part.height - 2 * part.top <= 1
        assert 0 <= columns - part.width - 2 * part.left <= 1
        assert part.height >= 1
        assert part.width >= 1
    whole, cut = (window.destination, window.source) if fit == "crop" else (window.source, window.destination)
    outer = (source_height, source_width) if fit == "crop" else (height, width)
    assert tuple(whole)[:2] == (0, 0)
    # Largest: it touches a pair of sides. Unstretched: the other side is right to half a pixel.
    assert cut.height == outer[0] or cut.width == outer[1]
    exact_height = cut.width * whole.height / whole.width
    exact_width = cut.height * whole.width / whole.height
    assert (
        abs(cut.height - exact_height) <= 0.5
        or abs(cut.width - exact_width) <= 0.5
        or 1 in (cut.height, cut.width)
    )


def test_windows_of_usual_cameras() -> None:
    assert fit_window(480, 640, 210, 280, "crop").source == Rectangle(0, 0, 480, 640)
    assert fit_window(180, 320, 210, 280, "crop").source == Rectangle(0, 40, 180, 240)
    assert fit_window(256, 256, 210, 280, "crop").source == Rectangle(32, 0, 192, 256)
    assert fit_window(180, 320, 112, 112, "pad").destination == Rectangle(24, 0, 63, 112)


@given(sides, sides, sides, sides, st.sampled_from(FITS))
def test_windows_map_points_there_and_back(
    source_height: int, source_width: int, height: int, width: int, fit: Any
) -> None:
    window = fit_window(source_height, source_width, height, width, fit)
    top, left, rows, columns = window.source
    corners = torch.tensor([[left, top], [left + columns, top + rows]], dtype=torch.float64)
    top, left, rows, columns = window.destination
    expected = torch.tensor([[left, top], [left + columns, top + rows]], dtype=torch.float64)
    torch.testing.assert_close(window.to_output(corners), expected)
    whole = corners.round().long()
    torch.testing.assert_close(window.to_output(whole), window.to_output(whole.float()))
    torch.testing.assert_close(window.to_source(whole), window.to_source(whole.float()))
    points = torch.rand((10, 2), dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 500
    torch.testing.assert_close(window.to_source(window.to_output(points)), points)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [(210, 280), (112, 112), (300, 120)])
def test_projection_through_a_window_equals_the_projected_pixels_moved(fit: Any, size: tuple[int, int]) -> None:
    camera = PixelIntrinsics(fx=400.0, fy=410.0, cx=330.0, cy=235.0, width=640, height=480)
    points = torch.randn((100, 3), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    points[:, 2] = points[:, 2].abs() + 0.2
    window = fit_window(480, 640, *size, fit)
    output = camera.through(window, *size)
    assert (output.height, output.width) == size
    torch.testing.assert_close(output.project(points), window.to_output(camera.project(points)))


@pytest.mark.parametrize("fit", FITS)
def test_intrinsics_follow_real_pixels(fit: Any) -> None:
    # A bright block drawn around a projected point must be found around its projection through the window.
    camera = PixelIntrinsics(fx=400.0, fy=400.0, cx=320.0, cy=240.0, width=640, height=480)
    point = torch.tensor([0.1, -0.2, 2.0], dtype=torch.float64)
    u, v = camera.project(point).tolist()
    pixels = np.zeros((480, 640), dtype=np.uint8)
    pixels[round(v) - 8 : round(v) + 8, round(u) - 8 : round(u) + 8] = 255
    window = fit_window(480, 640, 112, 140, fit)
    top, left, rows, columns = window.source
    cut = Image.fromarray(pixels).crop((left, top, left + columns, top + rows))
    output = np.zeros((112, 140))
    top, left, rows, columns = window.destination
    output[top : top + rows, left : left + columns] = np.asarray(cut.resize((columns, rows), Image.Resampling.BOX))
    weight = output / output.sum()
    found = [(weight.sum(0) * (np.arange(140) + 0.5)).sum(), (weight.sum(1) * (np.arange(112) + 0.5)).sum()]
    np.testing.assert_allclose(camera.through(window, 112, 140).project(point).numpy(), found, atol=0.05)


def test_projection_agrees_with_the_camera_matrix_and_unprojection_undoes_it() -> None:
    camera = PixelIntrinsics(fx=400.0, fy=410.0, cx=330.0, cy=235.0, width=640, height=480)
    matrix = torch.tensor([[400.0, 0, 330], [0, 410, 235], [0, 0, 1]], dtype=torch.float64)
    points = torch.rand((5, 20, 3), dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1
    homogeneous = points @ matrix.T
    pixels = camera.project(points)
    torch.testing.assert_close(pixels, homogeneous[..., :2] / homogeneous[..., 2:])
    torch.testing.assert_close(camera.unproject(pixels, points[..., 2]), points)
    torch.testing.assert_close(camera.unproject(pixels[0, 0], points[..., 2])[2, 3, 2], points[2, 3, 2])
    assert camera.project(torch.tensor([[0.1, 0.1, -1.0], [0.1, 0.1, 0.0]])).isnan().all()


def test_normalized_intrinsics_are_the_same_camera_at_any_resolution() -> None:
    camera = PixelIntrinsics(fx=400.0, fy=410.0, cx=330.0, cy=235.0, width=640, height=480)
    normalized = camera.normalized()
    assert normalized == NormalizedIntrinsics(400 / 640, 410 / 480, 330 / 640, 235 / 480)
    assert normalized.pixels(480, 640) == camera
    point = torch.tensor([0.2, 0.3, 1.5], dtype=torch.float64)
    halved = normalized.pixels(240, 320)
    torch.testing.assert_close(halved.project(point), camera.project(point) / 2)


def test_windows_that_do_not_fit_the_image_are_refused() -> None:
    camera = PixelIntrinsics(fx=400.0, fy=400.0, cx=320.0, cy=240.0, width=640, height=480)
    with pytest.raises(ShapeError, match=r"window\.source"):
        camera.through(fit_window(960, 1280, 210, 280, "crop"), 210, 280)
    with pytest.raises(ShapeError, match=r"window\.destination"):
        camera.through(fit_window(480, 640, 210, 280, "crop"), 112, 112)
    wrong: Any = "stretch"
    with pytest.raises(ConfigError, match="crop or pad"):
        fit_window(480, 640, 210, 280, wrong)
    with pytest.raises(ShapeError, match="at least one pixel"):
        fit_window(480, 0, 210, 280, "crop")


def test_divisibility_names_the_nearest_sizes() -> None:
    check_divisible(210, 280)
    check_divisible(112, 112, patch=16)
    with pytest.raises(ConfigError, match=r"cameras\.wrist(.|\n)*height 224, width 322"):
        check_divisible(230, 320, where="cameras.wrist")
    with pytest.raises(ConfigError, match="height 14, width 14"):
        check_divisible(3, 14)
    with pytest.raises(ConfigError, match="positive"):
        check_divisible(0, 14)
