"""The figures of docs/accuracy.md: they show the numbers of its tables, on axes from zero, with a legend."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from duq.compiler.accuracy.rates import wilson
from duq.tools import figures

PAGE = (figures.DOCS / "accuracy.md").read_text()


def texts(file: Path) -> set[str]:
    return set(re.findall(r"<text[^>]*>([^<]+)</text>", file.read_text()))


@pytest.mark.parametrize(
    ("name", "draw"),
    [
        ("success.svg", lambda file: figures.draw_success(figures.success_of_docs(PAGE), file)),
        ("accuracy.svg", lambda file: figures.draw_divergence(figures.divergence_of_docs(PAGE), file)),
    ],
)
def test_the_files_in_docs_are_those_of_the_tables(tmp_path, name, draw):
    draw(tmp_path / name)
    assert len(texts(tmp_path / name)) > 15
    assert texts(tmp_path / name) == texts(figures.DOCS / name), "run python tools/figures.py"


def test_the_tables_are_read_as_they_stand():
    success = {each.name: each for each in figures.success_of_docs(PAGE)}
    assert success["w4a8"].rate == pytest.approx(283 / 300) and success["w4a8"].interval == wilson(283, 300)
    assert success["reference"].action_error == 0.0711 and not success["reference"].engine and success["w8a8"].engine
    divergence = {each.name: each for each in figures.divergence_of_docs(PAGE)}
    assert len(divergence) == 16 and "fp32" not in divergence
    assert divergence["balanced"] == figures.Divergence("balanced", 0.159, 15.63, balanced=True)
    assert divergence["reference-folded"].kl == 2.742 and not divergence["reference-folded"].balanced


def drawn(monkeypatch, draw, schemes):
    """The matplotlib figure, not written."""
    found = []
    monkeypatch.setattr(figures, "save_figure", lambda canvas, file: found.append(canvas))
    draw(schemes, Path("figure.svg"))
    return found[0]


def test_axes_start_at_zero_and_a_legend_says_who_is_who(monkeypatch):
    """However small the differences are."""
    schemes = [figures.Success(name, 0.999, (0.998, 1.0), error, engine) for name, error, engine in
               (("fp32", 0.0, False), ("w4a8", 0.0701, True), ("w8a8", 0.0702, True))]  # fmt: skip
    canvas = drawn(monkeypatch, figures.draw_success, schemes)
    success, error = canvas.axes
    assert success.get_xlim()[0] == error.get_xlim()[0] == 0 and success.get_xlim()[1] >= 100
    assert error.get_xlim()[1] > 0.0702
    assert [text.get_text() for text in canvas.legends[0].get_texts()] == ["engine", "PyTorch", "95 % interval"]
    canvas = drawn(monkeypatch, figures.draw_divergence, figures.divergence_of_docs(PAGE))
    assert len(canvas.legends[0].get_texts()) == 2 and canvas.axes[0].get_xscale() == "log"
