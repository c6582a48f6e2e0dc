"""`duq-compile`."""

from __future__ import annotations

import resource
import time
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from duq.compiler.checkpoint import Checkpoint
from duq.compiler.errors import CalibrationError, CheckpointError, DuqError, PackError, RecipeError
from duq.compiler.pipeline import TARGETS, compile_policy, quantize_checkpoint
from duq.compiler.policy_options import with_policy_options
from duq.compiler.quant import Quantization, Recipe, load_transforms
from duq.compiler.quant.calibrate import calibration_inputs
from duq.compiler.quant.linears import check_selection, select_linears
from duq.compiler.quant.recipe import NO_LINEAR
from duq.compiler.quant.store import check_recipe, is_quantization, load_quantization
from duq.compiler.quantize_cli import (
    CHECKPOINT_HELP,
    AssetOption,
    BaseOption,
    CalibrationOption,
    CalibrationSeedOption,
    DeviceOption,
    PacksOption,
    TokenizerOption,
    check_device,
    open_policy,
    print_line,
    progress_bar,
    use_packs,
    with_recipe_options,
)
from duq.compiler.settings import Choices, PolicySettings, missing_statistics, settings_of
from duq.compiler.targets import Options
from duq.plugins.driver import open_device
from duq.plugins.errors import KernelError
from duq.plugins.gpu import CARDS, cards_by_sm
from duq.runtime.cli_errors import check_output_directory, check_output_file, one_line_errors
from duq.runtime.inspect import settings_table
from duq.runtime.lerobot_folder import LeRobotFolder, lerobot_config

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


@app.command()
@with_policy_options
@with_recipe_options
def _compile(
    recipe: Recipe,
    origins: dict,
    choices: Choices,
    checkpoint: Annotated[str, typer.Argument(help=CHECKPOINT_HELP)],
    out: Annotated[Path, typer.Option("--out", help="The plan to write.")],
    target: Annotated[str, typer.Option(help=f"What to compile for: {', '.join(TARGETS)}.")] = "cpu",
    sm: Annotated[
        list[int] | None,
        typer.Option(
            help="Compute capability of the GPU without its dot, e.g. 90; may be given several times. "
            "By default that of this machine's GPU."
        ),  # fmt: skip
    ] = None,
    gpu: Annotated[
        list[str] | None,
        typer.Option(
            "--gpu",
            metavar="NAME",
            help="Card to compile for, e.g. 'RTX 4090': its --sm, and for --target cuda kernels chosen for its "
            f"multiprocessors. May be given several times. One of {', '.join(card.name for card in CARDS)}.",
        ),
    ] = None,
    timing: Annotated[
        bool | None,
        typer.Option(
            "--timing/--no-timing",
            help="--target cuda: beside a GPU of the --sm, choose kernels by timing them there (the default). "
            "Without, equal inputs give equal plans.",
        ),
    ] = None,
    ptx: Annotated[
        bool | None,
        typer.Option(
            "--ptx/--no-ptx",
            help="--target cuda: carry PTX of the program for the lowest --sm, so that the plan runs on later GPUs too "
            "(the default).",
        ),
    ] = None,
    loop: Annotated[
        str | None,
        typer.Option(
            help="--target tensorrt: the denoising steps 'unrolled' into one engine, or a 'graph' of step engines "
            "(the default)."
        ),  # fmt: skip
    ] = None,
    float_type: Annotated[
        str | None, typer.Option(help="--target tensorrt: of what is not quantized, bf16 (the default) or fp16.")
    ] = None,
    calibration: CalibrationOption = None,
    calibration_seed: CalibrationSeedOption = 0,
    device: DeviceOption = "cpu",
    packs: PacksOption = None,
    tokenizer: TokenizerOption = None,
    base: BaseOption = None,
    cameras: Annotated[int, typer.Option(min=1, max=3, help="The most cameras an observation will have.")] = 3,
    asset_id: AssetOption = None,
    without_norm_stats: Annotated[
        bool, typer.Option("--without-norm-stats", help="Make a robot's plan although the checkpoint has none.")
    ] = False,
    without_tokenizer: Annotated[
        bool, typer.Option("--without-tokenizer", help="Make a robot's plan that takes tokenized prompts only.")
    ] = False,
    lerobot: Annotated[
        bool,
        typer.Option("--lerobot", help="Make --out a folder with the plan for LeRobot's --policy.path (docs/lerobot.md)."),
    ] = False,
    keep_phases: Annotated[
        Path | None,
        typer.Option(
            "--keep-phases",
            "--keep-onnx",
            help="Directory for both graphs after each pass, weights included, and for the target's own phases.",
        ),
    ] = None,
) -> None:
    """Compile a pi0 or pi0.5 checkpoint into one [bold]engine.plan[/bold].

    The default, --quant llm+expert-mlp, quantizes the language model and the MLPs of the action expert to W4A8. That
    takes observations to calibrate on (--calibration), or packs made by duq-quantize (--packs).

    [bold]Examples[/bold]

      duq-compile checkpoints/pi05_libero --config pi05_libero --calibration observations.npz --out engine.plan

      duq-compile checkpoints/pi0_libero --robot libero --packs packs --out engine.plan

      duq-compile checkpoints/pi0_libero --robot libero --quant none --out float.plan

      duq-compile outputs/train/my_arm/checkpoints/last/pretrained_model --calibration datasets/my_arm --out engine.plan

      duq-compile outputs/train/my_arm/checkpoints/last/pretrained_model --quant none --out my_arm --lerobot

      duq-compile checkpoints/pi0_libero --robot libero --packs packs --target cuda --sm 90 --out engine.plan

      duq-compile checkpoints/pi0_libero --robot libero --packs packs --target cuda --gpu rtx4090 --out engine.plan

      duq-compile checkpoints/pi0_libero --robot libero --packs packs --target tensorrt --sm 86 --out engine.plan
    """
    start = time.perf_counter()
    _check_options(target, recipe)
    check_device(device)
    options = _target_options(target, sm, gpu, timing=timing, ptx=ptx, loop=loop, float_type=float_type)
    check_output_directory("--out", out) if lerobot else check_output_file("--out", out)
    folder = LeRobotFolder(out) if lerobot else None
    if keep_phases is not None:
        check_output_directory("--keep-phases", keep_phases)
    policy, settings = open_policy(checkpoint, choices, asset_id, tokenizer, base)
    _check_robot(policy, settings, without_norm_stats, without_tokenizer)
    if folder:
        lerobot_config(settings_of(policy, settings), checkpoint)
    with progress_bar() as progress:
        quantization = _quantization(
            policy, recipe, origins, packs, calibration, calibration_seed, settings, device, progress
        )
        options = replace(options, cameras=cameras, settings=settings)
        with folder or nullcontext():
            plan = folder.plan if folder else out
            compile_policy(policy, quantization, plan, options, progress, keep_phases)
            size = plan.stat().st_size
            if folder:
                folder.finish()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    console = Console(markup=False, highlight=False)
    console.print(settings_table(settings_of(policy, settings)))
    console.print(
        f"{out}: {size / 1e6:,.1f} MB, {len(quantization.packs)} quantized linears, compiled in "
        f"{seconds:.0f} s with a peak of {peak:.1f} GB of memory",
        soft_wrap=True,
    )
    if options.coverage:
        console.print(f"{out}: {options.coverage}", soft_wrap=True)


def _check_options(target: str, recipe: Recipe) -> None:
    if target not in TARGETS:
        raise DuqError(f"--target {target}: unknown, this version compiles for {', '.join(TARGETS)}")
    if recipe.scheme == "reference":
        raise RecipeError("--scheme reference is a fake quantization for studies, without integer arithmetic to compile")


def _target_options(
    target: str, sm: list[int] | None, gpu: list[str] | None = None, **chosen: str | bool | None
) -> Options:
    """The options of the target, checked; `chosen` that are None were left out. DuqError for one that it does not have."""
    given = {name: value for name, value in chosen.items() if value is not None}
    for name, value in given.items():
        owners = [each.name for each in TARGETS.values() if name in _names(each.options)]
        if target not in owners:
            flag = name.replace("_", "-")
            shown = f"--{flag} {value}" if isinstance(value, str) else f"--{flag}" if value else f"--no-{flag}"
            raise DuqError(f"{shown}: is for --target {' and '.join(owners)}; leave it out for {target}")
    options = TARGETS[target].options(**given, **_gpus(target, sm or [], gpu or []))
    TARGETS[target].check(options)
    return options


def _names(options: type[Options]) -> set[str]:
    return {field.name for field in fields(options)}


def _gpus(target: str, sm: list[int], gpu: list[str]) -> dict[str, Any]:
    """What --sm and --gpu say, checked; for a target that needs a GPU and without both, that of this machine."""
    known = TARGETS[target].architectures
    if not known:
        for flag, values in (("--sm", sm), ("--gpu", gpu)):
            if values:
                raise DuqError(f"{flag} {values[0]}: --target {target} runs on no GPU; leave {flag} out")
        return {}
    names, cards = ", ".join(map(str, known)), cards_by_sm(gpu)
    for card in cards.values():
        if card.sm not in known:
            raise DuqError(f"--gpu {card.name}: is SM {card.sm}, --target {target} compiles for {names}")
    if not sm and not cards:
        try:
            sm = [open_device()]
        except KernelError as error:
            raise DuqError(
                f"--target {target} needs --sm, one of {names}: this machine has no GPU to ask ({error})"
            ) from error
    for each in sm:
        if each not in known:
            raise DuqError(f"--sm {each}: --target {target} compiles for {names}")
    return {"sm": tuple(sorted({*sm, *cards})), "gpu": tuple(card.name for card in cards.values())}


def _check_robot(
    checkpoint: Checkpoint, settings: PolicySettings, without_norm_stats: bool, without_tokenizer: bool
) -> None:
    """Finds out now, not on the robot, whether its observations can be converted."""
    if settings.robot and checkpoint.norm_stats is None and not without_norm_stats:
        raise missing_statistics(checkpoint, settings.robot_name)
    if settings.robot and checkpoint.tokenizer is None and not without_tokenizer:
        raise CheckpointError(
            f"{checkpoint.path} has no tokenizer (*.model): a plan for {settings.robot_name} would refuse every prompt. Give "
            "PaliGemma's with --tokenizer FILE, or say --without-tokenizer to pass tokenized prompts only"
        )
    settings.preprocessor(checkpoint)


def _quantization(checkpoint, recipe, origins, packs, calibration, seed, settings, device, progress) -> Quantization:
    """From complete packs as they are, else by the quantizer, with the transforms of foreign packs if given.

    --quant none wins over packs; other recipe options have to agree with complete ones.
    """
    if recipe.include == NO_LINEAR:
        return Quantization(recipe)
    if use_packs(packs) and is_quantization(packs):
        check_recipe(packs, recipe, origins, checkpoint.config)
        if calibration is not None:
            print_line(f"warning: --calibration {calibration} is not read, for the packs in {packs} are complete")
        return load_quantization(packs, checkpoint)
    check_selection(recipe, checkpoint.config)
    if not select_linears(recipe, checkpoint.config):
        return Quantization(recipe)
    if use_packs(packs) and not packs.is_dir():
        raise PackError(f"--packs {packs}: is not a directory of packs; duq-quantize writes one")
    if calibration is None:
        raise CalibrationError(
            "quantization measures activations: give observations of the robot with --calibration DATA, packs made by "
            "duq-quantize with --packs DIR, or compile in float with --quant none"
        )
    transforms = load_transforms(packs, checkpoint, recipe) if use_packs(packs) else None
    inputs = calibration_inputs(
        calibration, settings.preprocessor(checkpoint), recipe.calibration_steps, seed=seed, report=print_line
    )
    return quantize_checkpoint(checkpoint, recipe, inputs, progress, transforms, device)


def compile_main() -> None:
    with one_line_errors():
        app()
