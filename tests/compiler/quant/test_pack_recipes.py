"""Packs and the recipe beside them: what was asked for, by option, file or variable, is done or refused."""

from __future__ import annotations

import pytest
import yaml
from rich.progress import Progress

import duq.compiler.cli
from duq.compiler.checkpoint import load_checkpoint
from duq.compiler.checkpoint.synthetic import make_checkpoint
from duq.compiler.commands import compile_main
from duq.compiler.quant import Quantization, load_recipe, save_quantization
from duq.compiler.quant.recipe import ENVIRONMENT, recipe_origins
from duq.runtime.observations import save_observations
from tests.support.observations import libero

MADE_WITH = {"weight_bits": 4, "block_size": 32, "layer_bits": ["layers.0:8"]}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_checkpoint(
        tmp_path_factory.mktemp("made") / "pi0", robot="libero", depth=2, vision_depth=1, action_horizon=8
    )


@pytest.fixture(scope="module")
def packs(source, tmp_path_factory):
    """A directory of packs of the recipe MADE_WITH over `llm`; which linears it has does not matter here."""
    directory = tmp_path_factory.mktemp("made") / "packs"
    checkpoint = load_checkpoint(source)
    quantization = Quantization(load_recipe("llm", MADE_WITH, {}))
    with Progress(disable=True) as progress:
        save_quantization(quantization, directory, checkpoint.fingerprint, progress)
    return directory


@pytest.fixture
def compiled(source, packs, command_line, monkeypatch, tmp_path):
    """(*options) -> what the command line said, and the quantization it would have compiled (None: it refused)."""
    taken = []

    def keep(policy, quantization, out, *others):
        taken.append(quantization)
        out.touch()

    monkeypatch.setattr(duq.compiler.cli, "compile_policy", keep)

    def run(*options, given=("--packs", packs)):
        taken.clear()
        result = command_line(compile_main, source, "--robot", "libero", "--out", tmp_path / "out.plan", *given, *options)
        return result, taken[0] if taken else None

    return run


def test_packs_alone_are_compiled_as_they_are(compiled):
    result, quantization = compiled()
    assert result.code == 0 and quantization.recipe == load_recipe("llm", MADE_WITH, {})


@pytest.mark.parametrize("options", [
    ["--quant", "llm", "--layer-bits", "layers.0:8"],
    ["--block-size", "32"],
    ["--weight-bits", "4"],  # of the recipe; layer_bits stay
    ["--scheme", "balanced"],
    ["--include", r"^llm\."],
    ["--scope", "llm", "--include", r"\."],  # the same linears, said otherwise
    ["--layer-bits", "llm.layers.0:8"],
    ["--compensate", "--damping", "1"],
])  # fmt: skip
def test_the_same_recipe_again_is_welcome(compiled, options):
    result, quantization = compiled(*options)
    assert result.code == 0 and quantization.recipe == load_recipe("llm", MADE_WITH, {}), result.err


CONFLICTS = {
    "preset": (["--quant", "all"], "--quant all: asks for include", "were made with '^llm"),
    "default preset": (["--quant", "llm+expert-mlp"], "--quant llm+expert-mlp: asks for include"),
    "bits": (["--weight-bits", "8"], "--weight-bits: asks for weight_bits 8, but the packs in", "were made with 4"),
    "layers": (
        ["--layer-bits", "layers.1:8"],
        "--layer-bits: asks for layer_bits (('layers.1', 8),)",
        "(('layers.0', 8),)",
    ),
    "auto": (["--auto-bits", "5"], "--auto-bits: asks for auto_bits 5.0", "made with 0.0"),
    "activations": (["--activation-bits", "0"], "--activation-bits: asks for activation_bits 0", "made with 8"),
    "scale": (["--activation-scale", "per-tensor"], "--activation-scale: asks for activation_scale 'per-tensor'"),
    "block": (["--block-size", "64"], "--block-size: asks for block_size 64", "made with 32"),
    "scheme": (["--scheme", "duquant"], "--scheme: asks for scheme 'duquant'", "made with 'balanced'"),
    "permute": (["--permute"], "--permute: asks for permute True", "made with False"),
    "rotation": (["--row-rotation", "restore"], "--row-rotation: asks for row_rotation 'restore'"),
    "compensate": (["--no-compensate"], "--compensate: asks for compensate False"),
    "damping": (["--damping", "0.5"], "--damping: asks for damping 0.5", "made with 1.0"),
    "exclude": (["--exclude", "q_proj"], "--exclude: asks for exclude 'q_proj'", "made with ''"),
    "scope": (["--scope", "expert"], "--scope: asks for scope 'expert'"),
    "nothing": (["--include", "nothing"], "--include: asks for include 'nothing'"),
    "percentile": (["--activation-percentile", "90"], "--activation-percentile: asks for activation_percentile 90.0"),
    "steps": (["--calibration-steps", "8"], "--calibration-steps: asks for calibration_steps 8", "made with 32"),
}


@pytest.mark.parametrize("name", CONFLICTS)
def test_another_recipe_is_refused_by_option_and_both_values(compiled, name):
    options, *words = CONFLICTS[name]
    result, quantization = compiled(*options)
    assert result.code == 2 and quantization is None and result.err.count("error: ") == 1
    assert result.err.rpartition("error: ")[2].count("\n") == 1
    for each in (*words, "leave it out to compile them as they are, or make others with duq-quantize"):
        assert each in result.err, result.err


@pytest.mark.parametrize("options", [[], ["--weight-bits", "8"], ["--scheme", "duquant"]])
def test_none_wins_over_packs(compiled, packs, options):
    result, quantization = compiled("--quant", "none", *options)
    assert result.code == 0 and not quantization.packs and quantization.recipe.include == load_recipe("none").include


def test_a_recipe_file_counts_like_options(compiled, tmp_path):
    file = tmp_path / "recipe.yaml"
    for settings, words in (
        ({"block_size": 32}, None),
        ({"preset": "llm", "layer_bits": {"layers.0": 8}, "weight_bits": 4}, None),
        ({"weight_bits": 8}, f"--quant {file}: asks for weight_bits 8"),
        ({"preset": "all"}, f"--quant {file}: asks for include"),
    ):
        file.write_text(yaml.safe_dump(settings))
        result, quantization = compiled("--quant", file)
        assert (result.code, quantization is None) == ((0, False) if words is None else (2, True)), result.err
        assert words is None or words in result.err
    file.write_text("preset: none")
    assert compiled("--quant", file)[1].packs == {}


@pytest.mark.parametrize("variables, words", [
    ({"BLOCK": "32"}, None),
    ({"LS": "0.15", "DEBUG": "1"}, None),
    ({"WBITS_DEFAULT": "8"}, "OPENPI_DUQUANT_WBITS_DEFAULT: asks for weight_bits 8"),
    ({"WBITS": "layers.1:8"}, "OPENPI_DUQUANT_WBITS: asks for layer_bits"),
    ({"ABITS": "0"}, "OPENPI_DUQUANT_ABITS: asks for activation_bits 0"),
    ({"BLOCK": "16"}, "OPENPI_DUQUANT_BLOCK: asks for block_size 16"),
    ({"PERMUTE": "1"}, "OPENPI_DUQUANT_PERMUTE: asks for scheme 'duquant'"),
    ({"ROW_ROT": "0"}, "OPENPI_DUQUANT_ROW_ROT: asks for scheme 'duquant'"),
    ({"SCOPE": "llm"}, None),
    ({"SCOPE": "expert"}, "OPENPI_DUQUANT_SCOPE: asks for scope 'expert'"),
    ({"LAYERS": "llm.layers.0.mlp.up_proj"}, "OPENPI_DUQUANT_LAYERS: asks for include"),
    ({"EXCLUDE": "vision|gemma_expert|projector"}, None),
    ({"EXCLUDE": "llm"}, "OPENPI_DUQUANT_EXCLUDE: asks for "),
])  # fmt: skip
@pytest.mark.parametrize("by_variable", [False, True])
def test_variables_count_too(compiled, packs, monkeypatch, variables, words, by_variable):
    for key, value in variables.items():
        monkeypatch.setenv(f"OPENPI_DUQUANT_{key}", value)
    if by_variable:
        monkeypatch.setenv("OPENPI_DUQUANT_PACKDIR", str(packs))
    result, quantization = compiled(given=() if by_variable else ("--packs", packs))
    assert (result.code, quantization is None) == ((0, False) if words is None else (2, True)), result.err
    assert words is None or words in result.err


def test_options_override_the_variables_that_conflict(compiled, monkeypatch):
    monkeypatch.setenv("OPENPI_DUQUANT_BLOCK", "16")
    assert compiled("--block-size", "32")[0].code == 0
    assert "--block-size: asks for block_size 64" in compiled("--block-size", "64")[0].err


@pytest.mark.parametrize("key", ENVIRONMENT)
def test_every_variable_has_an_origin(key):
    variable = f"OPENPI_DUQUANT_{key}"
    value = {"WBITS": "a:8", "ROW_ROT": "restore", "ACT_PCT": "99"}.get(key, "16" if "BLOCK" in key else "8")
    environment = {variable: "1" if key == "PERMUTE" else value}
    assert variable in recipe_origins(environment=environment).values()
    assert set(recipe_origins(environment=environment)) <= set(vars(load_recipe(environment=environment)))


def test_other_packs_take_the_recipe(compiled, tmp_path):
    """Packs without recipe.json are transforms: here they lack the linears that the recipe selects."""
    (tmp_path / "foreign").mkdir()
    save_observations(tmp_path / "data.npz", [libero()])
    given = ("--packs", tmp_path / "foreign", "--calibration", tmp_path / "data.npz")
    result, _ = compiled("--quant", "llm", given=given)
    assert result.code == 2 and "has no pack for llm.layers.0.self_attn.q_proj" in result.err
    assert compiled("--quant", "none", given=given)[0].code == 0


# --- a robot's plan without a tokenizer ------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [("--quant", "none"), "packs"])
def test_a_robot_s_plan_needs_a_tokenizer(compiled, source, packs, given, monkeypatch, tmp_path):
    checkpoint = load_checkpoint(source)
    without = type(checkpoint)(**{**vars(checkpoint), "tokenizer": None})
    monkeypatch.setattr("duq.compiler.quantize_cli.load_checkpoint", lambda *_, **__: without)
    given = ("--packs", packs) if given == "packs" else given
    result, quantization = compiled(given=given)
    assert result.code == 2 and quantization is None
    assert "has no tokenizer" in result.err and "--tokenizer FILE" in result.err and "--without-tokenizer" in result.err
    assert compiled("--without-tokenizer", given=given)[0].code == 0
    assert compiled("--tokenizer", source / "tokenizer.model", given=given)[0].code == 0
    assert compiled("--robot", "none", given=given)[0].code == 0
