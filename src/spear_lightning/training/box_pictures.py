"""Pictures on validation: what the model says about objects in 3D, drawn into the image beside the truth."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import lightning as L
import numpy as np
import torch

from spear_lightning.geometry.cameras import PixelIntrinsics
from spear_lightning.training.first_batch_picture import FirstBatchPicture
from spear_lightning.vqa.coordinate_tokens import CoordinateTokens
from spear_lightning.vqa.mixture import load_task, read_answers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from spear_lightning.batches import VqaBatch
    from spear_lightning.training.vlm_module import VLMModule, VqaValidationOutput

EDGES = tuple((vertex, vertex | bit) for vertex in range(8) for bit in (1, 2, 4) if not vertex & bit)
"""Pairs of vertices of a box, in canonical order, that an edge joins."""

COLOURS = {"true": "tab:green", "predicted": "tab:red"}
COLUMNS = 4


class BoxPictures(FirstBatchPicture):
    """Draws the first samples of the first validation batch into TensorBoard and MLflow.

    Boxes are drawn by their edges, other points as dots: green the truth, red the model's answers. Titles are
    the questions, with a mark where the answer does not parse.

    Args:
        samples: Images of the picture.
    """

    topic = "boxes"

    def __init__(self, samples: int = 8) -> None:
        super().__init__(samples)

    def draw(self, module: L.LightningModule, output: VqaValidationOutput) -> Figure:
        """Return the picture."""
        return draw_answers(output, cast("VLMModule", module).answerer.require_tokens(), self.samples)


def draw_answers(output: VqaValidationOutput, tokens: CoordinateTokens, samples: int) -> Figure:
    """Return the picture described at `BoxPictures`.

    Args:
        output: A validation batch with the model's answers.
        tokens: The 3D tokens.
        samples: Images at most.
    """
    from matplotlib.figure import Figure

    batch = output["batch"].to("cpu")
    count = min(samples, len(batch))
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(3.2 * columns, 3.0 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for plot in axes:
        plot.set_axis_off()
    for row in range(count):
        _draw_sample(axes[row], batch, row, output["texts"][row], tokens)
    return figure


def _draw_sample(plot: Axes, batch: VqaBatch, row: int, text: str, tokens: CoordinateTokens) -> None:
    (images,) = batch.images.values()
    height, width = images.shape[-2:]
    plot.imshow(images[row].permute(1, 2, 0).numpy(), extent=(0, width, height, 0))
    asked = batch.asked[row]
    tasks = [load_task(question.task) for question in asked]
    found = read_answers(text, tasks, tokens, height, width) if tasks else []
    fx, fy, cx, cy = batch.intrinsics[row].tolist()
    camera = None if np.isnan(fx) else PixelIntrinsics(fx, fy, cx, cy, width=width, height=height)
    for question, answer in zip(asked, found, strict=True):
        for name, values in (("true", question.values), ("predicted", None if answer is None else answer.values)):
            if values is not None:
                draw_points(plot, values, camera, COLOURS[name])
    lines = [
        f"{line[:56]}{'' if answer is not None else ' (no answer)'}"
        for line, answer in zip(batch.questions[row].split("\n"), found, strict=False)
    ]
    plot.set_title("\n".join(lines), fontsize=5)
    plot.set_xlim(0, width)
    plot.set_ylim(height, 0)


def draw_points(plot: Axes, values: np.ndarray, camera: PixelIntrinsics | None, colour: str) -> None:
    """Draw points into an image: eight by the edges of their box, others as crosses.

    Args:
        plot: Where the image is shown, in pixels.
        values: (n, 3) points in the camera frame, in any unit, or (n, 2) pixels; anything else is not drawn.
        camera: Intrinsics of the image; without, points of space are not drawn, nor are those behind the camera.
        colour: Of the lines.
    """
    if values.ndim != 2:
        return
    pixels = values
    if values.shape[1] == 3:
        # Lengths in any unit have the same place in the image.
        if camera is None or (values[:, 2] <= 0).any():
            return
        pixels = camera.project(torch.from_numpy(values)).numpy()
    if len(pixels) == 8:
        for first, second in EDGES:
            plot.plot(*pixels[[first, second]].T, color=colour, linewidth=0.8)
    else:
        plot.plot(*pixels.T, color=colour, marker="+", linestyle="", markersize=4)
