import math
import random
import xml.etree.ElementTree as ET

import pandas
import pytest

from benchmarks._figures import Point, errors_of, rank_correlation, scatter_svg

SVG = "{http://www.w3.org/2000/svg}"


def test_errors_are_relative_to_what_was_measured() -> None:
    errors = errors_of([(1.1, 1.0), (1.8, 2.0), (4.0, 2.0)])
    assert errors.count == 3
    assert errors.median == pytest.approx(0.1)
    assert errors.worst == pytest.approx(1.0)
    assert errors.bias == pytest.approx(0.1)


def test_rank_correlation_is_spearmans() -> None:
    random.seed(3)
    pairs = [(random.randrange(8), random.randrange(8)) for _ in range(40)]
    frame = pandas.DataFrame(pairs, columns=["predicted", "measured"], dtype=float)
    expected = frame.rank().corr().loc["predicted", "measured"]
    assert rank_correlation(pairs) == pytest.approx(expected)


def test_rank_correlation_needs_two_values() -> None:
    assert math.isnan(rank_correlation([(1.0, 2.0)]))
    assert math.isnan(rank_correlation([(1.0, 2.0), (1.0, 3.0)]))


def test_picture_shows_every_point_where_it_belongs() -> None:
    points = [
        Point(10.0, 10.0, "a", "on the <diagonal>"),
        Point(100.0, 200.0, "b", "too slow"),
        Point(50.0, 30.0, "a", "too fast"),
    ]
    root = ET.fromstring(scatter_svg(points, title="Steps & more", unit="ms", band=0.08))
    circles = [c for c in root.iter(f"{SVG}circle") if c.find(f"{SVG}title") is not None]
    labels = [circle.findtext(f"{SVG}title") for circle in circles]
    assert labels == [point.label for point in points]
    (line,) = (line for line in root.iter(f"{SVG}line") if line.get("stroke") == "#666666")
    top, bottom = float(line.get("y2", "")), float(line.get("y1", ""))
    left, right = float(line.get("x1", "")), float(line.get("x2", ""))
    for circle, point in zip(circles, points, strict=True):
        across = (float(circle.get("cx", "")) - left) / (right - left)
        up = (bottom - float(circle.get("cy", ""))) / (bottom - top)
        sign = (up > across + 1e-3) - (up < across - 1e-3)
        assert sign == (point.predicted > point.measured) - (point.predicted < point.measured)
    colours = [circle.get("fill") for circle in circles]
    assert colours[0] == colours[2] != colours[1]
