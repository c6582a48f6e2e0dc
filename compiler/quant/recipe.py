"""What to quantize and how: the recipe, its presets, its file form, and the variables of the original scripts."""

from __future__ import annotations

import difflib
import functools
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from duq.compiler.checkpoint.names import canonical_name, openpi_name
from duq.compiler.checkpoint.ranges import RANGES, in_range
from duq.compiler.errors import RecipeError
from duq.compiler.patterns import Pattern
from duq.runtime.reading import brief, present, read_bytes, reading, reason

EVERY_LINEAR = r"\.layers\.|^projector$"
NO_LINEAR = r"(?!)"
SELECTION = ("scope", "include", "exclude")

# The selection each preset stands for. The small projections of state, action and time always stay in float.
PRESETS = {
    "llm": r"^llm\.",
    "llm+expert-mlp": r"^llm\.|^expert\..*\.mlp\.",
    "all": EVERY_LINEAR,
    "none": NO_LINEAR,
}
LARGEST = 1 << 20  # bytes of a recipe
REMEDY = "write it as docs/quantization.md says"
DEFAULT_PRESET = "llm+expert-mlp"

# What a scheme implies where the user says nothing.
SCHEMES = {
    "balanced": {
        "block_size": 64,
        "permute": False,
        "row_rotation": "0",
        "activation_scale": "per-token",
        "compensate": True,
    },
    "duquant": {
        "block_size": 16,
        "permute": True,
        "row_rotation": "restore",
        "activation_scale": "per-token",
        "compensate": False,
    },
    "reference": {
        "block_size": 16,
        "permute": True,
        "row_rotation": "restore",
        "activation_scale": "per-channel",
        "compensate": False,
    },
}


@dataclass(frozen=True)
class Recipe:
    """A fully resolved recipe; :func:`load_recipe` makes one from a preset or file, the environment and flags.

    Attributes:
        scheme: ``balanced`` (balance factors and block Hadamard), ``duquant`` (zigzag permutation and block rotations
            from the weights) or ``reference`` (duquant with the original per-channel fake quantization; not compilable).
        scope, include, exclude: regular expressions over module names. A linear is quantized when its canonical or its
            openpi name starts with ``scope``, contains ``include`` and, in neither form, contains ``exclude``.
        weight_bits: 4, 8 or 16 (16 leaves the linear in float).
        layer_bits: (pattern, bits) pairs overriding ``weight_bits``; a pattern covers whole components of the name,
            so ``layers.1`` is not ``layers.10``, and the last one that matches counts.
        auto_bits: mean bits of the quantized weights to spend, 4 to 8: of the 4-bit linears, those get 8 that lose most for
            their size. 0: none do.
        activation_bits: 8, or 0 for float activations.
        activation_scale: ``per-token`` (dynamic) or ``per-tensor`` (calibrated); ``per-channel`` in ``reference`` only.
        block_size: block of the input rotation, 16..128; narrowed to what divides a linear's input.
        permute: zigzag permutation of the input channels.
        row_rotation: ``0``, or ``restore``: block rotation of the output channels, undone after the GEMM.
        activation_percentile: of |x'|, for calibrated activation scales.
        calibration_steps: observations to calibrate on.
        compensate, damping: GPTQ-style error compensation, with ``damping`` x the mean diagonal added to the Hessian, or
            more, with a warning, where so little leaves it singular (``compiler/quant/rounding.py``).
    """

    scheme: str = "balanced"
    scope: str = ""
    include: str = PRESETS[DEFAULT_PRESET]
    exclude: str = ""
    weight_bits: int = 4
    layer_bits: tuple[tuple[str, int], ...] = ()
    auto_bits: float = 0.0
    activation_bits: int = 8
    activation_scale: str = "per-token"
    block_size: int = 64
    permute: bool = False
    row_rotation: str = "0"
    activation_percentile: float = 99.9
    calibration_steps: int = 32
    compensate: bool = True
    damping: float = 1.0

    def __post_init__(self) -> None:
        _one_of("scheme", self.scheme, SCHEMES)
        if not all(isinstance(each, tuple) and len(each) == 2 for each in self.layer_bits):
            raise RecipeError(f"layer_bits is {brief(self.layer_bits)}; expected pairs of a pattern and bits")
        scales = ("per-channel",) if self.scheme == "reference" else ("per-token", "per-tensor")
        _one_of("activation_scale", self.activation_scale, scales)
        _one_of("row_rotation", self.row_rotation, ("0", "restore"))
        _one_of("weight_bits", self.weight_bits, (4, 8, 16))
        _one_of("activation_bits", self.activation_bits, (8, 0))
        for pattern, bits in self.layer_bits:
            _one_of(f"weight bits of {pattern!r}", bits, (4, 8, 16))
        if self.auto_bits and not in_range(self.auto_bits, "mean_bits"):
            raise RecipeError(f"auto_bits is {self.auto_bits}; a mean of 4 to 8 bits, such as 4.5, or 0 for none")
        if self.block_size not in (16, 32, 64, 128):
            raise RecipeError(f"block_size is {self.block_size}; a block is 16, 32, 64 or 128 channels")
        if not in_range(self.activation_percentile, "activation_percentile"):
            raise RecipeError(f"activation_percentile is {self.activation_percentile}; expected 50..100")
        if not in_range(self.calibration_steps, "calibration_steps"):
            raise RecipeError(
                f"calibration_steps is {brief(self.calibration_steps)}; at least one observation is needed, at most "
                f"{RANGES['calibration_steps'][1]:,} are taken"
            )
        if not in_range(self.damping, "damping"):
            raise RecipeError(
                f"damping is {self.damping}; it must be positive for the Hessian to be invertible, at most "
                f"{RANGES['damping'][1]:g}"
            )
        for key in SELECTION:
            Pattern(getattr(self, key), key, RecipeError)
        for pattern, _ in self.layer_bits:
            _component(pattern)

    def bits(self, name: str) -> int:
        """Weight bits of the linear with this canonical module name; 16 when it is not to be quantized."""
        names = (name, openpi_module(name))
        scope, include, exclude = (Pattern(getattr(self, key), key, RecipeError) for key in SELECTION)
        selected = (
            any(scope.starts(n) for n in names)
            and any(include.is_in(n) for n in names)
            and not (self.exclude and any(exclude.is_in(n) for n in names))
        )
        bits = self.weight_bits if selected else 16
        for pattern, override in self.layer_bits:
            if selected and any(_component(pattern).is_in(n) for n in names):
                bits = override
        return bits

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "layer_bits": dict(self.layer_bits)}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Recipe:
        """A recipe from any subset of its fields (as :meth:`to_json` writes them); the scheme fills in the rest.

        Raises RecipeError for unknown keys and for values of the wrong kind.
        """
        known = {field.name: field for field in fields(cls)}
        for key in settings:
            _one_of("recipe key", key, known)
        scheme = settings.get("scheme", cls.scheme)
        _one_of("scheme", scheme, SCHEMES)
        values = {**SCHEMES[scheme], **settings}
        return cls(**{key: _coerce(key, value, type(known[key].default)) for key, value in values.items()})


def load_recipe(
    source: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Recipe:
    """The recipe from, in rising order of precedence: the environment, ``source``, ``overrides``.

    Args:
        source: a preset's name or the path of a YAML or TOML file with recipe keys (and ``preset``); None is the
            default preset, unless the environment selects linears itself.
        overrides: recipe keys from command-line flags; None values are skipped.
        environment: where ``OPENPI_DUQUANT_*`` variables are looked up.
    Raises RecipeError naming the key or value and the nearest valid ones.
    """
    settings = environment_settings(environment)
    if source is not None:
        settings |= source_settings(source)
    elif "include" not in settings:
        settings |= preset_settings(DEFAULT_PRESET)
    settings |= {key: value for key, value in (overrides or {}).items() if value is not None}
    return Recipe.from_settings(settings)


def recipe_origins(
    source: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] = os.environ,
) -> dict[str, str]:
    """Recipe key -> the option or variable that sets it, of the keys that the arguments of :func:`load_recipe` set."""
    origins = environment_origins(environment)
    if source is not None:
        origins |= dict.fromkeys(source_settings(source), f"--quant {source}")
    given = [key for key, value in (overrides or {}).items() if value is not None]
    return origins | {key: f"--{key.replace('_', '-')}" for key in given}


def source_settings(source: str) -> dict[str, Any]:
    """The settings of a preset or a recipe file."""
    return preset_settings(source) if source in PRESETS else file_settings(source)


def preset_settings(preset: str) -> dict[str, str]:
    return {"scope": "", "include": PRESETS[preset], "exclude": ""}


def file_settings(source: str) -> dict[str, Any]:
    """The settings in a recipe file. Keys may be written with hyphens; ``preset`` stands for its selection."""
    path = Path(source)
    if path.suffix not in (".yaml", ".yml", ".toml") or not present(path, RecipeError):
        raise RecipeError(f"{source!r} is neither a preset nor a .yaml or .toml recipe file; {_valid(source, PRESETS)}")
    settings = {_key(path, key): value for key, value in _parse(path).items()}
    if "preset" in settings:
        preset = settings.pop("preset")
        _one_of(f"preset in {path}", preset, PRESETS)
        settings = preset_settings(preset) | settings
    return settings


def _key(path: Path, key: Any) -> str:
    if not isinstance(key, str):
        raise RecipeError(f"{path}: {brief(key)} is no key of a recipe")
    return key.replace("-", "_")


def environment_settings(environment: Mapping[str, str]) -> dict[str, Any]:
    """Recipe settings from the variables of the original DuQuant scripts (docs/quantization.md lists them).

    The presence of PERMUTE or ROW_ROT, which only DuQuant's transforms have, makes ``duquant`` the scheme. SCOPE,
    INCLUDE, EXCLUDE and LAYERS select among all linears, as they did there.
    """
    variables = {
        key.removeprefix("OPENPI_DUQUANT_"): value.strip()
        for key, value in environment.items()
        if key.startswith("OPENPI_DUQUANT_")
    }
    settings: dict[str, Any] = {}
    if {"PERMUTE", "ROW_ROT"} & variables.keys():
        settings["scheme"] = "duquant"
    if {"SCOPE", "INCLUDE", "EXCLUDE", "LAYERS"} & variables.keys():
        settings["scope"] = re.escape(variables.get("SCOPE", ""))
        settings["include"] = variables.get("INCLUDE") or EVERY_LINEAR
        settings["exclude"] = variables.get("EXCLUDE", "")
        if variables.get("LAYERS"):
            settings["include"] = f"^({'|'.join(re.escape(name) for name in _listed(variables['LAYERS']))})$"
    for variable, key in ENVIRONMENT.items():
        if variables.get(variable):
            settings[key] = variables[variable]
    return settings


def environment_origins(environment: Mapping[str, str]) -> dict[str, str]:
    """Recipe key -> the variable that sets it, of the keys of :func:`environment_settings`."""
    variables: dict[str, tuple[str, ...]] = {key: (variable,) for variable, key in ENVIRONMENT.items()}
    variables["scheme"] = ("PERMUTE", "ROW_ROT")
    variables |= {key: (key.upper(), "LAYERS", "INCLUDE", "SCOPE", "EXCLUDE") for key in SELECTION}
    return {
        key: next(name for name in (f"OPENPI_DUQUANT_{variable}" for variable in variables[key]) if name in environment)
        for key in environment_settings(environment)
    }


# OPENPI_DUQUANT_<variable> -> recipe key. LS needs none: it shifts all channel energies alike, and only their order
# is used. PACKDIR is the command line's default for --packs.
ENVIRONMENT = {
    "WBITS_DEFAULT": "weight_bits",
    "WBITS": "layer_bits",
    "ABITS": "activation_bits",
    "BLOCK": "block_size",
    "PERMUTE": "permute",
    "ROW_ROT": "row_rotation",
    "ACT_PCT": "activation_percentile",
    "CALIB_STEPS": "calibration_steps",
}


def openpi_module(name: str) -> str:
    """The openpi name of a module given by its canonical name."""
    return openpi_name(f"{name}.weight").removesuffix(".weight")


def canonical_module(name: str) -> str:
    """The inverse of :func:`openpi_module`; canonical names stay as they are."""
    return canonical_name(f"{name}.weight").removesuffix(".weight")


def parse_layer_bits(items: Iterable[str]) -> tuple[tuple[str, int], ...]:
    """``["layers.0:8", "down_proj:8"]`` -> (("layers.0", 8), ("down_proj", 8))."""
    pairs = []
    for item in items:
        pattern, _, bits = item.rpartition(":")
        if not pattern or not re.fullmatch(r"[0-9]{1,3}", bits.strip()):
            raise RecipeError(f"layer_bits entry {brief(item)} is not of the form PATTERN:BITS, such as layers.0:8")
        pairs.append((pattern.strip(), int(bits)))
    return tuple(pairs)


def _listed(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _parse(path: Path) -> dict[str, Any]:
    import yaml  # imported here because most runs have no recipe file

    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    text = read_bytes(path, RecipeError, REMEDY, limit=LARGEST)
    with reading(path, RecipeError, REMEDY):
        try:
            parsed = tomllib.loads(text.decode()) if path.suffix == ".toml" else yaml.load(text, _plain_loader())
        except (ValueError, yaml.YAMLError, RecursionError) as error:  # tomllib's and Unicode's are ValueErrors
            raise RecipeError(f"{path} does not parse: {reason(error)}") from error
    if not isinstance(parsed, dict):
        raise RecipeError(f"{path} holds no settings; expected 'key: value' lines such as 'preset: llm'")
    return parsed


@functools.cache
def _plain_loader() -> type:
    """YAML without aliases: a few lines of them stand for more than fits into memory."""
    import yaml

    class PlainLoader(yaml.SafeLoader):
        def compose_node(self, parent, index):
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError(f"an alias (*{self.peek_event().anchor}) stands in it; write the value itself")
            return super().compose_node(parent, index)

    return PlainLoader


def _coerce(key: str, value: Any, kind: type) -> Any:
    """Brings a value from a file, flag or variable to the field's type; strings are what variables are made of."""
    if key == "layer_bits":
        if isinstance(value, Mapping):
            value = [f"{pattern}:{bits}" for pattern, bits in value.items()]
        items = _listed(value) if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
            raise RecipeError(
                f"recipe key layer_bits is {brief(value)}; expected a list of PATTERN:BITS, such as layers.0:8"
            )
        return parse_layer_bits(items)
    if kind is bool and isinstance(value, str) and value.lower() in ("0", "1", "false", "true", "off", "on"):
        return value.lower() in ("1", "true", "on")
    if kind is str and key == "row_rotation" and value in (0, "disabled"):
        return "0"  # YAML reads the mode 0 as a number
    try:
        number = (
            kind(value)
            if kind in (int, float) and isinstance(value, (int, float, str)) and type(value) is not bool
            else value
        )
    except (TypeError, ValueError, OverflowError):
        number = value
    if not isinstance(number, kind) or (kind is int and isinstance(value, float) and number != value):
        raise RecipeError(f"recipe key {key} is {brief(value)}; expected {kind.__name__}")
    return number


def _one_of(what: str, value: Any, valid: Iterable) -> None:
    if value not in list(valid):  # a list, as what a file holds may not be hashable
        raise RecipeError(f"unknown {what} {brief(value)}; {_valid(value, valid)}")


def _valid(value: Any, valid: Iterable) -> str:
    names = [str(name) for name in valid]
    near = difflib.get_close_matches(value[:100], names, n=2) if isinstance(value, str) else []
    return f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(names)}"


def _component(pattern: str) -> Pattern:
    """Whole components of a name."""
    Pattern(pattern, "layer_bits", RecipeError)  # on its own, for what its error says
    return Pattern(rf"(^|\.)({pattern})(\.|$)", "layer_bits", RecipeError)
