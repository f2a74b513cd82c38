"""A page to judge labels by, in one file that needs no other: pictures, boxes from above, histograms."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from spear_lightning.labeling.assembly import DROPPED
from spear_lightning.labeling.label_statistics import LabelStatistics, measure
from spear_lightning.labeling.records import ImageLabel
from spear_lightning.labeling.report_pictures import draw_from_above, draw_label, ink_on, object_colours
from spear_lightning.labeling.store import LabelStore

MOST_NAMES = 40

STYLE = """
:root { color-scheme: light dark; --ink: #111; --quiet: #57606a; --line: #d0d7de; --panel: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --quiet: #9198a1; --line: #3d444d; --panel: #161b22; }
  body { background: #0d1117; }
}
body { font: 14px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 1100px; padding: 0 1rem; }
body { color: var(--ink); }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 2rem; }
h3 { font-size: 1rem; margin: 0 0 .4rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; }
td, th { padding: .15rem .9rem .15rem 0; text-align: right; vertical-align: top; }
th { color: var(--quiet); font-weight: 600; } td, th { white-space: nowrap; font-variant-numeric: tabular-nums; }
td:first-child, th:first-child, td.text { text-align: left; }
td.text + td.text { white-space: normal; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: 1.5rem; }
.charts svg { max-width: 100%; } figure { margin: 0; }
.names { columns: 2 24rem; column-gap: 2rem; }
.names div { display: grid; grid-template-columns: 12rem 3rem 1fr; gap: .6rem; break-inside: avoid; }
.names span { overflow-wrap: anywhere; } .names span + span { text-align: right; }
.names svg { width: 100%; height: 10px; align-self: center; }
.label { border-top: 1px solid var(--line); padding: 1rem 0; break-inside: avoid; }
.views { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
.views img { max-width: 100%; height: auto; }
.above { background: var(--panel); max-width: 100%; } .above text { font-size: 12px; fill: var(--ink); }
.above .axis, .axis { font-size: 11px; fill: var(--quiet); }
.median { stroke: var(--quiet); stroke-dasharray: 4 4; }
.camera { fill: var(--quiet); } .bar { fill: #3b78f0; }
.chip { display: inline-block; min-width: 1.4em; text-align: center; border-radius: 3px; }
.quiet { color: var(--quiet); font-weight: 400; }
"""


def write_report(folder: str | Path, out: str | Path, images: int = 50, seed: int = 0, width: int = 640) -> Path:
    """Write the page.

    Args:
        folder: A label store.
        out: The HTML file.
        images: Labels that are shown, drawn at random; all if there are not more.
        seed: Of the draw.
        width: Of the pictures, pixels.

    Returns:
        The file.

    Raises:
        DataError: If there are no labels, or some are broken.
    """
    # Read in order: one row group after another, and those with masks are large.
    store = LabelStore(folder, masks=True, cached_groups=1)
    found = measure(folder)
    chosen = np.random.default_rng(seed).permutation(len(store))[:images]
    labels = [_label(*store.read(int(index)), width) for index in np.sort(chosen)]
    title = f"Labels in {'/'.join(Path(folder).resolve().parts[-2:])}"
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>"
        f"{_overview(found)}{_charts(found)}{_troubles(found)}"
        f"<h2>{len(labels)} of {len(store):,} labels</h2>"
        f'<p class="quiet">Masks in colour; near faces of boxes thick, far ones thin. From above, cut to the '
        f"objects, the camera is below, in the triangle's column; the dashed line is the image's median depth.</p>"
        f"{''.join(labels)}</body></html>"
    )
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, out)
    return out


def _overview(found: LabelStatistics) -> str:
    images, objects = len(found.per_image_N), int(found.per_image_N.sum())
    rows = [
        ("images", f"{images:,}"),
        ("objects", f"{objects:,} under {len(found.names):,} names"),
        ("objects an image", f"{found.per_image_N.mean():.1f}"),
        ("unit", ", ".join(sorted(found.units))),
        *((step, made) for step, made in sorted(found.provenance)),
    ]
    return _table([], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; its cells are text, not markup."""
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f'<td class="text">{html.escape(cell)}</td>' for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table>{f"<tr>{top}</tr>" if top else ""}{body}</table></div>'


def _charts(found: LabelStatistics) -> str:
    metric = set(found.units) == {"metric"}
    charts = [
        histogram("Objects an image", found.per_image_N, whole=True),
        histogram("Depth / median depth of the image", found.depth_M),
        histogram("Distance from the camera" + (" (m)" if metric else ""), found.distance_M),
        histogram("Longest edge / distance", found.size_M),
        histogram("Points of a box", found.points_M),
        histogram("Residual", found.residual_M),
        histogram("Detector's score", found.score_M),
    ]
    names = found.names.most_common(MOST_NAMES)
    if not names:
        return '<h2>Numbers</h2><p class="quiet">There are no objects.</p>'
    more = len(found.names) - len(names)
    rest = f'<p class="quiet">and {more:,} less frequent</p>' if more else ""
    return f'<h2>Numbers</h2><div class="charts">{"".join(charts)}</div><h2>Names</h2>{bars(names)}{rest}'


def histogram(title: str, values: np.ndarray, bins: int = 24, whole: bool = False) -> str:
    """Return a histogram as a figure with inline SVG; its last bin holds everything beyond the 99th percentile."""
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    if not len(values):
        return ""
    low, high = float(values.min()), float(np.quantile(values, 0.99))
    if whole:
        low, high, bins = low - 0.5, values.max() + 0.5, int(values.max() - low + 1)
    elif high <= low:
        high = low + 1e-6 + abs(low) * 1e-3
    counts, edges = np.histogram(values.clip(low, high), min(bins, 60), (low, high))
    width, height = 300, 120
    ends = (edges[0] + 0.5, edges[-1] - 0.5) if whole else (low, high)
    step = width / len(counts)
    rects = "".join(
        f'<rect class="bar" x="{index * step:.1f}" width="{max(step - 1, 1):.1f}" '
        f'y="{height * (1 - count / counts.max()):.1f}" height="{height * count / counts.max():.1f}">'
        f"<title>{edges[index]:.3g} to {edges[index + 1]:.3g}: {count:,}</title></rect>"
        for index, count in enumerate(counts)
    )
    return (
        f"<figure><h3>{html.escape(title)}</h3>"
        f'<svg viewBox="0 0 {width} {height + 16}" width="{width}" height="{height + 16}" role="img">'
        f"<title>{html.escape(title)}</title>{rects}"
        f'<text class="axis" x="0" y="{height + 13}">{_number(ends[0])}</text>'
        f'<text class="axis" x="{width}" y="{height + 13}" text-anchor="end">{_number(ends[1])}</text>'
        f'<text class="axis" x="{width / 2}" y="{height + 13}" text-anchor="middle">median '
        f"{_number(float(np.median(values)))}</text></svg></figure>"
    )


def _number(value: float) -> str:
    """Return three digits, without exponents: what is small beside them is 0."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return "0" if abs(value) < 5e-5 else f"{value:.3g}"


def bars(counts: Sequence[tuple[str, int]]) -> str:
    """Return counts by name as rows, each with a bar."""
    most = max((count for _, count in counts), default=1)
    rows = "".join(
        f"<div><span>{html.escape(name)}</span><span>{count:,}</span><svg>"
        f'<rect class="bar" width="{100 * count / most:.1f}%" height="10"/></svg></div>'
        for name, count in counts
    )
    return f'<div class="names">{rows}</div>'


def _troubles(found: LabelStatistics) -> str:
    parts = []
    if found.dropped:
        rows = [(reason, f"{count:,}") for reason, count in found.dropped.most_common()]
        parts.append(f"<h2>{_counted(found.dropped.total(), 'detection')} without a box</h2>{_table([], rows)}")
    if found.failures:
        failed = [(step, reason, f"{count:,}") for (step, reason), count in found.failures.most_common()]
        parts.append(f"<h2>{_counted(found.failures.total(), 'image')} without a label</h2>{_table([], failed)}")
    return "".join(parts)


def _counted(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def _label(label: ImageLabel, image_HW3: np.ndarray, width: int) -> str:
    picture = base64.b64encode(draw_label(label, image_HW3, width)).decode()
    name = html.escape(label.image_id)
    dropped = label.provenance.get(DROPPED, "").splitlines()
    note = f'<p class="quiet">No box: {html.escape("; ".join(dropped))}</p>' if dropped else ""
    above = draw_from_above(label) if label.objects else ""
    return (
        f'<section class="label"><h3>{name} <span class="quiet">{label.width} x {label.height}, median depth '
        f'{label.median_depth:.3g}</span></h3><div class="views">'
        f'<img alt="{name}" src="data:image/jpeg;base64,{picture}">{above}</div>'
        f"{_objects(label)}{note}</section>"
    )


def _objects(label: ImageLabel) -> str:
    if not label.objects:
        return '<p class="quiet">No objects.</p>'
    metric = label.unit == "metric"
    unit, digits = (" (m)", ".3f") if metric else ("", "#.3g")
    head = ["object", f"distance{unit}", f"edges x \u00d7 y \u00d7 z{unit}", "points", "residual"]
    scored = not all(np.isnan(item.detection_score) for item in label.objects)
    rows = []
    for number, (item, colour) in enumerate(
        zip(label.objects, object_colours(len(label.objects)), strict=True), start=1
    ):
        edges = " \u00d7 ".join(f"{edge:{digits}}" for edge in item.extents)
        score = (
            f"<td>{'' if np.isnan(item.detection_score) else f'{item.detection_score:.2f}'}</td>" if scored else ""
        )
        rows.append(
            f'<tr><td><span class="chip" style="background:rgb{colour};color:rgb{ink_on(colour)}">{number}</span> '
            f"{html.escape(item.name)}</td><td>{item.distance:{digits}}</td><td>{edges}</td><td>{item.points:,}</td>"
            f"<td>{item.residual:.3f}</td>{score}</tr>"
        )
    cells = "".join(f"<th>{cell}</th>" for cell in head + ["score"] * scored)
    return f'<div class="wide"><table><tr>{cells}</tr>{"".join(rows)}</table></div>'
