"""Plots as SVG text: they go into a page, take its colours, and need nothing else."""

from __future__ import annotations

import base64
import html
import math
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from deploy import screen

Array = NDArray[np.float64]

WIDTH, HEIGHT = 900, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 10, 34
_TICKS = 5
_FLAT_CELLS = 40
"""More rows than this have no names at a heat map."""


def colour(index: int) -> str:
    """Return the colour of a domain: hues that are far apart come first."""
    hue = (index * 137.508 + 215) % 360
    return f"hsl({hue:.0f} {(62, 48)[index // 10 % 2]}% {(52, 62, 44)[index // 7 % 3]}%)"


def printable(text: str) -> str:
    """Return text as it may stand in a page: escaped, and without what turns it around."""
    return html.escape(screen.printable(text))


def lines(
    x: Array, series: Mapping[str, Array], title: str, *, unit: str, percent: bool = False
) -> str:
    """Return curves over `x`; NaN breaks a curve. Names are those of the legend."""
    values = np.concatenate([*series.values(), np.zeros(0)])
    finite = values[np.isfinite(values)]
    if not len(finite):
        return ""
    low, high = float(finite.min()), float(finite.max())
    low = min(low, 0.0) if percent or low < 0.5 * high else low
    axes = _Axes(x, low, high if high > low else low + 1)
    drawn = [
        f"<path d='{_path(axes, x, values)}' fill='none' stroke='{colour(index)}' "
        f"stroke-width='1.6'><title>{printable(name)}</title></path>"
        for index, (name, values) in enumerate(series.items())
    ]
    return _figure(title, axes, drawn, list(series), unit=unit, percent=percent)


def areas(x: Array, series: Mapping[str, Array], title: str) -> str:
    """Return shares stacked up to 100%, the first at the bottom."""
    stack = np.nan_to_num(np.stack([*series.values()]))
    known = stack.sum(axis=0) > 0
    if not known.any():
        return ""
    x, tops = x[known], np.cumsum(stack[:, known], axis=0)
    if len(x) == 1:
        x, tops = np.array([x[0], x[0] + 1]), np.repeat(tops, 2, axis=1)
    axes = _Axes(x, 0.0, 1.0)
    below = np.zeros(len(x))
    drawn = []
    for index, (name, top) in enumerate(zip(series, tops, strict=True)):
        there = " ".join(_points(axes, x, top))
        back = " ".join(reversed(list(_points(axes, x, below))))
        drawn.append(
            f"<polygon points='{there} {back}' fill='{colour(index)}'>"
            f"<title>{printable(name)}</title></polygon>"
        )
        below = top
    return _figure(title, axes, drawn, list(series), unit="share", percent=True)


def heat_map(matrix: Array, names: Sequence[str], title: str) -> str:
    """Return a square of values of -1 to 1, blue to red; its diagonal is left grey."""
    number = len(matrix)
    cell = max(480 / number, 1)
    named = number <= _FLAT_CELLS
    left = 150 if named else 10
    size = cell * number
    picture = base64.b64encode(_png(matrix)).decode()
    parts = [
        f"<image x='{left}' y='10' width='{size:.1f}' height='{size:.1f}' "
        f"preserveAspectRatio='none' style='image-rendering:pixelated' "
        f"href='data:image/png;base64,{picture}'/>"
    ]
    for index, name in enumerate(names if named else ()):
        middle = 10 + (index + 0.5) * cell
        text = printable(name if len(name) <= 20 else name[:19] + "…")
        parts.append(
            f"<text x='{left - 6}' y='{middle + 4:.1f}' text-anchor='end'>{text}</text>"
            f"<text transform='translate({left + middle - 10:.1f} {size + 18:.1f}) rotate(60)'>"
            f"{text}</text>"
        )
    height = size + (170 if named else 20)
    return _wrapped(title, parts, left + size + 120, height, legend="")


class _Axes:
    """Where values lie in the picture."""

    def __init__(self, x: Array, low: float, high: float) -> None:
        self.low, self.high = low, high
        self.first, self.last = float(x[0]), float(max(x[-1], x[0] + 1))

    def at(self, x: float, y: float) -> tuple[float, float]:
        width, height = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM
        return (
            _LEFT + (x - self.first) / (self.last - self.first) * width,
            _TOP + (self.high - y) / (self.high - self.low) * height,
        )


def _points(axes: _Axes, x: Array, y: Array) -> Iterator[str]:
    for at, value in zip(x.tolist(), y.tolist(), strict=True):
        across, down = axes.at(at, value)
        yield f"{across:.1f},{down:.1f}"


def _path(axes: _Axes, x: Array, y: Array) -> str:
    parts, pen = [], "M"
    for at, value in zip(x.tolist(), y.tolist(), strict=True):
        if not math.isfinite(value):
            pen = "M"
            continue
        across, down = axes.at(at, value)
        parts.append(f"{pen}{across:.1f} {down:.1f}")
        pen = "L"
    # A point that stands alone is drawn as a dot.
    return "".join(parts) + ("h1" if len(parts) == 1 else "")


def _figure(
    title: str, axes: _Axes, drawn: Sequence[str], names: list[str], *, unit: str, percent: bool
) -> str:
    parts = [*_grid(axes, percent), *drawn]
    parts.append(f"<text x='{WIDTH - _RIGHT}' y='{HEIGHT - 4}' text-anchor='end'>step</text>")
    if not percent and unit:
        title = f"{title} ({unit})"
    entries = [
        f"<li><i style='background:{colour(index)}'></i>{printable(name)}</li>"
        for index, name in enumerate(names)
    ]
    # A curve that is alone is what the title says.
    legend = f"<ul class='legend'>{''.join(entries)}</ul>" if len(entries) > 1 else ""
    return _wrapped(title, parts, WIDTH, HEIGHT, legend=legend)


def _grid(axes: _Axes, percent: bool) -> Iterator[str]:
    for value in _ticks(axes.low, axes.high):
        _, down = axes.at(axes.first, value)
        shown = f"{value:.0%}" if percent and axes.high >= 0.05 else f"{value:.4g}"
        shown = f"{value:.2%}" if percent and axes.high < 0.05 else shown
        yield f"<path class='grid' d='M{_LEFT} {down:.1f}H{WIDTH - _RIGHT}'/>"
        yield f"<text x='{_LEFT - 6}' y='{down + 4:.1f}' text-anchor='end'>{shown}</text>"
    for value in _ticks(axes.first, axes.last):
        across, _ = axes.at(value, axes.low)
        yield f"<text x='{across:.1f}' y='{HEIGHT - 18}' text-anchor='middle'>{value:,.0f}</text>"


def _ticks(low: float, high: float) -> Iterator[float]:
    """Yield a few round numbers from `low` to `high`."""
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1):
        yield number * step


def _wrapped(title: str, parts: Sequence[str], width: float, height: float, *, legend: str) -> str:
    shown = printable(title)
    return (
        f"<figure><figcaption>{shown}</figcaption><svg viewBox='0 0 {width:.0f} {height:.0f}' "
        f"role='img' aria-label='{shown}'>{''.join(parts)}</svg>{legend}</figure>"
    )


def _png(matrix: Array) -> bytes:
    """Return [rows, columns] values of -1 to 1 as a picture, a pixel each."""
    number = len(matrix)
    limit = np.nan_to_num(np.abs(matrix[~np.eye(number, dtype=bool)])).max(initial=0.1)
    value = np.clip(np.nan_to_num(matrix) / limit, -1, 1)[..., None]
    grey = np.array([232.0, 232.0, 232.0])
    ends = np.where(value > 0, np.array([178.0, 24.0, 43.0]), np.array([33.0, 102.0, 172.0]))
    pixels = grey + np.abs(value) * (ends - grey)
    pixels[np.arange(number), np.arange(number)] = (150, 150, 150)
    rows = np.concatenate([np.zeros((number, 1)), pixels.reshape(number, -1)], axis=1)
    header = struct.pack(">IIBBBBB", number, number, 8, 2, 0, 0, 0)
    data = zlib.compress(rows.astype(np.uint8).tobytes())
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND")


def _chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
