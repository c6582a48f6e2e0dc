"""The options of `duq-compile` and `duq-quantize`. What does the work, and imports PyTorch, is imported when one runs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from duq.compiler.choices import (
    ACTIVATION_BITS,
    ACTIVATION_SCALES,
    BLOCK_SIZES,
    DEVICES,
    FLOAT_TYPES,
    LOOPS,
    PRESETS,
    ROW_ROTATIONS,
    SCHEMES,
    TARGETS,
    WEIGHT_BITS,
)
from duq.compiler.policy_options import signature_of, with_policy_options
from duq.plugins.gpu import CARDS
from duq.runtime.cli_errors import one_line_errors
from duq.runtime.command_line import choice, command_app, compute_capability

if TYPE_CHECKING:
    from duq.compiler.quant import Recipe
    from duq.compiler.settings import Choices

CHECKPOINT_HELP = (
    "openpi (PyTorch or JAX) or LeRobot checkpoint: its directory, a PEFT adapter's, or hf://owner/name\\[@revision]."
)
RECIPE_PANEL = "Recipe (override --quant)"


def _option(kind: Any, flag: str, description: str, metavar: str | None = None) -> Any:
    return Annotated[kind | None, typer.Option(flag, metavar=metavar, help=description, rich_help_panel=RECIPE_PANEL)]


def _choice(kind: Any, flag: str, description: str, values: tuple[str, ...]) -> Any:
    return Annotated[kind | None, choice(values, flag, help=description, rich_help_panel=RECIPE_PANEL)]


# Recipe key -> flag. The values are checked by the recipe, which also reads them from files and the environment.
RECIPE_OPTIONS = {
    "scheme": _choice(str, "--scheme", "How the transforms of the inputs are made.", SCHEMES),
    "scope": _option(str, "--scope", "Quantize only linears whose name starts so.", "REGEX"),
    "include": _option(str, "--include", "Quantize only linears whose name contains this.", "REGEX"),
    "exclude": _option(str, "--exclude", "But not those whose name contains this.", "REGEX"),
    "weight_bits": _choice(int, "--weight-bits", "16 are float weights.", WEIGHT_BITS),
    "layer_bits": _option(
        list[str],
        "--layer-bits",
        "Such as layers.0:8. Repeatable; the last match counts.",
        "PATTERN:BITS",
    ),
    "auto_bits": _option(float, "--auto-bits", "Mean weight bits to spend, such as 4.5: the linears that lose most get 8."),
    "activation_bits": _choice(int, "--activation-bits", "0 are float activations (W4A16).", ACTIVATION_BITS),
    "activation_scale": _choice(
        str, "--activation-scale", "Dynamic, or calibrated; per-channel in --scheme reference alone.", ACTIVATION_SCALES
    ),
    "block_size": _choice(int, "--block-size", "Channels in a block of the input rotation.", BLOCK_SIZES),
    "permute": _option(bool, "--permute/--no-permute", "Zigzag permutation of the input channels."),
    "row_rotation": _choice(str, "--row-rotation", "Rotate the output channels and back.", ROW_ROTATIONS),
    "activation_percentile": _option(float, "--activation-percentile", "Of |x|, for calibrated activation scales."),
    "calibration_steps": _option(int, "--calibration-steps", "Observations to calibrate on."),
    "compensate": _option(bool, "--compensate/--no-compensate", "GPTQ-style compensation of the rounding errors."),
    "damping": _option(float, "--damping", "Of the compensation, relative to the mean activation energy."),
}
QuantOption = Annotated[
    str | None,
    choice(
        PRESETS,
        "--quant",
        metavar="|".join((*PRESETS, "FILE")),
        help="Preset or recipe file (.yaml, .toml).",
    ),
]
PacksOption = Annotated[
    Path | None,
    typer.Option(
        "--packs", envvar="OPENPI_DUQUANT_PACKDIR", help="Directory of DuQuant packs to take the transforms from."
    ),
]
CalibrationOption = Annotated[
    Path | None,
    typer.Option("--calibration", help="Observations: a LeRobotDataset folder, duq-serve's recordings, or .npz files."),
]
CalibrationSeedOption = Annotated[
    int, typer.Option("--calibration-seed", min=0, help="Of the choice of frames from a LeRobotDataset.")
]
BaseOption = Annotated[
    str | None,
    typer.Option(
        "--base", metavar="CHECKPOINT", help="The policy that an adapter was trained on; by default the one it names."
    ),
]
TokenizerOption = Annotated[
    Path | None, typer.Option("--tokenizer", help="SentencePiece model; by default the one in the checkpoint.")
]
DeviceOption = Annotated[str, choice(DEVICES, "--device", help="Where to calibrate and quantize.")]
CheckpointArgument = Annotated[str, typer.Argument(metavar="CHECKPOINT", help=CHECKPOINT_HELP)]
JsonOption = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON object on stdout: files, sizes, times, settings, warnings."),
]
AssetOption = Annotated[
    str | None,
    typer.Option("--asset-id", metavar="ID", help="Which normalization statistics, if the checkpoint has several."),
]


def with_recipe_options(command: Callable) -> Callable:
    """Gives a typer command the option ``--quant`` and one for each recipe key, and passes it the ``recipe``.

    And, to a command that has a parameter of that name, ``origins``: what set each key that is not at its default.
    """
    own = signature_of(command)
    parameters = [parameter for parameter in own.parameters.values() if parameter.name not in ("recipe", "origins")]
    options = {"quant": QuantOption, **RECIPE_OPTIONS}
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in options.items()
    ]

    @functools.wraps(command)
    def with_recipe(**arguments: Any) -> Any:
        from duq.compiler.quant.recipe import load_recipe, recipe_origins

        source, overrides = arguments.pop("quant"), {key: arguments.pop(key) for key in RECIPE_OPTIONS}
        if "origins" in own.parameters:
            arguments["origins"] = recipe_origins(source, overrides)
        return command(recipe=load_recipe(source, overrides), **arguments)

    with_recipe.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    with_recipe.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_recipe


compile_app = command_app()
quantize_app = command_app()


@compile_app.command()
@with_policy_options
@with_recipe_options
def _compile(
    recipe: Recipe,
    origins: dict,
    choices: Choices,
    checkpoint: CheckpointArgument,
    out: Annotated[Path, typer.Option("--out", help="The plan to write.")],
    target: Annotated[str, choice(TARGETS, "--target", help="What to compile for.")] = "cpu",
    sm: Annotated[
        list[str] | None,
        typer.Option(
            "--sm",
            metavar="SM",
            help="Compute capability of the GPU: 90, or 9.0. May be given several times. By default that of this machine's GPU.",
        ),
    ] = None,
    gpu: Annotated[
        list[str] | None,
        typer.Option(
            "--gpu",
            metavar="NAME",
            autocompletion=lambda: [card.name for card in CARDS],
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
        choice(
            LOOPS,
            "--loop",
            help="--target tensorrt: a 'graph' of step engines (the default), or the steps 'unrolled' into one engine.",
        ),  # fmt: skip
    ] = None,
    float_type: Annotated[
        str | None,
        choice(FLOAT_TYPES, "--float-type", help="--target tensorrt: of what is not quantized; bf16 is the default."),
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
    sign: Annotated[
        Path | None,
        typer.Option(
            "--sign", metavar="KEY", help="Sign the plan with this Ed25519 private key (PEM); needs the extra sign."
        ),
    ] = None,
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
    as_json: JsonOption = False,
) -> None:
    """Compile a pi0 or pi0.5 checkpoint into one [bold]engine.plan[/bold].

    The default, --quant llm+expert-mlp, quantizes the language model and the MLPs of the action expert to W4A8. That
    takes observations to calibrate on (--calibration), or packs made by duq-quantize (--packs).

    [bold]Examples[/bold]

      duq-compile checkpoints/pi05_libero --config pi05_libero --calibration observations.npz --out engine.plan

      duq-compile checkpoints/pi0_libero --robot libero --packs packs --out engine.plan

      duq-compile checkpoints/pi0_libero --robot libero --quant none --out float.plan

      duq-compile outputs/train/my_arm/checkpoints/last/pretrained_model --calibration datasets/my_arm --out engine.plan

      duq-compile checkpoints/pi0_libero --robot libero --packs packs --target cuda --sm 90 --out engine.plan

      duq-compile checkpoints/pi0_libero --robot libero --packs packs --target cuda --gpu rtx4090 --out engine.plan

      duq-compile checkpoints/pi0_libero --robot libero --packs packs --target tensorrt --sm 86 --out engine.plan
    """
    from duq.compiler import cli

    cli.compile_checkpoint(
        recipe, origins, choices, checkpoint, out,
        target=target, sm=[compute_capability("--sm", each) for each in sm or ()], gpu=gpu,
        chosen={"timing": timing, "ptx": ptx, "loop": loop, "float_type": float_type},
        calibration=calibration, calibration_seed=calibration_seed, device=device, packs=packs, tokenizer=tokenizer,
        base=base, cameras=cameras, asset_id=asset_id, without_norm_stats=without_norm_stats,
        without_tokenizer=without_tokenizer, sign=sign, lerobot=lerobot, keep_phases=keep_phases,
        as_json=as_json,
    )  # fmt: skip


@quantize_app.command()
@with_policy_options
@with_recipe_options
def _quantize(
    recipe: Recipe,
    choices: Choices,
    checkpoint: CheckpointArgument,
    out: Annotated[Path, typer.Option("--out", help="Directory of packs to write.")],
    calibration: CalibrationOption = None,
    calibration_seed: CalibrationSeedOption = 0,
    packs: PacksOption = None,
    tokenizer: TokenizerOption = None,
    base: BaseOption = None,
    asset_id: AssetOption = None,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Quantize a policy: calibrate it on observations and write the packs that [bold]duq-compile --packs[/bold] takes.

    [bold]Examples[/bold]

      duq-quantize checkpoints/pi0 --calibration observations.npz --out packs

      duq-quantize checkpoints/pi0 --calibration dataset/ --robot aloha --quant all --layer-bits layers.0:8 --out packs
    """
    from duq.compiler import quantize_cli

    quantize_cli.quantize_policy(
        recipe, choices, checkpoint, out, calibration=calibration, calibration_seed=calibration_seed, packs=packs,
        tokenizer=tokenizer, base=base, asset_id=asset_id, device=device, as_json=as_json,
    )  # fmt: skip


def compile_main() -> None:
    with one_line_errors():
        compile_app()


def quantize_main() -> None:
    with one_line_errors():
        quantize_app()
