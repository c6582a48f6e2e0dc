"""duq-inspect as a user runs it: its text, its JSON, its exit codes."""

import json
import subprocess
import sys

import numpy as np
import pytest

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
    result = inspect(path)
    assert result.returncode == 0, result.stderr
    for text in ("libero", "balanced", "[a-z]+", "llm.layers.1", "up_proj, q_proj", "W4A8", "3.0 KB", "21.0 dB",
                 "state [8]",
                 "duq::W4A8Linear x4, Add x2", "images (dtype float", "not signed", "graph/prefix.onnx", "2 tensors", "6.0 KB",
                 "all 3 entries match"):  # fmt: skip
        assert text in result.stdout, text
    assert "weights/a" not in result.stdout and "weights/a" in inspect(path, "--entries").stdout


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
