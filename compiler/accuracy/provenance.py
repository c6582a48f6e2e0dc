"""Where a comparison comes from: when, by which versions, and on what machine."""

from __future__ import annotations

import os
import platform
import re
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import onnxruntime
import torch

import duq
from duq.plugins.errors import DuqError


def versions() -> dict[str, str]:
    return {
        "duq": duq.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
    }


def now() -> str:
    """The date and time in UTC, ISO 8601, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z")


def machine(target: str) -> dict:
    """What the comparison ran on. gpu: the one that the engine ran on; None for the target `cpu`, or if it cannot be asked."""
    memory = re.search(r"MemTotal:\s*(\d+) kB", _read("/proc/meminfo"))
    return {
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": 1024 * int(memory[1]) if memory else None,
        "gpu": None if target == "cpu" else _gpu(),
    }


def _processor() -> str:
    """Its name: of an x86 "model name", of a board with ARM cores the board's; else the architecture."""
    model = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return model[1] if model else _read("/proc/device-tree/model").rstrip("\0\n") or platform.machine()


def _gpu() -> str | None:
    from duq.plugins.driver import device_properties

    try:
        return device_properties()[0]
    except DuqError:  # a plan for TensorRT also runs without CUDA's Python bindings
        return None


def _read(file: str) -> str:
    try:
        return Path(file).read_text()
    except OSError:
        return ""
