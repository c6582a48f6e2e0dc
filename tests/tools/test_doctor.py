"""duq-doctor: what it asks the driver, what it says of each target and of a plan, its exit codes. Drivers are made up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from duq.plugins.libraries import Version
from duq.runtime import machine
from duq.runtime.machine import Device, Gpus, find_gpus
from duq.tools import doctor

ROOT = Path(__file__).parents[2]
H200 = Device("H200", 90, 132, 141_000_000_000, 227 << 10)
RTX3090 = Device("GeForce RTX 3090", 86, 82, 24_000_000_000, 99 << 10)
CUDA13 = Version(13, 0)
PROC = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 07:24:44 UTC 2025\nGCC version: gcc 12.2.0\n"


class Libcuda:
    """The driver's functions over made-up devices; `fails`: function -> the status that it returns."""

    def __init__(self, *devices: Device, cuda: int = 13000, free: int = 0, fails: dict[str, int] | None = None):
        self.devices, self.cuda, self.free, self.fails = devices, cuda, free, fails or {}
        self.retained = 0

    def __getattr__(self, name):
        def call(*arguments):
            if name in self.fails:
                return self.fails[name]
            return getattr(type(self), f"_{name}")(self, *arguments) or 0

        return call

    def _cuInit(self, flags):
        pass

    def _cuDriverGetVersion(self, to):
        to._obj.value = self.cuda

    def _cuDeviceGetCount(self, to):
        to._obj.value = len(self.devices)

    def _cuDeviceGet(self, to, ordinal):
        to._obj.value = ordinal

    def _cuDeviceGetName(self, buffer, size, device):
        buffer.value = f"NVIDIA {self.devices[device.value].name}".encode()

    def _cuDeviceTotalMem_v2(self, to, device):
        to._obj.value = self.devices[device.value].memory_bytes

    def _cuDeviceGetAttribute(self, to, number, device):
        own = self.devices[device.value]
        to._obj.value = {75: own.sm // 10, 76: own.sm % 10, 16: own.multiprocessors, 97: own.block_shared_bytes}[number]

    def _cuDevicePrimaryCtxRetain(self, to, device):
        self.retained += 1

    def _cuDevicePrimaryCtxRelease_v2(self, device):
        self.retained -= 1

    def _cuCtxSetCurrent(self, context):
        pass

    def _cuMemGetInfo_v2(self, free, total):
        free._obj.value, total._obj.value = self.free, 2 * self.free

    def _cuGetErrorName(self, status, to):
        to._obj.value = f"CUDA_ERROR_{status}".encode()


@pytest.fixture
def proc(tmp_path):
    file = tmp_path / "version"
    file.write_text(PROC)
    return file


def test_the_driver_is_asked_for_every_gpu(proc):
    found = find_gpus(lambda name: Libcuda(H200, RTX3090), proc)
    assert found == Gpus((H200, RTX3090), CUDA13, "580.65.06", "")
    assert found.to_json()["cuda"] == "13.0" and found.to_json()["devices"][1]["name"] == "GeForce RTX 3090"


@pytest.mark.parametrize(
    ("library", "says"),
    [
        (Libcuda(fails={"cuInit": 100}), "does not work: cuInit: CUDA_ERROR_100"),
        (Libcuda(H200, fails={"cuDeviceGetAttribute": 999}), "does not work: cuDeviceGetAttribute: CUDA_ERROR_999"),
        (Libcuda(), "finds no GPU"),
        (Libcuda(H200, cuda=12020), "is for CUDA 12.2, 12.4 is the oldest"),
    ],
)
def test_a_driver_that_cannot_be_used_is_a_problem_and_no_error(library, says, proc):
    found = find_gpus(lambda name: library, proc)
    assert says in found.problem and found.driver == "580.65.06"


def test_a_machine_without_a_driver():
    def load(name):
        raise OSError(f"{name}: cannot open shared object file")

    found = find_gpus(load, Path("/nowhere"))
    assert found == Gpus(problem="no NVIDIA driver (libcuda.so.1 is not found)")
    assert machine.free_device_bytes(load) is None


def test_the_context_for_free_memory_is_given_back():
    library = Libcuda(H200, free=5_000_000_000)
    assert machine.free_device_bytes(lambda name: library) == 5_000_000_000 and library.retained == 0
    library = Libcuda(H200, fails={"cuMemGetInfo_v2": 2})
    assert machine.free_device_bytes(lambda name: library) is None and library.retained == 0


# --- targets --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def complete(monkeypatch):
    """(gpus, absent modules): a machine on which everything but those is installed and loads."""

    def make(gpus: Gpus, *absent: str, free: int | None = None, bindings: str | None = "13.0.3") -> None:
        original = doctor.version_of
        versions = {"cuda-bindings": bindings}
        monkeypatch.setattr(doctor, "version_of", lambda name: versions[name] if name in versions else original(name))
        monkeypatch.setattr(doctor, "find_gpus", lambda: gpus)
        monkeypatch.setattr(doctor, "free_device_bytes", lambda: free)
        monkeypatch.setattr(doctor, "is_importable", lambda module: module not in absent)
        monkeypatch.setattr(doctor, "_loads", lambda version: ())

    return make


def report(command_line, *arguments):
    ran = command_line(doctor.main, *arguments, "--json")
    assert ran.err == ""
    return ran.code, json.loads(ran.out)


def test_with_everything_everything_is_possible(complete, command_line):
    complete(Gpus((H200,), CUDA13, "580.65.06"))
    code, found = report(command_line, *(f"--target={each}" for each in doctor.TARGETS))
    assert code == 0
    assert all(each["possible"] and not each["missing"] for pair in found["targets"].values() for each in pair.values())


@pytest.mark.parametrize(
    ("absent", "target", "purpose", "remedy"),
    [
        ("torch", "cpu", "compile", "pip install 'duq-vla[compile]'"),
        ("onnxruntime", "cpu", "run", "pip install 'duq-vla'"),
        ("cuda.bindings", "cuda", "compile", "pip install 'duq-vla[cuda]'"),
        ("cuda.bindings", "cuda", "run", "pip install 'duq-vla[cuda-runtime]'"),
        ("cuda.bindings", "tensorrt", "run", "pip install 'duq-vla[tensorrt-runtime]'"),
        ("bitblas", "tensorrt", "compile", "pip install 'duq-vla[tensorrt]'"),
    ],
)
def test_what_is_missing_has_the_command_that_brings_it(absent, target, purpose, remedy, complete, command_line):
    complete(Gpus((H200,), CUDA13, "580.65.06"), absent)
    code, found = report(command_line, "--target", target, "--do", purpose)
    assert code == 1
    assert [each["remedy"] for each in found["targets"][target][purpose]["missing"]] == [remedy]
    assert report(command_line)[0] == 0  # nothing was asked for
    text = command_line(doctor.main).out
    assert f"to {purpose} {target} plans: " in text and remedy in text


def test_without_a_gpu_plans_are_compiled_and_not_run(complete, command_line):
    complete(Gpus(problem="no NVIDIA driver (libcuda.so.1 is not found)"))
    assert report(command_line, "--target", "cuda", "--do", "compile")[0] == 0
    code, found = report(command_line, "--target", "cuda")
    assert code == 1 and "580" in found["targets"]["cuda"]["run"]["missing"][0]["remedy"]
    assert found["targets"]["cpu"]["run"]["possible"]


ORIN = Device("Orin", 87, 16, 30_000_000_000, 163 << 10)


def test_a_driver_of_cuda_12_is_offered_its_packages(complete, command_line):
    complete(Gpus((ORIN,), Version(12, 6), "540.4.0"), "cuda.bindings", bindings=None)
    _, found = report(command_line)
    (missing,) = found["targets"]["cuda"]["run"]["missing"]
    assert missing == {"what": "cuda-bindings", "remedy": "pip install 'duq-vla[cuda12-runtime]'"}


@pytest.mark.parametrize(("bindings", "possible"), [("13.0.3", False), ("12.9.4", True)])
def test_a_driver_older_than_the_packages_is_missing(bindings, possible, complete, command_line):
    complete(Gpus((ORIN,), Version(12, 6), "540.4.0"), bindings=bindings)
    code, found = report(command_line, "--target", "cuda")
    assert (code == 0) is possible
    for each in found["targets"]["cuda"]["run"]["missing"]:
        assert "for CUDA 12.6" in each["what"] and "duq-vla[cuda12-runtime]" in each["remedy"]


def test_a_plan_that_needs_a_newer_driver(complete, command_line, tiny_plans):
    complete(Gpus((RTX3090,), Version(12, 6), "560.35"), bindings="12.9.4", free=10**10)
    code, found = report(command_line, tiny_plans("pi0", "none", "cuda").plan)
    (missing,) = found["plan"]["missing"]
    assert code == 1 and "driver for CUDA 13.0" in missing["what"] and "duq-vla[cuda12]" in missing["remedy"]


def test_a_gpu_without_kernels_of_its_own_is_said(complete, command_line):
    complete(Gpus((Device("RTX 2080", 75, 46, 8_000_000_000, 64 << 10),), CUDA13, "580.65.06"))
    _, found = report(command_line)
    assert "SM 75" in found["targets"]["cuda"]["run"]["notes"][0]


@pytest.mark.parametrize("arguments", [["--target", "tpu"], ["--do", "fly"]])
def test_an_unknown_value_is_refused(arguments, command_line):
    ran = command_line(doctor.main, *arguments)
    assert ran.code == 2 and "unknown, one of" in ran.err and ran.out == ""


def test_an_installed_library_that_does_not_load_is_missing():
    from duq.plugins.errors import KernelError

    def version():
        raise KernelError("compiling CUDA kernels needs nvidia-cuda-nvrtc: pip install 'duq-vla[cuda]'")

    (missing,) = doctor._loads(version)
    assert missing == doctor.Missing("compiling CUDA kernels needs nvidia-cuda-nvrtc", "pip install 'duq-vla[cuda]'")


# --- a plan ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpu", "program"),
    [
        (H200, {"sm": 90, "image": "cubin", "driver": "13.0"}),
        (RTX3090, {"sm": 86, "image": "cubin", "driver": "13.0"}),
        (Device("RTX 5090", 120, 170, 32_000_000_000, 99 << 10), {"sm": 86, "image": "ptx", "driver": "13.0"}),
    ],
)
def test_a_plan_runs_with_the_program_that_the_executor_takes(gpu, program, complete, command_line, tiny_plans):
    complete(Gpus((gpu,), CUDA13, "580.65.06"), free=10**10)
    code, found = report(command_line, tiny_plans("pi0", "none", "cuda").plan)
    assert code == 0 and found["plan"]["program"] == program
    assert 10**7 < found["plan"]["memory_bytes"] < 10**9


def test_a_plan_that_does_not_fit(complete, command_line, tiny_plans):
    plan = tiny_plans("pi0", "none", "cuda").plan
    complete(Gpus((RTX3090,), CUDA13, "580.65.06"), free=10**6)
    code, found = report(command_line, plan)
    assert code == 1 and "GB are needed, 0.00 GB are free" in found["plan"]["missing"][0]["what"]
    complete(Gpus((Device("A100", 80, 108, 40_000_000_000, 163 << 10),), CUDA13, "580.65.06"), free=10**10)
    code, found = report(command_line, plan)
    assert code == 1 and found["plan"]["missing"][0]["remedy"] == "compile it again with --sm 80"
    assert "does not run here" in command_line(doctor.main, plan).out


def test_a_plan_for_the_cpu(complete, command_line, tiny_plans):
    complete(Gpus(problem="no NVIDIA driver"))
    plan = tiny_plans("pi0", "none").plan
    code, found = report(command_line, plan)
    assert code == 0 and found["plan"]["possible"] and 10**6 < found["plan"]["memory_bytes"] < plan.stat().st_size
    assert f"{plan}: runs here, on cpu" in command_line(doctor.main, plan).out.replace("\n", "")


def test_what_is_no_plan_is_bad_input(command_line, tmp_path):
    ran = command_line(doctor.main, tmp_path / "none.plan")
    assert ran.code == 2 and "none.plan: cannot be read" in ran.err and ran.err.count("\n") == 1


def test_it_needs_the_runtime_alone():
    """Everything beyond the runtime's packages is absent; and the report is of this machine."""
    absent = "torch", "onnx", "onnx_ir", "matplotlib", "cuda", "tensorrt", "tensorrt_rtx", "bitblas", "websockets"
    code = f"""
import sys
for name in {absent!r}:
    sys.modules[name] = None
sys.argv = ["x", "--json"]
from duq import commands
commands.doctor()
"""
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=False, env=variables)
    assert ran.returncode == 0 and ran.stderr == ""
    found = json.loads(ran.stdout)
    assert found["targets"]["cpu"]["run"]["possible"] and not found["targets"]["cuda"]["run"]["possible"]
    assert not found["targets"]["cpu"]["compile"]["possible"]
    assert found["machine"]["cores"] == len(os.sched_getaffinity(0))
