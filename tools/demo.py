"""What `make demo` runs around the compiler: observations from real photographs, and a robot's loop over them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":  # in a checkout; in tools/, profile.py would pass for the standard library's
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from duq import commands

    commands.demo()

import numpy as np
import typer

from duq.runtime import Policy
from duq.runtime.cli_errors import one_line_errors
from duq.runtime.command_line import command_app
from duq.runtime.files import check_output_file
from duq.runtime.observations import load_observations, save_observations

app = command_app("Make observations from photographs, and drive a policy with them as a robot's loop would.")
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee")
PROMPTS = ("pick up the cup", "open the drawer", "push the button")


@app.command()
def observations(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The .npz file to write.")],
    count: Annotated[int, typer.Option(min=1, help="Of observations.")],
    seed: Annotated[int, typer.Option(min=0, help="Of the crops and the states.")],
) -> None:
    """Writes LIBERO observations whose cameras see crops of photographs that scikit-image ships."""
    check_output_file("OUT", out)
    import skimage.data

    rng = np.random.default_rng(seed)
    photographs = [getattr(skimage.data, name)() for name in PHOTOGRAPHS]

    def camera(index: int) -> np.ndarray:
        photograph = photographs[index % len(photographs)]
        top, left = (rng.integers(0, size - 256) for size in photograph.shape[:2])
        return photograph[top : top + 256, left : left + 256]

    save_observations(
        out,
        [
            {
                "observation/image": camera(index),
                "observation/wrist_image": camera(index + 1),
                "observation/state": rng.normal(0, 0.3, 8).astype(np.float32),
                "prompt": PROMPTS[index % len(PROMPTS)],
            }
            for index in range(count)
        ],
    )


@app.command()
def run(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="An engine.plan.")],
    data: Annotated[Path, typer.Argument(metavar="OBSERVATIONS", help="As `observations` writes them.")],
) -> None:
    """Drives the policy as a robot's loop would, and prints what the robot gets for each observation."""
    policy = Policy(plan)
    policy.warmup()
    print("instruction      preprocess+prefix+denoise    actions    the first of them")
    for observation in load_observations(data):
        reply = policy.infer(observation)
        actions, timing = reply["actions"], reply["policy_timing"]
        preprocess, prefix, denoise, total = (timing[f"{part}_ms"] for part in ("preprocess", "prefix", "denoise", "infer"))
        milliseconds = f"{preprocess:.0f}+{prefix:.0f}+{denoise:.0f} = {total:.0f} ms"
        first = " ".join(f"{value:.1f}" for value in actions[0])
        print(f"{observation['prompt']:16} {milliseconds:>25}    {list(actions.shape)}    {first}")


def main() -> None:
    with one_line_errors():
        app()
