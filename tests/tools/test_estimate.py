"""tools/profile.py --sm: what a call consists of, counted by hand, and its table."""

import dataclasses

from duq.compiler.checkpoint.synthetic import make_config
from duq.plugins.gpu import gpu_named, gpu_of
from duq.tools import estimate, profile

CONFIG = make_config("full", pi05=False)
MLP = [
    f"{model}.layers.{i}.mlp.{name}_proj"
    for model in ("llm", "expert")
    for i in range(18)
    for name in ("gate", "up", "down")
]
ATTENTION = [f"llm.layers.{i}.self_attn.{name}_proj" for i in range(18) for name in "qkvo"]
MANIFEST = {"num_steps": 10, "quantization": {"linears": {name: {"activation_bits": 8} for name in MLP + ATTENTION}}}


def work(card="A40", **changes):
    return list(estimate.kernels(dataclasses.replace(CONFIG, **changes), MANIFEST, gpu_named(card), 3, 48))


def test_operations_of_the_integer_products():
    """2 M N K: 17 whole layers of the language model and the keys and values of the last; the expert's MLPs ten times."""
    llm = 17 * (2560 * 2048 + 2048 * 2048 + 32768 * 2048 + 2048 * 16384) + 512 * 2048
    expert = 10 * 18 * (8192 * 1024 + 1024 * 4096)
    integer = [kernel for kernel in work() if kernel.kind == "integer products"]
    assert sum(kernel.operations for kernel in integer if kernel.part == "LLM") == 2 * 816 * llm
    assert sum(kernel.operations for kernel in integer if kernel.part == "expert") == 2 * 50 * expert


def test_nothing_is_faster_than_the_gpu():
    gpu = gpu_of(86)
    int8 = 2 * gpu.int8_rate * gpu.multiprocessors * gpu.clock
    assert 280e12 < int8 < 320e12  # the A40's data sheet: 299
    for kernel in work():
        rate = int8 if kernel.kind == "integer products" else int8 / 2
        assert kernel.seconds >= kernel.operations / rate and kernel.seconds >= kernel.bytes / gpu.memory_bandwidth


def test_a_geforce_card_multiplies_floats_at_half_the_rate():
    """An RTX A6000 is the same chip with 2 more multiprocessors and a clock 6 % higher: 2 x 1.09."""
    siglip = [
        sum(k.seconds - estimate.LAUNCH for k in work(card) if (k.part, k.kind) == ("SigLIP", "float products"))
        for card in ("RTX A6000", "RTX 3090")
    ]
    assert 2.0 < siglip[1] / siglip[0] < 2.3


def test_fewer_actions_take_less():
    assert sum(k.seconds for k in work(action_horizon=25)) < sum(k.seconds for k in work())


def test_the_table_of_a_plan(tiny_plans, command_line):
    plan = tiny_plans("pi0", "llm+expert-mlp").plan
    ran = command_line(profile.main, plan, "--sm", "86")
    assert ran.code == 0 and "A40 (SM 86), not a measurement" in ran.out and "the call" in ran.out
    assert "RTX 4090 (SM 89), not" in command_line(profile.main, plan, "--gpu", "rtx4090").out
    refused = command_line(profile.main, plan, "--sm", "75")
    assert refused.code == 2 and "no kernels for SM 75" in refused.err
    refused = command_line(profile.main, plan, "--gpu", "gb10")
    assert refused.code == 2 and "GB10: its int8_rate is not public" in refused.err
    assert command_line(profile.main, plan, "--gpu", "a40", "--sm", "86").code == 2
