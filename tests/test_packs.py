"""Pack files: our own, those of the original scripts, and everything that must be refused."""
import json

import numpy as np
import pytest
import torch
from rich.progress import Progress

from compiler.errors import PackError
from compiler.quant import Quantization, Recipe, load_quantization, load_recipe, load_transforms, save_quantization
from compiler.quant.pack import LinearPack, load_pack, pack_weight, save_pack
from compiler.quant.recipe import openpi_module
from compiler.quant.transforms import LinearTransform
from tests.quant_policy import tiny_checkpoint

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
        ({"Rin_3": None}, "Rin_3"),
        ({"Rout_1": np.eye(8, dtype=np.float32)}, "shape"),
        ({"R_in_blocks": np.arange(9)}, "does not divide"),
        ({"meta": json.dumps({"in_features": 256})}, "in_features 256"),
        ({"meta": "{"}, "not a readable pack"),
        ({"meta": json.dumps({"block_size": 48})}, "does not divide"),
    ],
)
def test_refuses_packs_that_do_not_fit(tmp_path, changes, message):
    np.savez(tmp_path / f"{NAME}.npz", **original_pack(**changes))
    with pytest.raises(PackError, match=message):
        load_pack(tmp_path, NAME, (64, 128))


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
        (lambda d: (d / "float_weights.safetensors").write_bytes(b"short"), "quantise again"),
        (lambda d: (d / "value_scales.safetensors").unlink(), "quantise again"),
        (lambda d: np.savez(d / f"{NAME}.npz", **original_pack()), "no integer weights"),
        (lambda d: _edit(d, format_version=99), "format 99"),
        (lambda d: _edit(d, checkpoint_fingerprint="another"), "another checkpoint"),
    ],
)
def test_refuses_damaged_directories(stored, damage, message):
    directory, checkpoint, _ = stored
    damage(directory)
    with pytest.raises(PackError, match=message):
        load_quantization(directory, checkpoint)


def _edit(directory, **changes):
    path = directory / "recipe.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
