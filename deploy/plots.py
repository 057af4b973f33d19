"""A run in three pictures: the mixture over time, loss per domain, alignment of the gradients."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from deploy.record import RunRecord

MIXTURE_PLOT = "mixture.png"
LOSS_PLOT = "loss.png"
ALIGNMENT_PLOT = "alignment.png"

_DPI = 130
_COLOURS = (
    *("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7"),
    *("#a463f2", "#97bbf5", "#9c6b4e", "#9498a0"),
)
_GREY = "#666666"
_NEUTRAL = "#e4e4e4"

_LEAST_LIMIT = 0.1
"""Cosines within this of 0 never fill the scale."""

_MOST_NUMBERED = 12
"""More domains than this leave no room for numbers."""


def draw_plots(record: RunRecord, domains: Sequence[str], out: Path, *, title: str) -> list[Path]:
    """Draw what the ledger has the numbers for; return the files."""
    drawn = []
    if record.steps:
        drawn += [
            _mixture(record, domains, out / MIXTURE_PLOT, title),
            _loss(record, domains, out / LOSS_PLOT, title),
        ]
    measured = [step for step in sorted(record.steps) if _alignment(record, step) is not None]
    if measured:
        drawn.append(_heat_maps(record, measured, domains, out / ALIGNMENT_PLOT, title))
    return drawn


def _mixture(record: RunRecord, domains: Sequence[str], path: Path, title: str) -> Path:
    steps, shares = mixture_by_step(record)
    figure, axes = _axes(title, "the mixture that each step was given")
    # Edges rather than points: a plan holds from the beginning of its first step on.
    edges = np.append(steps, steps[-1] + 1)
    stacked = np.vstack([shares, shares[-1]]).T
    axes.stackplot(
        edges,
        stacked * 100,
        labels=domains,
        colors=_colours(len(domains)),
        step="post",
        linewidth=0.4,
        edgecolor="white",
    )
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, 100)
    axes.set_xlabel("step")
    axes.set_ylabel("share of the sequences, %")
    handles, labels = axes.get_legend_handles_labels()
    # From the top down, as the areas lie.
    axes.legend(handles[::-1], labels[::-1], **_LEGEND)
    return _save(figure, path)


def mixture_by_step(record: RunRecord) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the trained steps and, [steps, domains], the shares that were in force."""
    steps = np.asarray(sorted(record.steps), dtype=np.int64)
    shares = np.asarray([record.steps[int(step)].observation.planned for step in steps])
    return steps, shares


def _loss(record: RunRecord, domains: Sequence[str], path: Path, title: str) -> Path:
    steps, losses = record.loss()
    figure, axes = _axes(title, "training loss of each domain")
    for index, (domain, colour) in enumerate(zip(domains, _colours(len(domains)), strict=True)):
        seen = np.isfinite(losses[:, index])
        if not seen.any():
            continue
        axes.plot(steps[seen], losses[seen, index], color=colour, alpha=0.22, linewidth=0.8)
        smooth = _smoothed(losses[seen, index])
        axes.plot(steps[seen], smooth, color=colour, linewidth=1.8, label=domain)
    axes.set_xlim(steps[0], max(steps[-1], steps[0] + 1))
    axes.set_xlabel("step")
    axes.set_ylabel("nats a token")
    axes.grid(visible=True, color="#e6e6e6", linewidth=0.6)
    axes.legend(**_LEGEND)
    return _save(figure, path)


def _smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean of the values around each, over a twelfth of them."""
    half = max(len(values) // 24, 1)
    sums = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.minimum(np.arange(len(values)) + half + 1, len(values))
    starts = np.maximum(np.arange(len(values)) - half, 0)
    means: NDArray[np.float64] = (sums[ends] - sums[starts]) / (ends - starts)
    return means


def _heat_maps(
    record: RunRecord, measured: list[int], domains: Sequence[str], path: Path, title: str
) -> Path:
    quarter = max(len(measured) // 4, 1)
    spans = {"first": measured[:quarter], "last": measured[-quarter:]}
    cosines = {name: _mean_cosines(record, steps) for name, steps in spans.items()}
    limit = max(_LEAST_LIMIT, *(_largest_beside_diagonal(matrix) for matrix in cosines.values()))
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}: how far the domains' gradients agree", fontsize=12)
    image = None
    for position, (name, steps) in enumerate(spans.items(), start=1):
        axes = figure.add_subplot(1, 2, position)
        # A domain always agrees with itself; in colour that would drown all else.
        beside = np.where(np.eye(len(domains), dtype=bool), np.nan, cosines[name])
        axes.set_facecolor(_NEUTRAL)
        image = axes.imshow(beside, cmap="RdBu_r", vmin=-limit, vmax=limit)
        axes.set_title(f"steps {steps[0]}-{steps[-1]} ({name} quarter)", fontsize=10, color=_GREY)
        axes.set_xticks(range(len(domains)), domains, rotation=40, ha="right", fontsize=9)
        axes.set_yticks(range(len(domains)), domains, fontsize=9)
        _write_numbers(axes, beside, limit)
    if image is not None:
        bar = figure.colorbar(image, ax=figure.axes, shrink=0.85, pad=0.02)
        bar.set_label("cosine of the mean gradients")
    return _save(figure, path)


def _largest_beside_diagonal(matrix: NDArray[np.float64]) -> float:
    beside = np.abs(matrix[~np.eye(len(matrix), dtype=bool)])
    return float(np.nanmax(beside)) if np.isfinite(beside).any() else 0.0


def _write_numbers(axes: Any, cosines: NDArray[np.float64], limit: float) -> None:
    if len(cosines) > _MOST_NUMBERED:
        return
    for (row, column), value in np.ndenumerate(cosines):
        if np.isfinite(value):
            colour = "white" if abs(value) > 0.65 * limit else "black"
            text = f"{round(value, 2) + 0.0:.2f}"  # + 0.0 makes -0.00 a 0.00
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)


def _alignment(record: RunRecord, step: int) -> NDArray[np.float64] | None:
    return record.steps[step].observation.alignment


def _mean_cosines(record: RunRecord, steps: Sequence[int]) -> NDArray[np.float64]:
    """Return cosines from the mean, over steps, of the inner products of mean gradients."""
    total: NDArray[np.float64] | None = None
    for step in steps:
        matrix = _alignment(record, step)
        if matrix is None:
            continue
        tokens = np.maximum(record.steps[step].observation.tokens, 1).astype(np.float64)
        scaled = matrix / np.outer(tokens, tokens)
        total = scaled if total is None else total + scaled
    if total is None:
        raise ValueError("no step of these has an alignment")
    norms = np.sqrt(np.maximum(np.diag(total), 0))
    scale = np.outer(norms, norms)
    cosines: NDArray[np.float64] = np.divide(
        total, scale, out=np.full_like(total, np.nan), where=scale > 0
    )
    return np.clip(cosines, -1, 1)


_LEGEND: dict[str, Any] = {
    "loc": "center left",
    "bbox_to_anchor": (1.01, 0.5),
    "frameon": False,
    "fontsize": 9,
}


def _axes(title: str, subtitle: str) -> tuple[Figure, Any]:
    # Not pyplot: it keeps figures alive and looks for a display.
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(f"{title}: {subtitle}", loc="left", fontsize=12)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _colours(number: int) -> list[str]:
    return [_COLOURS[index % len(_COLOURS)] for index in range(number)]


def _save(figure: Figure, path: Path) -> Path:
    partial = path.with_name("." + path.name)
    figure.savefig(partial, dpi=_DPI, format="png")
    partial.replace(path)
    return path
