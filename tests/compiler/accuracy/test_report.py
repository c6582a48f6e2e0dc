"""The HTML report: what it says, what it draws, and how a browser shows it on a phone and on a desk, light and dark."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duq.compiler.accuracy import charts, report
from tests.support.browser import Shown, chromium
from tests.support.comparison import judged, made_up_comparison


def broken():
    """A joint of one observation is NaN, once."""
    comparison = made_up_comparison(joints=3, not_finite=True)
    return judged(comparison, ("actions of observation 0 are not finite",))


VARIANTS = {
    "pass": made_up_comparison,
    "look": lambda: judged(made_up_comparison(joints=14, horizon=50), made_up=True),
    "fail": lambda: made_up_comparison(joints=32, observations=60, horizon=50, error=0.4),
    "float": lambda: made_up_comparison(error=0, quantized=False),
    "shortest": lambda: made_up_comparison(joints=1, observations=1, horizon=1),
    "broken": broken,
}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    """Name, comparison and page."""
    comparison = VARIANTS[request.param]()
    return request.param, comparison, report.page(comparison)


# --- the page's text ---------------------------------------------------------------------------------------------------


class Elements(HTMLParser):
    """All elements as (tag, attributes), in their order."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.found if name == tag]


def test_the_page_stands_on_its_own(variant):
    _, _, page = variant
    assert len(page.encode()) < 500_000 and "{{" not in page
    assert not re.search(r"https?:|url\(|@import|javascript:", page)
    for tag, attributes in Elements(page).found:
        assert tag not in ("script", "iframe", "object", "embed", "img", "base")
        assert not [key for key in attributes if key.startswith("on") or key in ("src", "srcset", "data", "poster")]
        assert attributes.get("href", "data:,") == "data:,"  # the icon, or the browser would ask for one


def test_the_page_can_be_read_aloud(variant):
    _, _, page = variant
    elements = Elements(page)
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {each["aria-labelledby"] for each in elements.of("section")} <= set(ids)
    assert all(each["role"] == "img" and len(each["aria-label"]) > 20 for each in elements.of("svg"))
    assert all("scope" in each for each in elements.of("th"))
    assert len(elements.of("html")) == 1 and elements.of("html")[0]["lang"] == "en" and len(elements.of("h1")) == 1


def test_the_verdict_comes_first(variant):
    name, comparison, page = variant
    expected = {"look": "look", "fail": "fail", "broken": "fail"}.get(name, "pass")
    assert comparison.summary["verdict"]["result"] == expected
    assert page.index(f'class="verdict {expected}"') < page.index("<table") < page.index("Error by joint")
    assert ("made up" in page) == (name == "look")
    assert ("not finite" in page) == (name == "broken") and ">nan" not in page.lower()


def test_the_page_names_every_joint_and_its_errors_in_the_robot_s_units():
    comparison = made_up_comparison(joints=20, error=0.2)
    page = report.page(comparison).replace("<wbr>", "")
    table = page[page.index('class="joints"') : page.index("One action chunk")]
    for joint in comparison.summary["dimensions"]:
        row = table[table.index(f">{joint['name']}") :].partition("</tr>")[0]
        numbers = [float(found.replace(",", "")) for found in re.findall(r'class="n">([\d.,e-]+)<', row)]
        assert numbers == pytest.approx([joint["robot"]["rms_error"], joint["robot"]["max_error"]], rel=0.005)
        assert joint["unit"] in row
    drawn = re.findall(r"<figcaption><strong>([\w.]+)", page)
    observation = report.worst_observation(comparison.summary)
    errors = np.abs(comparison.robot.engine[observation] - comparison.robot.reference[observation]).max(0)
    assert {int(name.split("_")[-1].split(".")[0]) for name in drawn} == set(
        np.argsort(-errors)[: report.MOST_JOINTS].tolist()
    )


def test_a_plan_without_a_robot_says_so():
    comparison = made_up_comparison(joints=2)
    assert "describes no robot" not in report.page(comparison)
    comparison.summary["plan"]["robot"], comparison.robot = "none", None
    page = report.page(comparison)
    assert "describes no robot" in page and "in normalized units" in page


def test_where_it_comes_from_is_on_the_page():
    comparison = made_up_comparison()
    page = report.page(comparison)
    for shown in (
        "2026-01-02 03:04:05 UTC",
        "duq-compare checkpoint",
        "5e" * 32,
        "A CPU, 2 cores",
        "torch 2.13",
        "balanced",
    ):
        assert shown in page
    comparison.summary["plan"]["target"] = "cuda"
    comparison.summary["machine"]["gpu"] = "H200"
    assert "<td>H200</td>" in report.page(comparison)


def test_names_cannot_inject_markup():
    comparison = made_up_comparison(joints=1)
    comparison.summary["dimensions"][0]["name"] = '<script>"&x_y</script>'
    comparison.summary["source"] = "<img src=x>"
    page = report.page(judged(comparison))
    assert "<script" not in page and "<img" not in page and "x_<wbr>y" in page


def test_of_many_observations_the_worst_are_listed():
    comparison = made_up_comparison(joints=2, observations=120)
    page = report.page(comparison)
    listed = [int(each) for each in re.findall(r'<tr><th scope="row">(\d+)</th><td class="n wide">', page)]
    errors = [each["actions"]["max_error"] for each in comparison.summary["observations"]]
    assert listed == sorted(np.argsort(errors)[-50:].tolist()) and "of 120" in page


# --- charts ------------------------------------------------------------------------------------------------------------


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6), st.integers(2, 6))
def test_ticks_are_round_and_hold_the_values(low, span, count):
    high = low + span
    found = charts.ticks(low, high, count)
    steps = np.diff(found)
    assert 2 <= len(found) <= 2 * count + 3 and found[0] <= low + 1e-6 * steps[0] and found[-1] >= high - 1e-6 * steps[0]
    np.testing.assert_allclose(steps, steps[0], rtol=1e-3)
    mantissa = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-6)
    assert min(abs(mantissa - each) for each in (1, 2, 5, 10)) < 1e-2 * mantissa


def points(chart: str, kind: str) -> np.ndarray:
    """[points, x and y] of a line."""
    path = re.search(rf'class="line {kind}" d="(M[^"h]*)"', chart)[1]
    return np.array([[float(each) for each in pair.split()] for pair in re.split("[ML]", path)[1:]])


@pytest.mark.parametrize("size", [1e-4, 0.03, 1.0, 50.0])
def test_a_residual_has_a_scale_of_its_own_and_says_how_much_larger(size):
    random = np.random.default_rng(0)
    reference, residual = random.normal(size=20), size * random.uniform(-1, 1, 20)
    chart = charts.residual_panel("what it shows", reference, reference + residual)
    upper, strip = points(chart, "reference"), points(chart, "first")
    per_unit = [np.polyfit(values, line[:, 1], 1)[0] for values, line in ((reference, upper), (residual, strip))]
    ratio, kind = re.search(r"error, ([\d.e+]+)\N{MULTIPLICATION SIGN} (\w+)", chart).groups()
    measured = per_unit[1] / per_unit[0]
    assert float(ratio) == pytest.approx(measured if kind == "magnified" else 1 / measured, rel=0.06)
    assert np.ptp(strip[:, 1]) > 20  # of 48 pixels: it can be seen, whatever its size
    labels = [
        float(each.replace("\N{MINUS SIGN}", "-")) for each in re.findall(r">(\N{MINUS SIGN}?[\d.e-]+)</text>", chart)
    ]
    assert max(labels) >= reference.max() and min(labels) <= reference.min()


def test_decibels_have_one_axis_whatever_is_drawn():
    for values in ([22.0, 25.0], [22.0, 130.0, math.inf], [-5.0, 22.0]):
        chart = charts.decibel_lines("what it shows", [charts.Series("keys", values)], "layer")
        line = points(chart, "first")
        assert line[values.index(22.0), 1] == pytest.approx(160 - 130 * 22 / 60, abs=0.06)
        beyond = sum(not 0 <= value <= 60 for value in values)
        assert chart.count("h-8z") == beyond and chart.count("<circle") == len(values) - beyond
        assert re.findall(r">(\d+)</text>", chart)[:4] == ["0", "20", "40", "60"]


def test_lines_start_at_zero_and_break_where_a_value_is_not_finite():
    chart = charts.zero_based_line("what it shows", charts.Series("error", [3.0, math.nan, 3.5, 3.2]), "action", "%")
    assert re.search(r">0</text>", chart) and chart.count("<circle") == 3
    assert re.search(r'class="line first" d="M[\d. ]+M[\d. ]+L[\d. ]+"', chart)


@pytest.mark.parametrize(("value", "top", "length"), [(30, 60, 50), (0, 60, 0), (-3, 60, 0), (math.inf, 60, 100)])
def test_bars_start_at_zero(value, top, length):
    assert report.meter(value, top) == length and report.meter(math.nan, top) == 0


# --- in a browser ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


WINDOWS = {"phone": (390, 664), "desk": (1280, 720)}


def test_a_browser_shows_it(browser, variant, tmp_path):
    name, comparison, page = variant
    file = tmp_path / "report.html"
    file.write_text(page, encoding="utf-8")
    shown = Shown(browser, file)
    for window, scheme in product(WINDOWS, ("light", "dark")):
        width, height = WINDOWS[window]
        shown.resize(width, height, scheme)
        check_window(shown, width, height, scheme)
    assert shown.requests == [file.as_uri()] and shown.errors == []
    shown.page.close()


def check_window(shown: Shown, width: int, height: int, scheme: str) -> None:
    """Nothing is cut off, everything can be read, and the verdict is what one sees first."""
    texts = shown.texts()
    assert shown.document_width() == width and len(texts) > 60
    assert [each for each in texts if each["contrast"] < 4.5] == []
    assert [each for each in texts if not each["inside"]] == []
    assert min(each["size"] for each in texts) >= 10.5
    assert shown.bottom("#verdict") < height / 2
    pixels = shown.screenshot()
    assert pixels.shape == (height, width) and pixels.std() > 10
    assert np.median(pixels) > 220 if scheme == "light" else np.median(pixels) < 60
