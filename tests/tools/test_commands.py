"""Every command as its users' shells meet it: what --help imports and shows, --version, completion, missing packages."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from duq import __version__, commands
from duq.compiler import choices
from duq.compiler.checkpoint.lerobot import VERSIONS
from duq.compiler.checkpoint.synthetic import VARIANTS
from duq.compiler.checkpoint.synthetic import files as synthetic_files
from duq.compiler.pipeline import TARGETS
from duq.compiler.quant.recipe import PRESETS, SCHEMES, load_recipe
from duq.compiler.targets.tensorrt.options import FLOAT_TYPES, LOOPS
from duq.runtime.command_line import compute_capability
from duq.runtime.config import ROTARY
from duq.runtime.extras import INCLUDES, PACKAGES, extra_of, missing_package
from duq.runtime.robots import ROBOT_NAMES
from duq.runtime.solver import SOLVERS
from duq.tools import make_checkpoint, study_schemes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
SLOW = ("torch", "onnx", "onnx_ir", "onnxruntime", "matplotlib", "skimage", "mujoco", "transformers", "ray", "websockets")
HELP = """
import sys
from duq import commands
sys.argv = ["program", "--help"]
try:
    getattr(commands, {function!r})()
except SystemExit as end:
    print([name for name in {slow!r} if name in sys.modules], end.code, file=sys.stderr)
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"COLUMNS": "200", "PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=False, env=variables
    )


def function_of(name: str) -> str:
    return name.removeprefix("duq-").replace("-", "_")


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_help_imports_nothing_slow_and_names_its_choices(name):
    ran = run(HELP.format(function=function_of(name), slow=SLOW))
    assert ran.stderr == "[] 0\n", ran.stderr
    assert f"Usage: {name} " in ran.stdout
    for option in ("--version", "--verbose", "--quiet"):
        assert option in ran.stdout
    assert not re.search(
        r"--(target|scheme|device|quant|robot|variant|suite|loop|float-type|layout|dtype)\s+<str>", ran.stdout
    )
    assert not re.search(r"--[A-Z]", ran.stdout), "Typer takes a metavar for the option's name where they are the same word"


def test_the_listed_values_are_those_that_are_taken():
    assert choices.TARGETS == tuple(TARGETS)
    assert choices.PRESETS == tuple(PRESETS) and choices.SCHEMES == tuple(SCHEMES)
    assert sorted(choices.LOOPS) == sorted(LOOPS) and sorted(choices.FLOAT_TYPES) == sorted(FLOAT_TYPES)
    assert choices.SOLVERS == tuple(SOLVERS)
    assert choices.LEROBOT_VERSIONS == VERSIONS and choices.VARIANTS == tuple(VARIANTS)
    assert {*choices.ROBOTS} == {*ROBOT_NAMES, "lerobot"} and {*choices.ROTARIES} == {*ROTARY, "auto"}
    assert make_checkpoint.DTYPES == tuple(synthetic_files.DTYPES)
    assert make_checkpoint.ROBOTS == (*synthetic_files.ROBOTS, "none")
    source = (ROOT / "tools" / "scheme_study.py").read_text()  # whose packages are not everywhere
    assert study_schemes.SCHEMES == tuple(re.findall(r'^    "([\w-]+)": Scheme\(', source, re.MULTILINE))


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("weight_bits", choices.WEIGHT_BITS),
        ("activation_bits", choices.ACTIVATION_BITS),
        ("block_size", choices.BLOCK_SIZES),
        ("row_rotation", choices.ROW_ROTATIONS),
    ],
)
def test_a_recipe_takes_every_listed_value(key, values):
    kind = str if key == "row_rotation" else int
    for value in values:
        assert getattr(load_recipe("llm", {key: kind(value)}, environment={}), key) == kind(value)


def test_the_name_of_an_activation_scale_decides_the_scheme():
    for scale in choices.ACTIVATION_SCALES:
        scheme = "reference" if scale == "per-channel" else "balanced"
        made = load_recipe("llm", {"activation_scale": scale, "scheme": scheme}, environment={})
        assert made.activation_scale == scale


@pytest.mark.parametrize("name", ["duq-compile", "duq-demo", "duq-doctor"])
def test_version(name):
    code = f"import sys; from duq import commands; sys.argv = ['x', '--version']; commands.{function_of(name)}()"
    ran = run(code)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"{name} {__version__}\n", "")


# --- completion -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("duq-compile --target ", "cpu\ncuda\ntensorrt\n"),
        ("duq-compile --target c", "cpu\ncuda\n"),
        ("duq-inspect --j", "--json\n"),
        ("duq-demo ", "observations\nrun\n"),
        ("duq-completion f", "fish\n"),
    ],
)
def test_a_shell_completes_options_and_values(line, expected):
    name, *_, word = line.split(" ")
    function = function_of(name)
    code = f"from duq import commands; commands.{function}()"
    variables = {
        f"_DUQ_{function.upper()}_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" ")),
    }  # fmt: skip
    ran = run(code, **variables)
    assert ran.stdout == expected, ran.stderr


def test_the_printed_script_completes_every_command_in_bash(tmp_path):
    script = run("import sys; from duq import commands; sys.argv = ['x', 'bash']; commands.completion()").stdout
    file = tmp_path / "completion.bash"
    file.write_text(script + "\ncomplete -p\n")
    ran = subprocess.run(["bash", "--norc", str(file)], text=True, capture_output=True, check=False)
    assert ran.returncode == 0 and ran.stderr == ""
    assert {line.split()[-1] for line in ran.stdout.splitlines()} >= set(commands.COMMANDS)


def test_an_unknown_shell_is_refused():
    ran = run("import sys; from duq import commands; sys.argv = ['x']; commands.completion()", SHELL="/bin/tcsh")
    assert (ran.returncode, ran.stderr) == (2, "error: $SHELL is tcsh: name the shell, one of bash, zsh, fish\n")


# --- missing packages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "arguments", "absent", "says"),
    [
        ("compile", ["c", "--out", "e.plan"], "torch", "duq-compile needs torch: pip install 'duq-vla[compile]'"),
        ("quantize", ["c", "--out", "p"], "torch", "duq-quantize needs torch: pip install 'duq-vla[compile]'"),
        ("compare", ["c", "e.plan"], "torch", "duq-compare needs torch: pip install 'duq-vla[compile]'"),
        ("bench", ["--suite", "cpu"], "torch", "duq-bench needs torch: pip install 'duq-vla[compile]'"),
        ("evaluate", [], "torch", "duq-evaluate needs torch: pip install 'duq-vla[compile,examples]'"),
        ("study_schemes", [], "torch", "duq-study-schemes needs torch: pip install 'duq-vla[study]'"),
        (
            "make_checkpoint",
            ["--out", "ck"],
            "torch",
            "duq-make-checkpoint needs torch: pip install 'duq-vla[compile]'",
        ),
        (
            "demo",
            ["observations", "o.npz", "--count", "1", "--seed", "0"],
            "skimage",
            "duq-demo needs skimage: pip install 'duq-vla[demo]'",
        ),
        (
            "bench_server",
            ["overhead"],
            "openpi_client",
            "duq-bench-server needs openpi_client: pip install 'duq-vla[client]'",
        ),
        (
            "bench_server",
            ["soak", "--seconds", "1"],
            "openpi_client",
            "duq-bench-server needs openpi_client: pip install 'duq-vla[client]'",
        ),
        ("serve", ["e.plan"], "prometheus_client", "duq-serve needs prometheus_client: pip install 'duq-vla[server]'"),
    ],
)
def test_a_missing_package_is_one_line_that_names_the_extra(function, arguments, absent, says):
    code = f"""
import sys
sys.modules[{absent!r}] = None
from duq import commands
sys.argv = ["x", *{arguments!r}]
commands.{function}()
"""
    ran = run(code)
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1, ran.stderr
    assert ran.stderr == f"error: {says}\n"


def test_every_package_is_in_the_extra_that_is_named():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = {"": project["dependencies"], **project["optional-dependencies"]}
    for module, (distribution, extra) in PACKAGES.items():
        names = [re.match(r"[\w.-]+", line)[0] for line in lines[extra]]
        assert distribution in names, (module, extra)


def test_the_extras_within_an_extra_are_known():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, inner in INCLUDES.items():
        assert f"duq-vla[{','.join(inner)}]" in extras[extra]


def test_the_extra_of_a_submodule_and_of_a_stranger():
    assert extra_of("onnx_ir.passes") == "compile" and extra_of("cuda") == "cuda-runtime" and extra_of("left_pad") is None
    assert missing_package("duq-x", "left_pad.core", "compile").endswith("not installed: pip install left_pad")
    assert missing_package("duq-evaluate", "torch", "compile,examples").endswith("'duq-vla[compile,examples]'")
    assert missing_package("duq-compile", "tensorstore", "compile").endswith("'duq-vla[jax]'")
    assert missing_package("duq-serve", "numpy", "server").endswith("pip install 'duq-vla'")


def test_every_option_with_a_value_list_is_checked_where_it_is_used(command_line, tmp_path):
    """The lists are for people and shells: a value beside them is refused in one line that lists them."""
    from duq.compiler.commands import compile_main
    from duq.tools.bench import main as bench_main
    from duq.tools.make_checkpoint import main as make_main

    for main, arguments, listed in (
        (compile_main, ["c", "--out", tmp_path / "e", "--target", "tpu"], "cpu, cuda, tensorrt"),
        (compile_main, ["c", "--out", tmp_path / "e", "--device", "tpu"], "cpu or cuda"),
        (compile_main, ["c", "--out", tmp_path / "e", "--scheme", "x"], "balanced, duquant"),
        (bench_main, ["--suite", "tpu"], "cpu, gpu"),
        (make_main, ["--out", tmp_path / "c", "--layout", "x"], "openpi, jax, lerobot"),
    ):
        ran = command_line(main, *arguments)
        assert ran.code == 2 and listed in ran.err and ran.err.count("\n") == 1, ran.err


# --- JSON, SMs ------------------------------------------------------------------------------------------------------------


def test_compile_and_quantize_print_one_json_object(command_line, tiny_plans, tmp_path):
    from duq.compiler.accuracy.synthetic import synthetic_observations
    from duq.compiler.checkpoint import load_checkpoint
    from duq.compiler.commands import compile_main, quantize_main
    from duq.runtime.observations import save_observations

    checkpoint = tiny_plans("pi0", "none").checkpoint
    data, packs, plan = tmp_path / "o.npz", tmp_path / "packs", tmp_path / "e.plan"
    save_observations(data, synthetic_observations(load_checkpoint(checkpoint).config, cameras=1, count=1))
    policy = (checkpoint, "--robot", "libero")
    ran = command_line(quantize_main, *policy, "--quant", "llm", "--calibration", data, "--out", packs, "--json")
    quantized = json.loads(ran.out)
    assert quantized["packs"] == str(packs) and quantized["bytes"] > 0 and quantized["seconds"] > 0
    assert all(each["weight_bits"] == 4 for each in quantized["linears"].values()) and len(quantized["linears"]) > 1
    assert any("only one observation" in line for line in quantized["warnings"])  # also on stderr
    assert all(f"warning: {line}\n" in ran.err for line in quantized["warnings"])
    assert "Calibrating" in ran.err
    steps = ("--num-steps", 4)  # the trace of tiny_plans
    quiet = command_line(compile_main, *policy, "--packs", packs, *steps, "--out", plan, "--json", "--quiet")
    compiled = json.loads(quiet.out)
    assert quiet.err == ""  # no progress
    assert compiled["bytes"] == plan.stat().st_size and compiled["linears"].keys() == quantized["linears"].keys()
    assert compiled["settings"]["robot"]["from"] == "--robot" and compiled["warnings"] == []


@pytest.mark.parametrize(
    ("text", "sm"),
    [("8.6", 86), ("86", 86), ("sm_86", 86), ("SM86", 86), ("9.0a", 90), ("10.0", 100), ("sm_121f", 121), ("100", 100)],
)
def test_a_compute_capability_is_taken_as_people_write_it(text, sm):
    assert compute_capability("--sm", text) == sm


@pytest.mark.parametrize("text", ["8,6", "8.60", "ampere", "", "8.6.1", "-86", "٨٦"])
def test_what_is_no_compute_capability_is_refused(text, command_line, tmp_path):
    from duq.compiler.commands import compile_main

    ran = command_line(compile_main, "c", "--out", tmp_path / "e.plan", "--target", "cuda", f"--sm={text}")
    assert ran.code == 2 and "write 86 for a GPU of 8.6" in ran.err and ran.err.count("\n") == 1


def test_a_hub_address_is_printed_as_given(command_line, tmp_path, monkeypatch):
    from duq.compiler.commands import compile_main

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    ran = command_line(compile_main, "hf://owner/policy", "--out", tmp_path / "e.plan")
    assert ran.code == 2 and "hf://owner/policy" in ran.err


def test_a_base_on_the_hub_arrives_as_given(command_line, tmp_path, monkeypatch):
    """As a path it would be "hf:/owner/base"."""
    from duq.compiler import cli
    from duq.compiler.commands import compile_main

    given = {}
    monkeypatch.setattr(cli, "compile_checkpoint", lambda *_, **options: given.update(options))
    ran = command_line(compile_main, tmp_path, "--base", "hf://owner/base", "--out", tmp_path / "e.plan")
    assert ran.code == 0 and given["base"] == "hf://owner/base"


def test_the_page_of_commands_lists_each_with_its_extra():
    page = (ROOT / "docs" / "commands.md").read_text()
    rows = {
        cells[1].strip(" `"): cells[3] for cells in (line.split("|") for line in page.splitlines() if line[:3] == "| `")
    }
    assert rows.keys() == commands.COMMANDS.keys()
    for name, extra in commands.COMMANDS.items():
        assert f"`{extra}`" in rows[name] if extra else "none" in rows[name], name
