"""Checkpoints of openpi's JAX trainer: the arrays mean what openpi's einsums make of them, and nothing is lost."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.progress import Progress

from duq.compiler.checkpoint import check_finite, load_checkpoint, orbax, scratch
from duq.compiler.checkpoint.jax import merge_lora
from duq.compiler.checkpoint.synthetic import make_checkpoint
from duq.compiler.errors import CheckpointError
from duq.compiler.pipeline import compile_policy
from duq.compiler.quant import Quantization, load_recipe
from duq.compiler.targets import Options
from duq.runtime.plan import Plan

tensorstore = pytest.importorskip("tensorstore")

SIZES = dict(depth=2, vision_depth=1)
VISION = dict(width=48, depth=2, mlp=64, heads=3, tokens=256)
LLM = dict(width=32, depth=3, mlp=40, heads=2, head=16)
EXPERT = dict(width=24, depth=3, mlp=36, heads=2, head=16)
ACTIONS, VOCAB = 5, 70
LORA = {"": 3, "_1": 2}


def tree(pi05: bool = False, lora: bool = False) -> dict[str, np.ndarray]:
    """A small policy as openpi's JAX modules name and shape it."""
    random = np.random.default_rng(0)
    shapes: dict[str, tuple] = {}
    image, block = "PaliGemma/img/", "PaliGemma/img/Transformer/encoderblock/"
    depth, width, mlp, heads = (VISION[key] for key in ("depth", "width", "mlp", "heads"))
    shapes |= {image + "embedding/kernel": (14, 14, 3, width), image + "embedding/bias": (width,)}
    shapes |= {image + "pos_embedding": (1, VISION["tokens"], width)}
    for norm in (f"{block}LayerNorm_0", f"{block}LayerNorm_1"):
        shapes |= {f"{norm}/scale": (depth, width), f"{norm}/bias": (depth, width)}
    for dense, size in (("Dense_0", (width, mlp)), ("Dense_1", (mlp, width))):
        shapes |= {f"{block}MlpBlock_0/{dense}/kernel": (depth, *size), f"{block}MlpBlock_0/{dense}/bias": (depth, size[1])}
    attention = block + "MultiHeadDotProductAttention_0/"
    for name in ("query", "key", "value"):
        shapes[f"{attention}{name}/kernel"] = (depth, width, heads, width // heads)
        shapes[f"{attention}{name}/bias"] = (depth, heads, width // heads)
    shapes |= {f"{attention}out/kernel": (depth, heads, width // heads, width), f"{attention}out/bias": (depth, width)}
    shapes |= {f"{image}Transformer/encoder_norm/{leaf}": (width,) for leaf in ("scale", "bias")}
    shapes |= {image + "head/kernel": (width, LLM["width"]), image + "head/bias": (LLM["width"],)}
    shapes["PaliGemma/llm/embedder/input_embedding"] = (VOCAB, LLM["width"])
    for suffix, gemma in (("", LLM), ("_1", EXPERT)):
        depth, width, mlp, heads, head = (gemma[key] for key in ("depth", "width", "mlp", "heads", "head"))
        layers = "PaliGemma/llm/layers/"
        einsums = {
            f"{layers}attn/q_einsum{suffix}/": (depth, heads, width, head),
            f"{layers}attn/kv_einsum{suffix}/": (depth, 2, 1, width, head),
            f"{layers}attn/attn_vec_einsum{suffix}/": (depth, heads, head, width),
            f"{layers}mlp{suffix}/gating_einsum": (depth, 2, width, mlp),
            f"{layers}mlp{suffix}/linear": (depth, mlp, width),
        }
        for name, shape in einsums.items():
            shapes[f"{name}w" if name.endswith("/") else name] = shape
            if lora:
                stem = name if name.endswith("/") else f"{name}_"
                shapes[f"{stem}lora_a"] = (*shape[:-1], LORA[suffix])
                shapes[f"{stem}lora_b"] = (*shape[:-2], LORA[suffix], shape[-1])
        for name, lead in ((f"{layers}pre_attention_norm", (depth,)), (f"{layers}pre_ffw_norm", (depth,)),
                           ("PaliGemma/llm/final_norm", ())):  # fmt: skip
            if pi05 and suffix:
                shapes[f"{name}{suffix}/Dense_0/kernel"] = (*lead, width, 3 * width)
                shapes[f"{name}{suffix}/Dense_0/bias"] = (*lead, 3 * width)
            else:
                shapes[f"{name}{suffix}/scale"] = (*lead, width)
    width = EXPERT["width"]
    linears = {"action_in_proj": (ACTIONS, width), "action_out_proj": (width, ACTIONS)}
    if pi05:
        linears |= {"time_mlp_in": (width, width), "time_mlp_out": (width, width)}
    else:
        linears |= {"state_proj": (ACTIONS, width), "action_time_mlp_in": (2 * width, width)}
        linears |= {"action_time_mlp_out": (width, width)}
    for name, shape in linears.items():
        shapes |= {f"{name}/kernel": shape, f"{name}/bias": shape[1:]}
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write(
    params: Path, arrays: dict, value=True, ocdbt=True, zarr3=False, dtype="float32", chunk=lambda shape: shape
) -> Path:
    """`arrays` in Orbax's form, with options of Orbax's own; returns the folder above."""
    entries = {}
    for name, array in arrays.items():
        keys = ["params", *name.split("/"), *(["value"] if value else [])]
        path = ".".join(keys)
        if ocdbt:
            kvstore = {"driver": "ocdbt", "base": f"file://{params}/", "path": f"{path}/"}
        else:
            kvstore = {"driver": "file", "path": f"{params / path}/"}
        spec = {"driver": "zarr3" if zarr3 else "zarr", "kvstore": kvstore, "create": True, "dtype": dtype,
                "store_data_equal_to_fill_value": True}  # fmt: skip
        layout = tensorstore.ChunkLayout(chunk_shape=chunk(array.shape))
        store = tensorstore.open(spec, shape=array.shape, chunk_layout=layout).result()
        store.write(array.astype(store.dtype.numpy_dtype)).result()
        entries[str(tuple(keys))] = {"key_metadata": [{"key": key, "key_type": 2} for key in keys],
                                     "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False}}  # fmt: skip
    entries["('params', 'empty')"] = {"key_metadata": [{"key": "params", "key_type": 2}, {"key": "empty", "key_type": 2}],
                                      "value_metadata": {"value_type": "Dict", "skip_deserialize": True}}  # fmt: skip
    (params / "_METADATA").write_text(json.dumps({"tree_metadata": entries, "use_ocdbt": ocdbt, "use_zarr3": zarr3}))
    return params.parent


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A small pi0 in Orbax's form. Read only."""
    return write(tmp_path_factory.mktemp("jax") / "params", tree())


@pytest.fixture(scope="module")
def plain_zarr(tmp_path_factory):
    return write(tmp_path_factory.mktemp("zarr") / "params", tree(), ocdbt=False, chunk=lambda shape: (1, *shape[1:]))


def fails(path, *patterns, **arguments):
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path, **arguments)
    for pattern in patterns:
        assert re.search(pattern, str(error.value)), f"{pattern!r} not in:\n{error.value}"


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


# --- values


@pytest.mark.parametrize("pi05, dtype", [(False, "float32"), (True, "bfloat16")])
def test_the_same_weights_as_in_pytorch(tmp_path, pi05, dtype):
    torch_form, jax_form = (
        make_checkpoint(tmp_path / layout, layout=layout, pi05=pi05, dtype=dtype, robot="libero", **SIZES)
        for layout in ("openpi", "jax")
    )
    expected, found = load_checkpoint(torch_form), load_checkpoint(jax_form)
    assert same(expected.weights, found.weights)
    rotary = "bfloat16" if dtype == "bfloat16" else "exact"  # which JAX never rounds
    assert found.config.rotary == "exact" and replace(found.config, rotary=rotary) == expected.config
    assert (found.norm_stats, found.layout) == (expected.norm_stats, "openpi")
    assert found.origin == "jax" and expected.origin == "torch" and found.form == f"openpi JAX (Orbax), {dtype}"
    below = load_checkpoint(jax_form / "params")
    assert (below.path, below.norm_stats, below.fingerprint) == (jax_form, found.norm_stats, found.fingerprint)
    assert below.tokenizer == jax_form / "tokenizer.model"


def test_the_same_plan_as_from_pytorch(tmp_path):
    entries = {}
    for layout in ("openpi", "jax"):
        checkpoint = load_checkpoint(make_checkpoint(tmp_path / layout, layout=layout, dtype="float32", **SIZES))
        out = tmp_path / f"{layout}.plan"
        with Progress(disable=True) as progress:
            compile_policy(checkpoint, Quantization(load_recipe("none", environment={})), out, Options(), progress)
        plan = Plan(out)
        entries[layout] = {name: plan.read(name) for name in plan.names}
    assert entries["jax"] == entries["openpi"] and sum(map(len, entries["jax"].values())) > 1e7


def linear(weights: dict, name: str, x: np.ndarray) -> np.ndarray:
    weight = weights[f"{name}.weight"].double().numpy()
    bias = weights.get(f"{name}.bias")
    return x @ weight.T + (0 if bias is None else bias.double().numpy())


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("suffix, stack, gemma", [("", "llm", LLM), ("_1", "expert", EXPERT)])
def test_linears_compute_what_openpi_s_einsums_do(tmp_path, lora, suffix, stack, gemma):
    arrays = {name: array.astype(np.float64) for name, array in tree(lora=lora).items()}
    weights = load_checkpoint(write(tmp_path / "params", tree(lora=lora))).weights
    random, layer = np.random.default_rng(1), 2
    x = random.standard_normal((4, gemma["width"]))
    heads, hidden = random.standard_normal((4, gemma["heads"], gemma["head"])), random.standard_normal((4, gemma["mlp"]))

    def einsum(name: str, equation: str, first: str, second: str, x: np.ndarray) -> np.ndarray:
        """The product, and beside it the two of LoRA, each as openpi's module writes it."""
        name = f"PaliGemma/llm/layers/{name}"
        out = np.einsum(equation, x, arrays[name if name in arrays else f"{name}/w"][layer])
        if lora:
            separator = "_" if name in arrays else "/"
            a, b = (arrays[f"{name}{separator}lora_{letter}"][layer] for letter in "ab")
            out += np.einsum(second, np.einsum(first, x, a), b)
        return out

    here = f"{stack}.layers.{layer}"
    q = einsum(f"attn/q_einsum{suffix}", "TD,NDH->TNH", "TD,NDL->TNL", "TNL,NLH->TNH", x)
    kv = einsum(f"attn/kv_einsum{suffix}", "SD,cKDH->cSKH", "SD,cKDL->cSKL", "cSKL,cKLH->cSKH", x)
    out = einsum(f"attn/attn_vec_einsum{suffix}", "TNH,NHD->TD", "TNH,NHL->TL", "TL,NLD->TD", heads)
    gate, up = einsum(f"mlp{suffix}/gating_einsum", "TD,cDF->cTF", "TD,cDL->cTL", "cTL,cLF->cTF", x)
    down = einsum(f"mlp{suffix}/linear", "TF,FD->TD", "TF,FL->TL", "TL,LD->TD", hidden)
    close = dict(rtol=1e-6, atol=1e-6 * 30)  # merged in float32; the outputs are of the order of 30
    np.testing.assert_allclose(linear(weights, f"{here}.self_attn.q_proj", x), q.reshape(4, -1), **close)
    np.testing.assert_allclose(linear(weights, f"{here}.self_attn.k_proj", x), kv[0].reshape(4, -1), **close)
    np.testing.assert_allclose(linear(weights, f"{here}.self_attn.v_proj", x), kv[1].reshape(4, -1), **close)
    np.testing.assert_allclose(linear(weights, f"{here}.self_attn.o_proj", heads.reshape(4, -1)), out, **close)
    np.testing.assert_allclose(linear(weights, f"{here}.mlp.gate_proj", x), gate, **close)
    np.testing.assert_allclose(linear(weights, f"{here}.mlp.up_proj", x), up, **close)
    np.testing.assert_allclose(linear(weights, f"{here}.mlp.down_proj", hidden), down, **close)


def test_vision_computes_what_flax_does(stored):
    arrays, weights = tree(), load_checkpoint(stored).weights
    block, here, layer = "PaliGemma/img/Transformer/encoderblock/", "vision.encoder.layers.1", 1
    x = np.random.default_rng(1).standard_normal((4, VISION["width"]))
    attention = block + "MultiHeadDotProductAttention_0"
    for name, ours in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        kernel, bias = arrays[f"{attention}/{name}/kernel"][layer], arrays[f"{attention}/{name}/bias"][layer]
        expected = np.einsum("td,dnh->tnh", x, kernel) + bias
        np.testing.assert_allclose(linear(weights, f"{here}.self_attn.{ours}", x), expected.reshape(4, -1), rtol=1e-9)
    heads = x.reshape(4, VISION["heads"], -1)
    expected = (
        np.einsum("tnh,nhd->td", heads, arrays[f"{attention}/out/kernel"][layer]) + arrays[f"{attention}/out/bias"][layer]
    )
    np.testing.assert_allclose(linear(weights, f"{here}.self_attn.out_proj", x), expected, rtol=1e-9)
    patch = np.random.default_rng(2).standard_normal((14, 14, 3))  # flax: NHWC images, HWIO kernels; torch: NCHW, OIHW
    expected = np.einsum("hwc,hwcd->d", patch, arrays["PaliGemma/img/embedding/kernel"])
    ours = torch.from_numpy(patch.transpose(2, 0, 1)[None])
    found = torch.nn.functional.conv2d(ours, weights["vision.embeddings.patch_embedding.weight"].double())
    np.testing.assert_allclose(found.flatten(), expected, rtol=1e-9)
    np.testing.assert_array_equal(
        weights["vision.embeddings.position_embedding.weight"], arrays["PaliGemma/img/pos_embedding"][0]
    )
    assert load_checkpoint(stored).config.vision.heads == VISION["heads"]  # 48 is no multiple of 72


@pytest.mark.parametrize("pi05", [False, True])
def test_every_value_of_the_tree_is_in_the_weights_once(tmp_path, pi05):
    arrays = tree(pi05)
    weights = load_checkpoint(write(tmp_path / "params", arrays)).weights
    expected = np.sort(np.concatenate([array.ravel() for array in arrays.values()]))
    np.testing.assert_array_equal(
        np.sort(np.concatenate([tensor.numpy().ravel() for tensor in weights.values()])), expected
    )


@pytest.mark.parametrize(
    "options",
    [
        dict(value=False),
        dict(ocdbt=False),
        dict(zarr3=True),
        dict(ocdbt=False, zarr3=True, value=False),
        dict(chunk=lambda shape: (min(2, shape[0]), *shape[1:])),  # two layers of three to a chunk
        dict(chunk=lambda shape: tuple(-(-size // 2) for size in shape)),  # as when devices share the arrays
    ],
)
def test_all_ways_in_which_orbax_stores_arrays(tmp_path, stored, options):
    path = write(tmp_path / "params", tree(), **options)
    found, expected = load_checkpoint(path), load_checkpoint(stored)
    assert same(found.weights, expected.weights) and found.config == expected.config
    assert len(set(found.files)) == len(found.files) and all(file.is_file() for file in found.files)


def test_bfloat16_base_with_float32_lora(tmp_path):
    arrays = tree(lora=True)
    lora = {name for name in arrays if "lora" in name}
    write(
        tmp_path / "base" / "params", {name: array for name, array in arrays.items() if name not in lora}, dtype="bfloat16"
    )
    base = load_checkpoint(tmp_path / "base").weights
    rounded = {
        name: array if name in lora else torch.from_numpy(array).bfloat16().float().numpy()
        for name, array in arrays.items()
    }
    merged = load_checkpoint(write(tmp_path / "params", rounded))
    assert merged.form == "openpi JAX (Orbax), float32, LoRA merged (rank 3, 2)"
    assert [note for note in merged.notes if "rank 3 in the llm" in note and "alpha = rank" in note]
    a, b = (arrays[f"PaliGemma/llm/layers/mlp/linear_lora_{letter}"][0] for letter in "ab")
    expected = base["llm.layers.0.mlp.down_proj.weight"].float().numpy() + (a.astype(np.float64) @ b).T
    np.testing.assert_allclose(merged.weights["llm.layers.0.mlp.down_proj.weight"], expected, atol=1e-5)
    mixed = merge_lora("mlp/linear", torch.ones(4, 3, dtype=torch.bfloat16), torch.ones(4, 2), torch.full((2, 3), 1e-3))
    assert mixed.dtype == torch.float32 and torch.allclose(mixed, torch.tensor(1.002))


def test_orbax_and_this_writer_read_each_other(tmp_path):
    checkpointer = pytest.importorskip("orbax.checkpoint").PyTreeCheckpointer()
    made = make_checkpoint(tmp_path / "made", layout="jax", dtype="float32", **SIZES)
    restored = checkpointer.restore(made / "params")
    checkpointer.save(tmp_path / "saved" / "params", restored)
    assert same(load_checkpoint(made).weights, load_checkpoint(tmp_path / "saved").weights)


# --- laziness


def test_weights_lie_in_a_file_without_a_name(stored, tmp_path, monkeypatch):
    monkeypatch.setattr(scratch.tempfile, "tempdir", str(tmp_path))
    weights = load_checkpoint(stored).weights
    lines = Path("/proc/self/maps").read_text().splitlines()
    mapped = [
        range(*(int(end, 16) for end in line.split()[0].split("-")))
        for line in lines if str(tmp_path) in line or "deleted" in line
    ]  # fmt: skip
    assert all(any(tensor.data_ptr() in part for part in mapped) for tensor in weights.values())
    assert not list(tmp_path.iterdir())


def test_too_little_space_is_said_before_work_starts(stored, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(scratch.shutil, "disk_usage", lambda folder: usage)
    fails(stored, r"has 1,000 bytes free, and the converted weights take [\d,]{7,}", "TMPDIR")


def test_progress_and_finite(stored, tmp_path):
    seen = []
    assert load_checkpoint(stored, progress=lambda done, total: seen.append((done, total))).finite
    assert seen[-1][0] == seen[-1][1] > 0 and [done for done, _ in seen] == sorted(done for done, _ in seen)
    arrays = tree()
    arrays["PaliGemma/llm/layers/mlp/linear"][1, 2, 3] = np.nan
    checkpoint = load_checkpoint(write(tmp_path / "params", arrays))
    assert not checkpoint.finite
    with pytest.raises(CheckpointError, match=r"llm\.layers\.1\.mlp\.down_proj\.weight: 1 of"):
        check_finite(checkpoint.weights)


# --- what is missing, damaged or foreign


def copied(source: Path, tmp_path: Path) -> Path:
    return shutil.copytree(source, tmp_path / "copy")


def test_files_that_are_missing_or_cut_short_are_named(stored, tmp_path):
    ends = orbax._database_ranges(stored / "params")
    assert len(ends) > 3
    path = copied(stored, tmp_path)
    for name in ("_METADATA", "manifest.ocdbt", *list(ends)[:3], *list(ends)[-3:]):
        file = path / "params" / name
        data = file.read_bytes()
        file.unlink()
        fails(path, re.escape(file.name), "download it again")
        if name in ends:
            file.write_bytes(data[: ends[name] - 1])
            fails(path, re.escape(name) + r" has [\d,]+ of [\d,]+ bytes", "download it again")
        file.write_bytes(data)
    assert load_checkpoint(path).weights


def test_bytes_that_were_changed_are_noticed(stored, tmp_path):
    path = copied(stored, tmp_path)
    largest = max((path / "params" / "d").iterdir(), key=lambda file: file.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[: len(data) // 2] = bytes(len(data) // 2)
    largest.write_bytes(data)
    fails(path, "cannot be (read|opened)|database", "download it again")


def test_missing_chunks_of_plain_zarr_are_no_zeros(plain_zarr, tmp_path):
    path = copied(plain_zarr, tmp_path)
    (path / "params/params.PaliGemma.llm.layers.mlp.linear.value/1.0.0").unlink()
    fails(path, r"params\.PaliGemma\.llm\.layers\.mlp\.linear\.value has 2 of 3 chunks")
    shutil.rmtree(path / "params/params.state_proj.bias.value")
    fails(path, "array state_proj/bias: .*NOT_FOUND")
    assert load_checkpoint(plain_zarr).weights


def test_git_lfs_pointers(stored, tmp_path):
    path = copied(stored, tmp_path)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n"
    data = max((path / "params" / "d").iterdir(), key=lambda file: file.stat().st_size)
    for file in (data, path / "params/manifest.ocdbt", path / "params/_METADATA"):
        file.write_text(pointer)
        fails(path, f"{file.name} is a Git LFS pointer.*git lfs pull")


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda t: t.update({"PaliGemma/llm/layers/mlp/extra": np.zeros((3, 2))}),
            r"mlp/extra \[3, 2\]: pi0 and pi0\.5 have no such",
        ),
        (lambda t: t.pop("PaliGemma/llm/layers/attn/q_einsum_1/w"), r"expert\.layers\.\*\.self_attn\.q_proj"),
        (lambda t: t.pop("action_out_proj/bias"), r"missing +action_out_proj\.bias"),
        (
            lambda t: t.update({"action_in_proj/kernel": np.zeros((2, 5, 24))}),
            r"action_in_proj/kernel has shape \[2, 5, 24\]",
        ),
        (
            lambda t: t.update({"PaliGemma/llm/layers/mlp/gating_einsum": np.zeros((3, 3, 32, 40))}),
            r"gating_einsum has shape .*expected 2 parts",
        ),
        (
            lambda t: t.update({"PaliGemma/llm/layers/mlp/linear_lora_a": np.zeros((3, 40, 2))}),
            "LoRA of .*mlp/linear .* and none",
        ),
        (
            lambda t: t.update({f"PaliGemma/llm/layers/mlp/linear_lora_{x}": np.zeros((3, 40, 2)) for x in "ab"}),
            r"LoRA of .*mlp/linear \[3, 40, 32\].*do not fit",
        ),
        (lambda t: t.update({"action_in_proj/lora_a": np.zeros((5, 2))}), "action_in_proj/lora_a .* no such array"),
        (lambda t: [t.pop(n) for n in list(t) if "_1" in n or not n.startswith("Pali")], "pi0-FAST"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path, change, message):
    arrays = tree()
    change(arrays)
    fails(write(tmp_path / "params", arrays), message)


def test_heads_of_another_size_are_refused(tmp_path):
    arrays = tree()
    for suffix in ("", "_1"):
        for name in ("q_einsum", "kv_einsum", "attn_vec_einsum"):
            array = arrays[f"PaliGemma/llm/layers/attn/{name}{suffix}/w"]
            kv = array.repeat(2, axis=2) if name == "kv_einsum" else array
            arrays[f"PaliGemma/llm/layers/attn/{name}{suffix}/w"] = kv  # two key/value heads of 16: looks like one of 32
    fails(write(tmp_path / "params", arrays), "llm has 2 heads and 2 key/value heads of 16; .* compute with 1 and 1 of 32")


def test_integers_are_no_weights(tmp_path):
    fails(write(tmp_path / "params", {name: np.zeros((2,)) for name in ("action_in_proj/bias",)}, dtype="int32"), "int32")


def test_training_state_in_place_of_weights(stored, tmp_path):
    path = copied(stored, tmp_path)
    metadata = (path / "params/_METADATA").read_text().replace('"key": "params"', '"key": "opt_state"')
    (path / "params/_METADATA").write_text(metadata)
    fails(path, "holds no weights.*opt_state.*pass the step's params/")


# --- run folders


def test_the_newest_complete_step_of_a_run(stored, tmp_path):
    for step in ("1000", "9000", "20000"):
        shutil.copytree(stored, tmp_path / "run" / step)
    (tmp_path / "run/20000/params/_METADATA").unlink()
    (tmp_path / "run/30000.orbax-checkpoint-tmp-1").mkdir()
    checkpoint = load_checkpoint(tmp_path / "run")
    assert checkpoint.path == tmp_path / "run/9000"
    assert re.search("newest step 9000 was taken; 20000 is not complete", checkpoint.notes[0])
    shutil.rmtree(tmp_path / "run/9000/params")
    (tmp_path / "run/9000/train_state").mkdir()
    assert load_checkpoint(tmp_path / "run").path == tmp_path / "run/1000"
    fails(tmp_path / "run/9000", "only the state of a training")


def test_a_run_of_the_pytorch_trainer(tmp_path, tiny_pi0):
    for step in ("5", "10"):
        shutil.copytree(tiny_pi0, tmp_path / step)
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.path == tmp_path / "10" and "newest step 10 was taken" in checkpoint.notes[0]


def test_missing_tensorstore_names_the_extra(stored, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorstore", None)
    fails(stored, r"needs tensorstore, pip install '\.\[jax\]'")


def test_fingerprint_follows_the_arrays(stored, plain_zarr, tmp_path):
    first = load_checkpoint(stored).fingerprint
    assert load_checkpoint(copied(stored, tmp_path)).fingerprint == first
    assert load_checkpoint(plain_zarr).fingerprint != first
    data = sorted((tmp_path / "copy/params/d").iterdir())[0]
    assert data.name in {file.name for file in load_checkpoint(stored).files}
