"""Where a cuda plan's time goes on this machine's GPU, kernel by kernel: `duq-profile --help`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":  # in a checkout; in tools/, profile.py would pass for the standard library's
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from duq import commands

    commands.profile()

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from duq.plugins.errors import DuqError
from duq.runtime.cli_errors import one_line_errors
from duq.runtime.command_line import command_app
from duq.runtime.executors.cuda import CudaExecutor
from duq.runtime.plan import Plan
from duq.runtime.preprocess import ModelInputs

# What one H100 SXM reaches (docs/performance.md): bytes a second from memory, operations a second in dense products.
BANDWIDTH, INT8, BF16 = 3.0e12, 1.39e15, 0.79e15

app = command_app()


@app.command()
def _profile(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan of target cuda for this machine's GPU.")],
    cameras: Annotated[int, typer.Option(min=1, max=3, help="Of the observation.")] = 3,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of the observation; padded to the plan's next size.")] = 48,
    each_layer: Annotated[bool, typer.Option("--layers", help="Do not sum over layers.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print every launch as JSON.")] = False,
) -> None:
    """Time every launch of a call and print a table: kernel, launches, microseconds, bytes, share of the ceiling.

    Launches follow each other on one stream. Times include an event each, 3 to 4 microseconds on an H100, and launches
    do not overlap, so their sum exceeds the graph's time, which is printed too; there the state token and the first
    step run beside the prefix. The ceiling is the larger of bytes over bandwidth and operations over the tensor cores'
    rate (H100). Of a GPU that is not at hand, duq-estimate says what to expect.

    [bold]Example[/bold]

      duq-profile engine.plan --cameras 3
    """
    executor = CudaExecutor(Plan(plan))
    size = min((s for s in executor.sizes if s[0] == cameras and s[1] >= prompt_tokens), default=None)
    if size is None:
        raise DuqError(f"{plan}: is not for {cameras} cameras and {prompt_tokens} prompt tokens")
    inputs, noise = _inputs(Plan(plan, verify=False).manifest, cameras, prompt_tokens)
    calls = [executor.run(inputs, noise)[1] for _ in range(100)][20:]
    whole = {key: float(np.median([call[key] for call in calls])) for key in ("prefix_ms", "denoise_ms")}
    executor.stage(inputs, noise)
    in_turn = dict(zip(("prefix_ms", "denoise_ms"), executor.milliseconds_in_turn(size), strict=True))
    launches = executor.launch_times(size)
    if as_json:
        keys = ("name", "work", "moved")
        rows = [
            {"program": program, **{k: launch[k] for k in keys}, "kernel": executor.kernel_name(launch), "us": us}
            for program, launch, us in launches
        ]
        typer.echo(json.dumps({"graph_ms": whole, "in_turn_ms": in_turn, "launches": rows}, indent=1))
        return
    for program in ("prefix", "step"):
        chosen = [(launch, us) for each, launch, us in launches if each == program]
        Console(width=150).print(_table(program, chosen, executor, each_layer))
    for name, found in (("In the graph", whole), ("With nothing beside the prefix", in_turn)):
        Console().print(f"{name}: prefix {found['prefix_ms']:.3f} ms, denoising behind it {found['denoise_ms']:.3f} ms")


def _inputs(manifest: dict, cameras: int, prompt_tokens: int) -> tuple[ModelInputs, np.ndarray]:
    random, config = np.random.default_rng(0), manifest["model"]
    size, slots = config["vision"]["image_size"], np.arange(config["max_prompt_tokens"])
    inputs = ModelInputs(
        images=random.integers(0, 256, (3, size, size, 3), np.uint8),
        image_mask=np.arange(3) < cameras,
        tokens=random.integers(0, config["vocab_size"], len(slots)),
        token_mask=slots < prompt_tokens,
        state=random.standard_normal(config["action_dim"]).astype(np.float32),
    )
    return inputs, random.standard_normal((config["action_horizon"], config["action_dim"]), np.float32)


def _table(program: str, launches: list[tuple[dict, float]], executor: CudaExecutor, each_layer: bool) -> Table:
    groups: dict[tuple[str, str], list[tuple[dict, float]]] = {}
    for launch, us in launches:
        name = launch["name"] if each_layer else re.sub(r"\.layers\.\d+\.", ".layers.*.", launch["name"])
        groups.setdefault((name, executor.kernel_name(launch)), []).append((launch, us))
    total = sum(us for _, us in launches)
    title = f"{program}: {len(launches)} launches, {total / 1e3:.3f} ms with an event behind each"
    table = Table(
        "launch", "kernel", "times", "us each", "us", "share", "MB each", "of ceiling", title=title, title_justify="left"
    )
    for (name, kernel), members in groups.items():
        us, (launch, _) = sum(us for _, us in members), members[0]
        rate = INT8 if re.match(r"gemm_(wgmma|small|large)", kernel) else BF16
        floor = max(launch["moved"] / BANDWIDTH, launch["work"] / rate) * 1e6
        each = us / len(members)
        cells = (f"{each:.1f}", f"{us:.0f}", f"{us / total:.1%}", f"{launch['moved'] / 1e6:.2f}", f"{floor / each:.0%}")
        table.add_row(name, kernel, str(len(members)), *cells)
    return table


def main() -> None:
    with one_line_errors():
        app()
