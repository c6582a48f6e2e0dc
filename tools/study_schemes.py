"""All quantization schemes on real weights: `duq-study-schemes --help`. scheme_study.py does the work."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":  # in a checkout; in tools/, profile.py would pass for the standard library's
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from duq import commands

    commands.study_schemes()

import typer

from duq.runtime.cli_errors import one_line_errors
from duq.runtime.command_line import command_app

SCHEMES = (  # of scheme_study.py
    "reference",
    "reference-folded",
    "reference-per-tensor",
    "reference-per-token",
    "bare",
    "duquant-per-tensor",
    "duquant",
    "duquant-64",
    "balanced-per-tensor",
    "balanced",
    "balanced-16",
    "balanced-128",
    "balanced-permuted",
    "balanced-compensated",
    "balanced-w4a16",
    "balanced-w8a8",
)
app = command_app()


@app.command()
def _study(
    schemes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SCHEME", autocompletion=lambda: list(SCHEMES), help=f"By default all: {', '.join(SCHEMES)}."
        ),
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(min=1, help="To calibrate on.")] = 2048,
    evaluation_tokens: Annotated[int, typer.Option(min=1, help="To measure on.")] = 4096,
    evaluation_text: Annotated[Path | None, typer.Option(help="To measure on in place of the manual.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the measures as JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Figure to write (.svg, .png, .pdf).")] = None,
) -> None:
    """Quantize all 126 linears of Gemma 3 270M with each scheme and measure what is left of its predictions.

    The text to calibrate on and, elsewhere in it, to measure on is the Python reference manual that CPython ships.
    The fp32 model is checked against that of transformers first.
    A scheme takes a minute or two on one core; the variable OMP_NUM_THREADS sets the number of threads.

    [bold]Examples[/bold]

      duq-study-schemes

      duq-study-schemes balanced balanced-compensated --evaluation-tokens 2048 --json
    """
    from duq.tools.scheme_study import study

    study(
        schemes, calibration_tokens=calibration_tokens, evaluation_tokens=evaluation_tokens, evaluation_text=evaluation_text,
        as_json=as_json, plot=plot,
    )  # fmt: skip


def main() -> None:
    with one_line_errors():
        app()
