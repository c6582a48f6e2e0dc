"""Estimates of a full-size call on every GPU of plugins/gpu.py, for docs/performance.md: no weights, and no GPU.

    python -m benchmarks.estimates [--pi05] [--gpu NAME ...]

Compiles the schedule of full-size pi0 or pi0.5 for each card from its sizes (benchmarks/schedules.py) and sums it up as
duq-estimate does. A card with a number that is not public has no estimate. One or a few minutes, most of them to trace the model.
"""

from __future__ import annotations

import argparse

from benchmarks.schedules import STEPS, schedule_for, sizes
from duq.plugins.gpu import CARDS, Gpu, gpu_named
from duq.tools.estimate import RATES, estimate

CAMERAS = (1, 2, 3)
COLUMNS = (*(f"{count} camera{'s' * (count > 1)}" for count in CAMERAS), "prefix", "steps")


def row(card: Gpu, pi05: bool) -> str:
    """A row of the table, in Markdown: milliseconds by number of cameras, prefix and steps of the most."""
    if missing := [name for name in RATES if getattr(card, name) is None]:
        return f"| {card.name} | {card.sm} | {', '.join(missing)} not public |" + " |" * (len(COLUMNS) - 1)
    config = sizes(pi05=pi05)
    schedule, sums = schedule_for(config, card), []
    for cameras in CAMERAS:
        variant = next(
            each
            for each in schedule["variants"]
            if (each["cameras"], each["prompt"]) == (cameras, config.max_prompt_tokens)
        )
        sums.append(estimate(schedule, variant, STEPS, card).sums)
    times = [each.call for each in sums] + [sums[-1].prefix, sums[-1].steps]
    return f"| {card.name} | {card.sm} | " + " | ".join(f"{1e3 * time:.1f}" for time in times) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--pi05", action="store_true")
    parser.add_argument("--gpu", metavar="NAME", action="append", help="this card alone; may be given several times")
    args = parser.parse_args()
    print("| card | SM | " + " | ".join(COLUMNS) + " |\n| --- | ---: |" + " ---: |" * len(COLUMNS))
    for card in map(gpu_named, args.gpu) if args.gpu else CARDS:
        print(row(card, args.pi05), flush=True)


if __name__ == "__main__":
    main()
