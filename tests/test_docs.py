"""README.md and docs/ against the code: links, files and options exist; every recipe key and pack array is explained."""

import inspect
import json
import re
from pathlib import Path

import numpy as np
import pytest
import typer.main

from duq.compiler.commands import RECIPE_OPTIONS, compile_app, quantize_app
from duq.compiler.quant import LinearPack, load_recipe
from duq.compiler.quant.pack import save_pack
from duq.compiler.quant.recipe import ENVIRONMENT, PRESETS, SCHEMES, Recipe, environment_settings
from duq.runtime import inspect as inspect_cli
from duq.runtime import serve_cli
from duq.tools import bench, compare, completion, demo, doctor, estimate, make_checkpoint, profile

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
COMMANDS = {
    "duq-compile": compile_app, "duq-quantize": quantize_app, "duq-serve": serve_cli.app, "duq-inspect": inspect_cli.app,
    "duq-compare": compare.app, "duq-bench": bench.app, "duq-profile": profile.app, "duq-demo": demo.app,
    "duq-estimate": estimate.app, "duq-make-checkpoint": make_checkpoint.app, "duq-doctor": doctor.app,
    "duq-completion": completion.app,
}  # fmt: skip
FOLDERS = "benchmarks|compiler|duq|examples|plugins|runtime|tests|tools"
TEXT = (DOCS / "quantization.md").read_text()
OPTIONS = {option.name: option for option in typer.main.get_command(quantize_app).params}  # of duq-quantize


def quoted(cell: str) -> str:
    """What is between the backquotes of a table's cell, or nothing."""
    return (re.findall(r"`(.*?)`", cell) or [""])[0]


def recipe_table() -> dict[str, list[str]]:
    """Key -> the cells [flag, variable, default, meaning] of the table in section 6."""
    lines = TEXT[TEXT.index("| key (YAML, TOML) |") :].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {quoted(key): cells for key, *cells in rows}


def test_the_table_has_every_recipe_key_and_no_other():
    assert list(recipe_table()) == list(Recipe.__dataclass_fields__) == list(RECIPE_OPTIONS)


@pytest.mark.parametrize("key", RECIPE_OPTIONS)
def test_flag_variable_and_default_of_each_key(key):
    flag, variable, default, _ = recipe_table()[key]
    assert quoted(flag) == "/".join([*OPTIONS[key].opts, *OPTIONS[key].secondary_opts])
    selection = {"scope": "SCOPE", "include": "INCLUDE", "exclude": "EXCLUDE"}  # read by hand in environment_settings
    assert quoted(variable) == selection.get(key, {v: k for k, v in ENVIRONMENT.items()}.get(key, ""))
    if key not in ("include", "layer_bits"):
        value = Recipe.__dataclass_fields__[key].default
        assert quoted(default) == (value if isinstance(value, str) and value else json.dumps(value))


def test_every_variable_that_is_read_is_named():
    read = set(re.findall(r'"([A-Z][A-Z_]+)"', inspect.getsource(environment_settings))) | set(ENVIRONMENT)
    assert {"SCOPE", "LAYERS", "BLOCK"} < read
    for variable in read:
        assert re.search(rf"`(OPENPI_DUQUANT_)?{variable}`", TEXT), variable
    assert f"`{OPTIONS['packs'].envvar}`" in TEXT


@pytest.mark.parametrize("name", [*PRESETS, *SCHEMES])
def test_every_preset_and_scheme_is_explained(name):
    assert f"`{name}`" in TEXT


@pytest.mark.parametrize("scheme", ["duquant", "reference"])
def test_the_defaults_of_the_other_schemes(scheme):
    for key in ("block_size", "permute", "row_rotation", "compensate"):
        meaning = recipe_table()[key][-1]
        value = SCHEMES[scheme][key]
        shown = value if isinstance(value, str) else json.dumps(value)
        assert re.search(rf"`{scheme}`[^;]*: `?{shown}`?$", meaning), (scheme, key)


def test_the_example_recipe_is_read_as_described(tmp_path):
    example = tmp_path / "recipe.yaml"
    example.write_text(re.search(r"```yaml\n(.*?)```", TEXT, re.DOTALL)[1])
    recipe = load_recipe(str(example), environment={})
    assert recipe.include == PRESETS["llm+expert-mlp"] and not recipe.compensate
    bits = {
        "llm.layers.0.self_attn.q_proj": 8,
        "expert.layers.0.mlp.up_proj": 8,
        "llm.layers.3.mlp.down_proj": 8,
        "llm.layers.3.mlp.up_proj": 4,
        "llm.layers.17.mlp.down_proj": 16,
    }
    assert {name: recipe.bits(name) for name in bits} == bits


def test_every_array_of_a_pack_is_listed(tmp_path):
    rotation = np.eye(16, dtype=np.float32)[None]
    pack = LinearPack(
        name="projector", weight_q=np.zeros((16, 8), np.uint8), weight_bits=4, weight_scale=np.ones(16, np.float32),
        activation_scale=np.float32(1), input_scale=np.ones(16, np.float32), permutation=np.arange(16), rotation=rotation,
        block_size=16, output_rotation=rotation,
    )  # fmt: skip
    save_pack(pack, tmp_path)
    with np.load(tmp_path / "projector.npz") as file:
        for key in (*file.files, *json.loads(file["meta"].item())):
            assert f"`{re.sub('_[0-9]+$', '_<i>', key)}`" in TEXT, key


every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def read(page: Path) -> str:
    """The page without its comments."""
    return re.sub(r"<!--.*?-->", "", page.read_text(), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", read(page), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_links_between_files_lead_somewhere(page):
    for file, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)]*)\)", read(page)):
        target = page.parent / file if file else page
        assert target.exists(), file
        assert not anchor or anchor in anchors(target), f"{file}#{anchor}"


@every_page
def test_files_and_modules_that_are_named_exist(page):
    """`compiler/pipeline.py` in the text, `python tools/bench.py` and `python -m benchmarks.layer` in a command."""
    text = read(page)
    files = re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", text) + re.findall(r"python3? ((?:tools|examples)/\S+\.py)", text)
    files += [module.replace(".", "/") + ".py" for module in re.findall(r"python3? -m (benchmarks[\w.]+)", text)]
    assert [file for file in files if not (ROOT / file).exists()] == []


@every_page
def test_options_in_command_lines_exist(page):
    lines = re.sub(r" \\\n", " ", read(page))
    for command, arguments in re.findall(r"^(?:    )?(?:\$ )?(duq-\w+) (.*)$", lines, re.MULTILINE):
        options = {flag for param in typer.main.get_command(COMMANDS[command]).params for flag in param.opts}
        options |= {flag for param in typer.main.get_command(COMMANDS[command]).params for flag in param.secondary_opts}
        assert set(re.findall(r"(?<!\S)--[\w-]+", arguments.partition("#")[0])) <= options, arguments


@every_page
def test_nothing_is_installed_from_a_name_that_is_not_ours(page):
    """`duq` on PyPI is another project's: this one is duq-vla, or the checkout."""
    for command in re.findall(r"pip install .*", read(page)):
        assert not re.search(r"(?<![\w./-])duq(?!-vla)\b", command), command


def test_the_readme_fits_on_a_few_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
