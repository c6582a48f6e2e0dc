"""CUDA source -> cubin or PTX, with NVRTC from its pip wheel: needs no GPU, no driver and no CUDA installation.

The kernels in plugins/cuda are templates; `compile_cubin` and `compile_ptx` instantiate the ones asked for. The headers beside
them are handed to the compiler in memory and no system header is used. Results are kept on disk by the hash of all that went in.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from duq.plugins import libraries
from duq.plugins.errors import KernelError
from duq.plugins.gpu import GPUS, Gpu, gpu_of
from duq.plugins.libraries import Version

SOURCES = Path(__file__).parent / "cuda"
OPTIONS = ("--std=c++17", "--device-as-default-execution-space")  # the latter for lambdas


@dataclass(frozen=True)
class Cubin:
    """Machine code for one SM, and for every kernel asked for (a C++ expression such as ``gemm<4, 2>``) its symbol.

    From `compile_ptx` the image is PTX instead: text that ends with a NUL, which the driver compiles when it loads it.
    """

    image: bytes
    symbols: Mapping[str, str]


def compile_cubin(
    source: str,
    sm: int | Gpu,
    kernels: Sequence[str],
    headers: Mapping[str, str] | None = None,
    options: Sequence[str] = (),
    cache: Path | None = None,
) -> Cubin:
    """Instantiates `kernels` (template expressions) of ``plugins/cuda/<source>`` for compute capability `sm` (e.g. 86), or
    for one GPU with the features that it has.

    `headers` are generated headers (name -> text), `options` further NVRTC options such as ``-DNAME=1``. The result is
    cached under `cache`, by default $DUQ_CACHE or ~/.cache/duq.
    Raises KernelError for an unknown SM, a missing wheel, or source that does not compile (with the compiler's log).
    """
    text = (SOURCES / source).read_text()
    return compile_text(source, text, sm, kernels, headers, options, cache)


def compile_ptx(
    source: str,
    sm: int | Gpu,
    kernels: Sequence[str],
    headers: Mapping[str, str] | None = None,
    options: Sequence[str] = (),
    cache: Path | None = None,
) -> Cubin:
    """As `compile_cubin`, but PTX, which GPUs of compute capability `sm` and all later ones run.

    Raises KernelError also for an SM whose PTX runs on no other.
    """
    gpu = _gpu(sm)
    if gpu.ptx_architecture is None:
        raise KernelError(f"{source}: PTX for {gpu.architecture} runs on SM {gpu.sm} alone; compile a cubin")
    return _compile_cached(source, (SOURCES / source).read_text(), gpu, True, kernels, headers, options, cache)


def compile_text(
    name: str,
    text: str,
    sm: int | Gpu,
    kernels: Sequence[str],
    headers: Mapping[str, str] | None = None,
    options: Sequence[str] = (),
    cache: Path | None = None,
) -> Cubin:
    """As `compile_cubin`, of source that is no file; `name` is what the compiler calls it."""
    return _compile_cached(name, text, _gpu(sm), False, kernels, headers, options, cache)


def _gpu(sm: int | Gpu) -> Gpu:
    return sm if isinstance(sm, Gpu) else gpu_of(sm)


def _compile_cached(
    name: str,
    text: str,
    gpu: Gpu,
    ptx: bool,
    kernels: Sequence[str],
    headers: Mapping[str, str] | None,
    options: Sequence[str],
    cache: Path | None,
) -> Cubin:
    """Machine code for the GPU, or PTX for it and later ones, compiled now or before."""
    nvrtc = _nvrtc()
    version = _checked(nvrtc, nvrtc.nvrtcVersion(), name)
    texts = {path.name: path.read_text() for path in sorted(SOURCES.glob("*.cuh"))} | dict(headers or {})
    architecture = gpu.ptx_architecture if ptx else gpu.architecture
    check_supported(gpu)
    arguments = [f"--gpu-architecture={architecture}", *OPTIONS, *_switched_off(gpu), *options]
    key = hashlib.sha256(json.dumps([version, text, texts, arguments, list(kernels)]).encode()).hexdigest()
    entry = (cache or default_cache()) / f"{key}.{'ptx' if ptx else 'cubin'}"
    body = read_cached(entry)
    if body is not None:
        symbols, image = body.split(b"\n", 1)
        return Cubin(image, json.loads(symbols))
    cubin = _compile(nvrtc, name, text, texts, arguments, kernels, ptx)
    write_cached(entry, json.dumps(dict(cubin.symbols)).encode() + b"\n" + cubin.image)
    return cubin


def _switched_off(gpu: Gpu) -> list[str]:
    """Macros against features that the row of the GPU does not have, although the code's architecture may."""
    features = {"-DNO_CLUSTER": gpu.has_clusters, "-DNO_PDL": gpu.has_pdl}
    return [macro for macro, has in features.items() if not has]


def _compile(nvrtc, source, text, headers, arguments, kernels, ptx) -> Cubin:
    encoded = [value.encode() for value in headers.values()], [name.encode() for name in headers]
    program = _checked(nvrtc, nvrtc.nvrtcCreateProgram(text.encode(), source.encode(), len(headers), *encoded), source)
    try:
        for kernel in kernels:
            _checked(nvrtc, nvrtc.nvrtcAddNameExpression(program, kernel.encode()), source)
        (status,) = nvrtc.nvrtcCompileProgram(program, len(arguments), [item.encode() for item in arguments])
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = bytearray(_checked(nvrtc, nvrtc.nvrtcGetProgramLogSize(program), source))
            nvrtc.nvrtcGetProgramLog(program, log)
            raise KernelError(f"{source} does not compile for {arguments[0]}:\n{bytes(log).decode().rstrip(chr(0))}")
        symbols = {
            kernel: _checked(nvrtc, nvrtc.nvrtcGetLoweredName(program, kernel.encode()), source).decode()
            for kernel in kernels
        }
        size, get = (nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX) if ptx else (nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
        image = bytearray(_checked(nvrtc, size(program), source))
        _checked(nvrtc, get(program, image), source)
        return Cubin(bytes(image), symbols)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def nvrtc_version() -> Version:
    """Of the NVRTC that compiles here: what it makes needs a driver for that CUDA. Raises KernelError as `compile_cubin` does."""
    return Version(*_nvrtc().nvrtcVersion()[1:])


def _nvrtc():
    """The bindings of a loaded NVRTC library, both of one major version of CUDA."""
    bindings = libraries.bindings_version()
    libraries.load("nvrtc", "compiling CUDA kernels")
    from cuda.bindings import nvrtc

    found = Version(*nvrtc.nvrtcVersion()[1:])
    if found.major != bindings.major:  # the bindings prefer the newest of those loaded before
        raise KernelError(
            f"compiling CUDA kernels: NVRTC {found} is loaded already, by PyTorch perhaps, and cuda-bindings is for CUDA "
            f"{bindings}; use an environment without CUDA {found.major}"
        )
    return nvrtc


def supported_sms() -> list[int]:
    """The SMs that the NVRTC here compiles for and that have kernels. Raises KernelError where there is none."""
    nvrtc = _nvrtc()
    return [sm for sm in _checked(nvrtc, nvrtc.nvrtcGetSupportedArchs(), "NVRTC") if sm in GPUS]


def check_supported(gpu: Gpu) -> None:
    """Raises KernelError unless the NVRTC here compiles for the GPU; the one of CUDA 12 knows none after Hopper."""
    if gpu.sm not in (known := supported_sms()):
        raise KernelError(
            f"NVRTC {nvrtc_version()} compiles for SM {', '.join(map(str, known))}, not for SM {gpu.sm}; CUDA 13's does: "
            "pip install 'duq-vla[cuda]'"
        )


def _checked(nvrtc, result: tuple, source: str):
    """The values an NVRTC call returned behind its status."""
    status, *values = result
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise KernelError(f"{source}: NVRTC says {nvrtc.nvrtcGetErrorString(status)[1].decode()}")
    return values[0] if len(values) == 1 else values


# A cache entry: the sha256 of the rest, and the rest. A cubin's or PTX's: one line of JSON with the symbols, the image.


def default_cache() -> Path:
    return Path(os.environ.get("DUQ_CACHE") or Path.home() / ".cache" / "duq")


def read_cached(path: Path) -> bytes | None:
    """What was kept; None when there is nothing or it is damaged, so that it is made again."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    digest, body = content[:32], content[32:]
    return body if hashlib.sha256(body).digest() == digest else None


def write_cached(path: Path, body: bytes) -> None:
    """Writes beside the entry and renames, so that a process reading at the same time sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(body).digest() + body)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
