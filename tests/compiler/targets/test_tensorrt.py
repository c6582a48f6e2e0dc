"""The tensorrt target: engines built without a GPU, what the plugins infer, what is refused. tests/gpu runs the plugins."""

import functools
import importlib.util
import json
import math
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from rich.progress import Progress

from duq.compiler.accuracy.synthetic import synthetic_observations
from duq.compiler.checkpoint import load_checkpoint
from duq.compiler.commands import compile_main
from duq.compiler.errors import GraphError
from duq.compiler.graph.export import export
from duq.compiler.phases import rewrite
from duq.compiler.pipeline import PHASES, TARGETS, compile_policy, quantize_checkpoint
from duq.compiler.quant import load_recipe
from duq.compiler.targets.tensorrt import TensorRTOptions, builder, engines
from duq.compiler.targets.tensorrt.network import Network, is_external, unroll
from duq.compiler.targets.tensorrt.precision import is_key_value
from duq.compiler.targets.tensorrt.prepare import prepare, take_embeddings
from duq.plugins import bitblas, nodes, ops, trt
from duq.plugins.bitblas import Tile
from duq.plugins.errors import KernelError
from duq.plugins.nodes import RotateQuantize, W4A8Linear
from duq.runtime.errors import PlanError
from duq.runtime.executors import tensorrt as executor
from duq.runtime.inspect import main as inspect_main
from duq.runtime.plan import Plan, PlanWriter
from duq.runtime.preprocess import Preprocessor
from tests.support.networks import with_weights

INSTALLED = any(importlib.util.find_spec(name) for name in trt.FLAVORS) and importlib.util.find_spec("bitblas")
needs_tensorrt = pytest.mark.skipif(not INSTALLED, reason="neither the tensorrt nor the tensorrt-rtx extra, or no bitblas")

ROTATIONS = ["hadamard+per_token", "per_token", "scale+permute+rotation+per_tensor", "hadamard+per_tensor"]
EPILOGUES = ["plain", "bias", "output_rotation", "output_rotation+bias"]
TILE = Tile(1, 2, 32, 32, 2, True)


NODES_OF_EVERY_KIND = [
    *(("RotateQuantize", RotateQuantize(stages)) for stages in ROTATIONS),
    ("RotateQuantize", RotateQuantize("hadamard+per_token", "RMS_NORM")),
    ("RotateQuantize", RotateQuantize("per_token", "GEGLU")),
    *(("W4A8Linear", W4A8Linear(stages, TILE, "Bf16")) for stages in EPILOGUES),
]


@pytest.mark.parametrize(("op", "node"), NODES_OF_EVERY_KIND, ids=str)
def test_operands_are_the_operators(op, node):
    gain = ["gain"] if getattr(node, "source", None) == "RMS_NORM" else []
    x, *others = ops.inputs_of(op, node.stages)
    assert node.operands == [x, *gain, *others]


SHAPES = {
    "x": (1, 5, 128), "input_scale": (128,), "permutation": (128,), "hadamard": (64, 64), "rotation": (2, 64, 64),
    "activation_scale": (), "gain": (128,), "x_q": (1, 5, 128), "x_scale": (1, 5, 1), "weight": (128, 96), "weight_scale": (96,),
    "output_rotation": (6, 16, 16), "bias": (96,),
}  # fmt: skip
DTYPES = {"permutation": np.int64, "x_q": np.int8, "weight": np.int8}


@pytest.mark.parametrize(("op", "node"), NODES_OF_EVERY_KIND, ids=str)
def test_shapes_and_types_are_those_of_the_operators_function(op, node):
    """Runs the ONNX function that defines the operator and compares what comes out with what the plugin announces."""
    names = ops.inputs_of(op, node.stages)
    body = ir.serde.serialize_function(ops.function(op, node.stages, 23))
    body.name, body.overload = "F", ""
    outputs = list(body.output)
    dtypes = {name: onnx.helper.np_dtype_to_tensor_dtype(np.dtype(DTYPES.get(name, np.float32))) for name in names}
    info = [onnx.helper.make_tensor_value_info(name, dtypes[name], SHAPES[name]) for name in names]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("F", names, outputs, domain="duq")], "g", info,
        [onnx.ValueInfoProto(name=name) for name in outputs],
    )  # fmt: skip
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("duq", 1)]
    model = onnx.helper.make_model(graph, functions=[body], opset_imports=opsets, ir_version=10)
    feeds = {name: np.ones(SHAPES[name], DTYPES.get(name, np.float32)) for name in names}
    results = onnx.reference.ReferenceEvaluator(model).run(None, feeds)
    shapes = [SHAPES[name] for name in node.operands]
    if getattr(node, "source", None) == "GEGLU":
        shapes[0] = (*shapes[0][:-1], 2 * shapes[0][-1])
    assert [tuple(shape) for shape in node.output_shapes(shapes)] == [each.shape for each in results]
    types = {"int8": np.int8, "float": np.float32, "Bf16": np.float32}  # y is the float32 result, rounded
    assert [types[name] for name in node.output_types(["float"])] == [each.dtype for each in results]


@pytest.mark.parametrize(("op", "node"), NODES_OF_EVERY_KIND, ids=str)
def test_fields_make_the_same_plugin_again(op, node):
    stored = {name: value for name, value in trt.attributes(node).items() if not name.startswith("plugin_")}
    data = {name: value.encode() if isinstance(value, str) else np.array(value, np.int32) for name, value in stored.items()}
    fields = [SimpleNamespace(name=name, data=value) for name, value in data.items()]
    assert trt.from_fields(op, fields) == node
    with pytest.raises(KernelError, match="compile the plan with this duq"):
        trt.from_fields(op, fields[1:])


def test_types_are_accepted_where_the_kernels_take_them():
    prologue, linear = RotateQuantize("permute+per_token"), W4A8Linear("bias", TILE, "Bf16")
    good = ["Bf16", "int32", "int8", "float"]
    assert all(prologue.accepts(i, good) for i in range(4))
    assert not prologue.accepts(0, ["int8"]) and not prologue.accepts(1, ["Bf16", "int64"])
    good = ["int8", "float", "int8", "float", "float", "Bf16"]
    assert all(linear.accepts(i, good) for i in range(6))
    added = W4A8Linear("residual", TILE, "Bf16")
    assert added.accepts(4, [*good[:4], "Bf16"]) and not added.accepts(4, [*good[:4], "float"])
    assert not linear.accepts(5, [*good[:5], "Half"]) and not linear.accepts(4, [*good[:4], "Bf16"])


@pytest.fixture(scope="module")
def compiled(tiny_plans, tmp_path_factory):
    """(policy, loop) -> the plan, compiled once with the integers of the cpu plan's preset."""
    directory = tmp_path_factory.mktemp("tensorrt")

    @functools.cache
    def quantization(policy):
        source = load_checkpoint(tiny_plans(policy, "llm+expert-mlp").checkpoint)
        preprocessor = Preprocessor(source.config)
        inputs = [preprocessor.model_inputs(each) for each in synthetic_observations(source.config, cameras=3, count=2)]
        with Progress(disable=True) as progress:
            return source, quantize_checkpoint(source, load_recipe("llm+expert-mlp", environment={}), inputs, progress)

    @functools.cache
    def plan(policy, loop, float_type="bf16"):
        source, integers = quantization(policy)
        out = directory / f"{policy}.{loop}.{float_type}.plan"
        options = TensorRTOptions(sm=(86,), robot="libero", num_steps=4, loop=loop, float_type=float_type)
        with Progress(disable=True) as progress:
            compile_policy(source, integers, out, options, progress)
        return Plan(out)

    plan.quantization = quantization
    return plan


UNROLLED_PI05 = pytest.param("pi05", "unrolled", marks=pytest.mark.slow)  # pi0's is, and the parts are those of "graph"
PLANS = [("pi0", "graph"), ("pi05", "graph"), ("pi0", "unrolled"), UNROLLED_PI05]


@needs_tensorrt
@pytest.mark.parametrize(("policy", "loop"), PLANS)
def test_engines_are_built_without_a_gpu(compiled, policy, loop):
    plan = compiled(policy, loop)
    section = plan.manifest["graphs"]["sm86"]
    assert section["flavor"] in trt.FLAVORS and section["version"] == trt.library().__version__
    assert section["engines"] == (["prefix", "step"] if loop == "graph" else ["policy"])
    for name, engine in engines_of(plan).items():
        assert len(plan.read(f"engine/sm86/{name}")) == engine["bytes"] > 1 << 20
        count = sum(number for op, number in engine["ops"].items() if op.startswith("duq::"))
        assert engine["plugins"] == count > 0
        assert b"Engine generation completed" in bytes(plan.read(f"engine/sm86/{name}.log"))
    for kernel in details_of(plan)["kernels"]:
        assert bytes(plan.read(kernel["cubin"])).startswith(b"\x7fELF")


def engines_of(plan) -> dict:
    graphs = plan.manifest["graphs"]
    return {name: graphs[f"sm86/{name}"] for name in graphs["sm86"]["engines"]}


def details_of(plan) -> dict:
    return json.loads(bytes(plan.read("engine/sm86/kernels.json")))


@needs_tensorrt
@pytest.mark.parametrize("policy", ["pi0", "pi05"])
def test_every_quantized_linear_runs_a_bitblas_kernel(compiled, policy):
    plan = compiled(policy, "graph")
    details = details_of(plan)
    merged = {part for name in details["linears"] for part in name.split("/")[1].split("+")}
    assert merged <= set(plan.manifest["quantization"]["linears"])
    dead = {"llm.layers.1." + name for name in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.o_proj")}
    assert set(plan.manifest["quantization"]["linears"]) - merged <= dead | {"llm.layers.1.self_attn.q_proj"}
    kernels = {kernel["expression"] for kernel in details["kernels"] if kernel["source"] == "bitblas"}
    assert set(details["linears"].values()) == set(plan.manifest["graphs"]["sm86"]["linears"].values()) == kernels


@needs_tensorrt
@pytest.mark.parametrize("policy", ["pi0", pytest.param("pi05", marks=pytest.mark.slow)])
def test_loops_have_the_same_operators_per_step(compiled, policy):
    graph = engines_of(compiled(policy, "graph"))
    (unrolled,) = engines_of(compiled(policy, "unrolled")).values()
    assert unrolled["plugins"] == graph["prefix"]["plugins"] + 4 * graph["step"]["plugins"]
    for op in ("Attention", "RMSNormalization", "MatMul", "RotaryEmbedding", "duq::RotateQuantize", "duq::W4A8Linear"):
        assert unrolled["ops"][op] == graph["prefix"]["ops"].get(op, 0) + 4 * graph["step"]["ops"][op]


@needs_tensorrt
def test_norms_and_geglu_are_part_of_the_prologues(compiled):
    """Two layers: of the norms before quantized linears none is left, nor is any GeGLU."""
    engines = engines_of(compiled("pi0", "graph"))
    assert engines["prefix"]["ops"]["Gelu"] == 1 and "Gelu" not in engines["step"]["ops"]  # the one of SigLIP
    assert engines["step"]["ops"]["RMSNormalization"] == 3  # before the float qkv of both layers, and the last
    assert (
        engines["step"]["ops"]["Add"] == 7
    )  # of nine: the sums behind the float o of both layers, but not those behind down
    kernels = [each["expression"] for each in details_of(compiled("pi0", "graph"))["kernels"]]
    assert any("RMS_NORM" in each for each in kernels) and any("GEGLU" in each for each in kernels)


@needs_tensorrt
def test_the_token_table_stays_on_the_host(compiled, tiny_plans):
    """The engine takes rows of the table; the plan holds the checkpoint's."""
    plan = compiled("pi0", "graph")
    inputs = engines_of(plan)["prefix"]["inputs"]
    assert "tokens" not in inputs and inputs["embeddings"] == {"dtype": "bfloat16", "shape": ["prompt", 512]}
    weights = load_checkpoint(tiny_plans("pi0", "llm+expert-mlp").checkpoint).weights
    stored = torch.frombuffer(bytearray(plan.read("embedding")), dtype=torch.bfloat16)
    assert torch.equal(stored, weights["llm.embed_tokens.weight"].bfloat16().flatten())


@needs_tensorrt
def test_fp16_builds_as_well(compiled):
    step = engines_of(compiled("pi05", "graph", "fp16"))["step"]
    assert step["inputs"]["key.0"]["dtype"] == "float16" and step["inputs"]["x"]["dtype"] == "float"


@needs_tensorrt
def test_unrolling_is_the_loop(tiny_plans, compiled):
    """The unrolled float32 policy in ONNX Runtime, given rows of the token table, against the prefix and the step, given
    tokens, one after the other."""
    source = load_checkpoint(tiny_plans("pi0", "none").checkpoint)
    exported = export(source.config, source.weights, 4, {})
    rewrite(exported, PHASES)

    def session(model):
        return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    random = np.random.default_rng(0)
    feeds = {
        "images": random.uniform(-1, 1, (2, 3, 224, 224)).astype(np.float32),
        "tokens": random.integers(0, 100, 7),
        "state": random.standard_normal(32).astype(np.float32),
    }
    x = noise = random.standard_normal((8, 32)).astype(np.float32)
    prefix, step = session(ir.to_proto(exported.prefix)), session(ir.to_proto(exported.step))
    names = [output.name for output in prefix.get_outputs()]
    cache = {k: v for k, v in zip(names, prefix.run(None, feeds), strict=True) if is_key_value(k)}
    for index in range(4):
        (x,) = step.run(None, {"x": x, "step": np.array(index), **cache})
    rows = take_embeddings(exported.prefix).const_value.numpy()[feeds.pop("tokens")].astype(np.float32)
    policy = unroll(Network.of(exported.prefix), Network.of(exported.step), 4)
    (whole,) = session(with_weights(policy)).run(None, {**feeds, "embeddings": rows, "x": noise})
    np.testing.assert_allclose(whole, x, rtol=1e-5, atol=1e-6)


def compile_arguments(plan, *changes):
    return [
        plan.checkpoint,
        "--robot",
        "libero",
        "--target",
        "tensorrt",
        "--out",
        plan.checkpoint.parent / "x.plan",
        *changes,
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--sm", "86", "--loop", "twice"], "--loop twice: unknown, one of unrolled, graph"),
        (["--sm", "86", "--float-type", "fp8"], "--float-type fp8: unknown, one of bf16, fp16"),
        (["--sm", "90"], "--sm 90: --target tensorrt compiles for 80, 86, 89"),
    ],
)
def test_bad_options_are_refused(tiny_plans, command_line, arguments, says):
    plan = tiny_plans("pi0", "llm+expert-mlp")
    ran = command_line(compile_main, *compile_arguments(plan, *arguments))
    assert ran.code == 2 and says in ran.err.replace("\n", " ")
    assert not list(plan.checkpoint.parent.glob("*x.plan*"))


def test_without_tensorrt_the_extras_are_named(tiny_plans, command_line, monkeypatch):
    trt.library.cache_clear()
    found = trt.importlib.util.find_spec
    monkeypatch.setattr(trt.importlib.util, "find_spec", lambda name: None if name in trt.FLAVORS else found(name))
    ran = command_line(compile_main, *compile_arguments(tiny_plans("pi0", "llm+expert-mlp"), "--sm", "86"))
    trt.library.cache_clear()
    assert ran.code == 2 and "duq-vla[tensorrt]" in ran.err and "duq-vla[tensorrt-rtx]" in ran.err


@needs_tensorrt
def test_without_bitblas_the_extra_is_named(tiny_plans, command_line, monkeypatch):
    def missing(name):
        raise bitblas.PackageNotFoundError(name)

    monkeypatch.setattr(bitblas, "version", missing)
    ran = command_line(compile_main, *compile_arguments(tiny_plans("pi0", "llm+expert-mlp"), "--sm", "86"))
    assert ran.code == 2 and "duq-vla[bitblas]" in ran.err


@needs_tensorrt
def test_without_graphsurgeon_the_extras_are_named(tiny_plans, command_line, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnx_graphsurgeon" else find(name))
    ran = command_line(compile_main, *compile_arguments(tiny_plans("pi0", "llm+expert-mlp"), "--sm", "86"))
    assert ran.code == 2 and "onnx-graphsurgeon" in ran.err and "duq-vla[tensorrt-rtx]" in ran.err


@needs_tensorrt
def test_phases_are_kept_without_weights(compiled, tmp_path, monkeypatch):
    """The ops as text, and the networks as ONNX files that name every weight and hold none."""
    source, integers = compiled.quantization("pi0")
    graphs = export(source.config, source.weights | integers.float_weights, 4, integers.packs)
    rewrite(graphs, (*PHASES, *TARGETS["tensorrt"].phases))
    monkeypatch.setattr(engines, "build", lambda *_: builder.Engine(memoryview(b"engine"), [], 0, 0, 0.0))
    monkeypatch.setattr(engines, "_write_kernels", lambda *_: [])
    with PlanWriter(tmp_path / "x.plan") as writer, Progress(disable=True) as progress:
        engines.write_engines(graphs, writer, progress, TensorRTOptions(sm=(86,)), tmp_path)
    for name in ("prefix", "step"):
        ops_of_graph = (tmp_path / f"tensorrt-fuse-{name}.txt").read_text()
        assert "Quantize, " in ops_of_graph and "residual: " in ops_of_graph
        model = onnx.load(tmp_path / f"tensorrt-sm86-{name}.onnx", load_external_data=False)
        assert model.ByteSize() < 1 << 20
        assert all(math.prod(each.dims) < 1024 or is_external(each) for each in model.graph.initializer)
        plugins = [node for node in model.graph.node if node.domain == ops.DOMAIN]
        assert {node.op_type for node in plugins} == set(nodes.NODES)
        for node in plugins:
            assert {attribute.name: attribute.s for attribute in node.attribute}["plugin_namespace"] == b"duq"


def small_model(*nodes, outputs=("y",)):
    text = f"""<ir_version: 10, opset_import: ["" : 23, "duq" : 1]>
        small (float[4, 8] x) => ({", ".join(f"float[4, 8] {name}" for name in outputs)}) {{ {" ".join(nodes)} }}"""
    return ir.from_proto(onnx.parser.parse_model(text))


@needs_tensorrt
@pytest.mark.parametrize(
    ("node", "plugins", "sm", "says"),
    [
        ("y = duq.Unheard(x)", 0, 86, "parser rejects the small graph: Unheard"),
        ("y = Relu(x)", 1, 86, "has 0 plugins instead of 1"),
        ("y = Relu(x)", 0, 90, "SM 90"),
    ],
)
def test_what_tensorrt_cannot_build_is_one_error(tmp_path, node, plugins, sm, says):
    with Progress(disable=True) as progress, pytest.raises(GraphError, match=says):
        builder.build("small", Network.of(small_model(node)), plugins, {}, sm, progress, tmp_path)
    assert not list(tmp_path.iterdir())


def test_linears_without_a_plugin_are_refused():
    model = small_model("q = duq.W8A8Linear(x, x, x, x)", "y = Relu(q)")
    with pytest.raises(GraphError, match="not for W8A8Linear: quantize to 4-bit weights"):
        prepare(model)


@needs_tensorrt
def test_progress_is_shown(tmp_path):
    shown = []
    with Progress(disable=True) as progress:
        original = progress.add_task
        progress.add_task = lambda description, **options: (shown.append(description), original(description, **options))[1]
        builder.build("small", Network.of(small_model("y = Relu(x)")), 0, {}, 86, progress, tmp_path)
    assert shown and all(each.startswith("small: ") for each in shown)


@needs_tensorrt
@pytest.mark.parametrize(
    ("change", "says"),
    [({"flavor": "other"}, "is built with other"), ({"version": "1.0"}, "this machine has"), ({}, None)],
)
def test_engines_of_another_library_are_refused(compiled, change, says):
    plan = compiled("pi0", "graph")
    section = executor.section_of(plan, 86) | change
    executor.check_plugins(plan, section)
    if says is None:
        executor.check_library(plan, section)
    else:
        with pytest.raises(PlanError, match=says):
            executor.check_library(plan, section)
    with pytest.raises(PlanError, match="compile it with --sm 89"):
        executor.section_of(plan, 89)


@needs_tensorrt
def test_the_executor_finds_every_kernel_in_the_plan(compiled):
    plan = compiled("pi0", "graph")
    kernels = executor.kernels_of(plan, 86)
    for each in details_of(plan)["kernels"]:
        cubin = kernels._cubins[nodes.KernelName(each["source"], each["expression"])]
        assert cubin.image.startswith(b"\x7fELF") and list(cubin.symbols.values()) == [each["symbol"]]


@needs_tensorrt
def test_duq_inspect_needs_no_tensorrt_to_show_the_plan(compiled, command_line, monkeypatch):
    plan = compiled("pi0", "graph")
    monkeypatch.setattr(trt, "library", lambda: pytest.fail("TensorRT was loaded"))
    ran = command_line(inspect_main, plan.path, "--all")
    assert ran.code == 0 and "engine/sm86/step" in ran.out and "general_dequant_matmul_kernel" in ran.out
