"""The options about a policy's settings that duq-compile and duq-quantize share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from duq.compiler.choices import LEROBOT_VERSIONS, ROBOTS, ROTARIES, SOLVERS
from duq.runtime.command_line import choice

PANEL = "Policy (each overrides --config and the checkpoint)"


def _option(kind: Any, flag: str, description: str, **more: Any) -> Any:
    return Annotated[kind | None, typer.Option(flag, help=description, rich_help_panel=PANEL, **more)]


def _choice(values: tuple[str, ...], flag: str, description: str, metavar: str | None = None) -> Any:
    return Annotated[str | None, choice(values, flag, metavar=metavar, help=description, rich_help_panel=PANEL)]


def _published_configs() -> list[str]:
    """For the shell's completion."""
    from duq.compiler.checkpoint.training import published

    return list(published())


POLICY_OPTIONS = {
    "config": _option(
        str, "--config", "A published openpi training config, such as pi05_libero: all of the below at once.",
        metavar="NAME", autocompletion=_published_configs,
    ),
    "robot": _choice(
        ROBOTS, "--robot",
        "The form of the observations: a known robot's, that of a TOML file of your own, none (bare model inputs), or lerobot "
        "(the features of a LeRobot checkpoint, its default).",
        metavar="|".join((*ROBOTS, "FILE")),
    ),
    "num_steps": _option(int, "--num-steps", "Denoising steps; by default the checkpoint's, or 10.", min=1, max=1000),
    "solver": _choice(
        SOLVERS, "--solver",
        "What integrates the flow: euler (the default), or ab2 or ab3 (Adams-Bashforth), for about half the --num-steps; "
        "judge it by duq-compare and by trials.",
    ),
    "action_horizon": _option(int, "--action-horizon", "Actions in a chunk, as in training.", min=1, max=1000),
    "max_prompt_tokens": _option(
        int, "--max-prompt-tokens", "Prompt slots, as in training; longer prompts are cut off.", min=1, max=4096
    ),
    "delta_actions": _option(
        bool, "--delta-actions/--no-delta-actions", "Whether joint actions are relative to the state."
    ),
    "adapt_to_pi": _option(
        bool, "--adapt-to-pi/--no-adapt-to-pi", "ALOHA: convert to the joint space in which the base models were trained."
    ),
    "state_in_prompt": _option(
        bool, "--state-in-prompt/--no-state-in-prompt", "pi0.5: whether the prompt holds the state."
    ),
    "default_prompt": _option(
        str, "--default-prompt", "The prompt of observations without one.", metavar="TEXT"
    ),
    "lerobot_version": _choice(
        LEROBOT_VERSIONS, "--lerobot-version", "The LeRobot that trained the policy; 0.5 stands for later ones too."
    ),
    "rotary": _choice(
        ROTARIES, "--rotary",
        "Rotary frequencies: exact, bfloat16 (as training in PyTorch's bfloat16 rounds them), or auto (by the weights' "
        "origin).",
    ),
}  # fmt: skip


def signature_of(command: Callable) -> inspect.Signature:
    """With its annotations evaluated, but for the types of the compiler that the decorators here supply the values of."""
    return inspect.signature(command, eval_str=True, locals={"Recipe": Any, "Choices": Any})


def with_policy_options(command: Callable) -> Callable:
    """Gives a typer command the options above, and passes it the `choices`."""
    own = signature_of(command)
    parameters = [parameter for parameter in own.parameters.values() if parameter.name != "choices"]
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in POLICY_OPTIONS.items()
    ]

    @functools.wraps(command)
    def with_choices(**arguments: Any) -> Any:
        from duq.compiler.settings import Choices

        return command(choices=Choices(**{name: arguments.pop(name) for name in POLICY_OPTIONS}), **arguments)

    with_choices.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    with_choices.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_choices
