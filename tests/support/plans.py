"""Plans made by hand: the least that a manifest says, and what becomes of a plan's file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from duq.runtime.config import GemmaConfig, ModelConfig, VisionConfig
from duq.runtime.executors.schedule import LIBRARY, SCHEDULE_VERSION
from duq.runtime.plan import PlanWriter
from duq.runtime.robots import load_robot
from duq.runtime.transforms import default_transforms

CONFIG = ModelConfig(
    pi05=False,
    vision=VisionConfig(32, 1, 64, 2, image_size=28),
    llm=GemmaConfig(64, 2, 128, 2, 1, 32),
    expert=GemmaConfig(32, 2, 64, 2, 1, 32),
    vocab_size=512,
)


def manifest(**changes: Any) -> dict[str, Any]:
    """That of a `cpu` plan without a robot."""
    return {
        "target": "cpu", "robot": "none", "num_steps": 10, "cameras": 3, "model": CONFIG.to_json(), "norm_stats": None,
        "checkpoint": {"path": "/x", "layout": "openpi", "fingerprint": "ab"},
    } | changes  # fmt: skip


def write_plan(path: Path, entries: dict[str, Any], signer: Any = None, **changes: Any) -> dict[str, int]:
    """Writes a plan of these entries; returns their offsets."""
    with PlanWriter(path) as plan:
        offsets = {name: plan.write(name, data) for name, data in entries.items()}
        plan.finish(manifest(**changes), signer)
    return offsets


def full_manifest() -> dict[str, Any]:
    """A manifest with every section, as duq-compile writes it for a robot, and entries of a file that is not there."""
    robot = load_robot("aloha")
    assert robot is not None
    statistics = {"mean": [0.0] * 14, "std": [1.0] * 14, "q01": [-1.0] * 14, "q99": [1.0] * 14}
    linear = {
        "op": "duq::W4A8Linear",
        "weight_bits": 4,
        "activation_bits": 8,
        "shape": [64, 64],
        "bytes": 2304,
        "sqnr_db": 20.5,
    }
    tensor = {"dtype": "float", "shape": ["cameras", 3, 28, 28]}
    made = manifest(
        robot="aloha",
        robot_description=robot.to_json(),
        transforms=default_transforms(robot, pi05=False, layout="openpi"),
        norm_stats={"state": statistics, "actions": statistics, "epsilon": 1e-6},
        settings_from={"num_steps": "--num-steps"},
        notes=["a note"],
        quantization={"recipe": {"scheme": "balanced", "layer_bits": {}}, "linears": {"llm.layers.0.mlp.up_proj": linear}},
        graphs={"prefix": {"inputs": {"images": tensor}, "outputs": {}, "ops": {"Add": 2}, "weight_bytes": 100}},
        sm=[], format_version=2, created_by={"duq": "0"}, training_config=None, ignored_settings=[], float_images=False,
        entries={"graph/prefix.onnx": {"offset": 64, "bytes": 10, "sha256": "0" * 64}},
    )  # fmt: skip
    plain: dict[str, Any] = json.loads(json.dumps(made))
    return plain


def schedule(weight_bytes: int = 4000) -> dict[str, Any]:
    """A schedule with one of each: a kernel, a library call, inputs, an output and a wait."""
    inputs, end = {}, 0
    for name, size in (
        ("images", 28 * 28 * 3),
        ("embeddings", 48 * 64 * 2),
        ("state", 128),
        ("x", 50 * 32 * 4),
        ("past", 4),
    ):
        inputs[name], end = [end, size], end + size
    parameters = [["x", "const float*"], ["weight", "const Bf16*"], ["count", "int"], ["epsilon", "float"]]
    launch = {
        "name": "norm", "kernel": 0, "grid": [4, 1, 1], "threads": 128, "shared": 1024, "work": 0.0, "moved": 8,
        "args": {"x": ["a", 64], "weight": ["w", "w", 100, 0], "count": 7, "epsilon": ["f", 1e-6]},
    }  # fmt: skip
    sizes = dict(n=8, m=8, k=8, x_stride=8, y_stride=8, batch=1, addend_batch_stride=0, y_type=2, gelu=0)
    operands = {"weight": ["w", "w", 0, 0], "x": ["a", 0], "bias": None, "addend": None, "y": ["a", 128]}
    call = {"name": "product", "call": "cublaslt", "args": operands | {"algorithm": 0} | sizes, "work": 1.0, "moved": 8}
    later = launch | {"wait_for": [0], "overlap": True, "cluster": [4, 1, 1]}
    output = {"after": 1, "offset": 0, "rows": 2, "columns": 8, "stride": 8, "type": "float"}

    def variant(cameras: int) -> dict[str, Any]:
        sized = inputs | {"images": [end, cameras * 28 * 28 * 3]}
        return {"cameras": cameras, "prompt": 48, "inputs": sized, "zeroed": [[0, 4]], "outputs": {"key.0": output},
                "prefix": [launch, call], "step": [later]}  # fmt: skip

    return {
        "version": SCHEDULE_VERSION, "arena_bytes": 1 << 20, "pixel": "unsigned char",
        "kernels": [{"cubin": "cubin/sm90/0", "ptx": "ptx/sm90/0", "symbol": "_Z", "expression": "norm<float>",
                     "parameters": parameters}],
        "calls": LIBRARY, "variants": [variant(1), variant(2), variant(3)], "weights": {"w": [0, weight_bytes]},
    }  # fmt: skip


def write_cuda_plan(path: Path, cameras: int = 3, **changes: Any) -> None:
    """A `cuda` plan for SM 90 of the schedule above, of which `changes` are made; its weights and kernels are zeros."""
    made = schedule()
    made |= {"variants": made["variants"][:cameras]} | changes
    entries = {
        "cubin/sm90/0": bytes(64),
        "ptx/sm90/0": bytes(64),
        "weights/w": bytes(4000),
        "embedding": bytes(512 * 64 * 2),
    }
    entries["schedule/sm90.json"] = json.dumps(made).encode()
    write_plan(path, entries, target="cuda", sm=[90], cameras=cameras, graphs={"ptx": [90], "sm90": {"gpu": "H100"}})
