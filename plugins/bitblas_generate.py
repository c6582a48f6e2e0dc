"""Runs BitBLAS in a process of its own: `python -m duq.plugins.bitblas_generate REQUESTS ANSWERS`, both files of JSON.

Importing BitBLAS changes the process it is imported into: it loads its own build of TVM, rewrites sys.path and the
environment, and asks for a GPU. Generating source needs no GPU, only a description of one. So this process
  - stands in for CUDA's libraries, of which nothing is called, by empty ones (where there is a driver it is not touched);
  - answers TVM's questions about device 0 from plugins/gpu.py;
  - tells TVM the SM wherever it would look for the device's.
A request is {"sm", "n", "k", "config"} with `config` the arguments of BitBLAS's scheduler; its answer is
{"source", "shared_bytes"}. The number of tokens is the kernel's last argument, not a constant.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

from duq.plugins.gpu import gpu_of
from duq.plugins.shared_object import load_alias, load_lazily

# What generated source depends on, with the GPU's multiprocessors: the thread blocks' limits.
LIMITS = {
    "exist": True,
    "warp_size": 32,
    "max_threads_per_block": 1024,
    "max_shared_memory_per_block": 48 * 1024,
}


def main(requests: str, answers: str) -> None:
    work = json.loads(Path(requests).read_text())
    spec = importlib.util.find_spec("bitblas")
    assert spec is not None and spec.submodule_search_locations is not None
    package = Path(spec.submodule_search_locations[0])
    tvm = _import_tvm(package / "3rdparty")
    _describe_device(tvm, work[0]["sm"])
    generate = _generator(tvm)
    Path(answers).write_text(json.dumps([generate(**request) for request in work]))


def _import_tvm(bundled: Path):
    for name in ("libcuda.so.1", "libcudart.so.12", "libnvrtc.so.12"):
        load_alias(name)
    for name in ("tvm/build/libtvm.so", "tilelang/build/libtilelang_module.so"):
        load_lazily(str(bundled / name))
    sys.path.insert(0, str(bundled / "tvm" / "python"))
    import tvm

    return tvm


def _describe_device(tvm, sm: int) -> None:
    from tvm._ffi.runtime_ctypes import Device

    of_gpu = {"multi_processor_count": gpu_of(sm).multiprocessors, "compute_version": f"{sm // 10}.{sm % 10}"}
    for name, value in (LIMITS | of_gpu).items():
        setattr(Device, name, value)
    original = tvm.target.Target.__init__

    def with_architecture(self, target, host=None):
        original(self, f"cuda -arch=sm_{sm}" if target == "cuda" else target, host)

    tvm.target.Target.__init__ = with_architecture


def _generator(tvm):
    """(sm, n, k, config) -> {"source", "shared_bytes"}"""
    import bitblas  # noqa: F401  (first: it completes the import paths of what follows)
    import tilelang
    from bitblas.base.arch import CUDA
    from bitblas.ops.general_matmul.tilelang.dequantize import MatmulDequantizeMMAScheduler

    emit, shared_bytes = tvm._ffi.get_global_func("target.build.tilelang_cuda"), []

    def note_shared_memory(module, target):
        def visit(node):
            if isinstance(node, tvm.tir.Allocate) and node.buffer_var.type_annotation.storage_scope == "shared.dyn":
                shared_bytes.append(int(node.extents[0]))

        for function in module.functions.values():
            tvm.tir.stmt_functor.post_order_visit(function.body, visit)
        return emit(module, target)

    tvm.register_func("target.build.tilelang_cuda", note_shared_memory, override=True)
    # BitBLAS would run nvcc here; compiling is the work of plugins/nvrtc.py.
    tvm.register_func("tilelang_callback_cuda_compile", lambda code, target: b"", override=True)

    def generate(sm: int, n: int, k: int, config: dict) -> dict:
        types = dict(in_dtype="int8", accum_dtype="int32", out_dtype="int32")
        weight = dict(num_bits=4, storage_dtype="int8", source_format="int")
        scheduler = MatmulDequantizeMMAScheduler(M=None, N=n, K=k, trans_A=False, trans_B=True, **types, **weight)
        target = tvm.target.Target(f"cuda -arch=sm_{sm}")
        function = scheduler.with_arch(CUDA(target)).apply_config(**config)
        module = tilelang.lower(function, target=target, runtime_only=True)
        return {"source": repaired(module.imported_modules[0].get_source()), "shared_bytes": shared_bytes[-1]}

    return generate


# A step's widening of the weights, once for every 16 values of a thread; and a copy into a stage, in the main loop.
_WIDENING = re.compile(
    r"__syncthreads\(\);\n( +)(\*\(int2\*\)\(B_local \+ 0\) = [^;]*;)\n"
    r" +for \(int (\w+) = 0; \3 < 16; \+\+\3\) \{\n +B_dequantize_local\[\3\] = [^;]* - \(signed char\)8\);\n +\}\n"
    r" +__syncthreads\(\);\n"
)
_LOOP = re.compile(r"^  for \(int ko = .*?^  \}\n(?=  tl::cp_async_wait)", re.MULTILINE | re.DOTALL)
_COPY = re.compile(r"^    (?=#pragma unroll$|tl::cp_async_gs)", re.MULTILINE)
_GUARDED_COPY = re.compile(r"^    __syncthreads\(\);\n    (?:#pragma unroll$|tl::cp_async_gs)", re.MULTILINE)


def repaired(source: str) -> str:
    """The generator's source with these changes, each checked to apply.

    - TileLang's headers become plugins/cuda/tilelang.cuh.
    - The loop that widens INT4 one value at a time becomes a call that widens 16 with a dozen instructions. The two
      barriers around it go: those before and after the loop over such calls suffice.
    - In the main loop the copies into a stage wait until every warp has read what the stage held. BitBLAS leaves that
      barrier out: a warp that falls behind the others by one copy would multiply a later step's values.
    """
    source = '#include "tilelang.cuh"\n' + re.sub(r"#include <tl_templates/.*>\n", "", source)
    source, widenings = _WIDENING.subn(r"\2\n\1decode_int4(B_local, B_dequantize_local);\n", source)
    source, loops = _LOOP.subn(lambda loop: _COPY.sub("    __syncthreads();\n    ", loop[0]), source)
    if widenings < 3 or loops != 1 or len(_GUARDED_COPY.findall(source)) != 2:
        raise ValueError(
            "this version of BitBLAS writes source of another form: pip install 'duq-vla[bitblas]' has the right one"
        )
    return source


if __name__ == "__main__":
    main(*sys.argv[1:])
