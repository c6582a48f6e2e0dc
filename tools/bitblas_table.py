"""Writes plugins/bitblas_sm86.json: the BitBLAS tile for every quantized linear of pi0 and pi0.5 on SM 86.

    python tools/bitblas_table.py

The choice is the cost model's (plugins/bitblas.py, estimate): there was no SM 86 to time on. M is 256 tokens a camera and
the prompt's for the language model, the actions (and pi0's state) for the expert.
"""

from __future__ import annotations

import json
import sys
from dataclasses import astuple
from pathlib import Path

if __name__ == "__main__":  # import from the repository: in tools/, profile.py would pass for the standard library's
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from duq.plugins.bitblas import TABLE, TABLE_SM, estimate, ranked
from duq.plugins.gpu import gpu_of
from duq.runtime.files import write_text

A40 = gpu_of(TABLE_SM)
LLM_TOKENS = (306, 562, 816, 818, 1024)
EXPERT_TOKENS = (50, 51)
LLM = {"qkv": (2560, 2048), "o": (2048, 2048), "gate_up": (32768, 2048), "down": (2048, 16384)}
EXPERT = {"qkv": (2560, 1024), "o": (1024, 2048), "gate_up": (8192, 1024), "down": (1024, 4096)}


def rows() -> list[dict]:
    table = []
    for model, linears, tokens in (("llm", LLM, LLM_TOKENS), ("expert", EXPERT, EXPERT_TOKENS)):
        for name, (n, k) in linears.items():
            for m in tokens:
                tile = ranked(m, n, k, A40)[0]
                microseconds = round(1e6 * estimate(tile, m, n, k, A40), 1)
                table.append({"linear": f"{model} {name}", "m": m, "n": n, "k": k, "tile": list(astuple(tile)),
                              "estimated_us": microseconds})  # fmt: skip
    return table


if __name__ == "__main__":
    write_text(TABLE, "[\n" + ",\n".join(json.dumps(row) for row in rows()) + "\n]\n")
