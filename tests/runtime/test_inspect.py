"""duq-inspect as a user runs it: its text, its JSON, its exit codes."""

import json
import subprocess
import sys

import numpy as np
import pytest

from duq.runtime.plan import Plan, PlanWriter
from tests.support.plans import write_plan


def inspect(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "duq.runtime.inspect", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={"COLUMNS": "160", "PATH": ""})


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "engine.plan"
    linear = {"weight_bits": 4, "activation_bits": 8, "op": "duq::W4A8Linear", "bytes": 1500}
    linears = {f"llm.layers.{i}.{name}": linear | {"sqnr_db": 20.0 + i} for i in (0, 1) for name in ("mlp.up_proj",
               "self_attn.q_proj")}  # fmt: skip
    entries = {
        "graph/prefix.onnx": b"onnx", "weights/a": np.zeros(1000, np.float32), "weights/b": np.zeros(500, np.float32)
    }  # fmt: skip
    statistics = {"state": {"mean": [0.0] * 8, "std": [1.0] * 8}, "actions": {"mean": [0.0] * 7, "std": [1.0] * 7}}
    write_plan(
        path,
        entries,
        robot="libero",
        quantization={"recipe": {"scheme": "balanced", "include": "[a-z]+"}, "linears": linears},
        norm_stats=statistics | {"epsilon": 1e-6},
        graphs={
            "prefix": {
                "ops": {"Add": 2, "duq::W4A8Linear": 4},
                "inputs": {"images": {"dtype": "float", "shape": ["cameras", 3, 224, 224]}},
            }
        },
    )
    return path


def test_text(path):
    result = inspect(path, "--all")
    assert result.returncode == 0, result.stderr
    for text in ("libero", "balanced", "[a-z]+", "llm.layers.1", "up_proj, q_proj", "W4A8", "3.0 KB", "21.0 dB",
                 "state [8]",
                 "duq::W4A8Linear x4, Add x2", "images (dtype float", "not signed", "graph/prefix.onnx", "2 tensors", "6.0 KB",
                 "all 3 entries match"):  # fmt: skip
        assert text in result.stdout, text
    assert "weights/a" not in result.stdout and "weights/a" in inspect(path, "--entries").stdout


def test_a_summary_has_ten_lines_at_most(path, tiny_plans):
    for plan, texts in (
        (path, ("4 linears W4A8; balanced; worst 20.0 dB, llm.layers.0.mlp.up_proj", "6.0 KB in 2 tensors", "cpu")),
        (
            tiny_plans("pi0", "none", "cuda").plan,
            ("libero: state 8, actions 7", "8 a chunk, 4 denoising steps", "none: all float", "SM 86 and later (ptx)"),
        ),
    ):
        result = inspect(plan)
        assert result.returncode == 0, result.stderr
        assert 4 <= len(result.stdout.splitlines()) <= 10 and "--all prints the rest" in result.stdout.splitlines()[0]
        assert all(text in result.stdout for text in texts), result.stdout


def test_notes_and_ignored_settings_are_never_left_out(path, tmp_path):
    plan, other = Plan(path), tmp_path / "noted.plan"
    with PlanWriter(other) as writer:
        writer.finish(plan.manifest | {"notes": ["took step 3"], "ignored_settings": ["lora_rank 3"]})
    text = inspect(other).stdout
    assert "note          took step 3" in text and "ignored       lora_rank 3" in text


def test_differences_of_two_plans(tiny_plans):
    first, second = (tiny_plans("pi0", quant, "cuda").plan for quant in ("none", "llm+expert-mlp"))
    found = json.loads(inspect(first, "--diff", second, "--json").stdout)
    assert found["settings"] == {} and found["recipe"]["include"][0] == "(?!)"
    quantized = Plan(second).manifest["quantization"]["linears"]
    assert found["linears"].keys() == quantized.keys()
    name, linear = next(iter(quantized.items()))
    assert found["linears"][name] == [None, f"W4A8, {linear['sqnr_db']:.1f} dB"]
    assert found["bytes"]["file"] == [first.stat().st_size, second.stat().st_size]
    gone = [name for name, (before, after) in found["launches"].items() if before and not after]
    new = [name for name, (before, after) in found["launches"].items() if after and not before]
    assert any("llm.layers.*.mlp" in name for name in gone) and any("gemm_wgmma" in name for name in new)
    text = inspect(first, "--diff", second).stdout
    assert "llm.layers.*.mlp.down_proj (1)" in text and "float" in text and "W4A8, worst" in text


def test_equal_plans_differ_in_nothing(path):
    assert "differ in no setting, linear, launch or size" in inspect(path, "--diff", path).stdout
    sections = json.loads(inspect(path, "--diff", path, "--json").stdout)
    assert not any(sections[name] for name in ("settings", "plan", "recipe", "linears", "launches", "bytes"))


def test_settings_that_differ(path, tmp_path):
    plan, other = Plan(path), tmp_path / "other.plan"
    with PlanWriter(other) as writer:
        for name in plan.names:
            writer.write(name, plan.read(name))
        linears = plan.manifest["quantization"]["linears"]
        changed = linears | {"llm.layers.1.mlp.up_proj": linears["llm.layers.1.mlp.up_proj"] | {"sqnr_db": 7.0}}
        writer.finish(plan.manifest | {"cameras": 2, "quantization": {"recipe": {}, "linears": changed}})
    found = json.loads(inspect(path, "--diff", other, "--json").stdout)
    assert found["plan"] == {"cameras": [3, 2]} and found["recipe"]["scheme"] == ["balanced", None]
    assert found["linears"] == {"llm.layers.1.mlp.up_proj": ["W4A8, 21.0 dB", "W4A8, 7.0 dB"]}
    assert "llm.layers.*.mlp.up_proj (1)" in inspect(path, "--diff", other).stdout


def test_json_is_the_manifest(path):
    manifest = json.loads(inspect(path, "--json").stdout)
    assert manifest["robot"] == "libero" and manifest["bytes"] == path.stat().st_size
    assert manifest["entries"]["weights/a"]["bytes"] == 4000 and len(manifest["entries"]["weights/a"]["sha256"]) == 64


def test_errors_are_one_line_and_exit_code_2(path, tmp_path):
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(b"onnx", damaged.index(b"prefix.onnx") + 11)] ^= 1
    (tmp_path / "damaged.plan").write_bytes(damaged)
    for file, message in (("damaged.plan", "SHA-256 does not match"), ("none.plan", "No such file")):
        result = inspect(tmp_path / file)
        assert result.returncode == 2 and result.stdout == ""
        assert message in result.stderr and result.stderr.count("\n") == 1
    assert inspect("--nonsense").returncode == 2
