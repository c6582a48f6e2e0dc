"""Whether products of 8 bits are exact is asked of the CPU, and a plan is run, or refused, by its answer.

A stand-in multiplies as x86 processors without VNNI do, so that these tests can fail on every CPU.
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from duq.runtime.errors import PlanError
from duq.runtime.executors import cpu, integers
from duq.runtime.executors.cpu import CpuExecutor
from duq.runtime.plan import Plan
from tests.support.plans import write_plan

INT8, UINT8 = ["graph/prefix.onnx", "graph/step.onnx"], ["graph/prefix.uint8.onnx", "graph/step.uint8.onnx"]
RANDOM = np.random.default_rng(0)


def exact(x, weight):
    zero = 128 if weight.dtype == np.uint8 else 0
    return ((x.astype(np.int64) - 128) @ (weight.astype(np.int64) - zero)).astype(np.float32)


def saturating(x, weight):
    """As `vpmaddubsw`: the products of two neighboring channels are added in INT16. uint8 weights are widened before."""
    if weight.dtype == np.uint8:
        return exact(x, weight)
    products = x[:, :, None].astype(np.int64) * weight.astype(np.int64)
    products = np.pad(products, ((0, 0), (0, len(weight) % 2), (0, 0)))
    pairs = np.clip(products[:, ::2] + products[:, 1::2], -(1 << 15), (1 << 15) - 1)
    return (pairs.sum(1) - 128 * weight.astype(np.int64).sum(0)).astype(np.float32)


def wrong(x, weight):
    return exact(x, weight) + (x.shape[0] > 1)  # in the kernel for several rows alone


def answer(monkeypatch, products, unsigned_weights):
    monkeypatch.setattr(integers, "products", products)
    return integers.multiplies_exactly.__wrapped__(unsigned_weights)


@pytest.mark.parametrize(
    ("products", "answers"),
    [(exact, (True, True)), (saturating, (False, True)), (wrong, (False, False))],
    ids=["exact", "saturating", "wrong"],
)
def test_the_cpu_is_asked_with_what_saturates(monkeypatch, products, answers):
    assert (answer(monkeypatch, products, False), answer(monkeypatch, products, True)) == answers


@pytest.mark.parametrize(
    ("zero", "lowest", "highest"),
    [(0, -(1 << 15), 1 << 20), (0, -(1 << 20), (1 << 15) - 1), (128, -(1 << 20), (1 << 15) - 1)],
    ids=["negative", "positive", "int8 x int8"],
)
def test_a_single_kind_of_pair_that_saturates_is_found(monkeypatch, zero, lowest, highest):
    """zero: of the activations that the CPU multiplies. 2 * -128 * -128 alone is too large where both are int8."""

    def some(x, weight):
        products = (x[:, :-1, None].astype(np.int64) - zero) * weight[:-1].astype(np.int64)  # of an even number of channels
        pairs = products[:, ::2] + products[:, 1::2]
        return exact(x, weight) + (np.clip(pairs, lowest, highest) - pairs).sum(1)

    assert not answer(monkeypatch, some, False)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_onnxruntime_is_asked_for_these_products(dtype):
    """Small numbers, which no CPU multiplies wrongly, through the model that is made without an ONNX library."""
    zero = 128 if dtype == np.uint8 else 0
    x = RANDOM.integers(0, 256, (5, 67)).astype(np.uint8)
    weight = (RANDOM.integers(-8, 8, (67, 37)) + zero).astype(dtype)
    np.testing.assert_array_equal(integers.products(x, weight), exact(x, weight))
    model = onnx.load_from_string(integers._model(weight))
    (node,) = model.graph.node
    assert (node.domain, node.op_type, model.ir_version) == ("com.microsoft", "MatMulIntegerToFloat", 10)
    found = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    np.testing.assert_array_equal(found["weight"], weight)
    assert found["weight"].dtype == dtype and found["weight_zero"] == zero and found["x_zero"] == 128


def test_uint8_weights_are_exact_here():
    """Else no plan with 8-bit weights runs on this CPU."""
    assert integers.multiplies_exactly(unsigned_weights=True)


def opened(path, entries, monkeypatch, products, operator=b"W8A8Linear.bias"):
    write_plan(path, {name: operator for name in entries})
    monkeypatch.setattr(cpu, "multiplies_exactly", lambda unsigned_weights: answer(monkeypatch, products, unsigned_weights))
    return list(CpuExecutor(Plan(path))._entries.values())


@pytest.mark.parametrize(("products", "taken"), [(exact, INT8), (saturating, UINT8)], ids=["exact", "saturating"])
def test_the_graphs_whose_products_are_exact_are_taken(tmp_path, monkeypatch, products, taken):
    assert opened(tmp_path / "engine.plan", INT8 + UINT8, monkeypatch, products) == taken


def test_a_plan_of_an_earlier_version_runs_where_it_is_exact(tmp_path, monkeypatch):
    assert opened(tmp_path / "engine.plan", INT8, monkeypatch, exact) == INT8


def test_a_plan_of_an_earlier_version_is_refused_where_it_would_be_wrong(tmp_path, monkeypatch):
    with pytest.raises(
        PlanError, match=r"engine.plan: has 8-bit weights and no graph/prefix.uint8.onnx.*compile the plan again"
    ):
        opened(tmp_path / "engine.plan", INT8, monkeypatch, saturating)


def test_no_plan_is_run_with_products_that_are_wrong_in_both_forms(tmp_path, monkeypatch):
    with pytest.raises(PlanError, match="has 8-bit weights, which ONNX Runtime .* multiplies wrongly.*--weight-bits 4"):
        opened(tmp_path / "engine.plan", INT8 + UINT8, monkeypatch, wrong)


@pytest.mark.parametrize("operator", [b"W4A8Linear.bias", b"W8A16Linear.plain", b"MatMul"])
def test_plans_without_8_bit_products_are_not_asked_about(tmp_path, monkeypatch, operator):
    assert opened(tmp_path / "engine.plan", INT8, monkeypatch, None, operator) == INT8
