"""How a kernel is described and its arguments are bound by name."""

from __future__ import annotations

import ctypes
import re
from typing import NamedTuple

import pytest

from duq.plugins import kernels
from duq.plugins.errors import KernelError
from duq.plugins.gpu import gpu_of
from duq.plugins.kernel import Kernel, Shape
from duq.plugins.kernels import GemmFloat, Large, Small, Wgmma, hadamard_quantize

NORMALIZE = kernels.normalize(50, 1024, "float", "Bf16", center=True)


class Pointer(NamedTuple):
    type: str


X, Y, GAIN = Pointer("float"), Pointer("Bf16"), Pointer("float")
SIZES = {"depth": 1024, "x_stride": 1024, "y_stride": 2048, "epsilon": 1e-6}


def test_arguments_come_in_the_kernels_order_whatever_order_they_are_given_in():
    bound = NORMALIZE.bind(**SIZES, y=Y, gain=GAIN, x=X)
    assert list(bound.items()) == [("x", X), ("gain", GAIN), ("shift", None), ("y", Y), *SIZES.items()]


def test_an_unknown_name_is_refused():
    with pytest.raises(KernelError, match=re.escape("normalize<float, Bf16, true, 1> has no parameter bias")):
        NORMALIZE.bind(x=X, y=Y, bias=GAIN, **SIZES)


@pytest.mark.parametrize("name", ["x", "y", "depth", "epsilon"])
def test_a_missing_argument_is_named(name):
    arguments = {"x": X, "y": Y, **SIZES}
    for without in ({key: value for key, value in arguments.items() if key != name}, arguments | {name: None}):
        with pytest.raises(KernelError, match=f"needs {name}$"):
            NORMALIZE.bind(**without)


def test_swapped_pointers_are_refused():
    with pytest.raises(KernelError, match=re.escape("takes x as const float*, not a pointer to Bf16")):
        NORMALIZE.bind(x=Y, y=X, **SIZES)


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ({"gain": Pointer("int")}, "gain as const float*, not a pointer to int"),
        ({"depth": Pointer("int")}, "depth as int, not a pointer to int"),
        ({"depth": 1024.0}, "depth as int, not 1024.0"),
    ],
)
def test_an_argument_of_another_type_is_refused(argument, says):
    with pytest.raises(KernelError, match=re.escape(says)):
        NORMALIZE.bind(**{"x": X, "y": Y, **SIZES, **argument})


def test_a_void_pointer_takes_any():
    operands = {"weight": Pointer("Bf16"), "x": Pointer("Bf16"), "y": Pointer("float")}
    sizes = {name: 1 for name, each in kernels.matmul().kernel.parameters.items() if each.type == "int"}
    assert kernels.matmul().bind(**operands, **sizes)["y"] == Pointer("float")
    with pytest.raises(KernelError, match="takes x as const Bf16"):
        kernels.matmul().bind(**operands | {"x": Pointer("float")}, **sizes)


def test_scalars_are_what_a_launch_takes():
    scalars = NORMALIZE.scalars({"x": 1 << 40, "y": 16, **SIZES})
    assert [type(each) for each in scalars] == [ctypes.c_void_p] * 4 + [ctypes.c_int] * 3 + [ctypes.c_float]
    assert [each.value for each in scalars[:7]] == [1 << 40, None, None, 16, 1024, 1024, 2048]


def test_types_have_the_template_arguments_in_them():
    tactic = Small(2, 7, 4, 2)
    instance = tactic.instance(50, 1024, 4, "float")
    assert instance.expression == "gemm_small<4, 2, 7, 4, 2, NONE, float>"
    assert instance.type_of("residual") == "const float*" and instance.element_of("y") == "float"
    assert instance.type_of("tokens") == "int" and instance.element_of("x_q") == "signed char"


@pytest.mark.parametrize("template", [{"In": "float"}, {"In": "float", "OUT": "float"}])
def test_template_arguments_are_all_named(template):
    kernel = Kernel("a.cu", "a", "class In, class Out", "const In* x, Out* y", print)
    with pytest.raises(KernelError, match="a.cu:a: template parameters are In, Out, not"):
        kernel.instance(Shape((1, 1, 1), 32), **template)


def test_a_gpu_without_clusters_gets_none():
    instance = GemmFloat(1, 7, 8, 1, split=4).instance(50, 1024, "float", False, "NONE")
    assert instance.on(gpu_of(90)) == instance and instance.shape.cluster == (1, 4, 1)
    without = instance.on(gpu_of(86))
    assert without.shape.cluster == (1, 1, 1) and without.shape.grid == instance.shape.grid
    assert without.code == instance.code


@pytest.mark.parametrize(("sm", "blocks"), [(90, 132), (87, 16), (121, 48)])
def test_persistent_blocks_are_as_many_as_a_gpu_runs_at_once(sm, blocks):
    few, many = Wgmma(2, 13, 4).instance(100, 256, 4, "int"), Wgmma(2, 13, 4).instance(1000, 2048, 4, "int")
    assert few.on(gpu_of(sm)).shape.grid == few.shape.grid == (2, 1, 1)
    assert many.shape.grid == (160, 1, 1) and many.on(gpu_of(sm)).shape.grid == (blocks, 1, 1)
    of_4096 = [hadamard_quantize(tokens, 4096).on(gpu_of(sm)).shape.grid[0] for tokens in (5, 5000)]
    assert of_4096 == [5, 8 * blocks]  # 128 threads each, of 1024


def test_code_is_the_key_of_what_is_compiled():
    small, other_size = (Small(2, 7, 4, 2).instance(m, 1024, 4, "float") for m in (50, 30))
    assert small.shape != Large(2, 8, 4, 2, 3).instance(50, 1024, 4, "float").shape
    assert len({small.code, other_size.code}) == 1 and small.code.source == "gemm_small.cu"
    assert kernels.Wgmma(1, 20, 5).instance(300, 1024, 4, "float").code.headers[0][0] == "wgmma.cuh"
