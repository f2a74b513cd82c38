"""What `spear data check` found, as tables in the terminal and as one HTML file that needs no other."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import simplejpeg
from rich.table import Table

from spear_lightning.batches import RobotBatch
from spear_lightning.robot_data.data_check import DatasetFindings, MixtureFindings

_STYLE = """
:root {color-scheme: light dark; --ink: #111; --quiet: #57606a; --line: #d0d7de; --warn: #fff3e0}
@media (prefers-color-scheme: dark) {
  :root {--ink: #e6edf3; --quiet: #9198a1; --line: #3d444d; --warn: #4a3410}
  body {background: #0d1117}
}
body {font: 14px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: var(--ink)}
h1 {font-size: 1.5em; overflow-wrap: anywhere} h2 {font-size: 1.15em; overflow-wrap: anywhere}
table {border-collapse: collapse; margin: 1em 0; display: block; overflow-x: auto}
td, th {border-bottom: 1px solid var(--line); padding: .2em .7em; text-align: right; white-space: nowrap}
td:first-child, th:first-child {text-align: left; padding-left: 0}
td:last-child, th:last-child {white-space: normal; min-width: 8em}
figure {display: inline-block; margin: .3em 1em .8em 0; vertical-align: top; width: 26em; max-width: 100%}
figure img {height: 10em; max-width: 60%; object-fit: contain; margin-right: .3em}
figcaption {font-size: 12px; color: var(--quiet)}
pre {white-space: pre-wrap; background: var(--warn); padding: .5em}
"""

_COLUMNS = ("data set", "episodes", "frames", "Hz", "share", "outside 1-99 %", "clipped", "worded", "problems")


def tables(findings: MixtureFindings) -> Iterator[Table]:
    """Yield what to print: the data sets, their ranges, their problems."""
    total = sum(each.frames for each in findings.datasets)
    overview = Table(title=f"{len(findings.datasets)} data sets, {total:,} frames")
    for column in _COLUMNS:
        overview.add_column(column, justify="left" if column == "data set" else "right", no_wrap=True)
    overview.add_column("cameras (in % of the episodes)")
    for each in findings.datasets:
        overview.add_row(*_row(each), _cameras(each))
    yield overview
    ranges = Table(title="1 % to 99 %, metres, base frame: positions | translations of chunk targets")
    for column in ("data set", "x", "y", "z", "x", "y", "z"):
        ranges.add_column(column, justify="left" if column == "data set" else "right", no_wrap=True)
    for name, cells in _ranges(findings):
        ranges.add_row(name, *cells)
    yield ranges
    if any(each.problems for each in findings.datasets):
        problems = Table(title="Problems", show_lines=True)
        problems.add_column("data set")
        problems.add_column("what")
        for each in findings.datasets:
            for problem in each.problems:
                problems.add_row(each.dataset, problem)
        yield problems


def _row(each: DatasetFindings) -> list[str]:
    if not each.usable:
        return [each.dataset, *["-"] * (len(_COLUMNS) - 2), "cannot be used"]
    percent = (each.share, each.outside, each.clipped)
    return [
        each.dataset,
        f"{each.episodes:,}",
        f"{each.frames:,}",
        f"{each.rate_hz:g}",
        *(f"{100 * value:.2f} %" for value in percent),
        f"{100 * each.worded:.0f} %",
        str(len(each.problems)) if each.problems else "none",
    ]


def _cameras(each: DatasetFindings) -> str:
    return ", ".join(f"{camera} {100 * share:.0f}" for camera, share in each.cameras.items())


def _ranges(findings: MixtureFindings) -> Iterator[tuple[str, list[str]]]:
    for each in findings.datasets:
        if each.usable:
            yield each.dataset, [*_cells(*each.position_m), *_cells(*each.translation_m)]
    if findings.statistics is not None:
        found = findings.statistics
        positions = _cells(np.array(found.position_low), np.array(found.position_high))
        yield "mixture", [*positions, *_cells(np.array(found.translation_low), np.array(found.translation_high))]


def _cells(low_3: np.ndarray, high_3: np.ndarray) -> list[str]:
    return [f"{low:.3f} to {high:.3f}" for low, high in zip(low_3, high_3, strict=True)]


def write_report(path: Path, findings: MixtureFindings, title: str) -> None:
    """Write the tables and example frames as one HTML file, at once or not at all."""
    body = [f"<h1>{html.escape(title)}</h1>"]
    body += _html_table(
        [*_COLUMNS, "cameras (in % of the episodes)"],
        [[*_row(each), _cameras(each)] for each in findings.datasets],
    )
    body.append("<p>1 % to 99 %, metres, base frame: positions | translations of chunk targets</p>")
    axes = ["data set", *(f"{what} {axis}" for what in ("position", "translation") for axis in "xyz")]
    body += _html_table(axes, [[name, *cells] for name, cells in _ranges(findings)])
    for each in findings.datasets:
        body.append(f"<h2>{html.escape(each.dataset)}</h2>")
        body += [f"<pre>{html.escape(problem)}</pre>" for problem in each.problems]
        body += _figures(each.examples) if each.examples is not None else []
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><body>{''.join(body)}</body></html>"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)


def _html_table(columns: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["<table><tr>", *(f"<th>{html.escape(column)}</th>" for column in columns), "</tr>"]
    for row in rows:
        lines += ["<tr>", *(f"<td>{html.escape(cell)}</td>" for cell in row), "</tr>"]
    return [*lines, "</table>"]


def _figures(examples: RobotBatch) -> Iterator[str]:
    """Yield samples: their pictures, as the model sees them, and their numbers."""
    for row, instruction in enumerate(examples.instructions):
        shown = [
            _picture(name, image_B3HW[row].permute(1, 2, 0).numpy())
            for name, image_B3HW in examples.images.items()
            if bool(examples.image_mask[name][row])
        ]
        x, y, z, qx, qy, qz, qw, openness = examples.state[row].tolist()
        dx, dy, dz = examples.actions[row, -1, :3].tolist()
        caption = (
            f"{instruction or '(no instruction)'}; at {x:.3f} {y:.3f} {z:.3f} m, "
            f"q {qx:.2f} {qy:.2f} {qz:.2f} {qw:.2f}, open {openness:.2f}; "
            f"last target {dx:+.3f} {dy:+.3f} {dz:+.3f} m"
        )
        yield f"<figure>{''.join(shown)}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _picture(camera: str, pixels_HW3: np.ndarray) -> str:
    data = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels_HW3), quality=85, colorspace="RGB")
    name = html.escape(camera)
    return f'<img title="{name}" alt="{name}" src="data:image/jpeg;base64,{base64.b64encode(data).decode()}">'
