"""Policies in LIBERO's scenes: `python examples/libero/evaluate.py --help`."""

from __future__ import annotations

import hashlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, cast

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # the checkout
    from duq.commands import command

    command("evaluate.py", "duq.examples.libero.evaluate:main", "libero")()

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress

from duq.examples.libero import demonstrations
from duq.examples.libero.journal import Journal
from duq.examples.libero.naive import bits_of, quantize_naively
from duq.examples.libero.report import key_of, print_tables
from duq.examples.libero.rollout import Conditions, Result, Simulators, Stress
from duq.examples.libero.scene import ACTION_DIM, IMAGE_SIZE, REST, STEPS, SUITES, held_scene, release_scene, tasks
from duq.examples.libero.starts import PLACES, Start
from duq.plugins.errors import DuqError
from duq.runtime import Policy
from duq.runtime.cli_errors import check_output_file, one_line_errors
from duq.runtime.config import ModelConfig
from duq.runtime.plan import Plan
from duq.runtime.policy import preprocessor_of
from duq.runtime.solver import Solver

ROBOT = "libero"
REPLAY = "replay"
ROUND = 5  # episodes of each task in a round, where there are minutes

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


# --- arms: what decides -------------------------------------------------------------------------------------------------


class PlanArm:
    """A compiled policy."""

    def __init__(self, file: Path):
        self.policy, self.identity = Policy(file), digest(file)
        found = self.policy.metadata
        if found["robot"] != ROBOT:
            raise DuqError(f"{file}: is a plan for {found['robot']}; compile it with --robot {ROBOT}")
        self.noise_shape = found["action_horizon"], found["model_action_dim"]
        self.policy.warmup()

    def answer(
        self, episodes: Sequence[Start], steps: Sequence[int], observations: Sequence[dict], noise: np.ndarray
    ) -> list[np.ndarray]:
        if hasattr(self.policy, "infer_batch"):
            replies = self.policy.infer_batch(observations, noise)
        else:
            replies = [self.policy.infer(each, own) for each, own in zip(observations, noise, strict=True)]
        return [reply["actions"] for reply in replies]


class TorchArm:
    """The checkpoint in PyTorch, in float32, or with packs of duq-quantize in float arithmetic, or rounded naively ("W4A8").
    Observations are converted as `plan` says, which is one of this checkpoint; runs on the GPU where there is one."""

    def __init__(self, checkpoint: Path, quantized: str, plan: Path):
        import torch

        from duq.compiler.checkpoint import load_checkpoint
        from duq.compiler.model import build_model
        from duq.compiler.quant import fake_quantize
        from duq.compiler.quant.store import load_quantization

        opened, found = Plan(plan), load_checkpoint(checkpoint)
        if opened.manifest["checkpoint"]["fingerprint"] != found.fingerprint:
            raise DuqError(f"--torch {checkpoint}: {plan} was not compiled from it, so its settings do not hold")
        config = ModelConfig.from_json(opened.manifest["model"])
        self._preprocessor, self._solver = preprocessor_of(opened, config), Solver.of(opened.manifest)
        self._cameras = opened.manifest["cameras"]
        self.noise_shape = config.action_horizon, config.action_dim
        self.identity = found.fingerprint[:12]
        model: torch.nn.Module = build_model(found).float()
        if bits := bits_of(quantized):
            model, self.identity = quantize_naively(model, config, *bits), f"{self.identity}-{quantized}"
        elif quantized:
            packs = Path(quantized)
            model, self.identity = fake_quantize(model, load_quantization(packs, found)), digest(*sorted(packs.iterdir()))
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = model.to(self._device)

    def answer(
        self, episodes: Sequence[Start], steps: Sequence[int], observations: Sequence[dict], noise: np.ndarray
    ) -> list[np.ndarray]:
        import torch

        from duq.compiler.accuracy.reference import tensors

        batch = [tensors(self._preprocessor.model_inputs(each)) for each in observations]
        images, mask, *others = (torch.cat(parts).to(self._device) for parts in zip(*batch, strict=True))
        inputs = images[:, : self._cameras], mask[:, : self._cameras], *others
        sample = cast(Callable[..., torch.Tensor], self._model.sample_actions)
        actions = sample(*inputs, torch.from_numpy(noise).to(self._device), self._solver.num_steps, self._solver.name)
        return [
            self._preprocessor.robot_actions(each, observation)
            for each, observation in zip(actions.cpu().numpy(), observations, strict=True)
        ]


class ReplayArm:
    """Plays back one demonstration of each task, whatever it sees: what a benchmark gives for nothing."""

    noise_shape = 1, 1

    def __init__(self, directory: Path, execute: int):
        jobs, self._execute = demonstrations.listed(directory), execute
        first = {task: seed for task, seed in reversed(jobs)}
        files = {task: demonstrations.path_of(directory, task, seed) for task, seed in first.items()}
        found = {task: demonstrations.load(file) for task, file in files.items()}
        for task, each in found.items():
            if each.pushed.any():
                raise DuqError(
                    f"{files[task]}: was pushed, so its actions are not what was done; collect with --strength 0"
                )
        self._actions = {task: each.actions for task, each in found.items()}
        self.identity = digest(*files.values())

    def answer(
        self, episodes: Sequence[Start], steps: Sequence[int], observations: Sequence[dict], noise: np.ndarray
    ) -> list[np.ndarray]:
        found = []
        for start, step in zip(episodes, steps, strict=True):
            if start.task not in self._actions:
                raise DuqError(f"--replay: there is no demonstration of task {start.task}")
            left = self._actions[start.task][step : step + self._execute]
            rest = np.repeat((REST * -1)[None], self._execute - len(left), axis=0)  # hold on
            found.append(np.concatenate((left, rest)).astype(np.float32))
        return found


Arm = PlanArm | TorchArm | ReplayArm


def named(flag: str, values: Sequence[str] | None) -> list[tuple[str, str]]:
    """NAME=WHAT, or WHAT, whose name is then the file's without its ending."""
    found = []
    for value in values or ():
        name, _, what = value.rpartition("=")
        if not what:
            raise DuqError(f"{flag} {value}: names nothing; give NAME=FILE or FILE")
        found.append((name or Path(what).stem, what))
    return found


def digest(*files: Path) -> str:
    """Which files these are, in 12 hexadecimal digits."""
    total = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            while block := stream.read(1 << 24):
                total.update(block)
    return total.hexdigest()[:12]


# --- episodes -----------------------------------------------------------------------------------------------------------


def line(arm: str, policy: str, start: Start, conditions: Conditions, result: Result, renderer: str) -> dict[str, Any]:
    """What the journal keeps of an episode."""
    from duq.compiler.accuracy.metrics import jerk

    executed = result.actions[:, : ACTION_DIM - 1]
    return {
        **setting(arm, policy, start, conditions, renderer),
        "success": result.success,
        "steps": len(result.actions),
        "jerk": jerk(executed),
        "first": np.round(result.first.astype(float), 5).tolist(),
    }


def setting(arm: str, policy: str, start: Start, conditions: Conditions, renderer: str) -> dict[str, Any]:
    """What determines an episode."""
    return {"arm": arm, "policy": policy, **asdict(start), **asdict(conditions), "renderer": renderer}


def done_already(lines: list[dict], wanted: list[dict], journal: Path) -> set[tuple]:
    """Keys of the wanted settings that `lines` have. DuqError if a line has another policy, renderer, ... for one of them."""
    found = {key_of(entry): entry for entry in lines}
    for each in wanted:
        if (entry := found.get(key_of(each))) is None:
            continue
        for name in each:
            if entry[name] != each[name]:
                raise DuqError(
                    f"{journal}: has {each['arm']} with {name} {entry[name]}, not {each[name]}; they do not compare. Name "
                    "another --out"
                )
    for name in ("renderer", "execute", "limit", "image_size", "plain"):
        values = {entry[name] for entry in [*lines, *wanted[:1]]}
        if len(values) > 1:
            raise DuqError(
                f"{journal}: has episodes with {name} {' and '.join(map(str, sorted(values)))}; name another --out"
            )
    return set(found)


def rounds(starts: list[Start], minutes: float, clock: Callable[[], float] = time.monotonic) -> Iterator[list[Start]]:
    """The episodes in rounds, ROUND of each task, for all policies in turn: as many as the minutes are expected to be enough
    for, judged by the longest so far, and one at least. All in one round where there is no limit."""
    if minutes == math.inf:
        yield starts
        return
    began, longest = clock(), 0.0
    for first in range(0, max(start.seed for start in starts) + 1, ROUND):
        before = clock()
        if first and before + longest > began + 60 * minutes:
            return
        yield [start for start in starts if first <= start.seed < first + ROUND]
        longest = max(longest, clock() - before)


def opened(kind: str, what: str, plans: list[tuple[str, str]], execute: int) -> Arm:
    if kind == "plan":
        return PlanArm(Path(what))
    if kind == "torch":
        checkpoint, _, quantized = what.partition("@")
        return TorchArm(Path(checkpoint), quantized, Path(plans[0][1]))
    return ReplayArm(Path(what), execute)


@app.command()
def _evaluate(
    plan: Annotated[
        list[str] | None, typer.Option(help="\\[NAME=]FILE, repeatable: a plan compiled with --robot libero.")
    ] = None,
    torch: Annotated[
        list[str] | None,
        typer.Option(
            help="\\[NAME=]CHECKPOINT\\[@PACKS], repeatable: in PyTorch, with the settings of the first --plan. W4A4 instead of "
            "PACKS: all linears rounded, with one scale a tensor."
        ),
    ] = None,
    replay: Annotated[
        Path | None, typer.Option(help="Demonstrations of collect.py, to replay one of each task blindly.")
    ] = None,
    suite: Annotated[str, typer.Option(help=f"One of {', '.join(SUITES)}.")] = "libero_object",
    task: Annotated[list[int] | None, typer.Option(help="Number, repeatable; by default all.")] = None,
    episodes: Annotated[int, typer.Option(min=1, help="Of each task.")] = 50,
    places: Annotated[str, typer.Option(help="Of the objects: official or permuted (libero_object only).")] = "official",
    execute: Annotated[int, typer.Option(min=1, help="Actions of a chunk to carry out before asking again.")] = 5,
    steps: Annotated[
        int | None, typer.Option(min=1, help="After which an episode has failed; by default openpi's.")
    ] = None,
    noise: Annotated[float, typer.Option(min=0.0, help="Of pixels, deviation in steps of 1/255.")] = 0.0,
    camera: Annotated[float, typer.Option(min=0.0, help="Move the camera of the scene so far, m.")] = 0.0,
    push: Annotated[float, typer.Option(min=0.0, help="Push the object once, at this speed, m/s.")] = 0.0,
    image_size: Annotated[int, typer.Option(min=14, help="Of the cameras, in pixels.")] = IMAGE_SIZE,
    stock: Annotated[
        bool,
        typer.Option("--stock-rendering", help="Antialiasing, shadows and reflections, as LIBERO's own data have them."),
    ] = False,
    minutes: Annotated[
        float, typer.Option(min=0.01, help="Stop early: all policies get the same, fewer episodes. Keeps all of them open.")
    ] = math.inf,
    jobs: Annotated[int, typer.Option(min=1, help="Simulators, of 1.8 GB each.")] = min(16, os.cpu_count() or 1),
    out: Annotated[Path, typer.Option(help="File of JSON lines, an episode each; what it has is not run again.")] = Path(
        "episodes.jsonl"
    ),
) -> None:
    """Drive LIBERO's robot with compiled policies, and record which episodes succeed.

    Observations and actions are those of openpi's LIBERO policies. All policies get the same starts, noise and
    disturbances. report.py makes a table and a figure of the file.

    [bold]Examples[/bold]

      python examples/libero/evaluate.py --plan pi05_libero.plan --suite libero_object --stock-rendering

      python examples/libero/evaluate.py --plan none.plan --plan w4a8.plan --torch fp32=policy --places permuted
    """
    check_output_file("--out", out)
    arms = [(name, "plan", what) for name, what in named("--plan", plan)]
    arms += [(name, "torch", what) for name, what in named("--torch", torch)]
    arms += [(REPLAY, "replay", str(replay))] if replay else []
    starts = checked_starts(arms, suite, task, episodes, places)
    conditions = Conditions(suite, execute, steps or STEPS[suite], image_size, not stock, Stress(noise, camera, push))
    journal = Journal(out)
    lines = journal.read()
    renderer = held_scene(suite, starts[0].task, image_size, not stock).renderer()
    release_scene()
    plans, held = named("--plan", plan), dict[str, Arm]()
    with Progress(console=Console(stderr=True)) as progress:
        bars = {name: progress.add_task(name, total=len(starts)) for name, _, _ in arms}
        simulators = None
        try:
            for some in rounds(starts, minutes):
                for name, kind, what in arms:
                    arm = held.pop(name, None) or opened(kind, what, plans, execute)
                    check_chunks(name, arm, execute)
                    wanted = [setting(name, arm.identity, start, conditions, renderer) for start in some]
                    done = done_already(lines, wanted, out)
                    todo = [start for start, each in zip(some, wanted, strict=True) if key_of(each) not in done]
                    progress.advance(bars[name], len(some) - len(todo))
                    if todo:
                        simulators = simulators or Simulators(min(jobs, len(starts)), conditions)
                        for start, result in simulators.run(todo, arm.answer, arm.noise_shape):
                            journal.add(line(name, arm.identity, start, conditions, result, renderer))
                            progress.advance(bars[name])
                    if minutes != math.inf:
                        held[name] = arm
                    del arm  # each may fill the GPU's memory
        finally:
            if simulators is not None:
                simulators.__exit__()
    print_tables(journal.read(), Console())


def check_chunks(name: str, arm: Arm, execute: int) -> None:
    """Raises DuqError where fewer actions would be carried out than was asked for."""
    if not isinstance(arm, ReplayArm) and arm.noise_shape[0] < execute:
        raise DuqError(f"--execute {execute}: a chunk of {name} has {arm.noise_shape[0]} actions")


def checked_starts(
    arms: list[tuple[str, str, str]], suite: str, task: list[int] | None, episodes: int, places: str
) -> list[Start]:
    """The episodes. Raises DuqError for whatever is wrong with what was asked for."""
    if not arms:
        raise DuqError("who drives? give one of --plan, --torch and --replay")
    names = [name for name, _, _ in arms]
    for name, kind, what in arms:
        if names.count(name) > 1:
            raise DuqError(f"two policies are called {name}; name them: --plan NAME=FILE")
        file, _, quantized = what.partition("@") if kind == "torch" else (what, "", "")
        naive = bits_of(quantized) is not None
        for path in [file] if naive or not quantized else [file, quantized]:
            if not Path(path).exists():
                raise DuqError(f"--{kind} {what}: there is no {path}")
        if naive and Path(quantized).exists():
            raise DuqError(f"--{kind} {what}: {quantized} exists, and is a naive scheme too; write ./{quantized} for packs")
        if kind == "torch" and "plan" not in [each for _, each, _ in arms]:
            raise DuqError("--torch takes its settings from a plan of the same checkpoint: give one with --plan")
    known = tasks(suite)
    if places not in PLACES:
        raise DuqError(f"--places {places}: unknown, one of {', '.join(PLACES)}")
    if places == "permuted" and suite != "libero_object":
        raise DuqError(f"--places permuted: only of libero_object, whose objects stand apart; leave it out for {suite}")
    chosen = list(range(len(known))) if task is None else sorted(set(task))
    for number in chosen:
        if not 0 <= number < len(known):
            raise DuqError(f"--task {number}: {suite} has tasks 0 to {len(known) - 1}")
    return [Start(number, seed, places) for number in chosen for seed in range(episodes)]


def main() -> None:
    with one_line_errors():
        app()
