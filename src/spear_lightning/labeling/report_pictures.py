"""Labels drawn: masks and 3D boxes on the photograph, and the same boxes from above."""

from __future__ import annotations

import colorsys
import io

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from spear_lightning.labeling.records import ImageLabel, ObjectLabel
from spear_lightning.labeling.run_lengths import decode_mask

EDGES = tuple((k, k | bit) for k in range(8) for bit in (1, 2, 4) if not k & bit)
"""Pairs of vertices that an edge connects: they differ in the sign of one axis."""

LARGEST_SCALE = 4.0
"""Small pictures are enlarged by so much at most."""

MASK_SHARE = 0.45
"""How much of a mask's colour covers the photograph."""

NUMBER_SIZE = 13
"""Of the numbers on photographs, pixels."""

ROOM = 1.25
"""Boxes from above fill their drawing but for a margin."""


def object_colours(count: int) -> list[tuple[int, int, int]]:
    """Return colours that are easy to tell apart; neighbours in the list are far apart in hue."""
    hues = (0.61803 * number % 1 for number in range(count))
    return [tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.85, 1.0)) for hue in hues]  # type: ignore[misc]


def ink_on(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return black or white, whichever is easier to read on a colour."""
    red, green, blue = colour
    return (0, 0, 0) if 0.3 * red + 0.59 * green + 0.11 * blue > 110 else (255, 255, 255)


def draw_label(label: ImageLabel, image_HW3: np.ndarray, width: int) -> bytes:
    """Draw masks, projected 3D boxes and numbers on a photograph.

    The far face of a box is drawn thin and the near one thick, so that its depth can be seen. Without a camera, 2D
    boxes are drawn instead.

    Args:
        label: The label, with masks if they shall be drawn.
        image_HW3: uint8 RGB, its image.
        width: Of the drawing, pixels; less for small images, which are enlarged up to `LARGEST_SCALE` times.

    Returns:
        A JPEG.
    """
    pixels = image_HW3.astype(np.float32)
    colours = object_colours(len(label.objects))
    for item, colour in zip(label.objects, colours, strict=True):
        if item.mask.size:
            mask_HW = decode_mask(item.mask, label.height, label.width)
            pixels[mask_HW] += MASK_SHARE * (np.array(colour, np.float32) - pixels[mask_HW])
    drawn = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    scale = min(LARGEST_SCALE, width / label.width)
    drawn = drawn.resize((round(label.width * scale), round(label.height * scale)), Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(drawn)
    for number, (item, colour) in enumerate(zip(label.objects, colours, strict=True), start=1):
        lines = _box_lines(label, item)
        for line, thickness in lines:
            pen.line([tuple(point * scale) for point in line], fill=colour, width=thickness)
        left, top = item.box_2d[:2] * scale
        _write_number(pen, number, (float(left), float(top)), colour)
    buffer = io.BytesIO()
    drawn.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def _box_lines(label: ImageLabel, item: ObjectLabel) -> list[tuple[np.ndarray, int]]:
    """Return lines, each (2, 2) pixels, and their thickness."""
    if label.intrinsics is None:
        left, top, right, bottom = item.box_2d
        corners = np.array([[left, top], [right, top], [right, bottom], [left, bottom]])
        return [(np.stack([corners[k], corners[(k + 1) % 4]]), 2) for k in range(4)]
    vertices = label.intrinsics.project(torch.from_numpy(item.vertices)).numpy()
    # The far face has bit 2 of its vertices set; the near face is drawn last, on top.
    ordered = sorted(EDGES, key=lambda edge: -((edge[0] >> 2) + (edge[1] >> 2)))
    return [(vertices[list(edge)], 3 if max(edge) < 4 else 1) for edge in ordered]


def _write_number(
    pen: ImageDraw.ImageDraw, number: int, place: tuple[float, float], colour: tuple[int, int, int]
) -> None:
    font = ImageFont.load_default(NUMBER_SIZE)
    left, top, right, bottom = pen.textbbox(place, str(number), font=font)
    pen.rectangle((left - 3, top - 2, right + 3, bottom + 2), fill=colour)
    pen.text(place, str(number), fill=ink_on(colour), font=font)


def draw_from_above(label: ImageLabel, size: int = 240) -> str:
    """Draw the boxes as seen from above the camera, as SVG: x to the right, z upwards, the camera below.

    Args:
        label: The label, with objects.
        size: Width and height in pixels, filled by the objects.

    Returns:
        An `<svg>` element.
    """
    from scipy.spatial import ConvexHull

    flat = [item.vertices[:, [0, 2]] for item in label.objects]
    low, high = np.concatenate(flat).min(0), np.concatenate(flat).max(0)
    width = ROOM * float((high - low).max())
    corner = (low + high) / 2 - width / 2

    def place(points: np.ndarray) -> np.ndarray:
        return (points - corner) / width * [size, -size] + [0, size]

    parts = []
    for number, (points, colour) in enumerate(zip(flat, object_colours(len(flat)), strict=True), start=1):
        outline = place(points[ConvexHull(points, qhull_options="QJ").vertices])
        x, z = place(points.mean(0))
        red, green, blue = colour
        parts.append(
            f'<polygon points="{" ".join(f"{x:.1f},{z:.1f}" for x, z in outline)}" '
            f'fill="rgb({red},{green},{blue})" fill-opacity="0.4" stroke="rgb({red},{green},{blue})"/>'
            f'<text x="{x:.1f}" y="{z:.1f}" text-anchor="middle" dominant-baseline="middle">{number}</text>'
        )
    camera, median = place(np.array([0.0, label.median_depth]))
    camera = float(np.clip(camera, 6, size - 6))
    unit = " m" if label.unit == "metric" else ""
    return (
        f'<svg class="above" viewBox="0 0 {size} {size}" width="{size}" height="{size}" role="img">'
        f"<title>from above</title>"
        f'<line x1="0" x2="{size}" y1="{median:.1f}" y2="{median:.1f}" class="median"/>'
        f'<path d="M{camera - 6:.1f},{size} L{camera:.1f},{size - 12} L{camera + 6:.1f},{size} Z" class="camera"/>'
        f"{''.join(parts)}"
        f'<text class="axis" x="4" y="14">{width:.2g}{unit} across</text></svg>'
    )
