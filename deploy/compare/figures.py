"""A comparison in four pictures: curves, differences, mixtures, domains."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from deploy.compare.curves import MACRO, NATURAL

Json = dict[str, Any]

_DPI = 120
_COLOURS = (
    *("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7"),
    *("#a463f2", "#97bbf5", "#9c6b4e", "#9498a0"),
)
_DOMAIN_COLOURS = colormaps["tab20"]
_DASHES = ("-", "--", ":")
_GREY = "#666666"
_CONTROLS = {MACRO: "uniform", NATURAL: "natural"}
_IN_WORDS = {MACRO: "mean over domains", NATURAL: "naturally weighted mean"}
_COLUMNS = 4


def draw_figures(results: Json, out: Path) -> dict[str, Path]:
    """Draw what there are figures for; return the files by title."""
    if not results["arms"]:
        return {}
    drawn = {"Test loss over the run": _curves(results, out / "curves.png")}
    if any(control in results["arms"] for control in _CONTROLS.values()):
        drawn["Final differences to the static controls"] = _forest(results, out / "final.png")
    drawn["Mixtures over the run"] = _mixtures(results, out / "mixtures.png")
    if any(
        "uniform" in values["final_by_domain_less"]
        for arm, values in results["arms"].items()
        if arm != "uniform"
    ):
        drawn["Final test loss by domain, against uniform"] = _domains(results, out / "domains.png")
    return drawn


def _curves(results: Json, path: Path) -> Path:
    """Draw both metrics: above as they are, below as differences to the control's curve."""
    figure = _figure(11, 8)
    for column, metric in enumerate((MACRO, NATURAL)):
        above = figure.add_subplot(2, 2, column + 1)
        below = figure.add_subplot(2, 2, column + 3, sharex=above)
        control = results["arms"].get(_CONTROLS[metric])
        for index, (arm, values) in enumerate(results["arms"].items()):
            style = _style(index)
            steps = np.asarray(values["curves"]["steps"])
            above.plot(steps, _mean_curve(values, metric), label=arm, **style)
            if control is not None:
                common = _difference_curve(values, control, metric)
                if common is not None:
                    below.plot(steps, common, **style)
        above.set_title(f"test loss, {_IN_WORDS[metric]}", loc="left", fontsize=11)
        below.set_title(f"the same, less {_CONTROLS[metric]}'s", loc="left", fontsize=11)
        below.set_xlabel("step")
        _zoom(above, results, metric)
        for axes in (above, below):
            axes.set_ylabel("nats a token")
            _plain(axes)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9)
    return _save(figure, path)


def _mean_curve(values: Json, metric: str) -> NDArray[np.float64]:
    mean: NDArray[np.float64] = np.mean(list(values["curves"][metric].values()), axis=0)
    return mean


def _difference_curve(values: Json, control: Json, metric: str) -> NDArray[np.float64] | None:
    """Return the mean over the seeds that both have; None: there is none."""
    here, there = values["curves"][metric], control["curves"][metric]
    common = [np.subtract(here[seed], there[seed]) for seed in here if seed in there]
    if not common:
        return None
    mean: NDArray[np.float64] = np.mean(common, axis=0)
    return mean


def _zoom(axes: Any, results: Json, metric: str) -> None:
    """Leave out the first fifth of the curves' heights: the steep part hides all differences."""
    curves = [_mean_curve(values, metric) for values in results["arms"].values()]
    fifth = max(len(curves[0]) // 5, 1)
    late = np.concatenate([curve[fifth:] for curve in curves])
    if len(late):
        margin = 0.05 * max(float(np.ptp(late)), 1e-3)
        axes.set_ylim(float(late.min()) - margin, float(late.max()) + margin)


def _forest(results: Json, path: Path) -> Path:
    arms = list(results["arms"])
    figure = _figure(11, 1.6 + 0.34 * len(arms))
    for column, (metric, control) in enumerate(_CONTROLS.items()):
        axes = figure.add_subplot(1, 2, column + 1)
        for row, arm in enumerate(arms):
            found = results["paired"][metric][arm].get(control)
            if found is None:
                continue
            axes.plot(
                list(found["differences"].values()),
                [row] * len(found["differences"]),
                ".",
                color="#bbbbbb",
            )
            axes.plot(found["mean"], row, "o", color=_style(row)["color"])
            if found["low"] is not None:
                axes.plot([found["low"], found["high"]], [row, row], color=_style(row)["color"])
        axes.axvline(0, color=_GREY, linewidth=0.8)
        axes.set_yticks(range(len(arms)), arms if column == 0 else [""] * len(arms), fontsize=9)
        axes.set_ylim(len(arms) - 0.5, -0.5)
        axes.set_title(f"{_IN_WORDS[metric]}, less {control}'s", loc="left", fontsize=11)
        axes.set_xlabel("nats a token (left of 0 is better)")
        _plain(axes)
    return _save(figure, path)


def _mixtures(results: Json, path: Path) -> Path:
    arms, domains = results["arms"], results["domains"]
    rows = math.ceil(len(arms) / _COLUMNS)
    figure = _figure(12, 0.8 + 2.3 * rows)
    for index, (arm, values) in enumerate(arms.items()):
        axes = figure.add_subplot(rows, _COLUMNS, index + 1)
        shares = np.asarray(values["mixture"]["over_time"])
        edges = np.asarray(values["curves"]["steps"])
        stacked = np.vstack([shares, shares[-1]]).T * 100
        axes.stackplot(
            edges[-len(shares) - 1 :],
            stacked,
            labels=domains,
            colors=[_DOMAIN_COLOURS(k % _DOMAIN_COLOURS.N) for k in range(len(domains))],
            step="post",
            linewidth=0.3,
            edgecolor="white",
        )
        axes.set_title(arm, loc="left", fontsize=10)
        axes.set_ylim(0, 100)
        axes.margins(x=0)
        axes.tick_params(labelsize=8)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", frameon=False, fontsize=8)
    return _save(figure, path)


def _domains(results: Json, path: Path) -> Path:
    domains = results["domains"]
    less = {
        arm: values["final_by_domain_less"]["uniform"]
        for arm, values in results["arms"].items()
        if arm != "uniform" and "uniform" in values["final_by_domain_less"]
    }
    arms, table = list(less), np.asarray(list(less.values()))
    figure = _figure(12, 2.2 + 0.36 * len(arms))
    axes = figure.add_subplot()
    limit = max(float(np.abs(table).max()), 1e-3)
    image = axes.imshow(table, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    axes.set_xticks(range(len(domains)), domains, rotation=40, ha="right", fontsize=8)
    axes.set_yticks(range(len(arms)), arms, fontsize=9)
    for (row, column), value in np.ndenumerate(table):
        colour = "white" if abs(value) > 0.65 * limit else "black"
        axes.text(column, row, f"{value:+.2f}", ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, ax=axes, pad=0.01).set_label("nats a token")
    return _save(figure, path)


def _style(index: int) -> Json:
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "linestyle": _DASHES[index // len(_COLOURS) % len(_DASHES)],
        "linewidth": 1.6,
    }


def _figure(width: float, height: float) -> Figure:
    # Not pyplot: it keeps figures alive and looks for a display.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _plain(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(visible=True, color="#e6e6e6", linewidth=0.6)


def _save(figure: Figure, path: Path) -> Path:
    partial = path.with_name("." + path.name)
    figure.savefig(partial, dpi=_DPI, format="png")
    partial.replace(path)
    return path
