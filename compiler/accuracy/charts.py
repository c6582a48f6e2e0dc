"""The report's charts: SVG inside the page, in the page's own colors, light or dark (the classes are report.html's)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

WIDTH, LEFT, RIGHT = 320, 56, 8  # pixels of a chart, and what its labels take of them
DECIBELS = (0.0, 60.0)  # every axis of SQNR; 60 dB is an error of a thousandth, float arithmetic is beyond
STRIP = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)  # where the axis of a strip may end, times a power of ten
TINY = 1e-30  # what is smaller is zero
COLORS = ("first", "second", "third")


@dataclass(frozen=True)
class Scale:
    """A linear axis: values low..high to pixels start..end."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The pixel of a value; of one beyond the axis, the pixel at its end."""
        share = (value - self.low) / (self.high - self.low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    @property
    def units_a_pixel(self) -> float:
        return (self.high - self.low) / abs(self.end - self.start)


class Series(NamedTuple):
    """Values by their place on the x axis, from 0 or at `x`."""

    label: str
    values: Sequence[float]
    x: Sequence[float] | None = None

    def points(self) -> list[tuple[float, float]]:
        return list(zip(range(len(self.values)) if self.x is None else self.x, self.values, strict=True))


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) that hold low..high between the outer two.

    Around values that are as good as constant they are a tenth of it wide: labels tell no finer differences apart.
    """
    size = max(abs(low), abs(high))
    if not high - low > max(1e-4 * size, TINY):
        room = size / 10 if size > TINY else 1.0
        low, high = low - room, high + room
    step = _round_up((high - low) / count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def _round_up(value: float, factors: Sequence[float] = (1, 2, 5)) -> float:
    """The least of the factors times a power of ten that is not below a positive value."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (*factors, 10) if factor * power >= value * (1 - 1e-9))


def decibel_lines(summary: str, series: Sequence[Series], x_label: str, *, joined: bool = True) -> Markup:
    """SQNR over layers, steps or ranks, on the one axis of all; what is beyond it is a triangle at its edge."""
    y_ticks = ticks(*DECIBELS, count=3)
    return _chart(summary, series, x_label, y_ticks, "dB", joined=joined)


def zero_based_line(summary: str, series: Series, x_label: str, unit: str) -> Markup:
    """Values from zero up, over their index."""
    top = max((value for value in series.values if math.isfinite(value)), default=0.0)
    return _chart(summary, [series], x_label, ticks(0.0, top or 1.0), unit, joined=True)


def residual_panel(summary: str, reference: np.ndarray, engine: np.ndarray) -> Markup:
    """A joint over the chunk, float [H] each: the reference as a line and, on a scale of its own, what the engine adds.

    The strip's label says how many times larger its scale is than the one above it.
    """
    residual = engine.astype(np.float64) - reference
    x = Scale(0, max(1, len(reference) - 1), LEFT, WIDTH - RIGHT)
    y_ticks = ticks(float(np.nanmin(reference)), float(np.nanmax(reference)), 3)
    upper = Scale(y_ticks[0], y_ticks[-1], 104, 8)
    finite = np.abs(residual[np.isfinite(residual)])
    bound = _round_up(float(finite.max()), STRIP) if finite.size and finite.max() > 0 else upper.high - upper.low
    strip = Scale(-bound, bound, 178, 130)
    return _svg(
        summary,
        196,
        _grid(upper, y_ticks),
        _curve(_pixels(enumerate(reference), x, upper), "line reference"),
        _grid(strip, [-bound, 0.0, bound]),
        _area(_pixels(enumerate(residual), x, strip), strip(0.0)),
        _curve(_pixels(enumerate(residual), x, strip), "line first"),
        _text(WIDTH - RIGHT, 123, _magnification(finite, upper, strip), "end"),
        _x_labels(x, [0, len(reference) - 1], 192),
    )


def _magnification(finite: np.ndarray, upper: Scale, strip: Scale) -> str:
    if not finite.size:
        return "not finite"
    if not finite.max() > 0:
        return "no error"
    ratio = upper.units_a_pixel / strip.units_a_pixel
    times = "\N{MULTIPLICATION SIGN}"
    return (
        f"error, {_rounded(ratio):g}{times} magnified" if ratio >= 1 else f"error, {_rounded(1 / ratio):g}{times} reduced"
    )


def _rounded(ratio: float) -> float:
    """To two digits."""
    return float(f"{ratio:.2g}")


def _chart(
    summary: str, series: Sequence[Series], x_label: str, y_ticks: list[float], unit: str, *, joined: bool
) -> Markup:
    places = [place for each in series for place, _ in each.points()]
    x = Scale(min(places, default=0), max([*places, min(places, default=0) + 1]), LEFT + 6, WIDTH - RIGHT - 6)
    y = Scale(y_ticks[0], y_ticks[-1], 160, 30)
    parts = [_grid(y, y_ticks), _legend(series, joined) if len(series) > 1 else _text(LEFT, 14, unit, "start")]
    for each, color in zip(series, COLORS, strict=False):
        points = _pixels(each.points(), x, y)
        if joined:
            parts.append(_curve(points, f"line {color}"))
        parts += [_mark(*point, _side(value, y), color) for point, (_, value) in zip(points, each.points(), strict=True)]
    parts.append(_x_labels(x, [x.low, x.high] if places else [], 176))
    parts.append(_text(WIDTH / 2, 190, x_label, "middle"))
    return _svg(summary, 196, *parts)


def _pixels(points, x: Scale, y: Scale) -> list[tuple[float, float]]:
    """NaN stays NaN."""
    return [(x(place), y(value) if not math.isnan(value) else math.nan) for place, value in points]


def _side(value: float, y: Scale) -> int:
    """1 above the axis, -1 below it, 0 on it."""
    return int(value > y.high) - int(value < y.low)


def _svg(summary: str, height: int, *parts: Markup) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, height, summary, Markup("").join(parts)
    )


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text x="{:.4g}" y="{:.4g}" text-anchor="{}">{}</text>').format(x, y, anchor, text)


def _grid(scale: Scale, values: Sequence[float]) -> Markup:
    """Horizontal lines with their values; the one at zero is stronger."""
    line = Markup('<path class="{}" d="M{} {:.1f}H{}"/>{}')
    return Markup("").join(
        line.format(
            "zero" if value == 0 else "grid",
            LEFT,
            scale(value),
            WIDTH - RIGHT,
            _text(LEFT - 5, scale(value) + 3.5, _short(value), "end"),
        )
        for value in values
    )


def _x_labels(x: Scale, values: Sequence[float], y: float) -> Markup:
    anchors = ["start", "end"] if len(values) > 1 else ["start"]
    return Markup("").join(_text(x(v), y, _short(v), a) for v, a in zip(values, anchors, strict=False))


def _short(value: float) -> str:
    """Of a round number, without the noise of its binary digits."""
    return re.sub(r"e([+-])0?", r"e\1", f"{value:.6g}").replace("-", "\N{MINUS SIGN}")


def _curve(points: Sequence[tuple[float, float]], kind: str) -> Markup:
    """A line through the points, with a gap where one is NaN."""
    steps, pen = [], "M"
    for x, y in points:
        if math.isnan(y):
            pen = "M"
            continue
        steps.append(f"{pen}{x:.1f} {y:.1f}")
        pen = "L"
    return Markup('<path class="{}" d="{}"/>').format(kind, "".join(steps))


def _area(points: Sequence[tuple[float, float]], base: float) -> Markup:
    steps = [f"M{x:.1f} {base:.1f}V{y:.1f}" for x, y in points if not math.isnan(y)]
    return Markup('<path class="stems" d="{}"/>').format("".join(steps))


def _mark(x: float, y: float, side: int, color: str) -> Markup:
    """A dot; a triangle that points off the axis where the value is beyond it."""
    if math.isnan(y):
        return Markup("")
    if side == 0:
        return Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="2.6"/>').format(color, x, y)
    return Markup('<path class="{}" d="M{:.1f} {:.1f}l4 {}h-8z"/>').format(color, x, y - 7 * side, 7 * side)


def _legend(series: Sequence[Series], joined: bool) -> Markup:
    parts, left = [], float(LEFT)
    for each, color in zip(series, COLORS, strict=False):
        if joined:
            parts.append(Markup('<path class="line {}" d="M{:.0f} 10h16"/>').format(color, left))
        parts.append(_mark(left + 8, 10, 0, color))
        parts.append(_text(left + 21, 14, each.label, "start"))
        left += 34 + 6.2 * len(each.label)
    return Markup("").join(parts)
