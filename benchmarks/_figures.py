"""Statistics of predictions, and their picture: predicted against measured, as SVG."""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Errors", "Point", "errors_of", "rank_correlation", "scatter_svg"]

_SIZE, _MARGIN, _LEGEND = 560, 70, 110  # pixels
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")


@dataclass(frozen=True, slots=True)
class Errors:
    """Relative errors |predicted - measured| / measured of several pairs, and the sign of most.

    Args:
        bias: median of (predicted - measured) / measured.
    """

    count: int
    median: float
    worst: float
    bias: float


def errors_of(pairs: Sequence[tuple[float, float]]) -> Errors:
    """Errors of (predicted, measured) pairs, of which there is one at least.

    >>> errors_of([(1.1, 1.0), (0.8, 1.0), (2.0, 2.0)]).worst
    0.19999999999999996
    """
    signed = [predicted / measured - 1.0 for predicted, measured in pairs]
    sizes = [abs(error) for error in signed]
    return Errors(len(pairs), statistics.median(sizes), max(sizes), statistics.median(signed))


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Spearman's rank correlation (1904); equal values share their mean rank. NaN if either side is
    constant or there are fewer than two pairs.

    >>> rank_correlation([(1, 10), (2, 20), (3, 15)])
    0.5
    """
    if len(pairs) < 2:
        return math.nan
    first, second = (_ranks([pair[side] for pair in pairs]) for side in (0, 1))
    if len(set(first)) == 1 or len(set(second)) == 1:
        return math.nan
    return statistics.correlation(first, second)


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]


@dataclass(frozen=True, slots=True)
class Point:
    """One prediction; points of one `series` have one colour, `label` shows under the pointer."""

    measured: float
    predicted: float
    series: str
    label: str


@dataclass(frozen=True, slots=True)
class _Axes:
    """The same logarithmic scale across and up."""

    low: float
    high: float

    def across(self, value: float) -> float:
        """Pixels from the left."""
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return _MARGIN + share * (_SIZE - 2 * _MARGIN)

    def down(self, value: float) -> float:
        """Pixels from the top."""
        return _SIZE - self.across(value)

    def place(self, measured: float, predicted: float) -> str:
        return f"{self.across(measured):.1f},{self.down(predicted):.1f}"


def scatter_svg(points: Sequence[Point], *, title: str, unit: str, band: float) -> str:
    """Predicted over measured on logarithmic axes, with the diagonal and a band around it.

    Args:
        points: of positive values, one at least.
        band: relative error that the band shows.
    """
    values = [value for point in points for value in (point.measured, point.predicted)]
    axes = _Axes(min(values) / 1.25, max(values) * 1.25)
    series = list(dict.fromkeys(point.series for point in points))
    colours = {name: _COLOURS[place % len(_COLOURS)] for place, name in enumerate(series)}
    width = _SIZE + _LEGEND
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{_SIZE}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{_SIZE}" fill="white"/>',
        f'<text x="{_MARGIN}" y="30" font-size="15">{html.escape(title)}</text>',
        *_background(axes, band),
        *(line for tick in _ticks(axes.low, axes.high) for line in _tick_marks(axes, tick)),
        f'<text x="{_SIZE / 2}" y="{_SIZE - 20}" text-anchor="middle">measured {unit}</text>',
        f'<text transform="translate(20 {_SIZE / 2}) rotate(-90)" text-anchor="middle">'
        f"predicted {unit}</text>",
        *(_dot(axes, point, colours[point.series]) for point in points),
        *_legend(colours),
        "</svg>\n",
    ]
    return "\n".join(lines)


def _background(axes: _Axes, band: float) -> list[str]:
    low, high = axes.low, axes.high
    corners = [
        axes.place(measured, measured * factor)
        for measured, factor in (
            (low, 1 - band),
            (low, 1 + band),
            (high, 1 + band),
            (high, 1 - band),
        )
    ]
    side = _SIZE - 2 * _MARGIN
    return [
        f'<polygon points="{" ".join(corners)}" fill="#dddddd"/>',
        f'<line x1="{axes.across(low):.1f}" y1="{axes.down(low):.1f}" '
        f'x2="{axes.across(high):.1f}" y2="{axes.down(high):.1f}" stroke="#666666"/>',
        f'<rect x="{_MARGIN}" y="{_MARGIN}" width="{side}" height="{side}" fill="none" '
        'stroke="black"/>',
    ]


def _tick_marks(axes: _Axes, tick: float) -> list[str]:
    x, y, foot = axes.across(tick), axes.down(tick), _SIZE - _MARGIN
    return [
        f'<text x="{x:.1f}" y="{foot + 18}" text-anchor="middle">{tick:g}</text>',
        f'<text x="{_MARGIN - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>',
        f'<line x1="{x:.1f}" y1="{foot}" x2="{x:.1f}" y2="{foot + 5}" stroke="black"/>',
        f'<line x1="{_MARGIN - 5}" y1="{y:.1f}" x2="{_MARGIN}" y2="{y:.1f}" stroke="black"/>',
    ]


def _dot(axes: _Axes, point: Point, colour: str) -> str:
    x, y = axes.across(point.measured), axes.down(point.predicted)
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}" fill-opacity="0.75">'
        f"<title>{html.escape(point.label)}</title></circle>"
    )


def _legend(colours: Mapping[str, str]) -> list[str]:
    left = _SIZE - _MARGIN + 18
    return [
        f'<circle cx="{left}" cy="{_MARGIN + 8 + 20 * place}" r="4" fill="{colour}"/>'
        f'<text x="{left + 10}" y="{_MARGIN + 12 + 20 * place}">{html.escape(name)}</text>'
        for place, (name, colour) in enumerate(colours.items())
    ]


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten from `low` to `high`."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [float(f"{step}e{decade}") for decade in decades for step in (1, 2, 5)]
    return [tick for tick in found if low <= tick <= high]
