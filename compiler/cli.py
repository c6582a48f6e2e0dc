"""What `duq-compile` does; its options are in commands.py."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from duq.compiler.checkpoint import Checkpoint
from duq.compiler.checks import check_inputs, packs_kept
from duq.compiler.commands import compile_main as compile_main
from duq.compiler.errors import CalibrationError, CheckpointError, DuqError, PackError, RecipeError
from duq.compiler.pipeline import TARGETS, compile_policy, quantize_checkpoint
from duq.compiler.quant import Quantization, Recipe, load_transforms
from duq.compiler.quant.calibrate import calibration_inputs
from duq.compiler.quant.linears import check_selection, select_linears
from duq.compiler.quant.recipe import NO_LINEAR
from duq.compiler.quant.store import check_recipe, is_quantization, load_quantization
from duq.compiler.quantize_cli import check_device, open_policy, print_line, progress_bar, result_json, use_packs
from duq.compiler.settings import Choices, PolicySettings, missing_statistics, settings_of
from duq.compiler.targets import Options
from duq.plugins.driver import open_device
from duq.plugins.errors import KernelError
from duq.plugins.gpu import cards_by_sm
from duq.runtime.cli_errors import check_output_directory, check_output_file
from duq.runtime.inspect import settings_table
from duq.runtime.lerobot_folder import LeRobotFolder, lerobot_config
from duq.runtime.signing import Signer


def compile_checkpoint(
    recipe: Recipe,
    origins: dict,
    choices: Choices,
    checkpoint: str,
    out: Path,
    *,
    target: str,
    sm: list[int],
    gpu: list[str] | None,
    chosen: Mapping[str, str | bool | None],
    calibration: Path | None,
    calibration_seed: int,
    device: str,
    packs: Path | None,
    tokenizer: Path | None,
    base: str | None,
    cameras: int,
    asset_id: str | None,
    without_norm_stats: bool,
    without_tokenizer: bool,
    sign: Path | None,
    lerobot: bool,
    keep_phases: Path | None,
    as_json: bool,
) -> None:
    """What `duq-compile` does, with its options by name; chosen: those of a target, None where left out.

    Raises DuqError for what is wrong with them, before any long work.
    """
    start = time.perf_counter()
    _check_options(target, recipe)
    check_device(device)
    options = _target_options(target, sm, gpu, **chosen)
    check_output_directory("--out", out) if lerobot else check_output_file("--out", out)
    folder = LeRobotFolder(out) if lerobot else None
    signer = None if sign is None else Signer(sign)
    if keep_phases is not None:
        check_output_directory("--keep-phases", keep_phases)
    check_inputs(None if recipe.include == NO_LINEAR else calibration, tokenizer)
    policy, settings = open_policy(checkpoint, choices, asset_id, tokenizer, base)
    _check_robot(policy, settings, without_norm_stats, without_tokenizer)
    if folder:
        lerobot_config(settings_of(policy, settings), checkpoint)
    with progress_bar() as progress:
        quantization = _quantization(
            policy, recipe, origins, packs, calibration, calibration_seed, settings, device, progress
        )
        options = replace(options, cameras=cameras, settings=settings)
        with packs_kept(quantization, policy, out, packs, print_line), folder or nullcontext():
            plan = folder.plan if folder else out
            compile_policy(policy, quantization, plan, options, progress, keep_phases, signer)
            if folder:
                folder.finish()
                plan = out / plan.name
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    if as_json:
        found = {"plan": str(plan), "bytes": plan.stat().st_size, "target": target, "runs_on": options.coverage or None}
        typer.echo(result_json(found, quantization, settings_of(policy, settings), seconds))
        return
    console = Console(markup=False, highlight=False)
    console.print(settings_table(settings_of(policy, settings)))
    console.print(
        f"{out}: {plan.stat().st_size / 1e6:,.1f} MB, {len(quantization.packs)} quantized linears, compiled in "
        f"{seconds:.0f} s with a peak of {peak:.1f} GB of memory",
        soft_wrap=True,
    )
    if signer:
        console.print(f"{out}: signed with the key {signer.public.fingerprint}", soft_wrap=True)
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
