"""The quantizer on a policy of a few thousand weights: exact folding, calibration, rounding, and the command line."""

import copy
import functools
import importlib
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.progress import Progress

from duq.compiler.errors import CalibrationError
from duq.compiler.model import build_model
from duq.compiler.quant import fake_quantize, gpu, load_quantization, load_recipe, quantize, rounding, save_quantization
from duq.compiler.quant.auto_bits import spend_bits
from duq.compiler.quant.calibrate import RESERVOIR_ROWS, InputStatistics, calibrate
from duq.compiler.quant.linears import input_group, quantizable_linears, select_linears
from duq.compiler.quant.quantize import float_edits, in_output_basis, place_transforms, sqnr_db
from duq.compiler.quant.rounding import (
    CHUNK,
    error_feedback,
    round_columns,
    round_compensated,
    round_weights,
    search_scales,
)
from duq.compiler.quant.transforms import weight_rotation
from duq.plugins import kernels
from duq.plugins.errors import DuqWarning, KernelError
from duq.plugins.kernels.reference import Memory, Pointer
from tests.support.emulate import launch
from tests.support.fake_device import FakeDevice
from tests.support.quant_policy import observation, sample_actions, tiny_checkpoint, tiny_config

SILENT = Progress(disable=True)
SCHEMES = {
    "balanced": {},
    "balanced, permuted": {"permute": True, "block_size": 16},
    "duquant": {"scheme": "duquant"},
    "duquant, row rotation off": {"scheme": "duquant", "row_rotation": "0", "permute": False},
    "reference": {"scheme": "reference"},
}


@pytest.fixture(scope="module", params=[False, True], ids=["pi0", "pi05"])
def policy(request):
    checkpoint = tiny_checkpoint(request.param)
    inputs = [observation(checkpoint.config, seed, cameras=3 - seed % 2) for seed in range(4)]
    return checkpoint, build_model(checkpoint), inputs


def quantized(policy, preset="all", **settings):
    checkpoint, model, inputs = policy
    return quantize(model, checkpoint, load_recipe(preset, settings, {}), inputs, SILENT)


class TransformedLinear(torch.nn.Module):
    """A quantized linear without its quantization."""

    def __init__(self, weight, online, bias):
        super().__init__()
        self.weight, self.online, self.bias = weight, online, bias

    def forward(self, x):
        y = self.online.restore_output(self.online.transform_input(x) @ self.weight.T)
        return y if self.bias is None else y + self.bias.float()


@pytest.mark.parametrize("preset", ["llm", "llm+expert-mlp", "all"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_transforms_leave_the_policy_unchanged(policy, scheme, preset):
    checkpoint, model, inputs = policy
    recipe = load_recipe(preset, SCHEMES[scheme], {})
    linears = select_linears(recipe, checkpoint.config)
    statistics = calibrate(model, checkpoint.config, linears, inputs, 2, SILENT, num_steps=2)

    def weight(name):
        return checkpoint.weights[f"{name}.weight"].float()

    placement = place_transforms(weight, checkpoint.config, recipe, linears, statistics, SILENT)
    moved = copy.deepcopy(model)
    for name, tensor in float_edits(checkpoint.weights, linears, placement).items():
        module, _, kind = name.rpartition(".")
        setattr(moved.get_submodule(module), kind, torch.nn.Parameter(tensor))
    for name in linears:
        edited = placement.full[name].transform_weight(in_output_basis(weight(name), placement.outputs.get(name)))
        parent, _, child = name.rpartition(".")
        bias = moved.get_submodule(name).bias
        setattr(moved.get_submodule(parent), child, TransformedLinear(edited, placement.online[name], bias))
    expected = sample_actions(model, inputs[3])
    torch.testing.assert_close(sample_actions(moved, inputs[3]), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


SETTINGS = [
    {"scheme": "duquant"},
    {"compensate": True, "activation_scale": "per-tensor"},
    pytest.param({}, marks=pytest.mark.slow),  # both have what these have
    pytest.param({"scheme": "reference"}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("policy", [True], indirect=True, ids=["pi05"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_quantizes_on_another_device(policy, settings, monkeypatch):
    """A device that refuses operations on tensors here and there. Sums are rounded otherwise; permutations may follow."""
    monkeypatch.setitem(CHUNK, "meta", 1 << 26)
    checkpoint, model, inputs = policy
    expected = quantized((checkpoint, model, inputs[:2]), "all", **settings)  # slow there, however small the policy
    with FakeDevice():
        found = quantized((checkpoint, build_model(checkpoint).to("meta"), inputs[:2]), "all", **settings)
    for name, pack in found.packs.items():
        assert abs(pack.sqnr_db - expected.packs[name].sqnr_db) < 1, name
    assert found.float_weights.keys() == expected.float_weights.keys()
    assert all(tensor.device.type == "cpu" for tensor in found.float_weights.values())


@pytest.mark.parametrize(
    "settings, minimum_db", [({"weight_bits": 8}, 25), ({"weight_bits": 8, "activation_bits": 0}, 25), ({}, 5)]
)
def test_the_fake_quantized_policy_is_close_to_float(policy, settings, minimum_db):
    checkpoint, model, inputs = policy
    quantization = quantized(policy, "llm+expert-mlp", **settings)
    expected = [sample_actions(model, each) for each in inputs]
    fake = fake_quantize(model, quantization)
    assert (
        np.median([sqnr_db(actions, sample_actions(fake, each)) for actions, each in zip(expected, inputs, strict=True)])
        > minimum_db
    )
    torch.testing.assert_close(
        sample_actions(model, inputs[0]), expected[0], rtol=0, atol=0
    )  # the model itself is as it was


def test_both_gemmas_share_the_basis_of_their_values(policy):
    checkpoint, _, _ = policy
    quantization = quantized(policy, "llm")
    assert list(quantization.value_transforms) == [0, 1]  # nothing quantized reads the values of the last layer
    for layer, transform in quantization.value_transforms.items():
        name = f"expert.layers.{layer}.self_attn.v_proj.weight"
        x = torch.randn(5, checkpoint.config.expert.width)
        values = transform.transform_input(x @ checkpoint.weights[name].float().T)
        torch.testing.assert_close(x @ quantization.float_weights[name].T, values, rtol=1e-4, atol=1e-4)


def test_what_our_transforms_leave_online(policy):
    packs = quantized(policy, "llm+expert-mlp", permute=True).packs
    for name, pack in packs.items():
        if name.endswith("o_proj"):
            assert pack.rotation is None and pack.input_scale is None and pack.permutation is None
        elif name.endswith("down_proj"):
            assert pack.rotation == "hadamard" and pack.input_scale is None and pack.permutation is None
        else:
            assert pack.rotation == "hadamard" and pack.input_scale is not None and pack.permutation is not None


@pytest.mark.parametrize("scheme", ["balanced", "duquant"])
def test_linears_with_one_input_share_its_transform(policy, scheme):
    packs = quantized(policy, "all", scheme=scheme).packs
    by_group = {}
    for name, pack in packs.items():
        by_group.setdefault(input_group(name), []).append(pack)
    assert {len(group) for group in by_group.values()} == {1, 2, 3}
    for first, *others in by_group.values():
        for other in others:
            for key in ("input_scale", "permutation", "rotation", "block_size"):
                np.testing.assert_array_equal(getattr(first, key), getattr(other, key))


def test_the_dead_tail_of_the_prefix_is_left_alone():
    names = quantizable_linears(tiny_config())
    assert [name for name in names if name.startswith("llm.layers.2")] == [f"llm.layers.2.self_attn.{p}_proj" for p in "kv"]
    assert "expert.layers.2.mlp.down_proj" in names and len(names) == 2 * 6 + 1 + 2 * 7 + 2 + 3 * 7


def test_bits_and_scales_follow_the_recipe(policy):
    packs = quantized(policy, "llm", layer_bits=["layers.1:8"], activation_scale="per-tensor").packs
    assert {name: pack.weight_bits for name, pack in packs.items()} == {name: 8 if ".1." in name else 4 for name in packs}
    assert all(pack.activation_scale.shape == () and pack.activation_scale > 0 for pack in packs.values())
    assert all(pack.weight_q.dtype == (np.int8 if pack.weight_bits == 8 else np.uint8) for pack in packs.values())
    assert all(np.isfinite(pack.sqnr_db) for pack in packs.values())


def test_preset_none_changes_nothing(policy):
    quantization = quantized(policy, "none")
    assert not quantization.packs and not quantization.float_weights and not quantization.value_transforms


def test_quantization_is_deterministic_and_survives_storage(policy, tmp_path):
    checkpoint, model, inputs = policy
    first, second = quantized(policy), quantized(policy)
    save_quantization(second, tmp_path / "packs", checkpoint.fingerprint, SILENT)
    stored = load_quantization(tmp_path / "packs", checkpoint)
    expected = sample_actions(fake_quantize(model, first), inputs[0])
    torch.testing.assert_close(sample_actions(fake_quantize(model, stored), inputs[0]), expected, rtol=0, atol=0)


def test_given_transforms_are_taken_as_they_are(policy):
    checkpoint, model, inputs = policy
    made = quantized(policy, "llm", scheme="reference").packs
    recipe = load_recipe("llm", {"scheme": "duquant"}, {})
    quantization = quantize(model, checkpoint, recipe, inputs, SILENT, transforms=made)
    assert not quantization.float_weights
    for name, pack in quantization.packs.items():
        np.testing.assert_array_equal(pack.permutation, made[name].permutation)
        np.testing.assert_array_equal(pack.output_rotation, made[name].output_rotation)
        np.testing.assert_array_equal(pack.weight_q, made[name].weight_q)  # the same W' and energies
        assert pack.activation_scale is None and made[name].activation_scale.shape == (pack.shape[1],)


# Calibration


def test_statistics_equal_those_of_all_rows():
    rows = torch.randn(3000, 7, generator=torch.Generator().manual_seed(0))
    statistics = InputStatistics(7, seed=0)
    for part in rows.split(450):
        statistics.observe(part)
    torch.testing.assert_close(statistics.rms, rows.double().square().mean(0).sqrt())
    torch.testing.assert_close(statistics.absmax, rows.abs().amax(0))
    sample = torch.cat((statistics.held_out_rows, statistics.fitting_rows))
    assert sample.shape == (RESERVOIR_ROWS, 7)
    found = (sample[:, None, :2] == rows[None, :, :2]).all(-1).float().argmax(1)
    assert len(set(found.tolist())) == RESERVOIR_ROWS  # without replacement ...
    assert abs(float(found.float().mean()) - 1500) < 100  # ... from all of the stream


def test_padding_and_absent_cameras_are_not_seen(policy):
    checkpoint, model, _ = policy
    config = checkpoint.config
    inputs = observation(config, 0, cameras=1)
    linears = ["vision.encoder.layers.0.mlp.fc1", "projector", "llm.layers.0.mlp.up_proj", "expert.layers.0.mlp.up_proj"]
    counts = {n: s.count for n, s in calibrate(model, config, linears, [inputs], 1, SILENT, num_steps=2).items()}
    patches, prompt = config.vision.tokens, config.max_prompt_tokens - 2
    suffix = config.action_horizon + (0 if config.pi05 else 1)
    assert counts == {
        "vision.encoder.layers.0.mlp.fc1": patches,
        "projector": patches,
        "llm.layers.0.mlp.gate_up": patches + prompt,
        "expert.layers.0.mlp.gate_up": 2 * suffix,
    }


@pytest.mark.parametrize(
    "broken, message",
    [
        ({"state": np.zeros(3, np.float32)}, "state has shape"),
        ({"images": np.zeros((3, 8, 8, 3), np.uint8)}, "images has shape"),
        ({"tokens": np.zeros(3, np.int64)}, "tokens has shape"),
        ({"tokens": np.full(6, 50)}, "vocabulary"),
        ({"state": np.full(8, np.nan, np.float32)}, "NaN or infinity"),
        ({"state": np.full(8, 1e38, np.float32)}, "NaN or infinite"),
    ],
)
def test_refuses_unusable_observations(policy, broken, message):
    checkpoint, model, inputs = policy
    if checkpoint.config.pi05 and message == "NaN or infinite":
        pytest.skip("pi0.5 reads the state as text")
    with pytest.raises(CalibrationError, match=message):
        quantize(model, checkpoint, load_recipe(environment={}), [inputs[0], replace(inputs[1], **broken)], SILENT)


def test_refuses_no_observations(policy):
    checkpoint, model, _ = policy
    with pytest.raises(CalibrationError, match="at least one"):
        quantize(model, checkpoint, load_recipe(environment={}), [], SILENT)


# Rounding


def weighted_error(weight, scale, energy, bits):
    quantized = round_weights(weight, scale, bits).double() * scale[:, None].double()
    return ((quantized - weight.double()) ** 2 * energy.double()).sum(1)


@pytest.mark.parametrize("bits", [4, 8])
def test_searched_scales_are_near_the_best_of_a_fine_grid(bits):
    generator = torch.Generator().manual_seed(0)
    weight, energy = torch.randn(40, 256, generator=generator), torch.rand(256, generator=generator)
    found = weighted_error(weight, search_scales(weight, energy, bits), energy, bits)
    unclipped = weight.abs().amax(1) / (2 ** (bits - 1) - 1)
    grid = [weighted_error(weight, ratio * unclipped, energy, bits) for ratio in np.linspace(0.4, 1.0, 241)]
    best = torch.stack(grid).amin(0)
    assert found.sum() < 1.01 * best.sum() and (found < 1.2 * best).all()


def test_scales_of_odd_rows():
    weight = torch.zeros(3, 8)
    weight[1, 0], weight[2, 3] = -8.0, 8.0
    scale = search_scales(weight, torch.ones(8), 4)
    back = round_weights(weight, scale, 4) * scale[:, None]
    assert torch.isfinite(scale).all()
    torch.testing.assert_close(back, weight, rtol=0.01, atol=0)


def compensated(weight, scale, x, bits, damping, name="a linear"):
    return round_compensated(weight, scale, error_feedback(x, damping, name), bits)


def test_compensation_lowers_the_error_of_the_output():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(300, 300, generator=generator) / 300**0.5
    x = torch.randn(2000, 300, generator=generator) @ mixing + torch.randn(2000, 1, generator=generator)
    weight = torch.randn(50, 300, generator=generator)
    scale = search_scales(weight, x.square().mean(0), 4)
    plain = round_weights(weight, scale, 4)
    found = compensated(weight, scale, x, 4, damping=0.1)
    assert found.dtype == torch.int8 and found.min() >= -8 and found.max() <= 7

    def noise(integers):
        return float((x @ (weight - integers * scale[:, None]).T).square().mean())

    assert noise(found) < 0.5 * noise(plain)
    unlinked = compensated(weight, scale, x, 4, damping=1e6)  # nothing but the damping: nothing to make up for
    torch.testing.assert_close(unlinked, plain, rtol=0, atol=0)


# --- bits by sensitivity ---------------------------------------------------------------------------------------------


def pack_of(sqnr_db, shape=(64, 64), bits=4):
    return SimpleNamespace(weight_bits=bits, shape=shape, sqnr_db=sqnr_db)


def test_bits_go_where_they_take_away_most_noise_for_their_cost():
    packs = {
        "expert.layers.0.self_attn.o_proj": pack_of(15.0),
        "expert.layers.0.mlp.down_proj": pack_of(13.0, (64, 256)),  # 1.6 times the noise, 4 times the cost
        "expert.layers.1.self_attn.o_proj": pack_of(25.0),
        "expert.layers.1.mlp.down_proj": pack_of(5.0, (64, 256), bits=8),
    }
    assert spend_bits(packs, 4.0) == {name: pack.weight_bits for name, pack in packs.items()}  # over the budget as it is
    total, spent = 10 * 4096, (4 * 6 + 8 * 4) * 4096
    assert [spend_bits(packs, (spent + extra * 4096) / total)[name] for extra in (3, 4, 8, 20) for name in packs] == [
        4, 4, 4, 8,
        8, 4, 4, 8,
        8, 4, 8, 8,  # the large one does not fit any more, a small one does
        8, 8, 4, 8,
    ]  # fmt: skip
    assert set(spend_bits(packs, 8.0).values()) == {8}


def test_linears_that_share_their_input_change_together():
    names = [f"llm.layers.0.self_attn.{x}_proj" for x in "qkv"]
    packs = {name: pack_of(sqnr_db) for name, sqnr_db in zip(names, (30.0, 30.0, 10.0), strict=True)}
    assert set(spend_bits(packs, 7.9).values()) == {4}
    assert set(spend_bits(packs, 8.0).values()) == {8}


def test_auto_bits_lower_the_noise_within_the_budget(policy):
    plain, mixed = quantized(policy), quantized(policy, auto_bits=5.0)
    weights = {name: pack.shape[0] * pack.shape[1] for name, pack in plain.packs.items()}
    mean = sum(pack.weight_bits * weights[name] for name, pack in mixed.packs.items()) / sum(weights.values())
    assert 4.7 < mean <= 5.0 and {pack.weight_bits for pack in mixed.packs.values()} == {4, 8}

    def noise(quantization):
        return sum(10 ** (-pack.sqnr_db / 10) for pack in quantization.packs.values())

    assert noise(mixed) < 0.8 * noise(plain)
    assert mixed.packs.keys() == plain.packs.keys() and mixed.recipe.auto_bits == 5.0


# --- compensation, piece by piece -------------------------------------------------------------------------------------


def correlated_rows(rows: int, channels: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=generator) / channels**0.5
    return torch.randn(rows, channels, generator=generator) @ mixing + torch.randn(rows, 1, generator=generator)


def hessian_of(x: torch.Tensor, damping: float) -> torch.Tensor:
    hessian = x.double().T @ x.double() / len(x)
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    return hessian


@pytest.mark.parametrize("channels", [1, 15, 16, 17, 100, 257])
def test_compensation_is_that_of_the_inverse_hessian(channels):
    """GPTQ as its paper has it, with the Cholesky factor of the inverse, column by column in float64."""
    x, damping = correlated_rows(400, channels), 0.5
    weight = torch.randn(20, channels, generator=torch.Generator().manual_seed(1))
    scale = search_scales(weight, x.square().mean(0), 4)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian_of(x, damping)), upper=True)
    left, expected = weight.double(), torch.empty(weight.shape, dtype=torch.int8)
    for k in range(channels):
        q = (left[:, k] / scale).round().clamp(-8, 7)
        expected[:, k] = q.to(torch.int8)
        left[:, k:] -= ((left[:, k] - q * scale) / factor[k, k])[:, None] * factor[k, k:]
    assert torch.equal(compensated(weight, scale, x, 4, damping), expected)


@given(
    seed=st.integers(0, 999),
    channels=st.integers(2, 80),
    rows=st.integers(1, 120),
    damping=st.sampled_from([0.01, 0.1, 1.0]),
)
def test_compensation_lowers_what_it_minimizes(seed, channels, rows, damping):
    """Over many rows of weights; one alone may lose, as each column is rounded for those before it."""
    x = correlated_rows(rows, channels, seed)
    weight = torch.randn(200, channels, generator=torch.Generator().manual_seed(seed))
    scale = search_scales(weight, x.square().mean(0), 4)
    hessian = hessian_of(x, damping)

    def error(integers):
        e = (weight - integers * scale[:, None]).double()
        return float(((e @ hessian) * e).sum())

    assert error(compensated(weight, scale, x, 4, damping)) <= 1.001 * error(round_weights(weight, scale, 4))


@pytest.mark.parametrize("bits", [4, 8])
def test_pytorch_rounds_columns_as_the_kernel_is_defined(bits):
    """To the bit: neither fuses multiplications and additions."""
    count, rows = 32, 60
    generator = torch.Generator().manual_seed(bits)
    columns, carried, feedback = (
        torch.randn(*shape, generator=generator) for shape in ((count, rows), (count, rows), (count, count + 4))
    )
    scale, integers = torch.rand(rows, generator=generator) - 0.5, torch.zeros(count, rows, dtype=torch.int8)
    operands = {"columns": columns, "scale": scale, "feedback": feedback, "carried": carried, "quantized": integers}
    memory = {name: Memory(each.numpy().copy().reshape(-1).view(np.uint8)) for name, each in operands.items()}
    instance = kernels.compensate(rows)
    pointers = {name: Pointer(each) for name, each in memory.items()}
    launch(instance.expression, instance.shape, pointers | dict(rows=rows, count=count, stride=count + 4, bits=bits))
    round_columns(columns, carried, scale, feedback[:, :count], integers, bits)
    assert bytes(memory["quantized"].data) == integers.numpy().tobytes()
    assert bytes(memory["carried"].data) == carried.numpy().tobytes()
    assert len(integers.unique()) > 8


def test_linears_that_share_their_input_share_its_feedback(policy, monkeypatch):
    """It is computed once a group, and the packs are those of linears quantized each on its own."""
    alone = {name: [] for name in ("whole", "parts")}
    module = importlib.import_module("duq.compiler.quant.quantize")

    def counted(x, damping, name):
        alone[kind].append(name)
        return error_feedback(x, damping, name)

    monkeypatch.setattr(module, "error_feedback", counted)
    kind = "whole"
    whole = quantized(policy, "all", compensate=True).packs
    kind = "parts"
    monkeypatch.setattr(module, "groupby", lambda names, key: [(key(name), [name]) for name in names])
    parts = quantized(policy, "all", compensate=True).packs
    assert alone["parts"] == list(parts) and len(alone["whole"]) == len({input_group(name) for name in whole})
    for name, pack in whole.items():
        np.testing.assert_array_equal(pack.weight_q, parts[name].weight_q)
        assert pack.sqnr_db == parts[name].sqnr_db


def test_a_gpu_without_the_kernels_compiler_is_told_so(monkeypatch):
    """And rounds by PyTorch's operations."""
    monkeypatch.setattr(gpu, "_kernel", functools.cache(gpu._kernel.__wrapped__))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(gpu.driver, "open_device", lambda ordinal: 86)

    def refuse(*arguments):
        raise KernelError("compiling CUDA kernels needs nvidia-cuda-nvrtc: pip install 'duq-vla[cuda]'")

    monkeypatch.setattr(gpu, "compile_cubin", refuse)
    with pytest.warns(DuqWarning, match=r"PyTorch's operations, .*pip install 'duq-vla\[cuda\]'"):
        assert not gpu.can_round(torch.device("cuda"))
    assert not gpu.can_round(torch.device("cpu"))


def test_columns_compensate_each_other_within_segments(monkeypatch):
    monkeypatch.setattr(rounding, "SEGMENT", 40)
    x = correlated_rows(300, 100)
    weight = torch.randn(20, 100, generator=torch.Generator().manual_seed(1))
    scale = search_scales(weight, x.square().mean(0), 4)
    found = compensated(weight, scale, x, 4, 1.0)
    assert [each.shape for each in error_feedback(x, 1.0)] == [(40, 40), (40, 40), (20, 20)]
    for part in (slice(0, 40), slice(40, 80), slice(80, 100)):
        assert torch.equal(found[:, part], compensated(weight[:, part], scale, x[:, part], 4, 1.0))


# --- compensation where the Hessian is singular ----------------------------------------------------------------------


def rows_of(kind: str, rows: int, channels: int) -> torch.Tensor:
    x = torch.randn(rows, channels, generator=torch.Generator().manual_seed(1))
    if kind == "dead":
        x[:, ::3] = 0
    elif kind == "equal":
        x[:, 1::2] = x[:, ::2]
    scale = {"zero": 0.0, "tiny": 1e-37, "huge": 1e37, "spread": torch.logspace(-15, 15, channels)}
    return x * scale.get(kind, 1.0)


@pytest.mark.parametrize("damping", [1e-30, 1e-12, 1e-6, 1e-2, 1.0, 1e6])
@pytest.mark.parametrize("kind", ["full", "few", "dead", "equal", "zero", "tiny", "huge", "spread"])
def test_compensation_works_on_any_rows_with_any_damping(kind, damping):
    """And is never worse than plain rounding on the rows it was fitted to, beyond what float32 resolves."""
    channels, rows = 96, 20 if kind == "few" else 80 if kind in ("dead", "equal") else 300
    x = rows_of(kind, rows, channels)
    weight = torch.randn(24, channels, generator=torch.Generator().manual_seed(2))
    scale = weight.abs().amax(1) / 7
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = compensated(weight, scale, x, 4, damping, "llm.layers.0.mlp.up_proj")
    assert found.dtype == torch.int8 and found.min() >= -8 and found.max() <= 7

    def error(integers):
        return float((x.double() @ (weight - integers * scale[:, None]).double().T).square().sum())

    plain = error(round_weights(weight, scale, 4))
    assert error(found) <= 1.001 * plain
    if kind in ("few", "equal") and damping < 1e-2:
        assert error(found) < 0.7 * plain
    for warning in said:
        assert damping < 1e-11 and "llm.layers.0.mlp.up_proj: --damping 1e-" in str(warning.message)
        assert "compensated with" in str(warning.message)
    if kind == "few":
        assert bool(said) == (damping == 1e-30)


def test_damping_enough_for_float32_changes_nothing():
    """Where the Hessian is well posed, the result is that of the plain formula, to the bit."""
    x, weight = rows_of("full", 300, 64), torch.randn(16, 64, generator=torch.Generator().manual_seed(2))
    scale = weight.abs().amax(1) / 7
    for power in (1.0, 2.0**40, 2.0**-40):
        assert torch.equal(compensated(weight, scale, x * power, 4, 1.0), compensated(weight, scale, x, 4, 1.0))


def test_a_policy_is_compensated_with_hardly_any_damping(policy):
    packs = quantized(policy, "llm", compensate=True, damping=1e-6).packs
    plain = quantized(policy, "llm", compensate=False).packs
    assert all(np.isfinite(pack.sqnr_db) for pack in packs.values()) and packs.keys() == plain.keys()


@pytest.mark.parametrize("factor", [0.0, 1e-30, 1e-20, 1.0, 1e18, 1e30])
def test_rotations_from_weights_of_any_size(factor):
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)) * factor
    rotation = weight_rotation(weight, 16)
    np.testing.assert_allclose(rotation @ rotation.swapaxes(1, 2), np.broadcast_to(np.eye(16), (4, 16, 16)), atol=1e-5)
    if factor:
        reference = weight_rotation(weight / factor, 16)
        np.testing.assert_allclose(np.abs((reference * rotation).sum(1)), 1, atol=1e-3)  # the same vectors, up to sign
