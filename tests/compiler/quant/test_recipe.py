"""Recipes: presets, files, the original scripts' variables, precedence, and what is refused."""

import pytest

from duq.compiler.errors import RecipeError
from duq.compiler.quant.recipe import PRESETS, Recipe, load_recipe, openpi_module

LINEARS = [
    "llm.layers.0.self_attn.q_proj",
    "llm.layers.1.mlp.down_proj",
    "llm.layers.10.mlp.down_proj",
    "expert.layers.0.self_attn.o_proj",
    "expert.layers.0.mlp.gate_proj",
    "vision.encoder.layers.0.mlp.fc1",
    "vision.encoder.layers.0.self_attn.out_proj",
    "projector",
]


def selected(recipe):
    return [name for name in LINEARS if recipe.bits(name) < 16]


def test_default_is_the_named_preset():
    recipe = load_recipe(environment={})
    assert recipe == load_recipe("llm+expert-mlp", environment={}) == Recipe()
    assert selected(recipe) == LINEARS[:3] + ["expert.layers.0.mlp.gate_proj"]


@pytest.mark.parametrize("preset, count", [("llm", 3), ("llm+expert-mlp", 4), ("all", 8), ("none", 0)])
def test_presets(preset, count):
    assert len(selected(load_recipe(preset, environment={}))) == count


@pytest.mark.parametrize("name", ["action_in_proj", "action_out_proj", "state_proj", "time_mlp_in", "action_time_mlp_out"])
@pytest.mark.parametrize("preset", PRESETS)
def test_small_projections_stay_float(preset, name):
    assert load_recipe(preset, environment={}).bits(name) == 16


# INCLUDE and EXCLUDE of the scripts that quantize the LLM and the expert's MLP, over openpi's long names.
ORIGINAL = {
    "OPENPI_DUQUANT_SCOPE": "",
    "OPENPI_DUQUANT_INCLUDE": r".*(language_model\.(.*\.)?(q_proj|down_proj)|"
    r"gemma_expert\.model\.layers\.\d+\.mlp\.(gate_proj)).*",
    "OPENPI_DUQUANT_EXCLUDE": r"(?:^|\.)(vision_tower|vision|norm|lm_head)(?:\.|$)|gemma_expert\..*\.self_attn\.",
    "OPENPI_DUQUANT_WBITS_DEFAULT": "4",
    "OPENPI_DUQUANT_WBITS": "paligemma_with_expert.gemma_expert.model.layers.0.mlp.gate_proj:8",
    "OPENPI_DUQUANT_ABITS": "8",
    "OPENPI_DUQUANT_BLOCK": "32",
    "OPENPI_DUQUANT_PERMUTE": "1",
    "OPENPI_DUQUANT_ROW_ROT": "restore",
    "OPENPI_DUQUANT_ACT_PCT": "98.5",
    "OPENPI_DUQUANT_CALIB_STEPS": "16",
    "OPENPI_DUQUANT_LS": "0.15",
    "OPENPI_DUQUANT_DEBUG": "1",
}


def test_the_original_scripts_keep_their_meaning():
    recipe = load_recipe(environment=ORIGINAL)
    assert selected(recipe) == LINEARS[:3] + ["expert.layers.0.mlp.gate_proj"]
    assert recipe.bits("expert.layers.0.mlp.gate_proj") == 8 and recipe.bits(LINEARS[0]) == 4
    assert (recipe.scheme, recipe.block_size, recipe.permute, recipe.row_rotation) == ("duquant", 32, True, "restore")
    assert (recipe.activation_percentile, recipe.calibration_steps) == (98.5, 16)


def test_scope_is_a_prefix_of_either_name():
    scope = "paligemma_with_expert.gemma_expert.model."
    by_environment = load_recipe(environment={"OPENPI_DUQUANT_SCOPE": scope})
    assert selected(by_environment) == LINEARS[3:5]
    assert selected(load_recipe("all", {"scope": "expert"}, {})) == LINEARS[3:5]
    assert selected(load_recipe("all", {"scope": "mlp"}, {})) == []


def test_layers_variable_is_a_list_of_names():
    listed = f"{openpi_module(LINEARS[3])}, {LINEARS[0]}"
    assert selected(load_recipe(environment={"OPENPI_DUQUANT_LAYERS": listed})) == [LINEARS[0], LINEARS[3]]


def test_precedence_environment_then_source_then_flags(tmp_path):
    environment = {"OPENPI_DUQUANT_BLOCK": "16", "OPENPI_DUQUANT_ABITS": "0", "OPENPI_DUQUANT_INCLUDE": "fc1"}
    path = tmp_path / "recipe.yaml"
    path.write_text("preset: llm\nblock-size: 32\nweight_bits: 8\nlayer_bits: {layers.1: 4}\n")
    recipe = load_recipe(str(path), {"weight_bits": 16, "scheme": None}, environment)
    assert (recipe.activation_bits, recipe.block_size, recipe.weight_bits) == (0, 32, 16)
    assert selected(recipe) == ["llm.layers.1.mlp.down_proj"]


def test_toml_equals_yaml(tmp_path):
    (tmp_path / "r.toml").write_text('scheme = "duquant"\npreset = "all"\nrow-rotation = "0"\nlayer_bits = ["fc1:8"]\n')
    (tmp_path / "r.yml").write_text("scheme: duquant\npreset: all\nrow-rotation: 0\nlayer_bits: ['fc1:8']\n")
    recipe = load_recipe(str(tmp_path / "r.toml"), environment={})
    assert recipe == load_recipe(str(tmp_path / "r.yml"), environment={})
    assert recipe.permute and recipe.row_rotation == "0" and recipe.block_size == 16


def test_layer_bits_cover_whole_components_and_the_last_wins():
    recipe = load_recipe("llm", {"layer_bits": ["layers.1:8", "down_proj:16", r"layers\.10.mlp:8"]}, {})
    assert [recipe.bits(name) for name in LINEARS[:3]] == [4, 16, 8]


@pytest.mark.parametrize("scheme", ["balanced", "duquant", "reference"])
def test_json_round_trip(scheme):
    recipe = Recipe.from_settings({"scheme": scheme, "layer_bits": ["layers.0:8"], "compensate": True})
    assert Recipe.from_settings(recipe.to_json()) == recipe


@pytest.mark.parametrize(
    "source, overrides, message",
    [
        ("llm+expert", {}, "llm+expert-mlp"),
        ("missing.yaml", {}, "neither a preset nor"),
        (None, {"scheme": "balancd"}, "balanced"),
        (None, {"weigth_bits": 4}, "weight_bits"),
        (None, {"weight_bits": 3}, "4, 8, 16"),
        (None, {"weight_bits": "four"}, "expected int"),
        (None, {"weight_bits": 4.5}, "expected int"),
        (None, {"activation_bits": 4}, "8, 0"),
        (None, {"activation_scale": "per-channel"}, "per-token, per-tensor"),
        (None, {"scheme": "reference", "activation_scale": "per-token"}, "per-channel"),
        (None, {"row_rotation": "propagate"}, "restore"),
        (None, {"block_size": 48}, "16, 32, 64 or 128"),
        (None, {"include": "("}, "regular expression"),
        (None, {"layer_bits": ["layers.0=8"]}, "PATTERN:BITS"),
        (None, {"layer_bits": ["layers.0:5"]}, "4, 8, 16"),
        (None, {"activation_percentile": 101.0}, "50..100"),
        (None, {"calibration_steps": 0}, "at least one"),
        (None, {"damping": 0.0}, "positive"),
        (None, {"permute": "perhaps"}, "expected bool"),
    ],
)
def test_refuses_and_names_the_valid_choice(source, overrides, message):
    with pytest.raises(RecipeError, match=message.replace("+", r"\+")):
        load_recipe(source, overrides, {})


@pytest.mark.parametrize("text", ["block_size: [", "- a\n- b\n", "presett: llm\n", "preset: lm\n", "weight_bits: true\n"])
def test_refuses_bad_files(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError):
        load_recipe(str(path), environment={})
