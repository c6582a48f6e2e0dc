"""Pack files: our own, those of the original scripts, and everything that must be refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.progress import Progress
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import save_file

from duq.compiler.errors import PackError
from duq.compiler.quant import Quantization, Recipe, load_quantization, load_recipe, load_transforms, save_quantization
from duq.compiler.quant.pack import LinearPack, load_pack, pack_weight, save_pack
from duq.compiler.quant.recipe import canonical_module, openpi_module
from duq.compiler.quant.transforms import LinearTransform
from tests.support.quant_policy import tiny_checkpoint

NAME = "llm.layers.0.mlp.down_proj"
SILENT = Progress(disable=True)


def random_pack(bits=4, hadamard=False, seed=0):
    random = np.random.default_rng(seed)
    weight = random.integers(-8, 8, (64, 128)).astype(np.int8)
    rotation = np.linalg.qr(random.standard_normal((8, 16, 16)))[0].astype(np.float32)
    return LinearPack(
        name=NAME,
        weight_q=pack_weight(weight, bits),
        weight_bits=bits,
        weight_scale=random.uniform(0.1, 1, 64).astype(np.float32),
        activation_scale=np.array(0.5, np.float32) if hadamard else None,
        input_scale=random.uniform(0.1, 1, 128).astype(np.float32),
        permutation=random.permutation(128),
        rotation="hadamard" if hadamard else rotation,
        block_size=64 if hadamard else 16,
        output_rotation=None if hadamard else rotation[:4],
        sqnr_db=21.5,
    )


def assert_equal(found, expected):
    for key, value in vars(expected).items():
        np.testing.assert_array_equal(getattr(found, key), value, err_msg=key)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("hadamard", [False, True])
def test_round_trip(tmp_path, bits, hadamard):
    pack = random_pack(bits, hadamard)
    save_pack(pack, tmp_path)
    found = load_pack(tmp_path, NAME, (64, 128))
    assert_equal(found, pack)
    assert found.shape == (64, 128) and found.weight().dtype == np.int8


def original_pack(**changes):
    """The arrays that the original scripts save for a linear of 64 x 128."""
    random = np.random.default_rng(1)
    blocks = np.linalg.qr(random.standard_normal((12, 16, 16)))[0].astype(np.float32)
    meta = {"in_features": 128, "out_features": 64, "block_size": 16, "block_out_size": 16, "enable_permute": True,
            "lambda_smooth": 0.15}  # fmt: skip
    arrays = {f"Rin_{i}": blocks[i] for i in range(8)} | {f"Rout_{i}": blocks[8 + i] for i in range(4)}
    arrays |= {"R_in_blocks": np.arange(8), "R_out_blocks": np.arange(4), "perm": random.permutation(128)}
    arrays |= {"weight_scale": np.ones(64, np.float32), "meta": json.dumps(meta)}
    return {key: value for key, value in (arrays | changes).items() if value is not None}


@pytest.mark.parametrize("name", [NAME, openpi_module(NAME)])
def test_reads_original_packs_under_both_names(tmp_path, name):
    arrays = original_pack()
    np.savez(tmp_path / f"{name}.npz", **arrays)
    found = load_pack(tmp_path, NAME, (64, 128))
    assert type(found) is LinearTransform and found.block_size == 16
    np.testing.assert_array_equal(found.permutation, arrays["perm"])
    np.testing.assert_array_equal(found.rotation[3], arrays["Rin_3"])
    np.testing.assert_array_equal(found.output_rotation[2], arrays["Rout_2"])


def test_an_original_pack_means_what_its_scripts_compute(tmp_path):
    """x' = x[perm] R_in; W' = R_out (W[:, perm] R_in); y = (x' W'^T) R_out, block by block."""
    arrays = original_pack()
    np.savez(tmp_path / f"{NAME}.npz", **arrays)
    transform = load_pack(tmp_path, NAME, (64, 128))
    random = np.random.default_rng(2)
    x, weight = random.standard_normal((5, 128)).astype(np.float32), random.standard_normal((64, 128)).astype(np.float32)
    moved_x, moved_w = x[:, arrays["perm"]], weight[:, arrays["perm"]]
    for i in range(8):
        part = slice(16 * i, 16 * i + 16)
        moved_x[:, part], moved_w[:, part] = moved_x[:, part] @ arrays[f"Rin_{i}"], moved_w[:, part] @ arrays[f"Rin_{i}"]
    for i in range(4):
        part = slice(16 * i, 16 * i + 16)
        moved_w[part] = arrays[f"Rout_{i}"] @ moved_w[part]
    np.testing.assert_allclose(transform.transform_input(torch.from_numpy(x)), moved_x, atol=1e-5)
    np.testing.assert_allclose(transform.transform_weight(torch.from_numpy(weight)), moved_w, atol=1e-5)


def test_blocks_left_out_are_the_identity(tmp_path):
    np.savez(tmp_path / f"{NAME}.npz", **original_pack(R_in_blocks=np.array([1]), R_out_blocks=None, perm=None))
    found = load_pack(tmp_path, NAME, (64, 128))
    np.testing.assert_array_equal(found.rotation[0], np.eye(16))
    assert found.permutation is None and found.output_rotation is None


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"perm": np.zeros(128, np.int64)}, "not a permutation"),
        ({"perm": np.arange(64)}, "shape"),
        ({"Rin_3": np.ones((16, 16), np.float32)}, "not rotations"),
        ({"Rin_3": np.full((16, 16), np.nan, np.float32)}, "not rotations"),
        ({"Rin_3": np.eye(16, dtype=complex)}, "Rin_3 has dtype complex128"),
        ({"Rin_3": np.eye(16).astype(str)}, "Rin_3 has dtype <U"),
        ({"weight_scale": np.full(64, np.inf, np.float32)}, "weight_scale holds inf at index 0"),
        ({"perm": np.arange(128.0)}, "perm has dtype float64"),
        ({"R_in_blocks": np.arange(8.0)}, "R_in_blocks is float64"),
        ({"R_in_blocks": np.arange(8)[None]}, "R_in_blocks is int64 of shape"),
        ({"meta": "[]"}, "meta: must hold a JSON object, not a list"),
        ({"meta": "7"}, "meta: must hold a JSON object, not a int"),
        ({"meta": json.dumps({"block_size": -16})}, "does not divide"),
        ({"meta": json.dumps({"block_size": "x"})}, "the size of the blocks is .x."),
        (
            {"meta": json.dumps({"name": "llm.layers.1.mlp.down_proj"})},
            "pack of llm.layers.1.mlp.down_proj, not of llm.layers.0",
        ),
        (
            {"meta": json.dumps({"name": openpi_module("expert.layers.0.mlp.down_proj")})},
            "is the pack of paligemma_with_expert.g",
        ),
        ({"meta": json.dumps({"name": 3})}, "is the pack of 3, not of llm"),
        ({"Rin_3": None}, "Rin_3"),
        ({"Rout_1": np.eye(8, dtype=np.float32)}, "shape"),
        ({"R_in_blocks": np.arange(9)}, "does not divide"),
        ({"meta": json.dumps({"in_features": 256})}, "in_features 256"),
        ({"meta": "{"}, "meta: cannot be read as JSON"),
        ({"meta": json.dumps({"block_size": 48})}, "does not divide"),
    ],
)
def test_refuses_packs_that_do_not_fit(tmp_path, changes, message):
    np.savez(tmp_path / f"{NAME}.npz", **original_pack(**changes))
    with pytest.raises(PackError, match=message):
        load_pack(tmp_path, NAME, (64, 128))


@pytest.mark.parametrize("said", [NAME, openpi_module(NAME), None])
def test_a_foreign_pack_may_say_its_linear_in_either_form(tmp_path, said):
    np.savez(tmp_path / f"{NAME}.npz", **original_pack(meta=json.dumps({"name": said} if said else {})))
    assert load_pack(tmp_path, NAME, (64, 128)).rotation is not None


@pytest.mark.parametrize("name", ["projector", "llm.layers.3.mlp.up_proj", "vision.encoder.layers.0.self_attn.q_proj"])
def test_module_names_are_one_to_one(name):
    assert openpi_module(name) != name and canonical_module(openpi_module(name)) == canonical_module(name) == name


def test_two_packs_for_one_linear_are_refused(tmp_path):
    save_pack(random_pack(), tmp_path)
    np.savez(tmp_path / f"{openpi_module(NAME)}.npz", **original_pack())
    with pytest.raises(PackError, match=f"two packs for {NAME}: .*keep one"):
        load_pack(tmp_path, NAME, (64, 128))


def our_pack(tmp_path, hadamard=False, **changes):
    """A pack as we write it, with other arrays or another meta."""
    save_pack(random_pack(hadamard=hadamard), tmp_path)
    path = tmp_path / f"{NAME}.npz"
    with np.load(path) as file:
        arrays = dict(file)
    meta = json.loads(arrays["meta"].item()) | changes.pop("meta", {})
    arrays |= {"meta": json.dumps({key: value for key, value in meta.items() if value is not ...})} | changes
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"meta": {"name": "llm.layers.1.mlp.down_proj"}}, f"pack of llm.layers.1.mlp.down_proj, not of {NAME}.*swapped"),
        ({"meta": {"weight_bits": 2}}, "weight_bits is 2, expected 4 or 8"),
        ({"meta": {"weight_bits": 8}}, r"weight_q has shape \(64, 64\)"),
        ({"meta": {"activation_bits": 4}}, "activation_bits is 4, expected 8 or 0"),
        ({"meta": {"weight_bits": ...}}, "not a readable pack: KeyError: 'weight_bits'"),
        ({"meta": {"sqnr_db": "high"}}, "sqnr_db is .high."),
        ({"meta": {"out_features": 63}}, "made for out_features 63"),
        ({"weight_q": np.zeros((64, 64), np.int8)}, "weight_q has dtype int8, expected uint8 for 4 bits"),
        ({"weight_q": np.zeros((64, 64), np.float32)}, "weight_q has dtype float32"),
        ({"weight_scale": None}, "weight_scale is missing"),
        ({"weight_scale": np.zeros(64, np.float32)}, "weight_scale is float32, 64 of it 0"),
        ({"weight_scale": np.full(64, np.nan, np.float32)}, "weight_scale holds nan at index 0"),
        ({"weight_scale": np.ones(64)}, "weight_scale is float64"),
        ({"weight_scale": np.ones(64, np.int64)}, "weight_scale is int64"),
        ({"weight_scale": np.ones((64, 1), np.float32)}, "weight_scale has shape"),
        ({"input_scale": np.r_[np.ones(127), 0].astype(np.float32)}, "input_scale is float32, as small as 0.0"),
        ({"input_scale": -np.ones(128, np.float32)}, "input_scale is float32, as small as -1.0"),
        ({"input_scale": np.r_[np.inf, np.ones(127)].astype(np.float32)}, "input_scale holds inf"),
        ({"input_scale": np.ones(64, np.float32)}, "input_scale has shape"),
        ({"activation_scale": np.float32(0)}, "activation_scale is float32, as small as 0.0"),
        ({"activation_scale": np.float32(np.nan)}, "activation_scale holds nan"),
        ({"activation_scale": np.ones(7, np.float32)}, r"activation_scale has shape \(7,\), expected \(\) or \(128,\)"),
        ({"hadamard": True, "meta": {"block_size": 48}}, "block_size is 48; a Hadamard's is a power of two"),
        ({"hadamard": True, "meta": {"block_size": 0}}, "block_size is 0"),
        ({"hadamard": True, "meta": {"block_size": 256}}, "block_size is 256"),
        ({"hadamard": True, "meta": {"block_size": ...}}, "not a readable pack: KeyError: 'block_size'"),
    ],
)
def test_refuses_our_packs_with_other_values(tmp_path, changes, message):
    our_pack(tmp_path, **changes)
    with pytest.raises(PackError, match=message) as error:
        load_pack(tmp_path, NAME, (64, 128))
    assert NAME in str(error.value) and "\n" not in str(error.value)


def test_scales_may_be_negative_and_integers_use_the_whole_range(tmp_path):
    weight = np.tile(np.arange(-8, 8, dtype=np.int8), (64, 8))
    our_pack(tmp_path, weight_q=pack_weight(weight, 4), weight_scale=-np.ones(64, np.float32))
    np.testing.assert_array_equal(load_pack(tmp_path, NAME, (64, 128)).weight(), weight)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 20_000), st.binary(min_size=1, max_size=40))
def test_whatever_bytes_are_damaged_is_one_error_or_nothing(tmp_path, position, data):
    """Bytes that no checksum covers may be harmless; nothing but a PackError may come of the rest."""
    save_pack(random_pack(), tmp_path)
    path = tmp_path / f"{NAME}.npz"
    content = bytearray(path.read_bytes())
    position %= len(content)
    content[position : position + len(data)] = data
    path.write_bytes(content)
    try:
        assert_equal(load_pack(tmp_path, NAME, (64, 128)), random_pack())
    except PackError as error:
        assert NAME in str(error) and "\n" not in str(error)


def test_refuses_damaged_and_missing_files(tmp_path):
    with pytest.raises(PackError, match="no pack for"):
        load_pack(tmp_path, NAME, (64, 128))
    save_pack(random_pack(), tmp_path)
    path = tmp_path / f"{NAME}.npz"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(PackError, match="not a readable pack"):
        load_pack(tmp_path, NAME, (64, 128))


def test_transforms_of_a_directory(tmp_path):
    checkpoint = tiny_checkpoint()
    np.savez(tmp_path / f"{openpi_module(NAME)}.npz", **original_pack())
    recipe = load_recipe("all", {"include": "^llm.layers.0.mlp.down", "scheme": "duquant"}, {})
    assert load_transforms(tmp_path, checkpoint, recipe)[NAME].output_rotation is not None
    without = load_recipe("all", {"include": "^llm.layers.0.mlp.down", "row_rotation": "0"}, {})
    assert load_transforms(tmp_path, checkpoint, without)[NAME].output_rotation is None
    with pytest.raises(PackError, match="no pack for llm.layers.0.self_attn.q_proj"):
        load_transforms(tmp_path, checkpoint, load_recipe("llm", environment={}))
    with pytest.raises(PackError, match="not a directory"):
        load_transforms(tmp_path / "missing", checkpoint, recipe)


@pytest.fixture
def stored(tmp_path):
    checkpoint = tiny_checkpoint()
    quantization = Quantization(
        Recipe(layer_bits=(("layers.0", 8),)),
        {NAME: random_pack()},
        {"llm.layers.0.self_attn.v_proj.weight": torch.randn(32, 64)},
        {2: LinearTransform(input_scale=np.ones(32, np.float32), rotation="hadamard", block_size=16)},
    )
    save_quantization(quantization, tmp_path / "packs", checkpoint.fingerprint, SILENT)
    return tmp_path / "packs", checkpoint, quantization


def test_quantization_round_trip(stored):
    directory, checkpoint, expected = stored
    found = load_quantization(directory, checkpoint)
    assert found.recipe == expected.recipe and list(found.packs) == [NAME]
    assert_equal(found.packs[NAME], expected.packs[NAME])
    assert_equal(found.value_transforms[2], expected.value_transforms[2])
    key = "llm.layers.0.self_attn.v_proj.weight"
    torch.testing.assert_close(found.float_weights[key], expected.float_weights[key], rtol=0, atol=0)


def test_saving_replaces_packs_and_nothing_else(stored, tmp_path):
    directory, checkpoint, quantization = stored
    (directory / "stale.npz").touch()
    save_quantization(quantization, directory, checkpoint.fingerprint, SILENT)
    assert not (directory / "stale.npz").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(PackError, match="not a directory of packs"):
        save_quantization(quantization, tmp_path / "other", checkpoint.fingerprint, SILENT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "packs"]


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda d: (d / "recipe.json").write_text("{"), "recipe.json is not readable"),
        (lambda d: (d / f"{NAME}.npz").unlink(), "no pack for"),
        (lambda d: (d / "float_weights.safetensors").write_bytes(b"short"), "quantize again"),
        (lambda d: (d / "value_scales.safetensors").unlink(), "quantize again"),
        (lambda d: np.savez(d / f"{NAME}.npz", **original_pack()), "no integer weights"),
        (lambda d: (d / "extra.npz").touch(), "holds packs that recipe.json does not list: extra"),
        (lambda d: _edit(d, linears=[]), f"does not list: {NAME}; copy the directory whole or quantize again"),
        (lambda d: _edit(d, linears=[NAME, "llm.layers.1.mlp.up_proj"]), "has no pack for llm.layers.1.mlp.up_proj; copy"),
        (lambda d: _edit(d, linears=[NAME, NAME]), "lists a linear twice"),
        (lambda d: _edit(d, linears=NAME), "linears is no list"),
        (lambda d: _edit(d, linears=[["a"]]), "linears are ..*a.*, expected names"),
        (lambda d: _edit(d, recipe=[]), "recipe is no dict"),
        (lambda d: _edit(d, recipe={"scheme": "none"}), "recipe.json is not readable: unknown scheme"),
        (lambda d: (d / "recipe.json").write_text("[]"), "recipe.json is not readable"),
        (lambda d: (d / "recipe.json").write_bytes(b"\xff\xfe"), "recipe.json is not readable"),
        (lambda d: _floats(d, V_PROJ, torch.full((32, 64), torch.nan)), "float_weights.safetensors: .*not finite"),
        (lambda d: _floats(d, V_PROJ, torch.ones(64, 32)), r"is \[64, 32\], but tiny has \[32, 64\]"),
        (lambda d: _floats(d, "llm.other.weight", torch.ones(2)), "but tiny does not have it"),
        (lambda d: _floats(d, V_PROJ, torch.ones(32, 64, dtype=torch.int32)), "is torch.int32"),
        (lambda d: _values(d, "2", np.zeros(32, np.float32)), "value_scales.safetensors: layer 2"),
        (lambda d: _values(d, "2", np.ones(64, np.float32)), "value_scales.safetensors: layer 2"),
        (lambda d: _values(d, "3", np.ones(32, np.float32)), "value_scales.safetensors: layer 3 .*for layers 0 to 2"),
        (lambda d: _values(d, "2", np.ones(32, np.float32), "24"), "blocks of 24"),
        (lambda d: _values(d, "two", np.ones(32, np.float32)), "quantize again"),
        (lambda d: _edit(d, format_version=99), "format 99"),
        (lambda d: _edit(d, checkpoint_fingerprint="another"), "another checkpoint"),
    ],
)
def test_refuses_damaged_directories(stored, damage, message):
    directory, checkpoint, _ = stored
    damage(directory)
    with pytest.raises(PackError, match=message):
        load_quantization(directory, checkpoint)


V_PROJ = "llm.layers.0.self_attn.v_proj.weight"


def _floats(directory, name, tensor):
    save_file({name: tensor}, directory / "float_weights.safetensors")


def _values(directory, layer, scale, block="16"):
    save_numpy({layer: scale}, directory / "value_scales.safetensors", {"block_size": block})


def test_swapped_packs_are_refused_by_both_names(tmp_path):
    """Equal shapes: only the name tells them apart."""
    checkpoint, other = tiny_checkpoint(), "llm.layers.1.mlp.down_proj"
    packs = {name: replace(random_pack(seed=seed), name=name) for seed, name in enumerate((NAME, other))}
    save_quantization(Quantization(Recipe(), packs), tmp_path / "packs", checkpoint.fingerprint, SILENT)
    assert list(load_quantization(tmp_path / "packs", checkpoint).packs) == [NAME, other]
    first, second = (tmp_path / "packs" / f"{name}.npz" for name in packs)
    first.rename(tmp_path / "kept")
    second.rename(first)
    (tmp_path / "kept").rename(second)
    with pytest.raises(PackError, match=f"{NAME}.npz: is the pack of {other}, not of {NAME}"):
        load_quantization(tmp_path / "packs", checkpoint)


def _edit(directory, **changes):
    path = directory / "recipe.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
