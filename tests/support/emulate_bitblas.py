"""Runs one thread block of a kernel that BitBLAS generated, in numpy: its source becomes Python, statement by statement.

All threads take a statement together, which is right where the kernel's barriers are. The index arithmetic is the
source's own; ldmatrix, mma and the widening of INT4 are written here after their documentation.
"""

from __future__ import annotations

import re

import numpy as np

_STATEMENTS = [  # pattern of a line -> Python
    (r"for \(int (\w+) = 0; \w+ < (\d+); \+\+\w+\) \{", r"for \1 in range(\2):"),
    (r"\*\(int4\*\)\(C_frag.*", "pass"),  # the accumulators start at zero
    (r"tl::cp_async_gs<16>\(buf_dyn_shmem\+\((.*)\), B\+\((.*)\)\);", r"copy(\1, b, \2, True)"),
    (r"tl::cp_async_gs_conditional<16>\(buf_dyn_shmem\+\((.*)\), A\+\((.*)\), \((.*)\)\);", r"copy(\1, a, \2, \3)"),
    (r"\*\(int2\*\)\(B_local \+ 0\) = \*\(int2\*\)\(\(\(signed char\*\)buf_dyn_shmem\) \+ (.*)\);", r"load(\1)"),
    (r"decode_int4\(B_local, B_dequantize_local\);", r"widen()"),
    (
        r"\*\(int4\*\)\(\(\(signed char\*\)buf_dyn_shmem\) \+ (.*)\) = \*\(int4\*\)\(B_dequantize_local \+ 0\);",
        r"store(\1)",
    ),
    (r"ldmatrix (\w) \[(.*)\] \[(.*)\]", r"ldmatrix('\1', \2, \3)"),
    (r"mma \[(.*)\] \[(.*)\] \[(.*)\]", r"mma(\1, \2, \3)"),
    (r"if \((.*) < m\) \{", r"for valid in [(\1) < m]:"),
    (r"\*\(int2\*\)\(C \+ (.*)\) = \*\(int2\*\)\(C_frag \+ (.*)\);", r"write(\1, \2, valid)"),
]
_IGNORED = r"#pragma.*|tl::cp_async_(commit|wait).*|__syncthreads\(\);|const dim3 blockIdx.*|(int|signed char) \w+\[\d+\];|"
_LDMATRIX = re.compile(
    r'^ *\{\n *unsigned int addr;.*?"l"\(\(void \*\)\(\(&\(\(\(signed char\*\)buf_dyn_shmem\)\[([^\n]*)\]\)\) \+ 0\)\)\n.*?'
    r"\(\(unsigned \*\)\((\w)_frag \+ ([^\n]*?)\)\)\[0\].*?^ *\}\n",
    re.MULTILINE | re.DOTALL,
)
_MMA = re.compile(
    r'^ *\{\n *__asm__ __volatile__\(\n *"mma[^\n]*\n[^\n]*\n[^\n]*?\(\(int \*\)\(C_frag \+ ([^\n]*?)\)\)\[0\][^\n]*\n'
    r"[^\n]*?A_frag \+ ([^\n]*?)\)\)\[0\][^\n]*?B_frag \+ ([^\n]*?)\)\)\[0\].*?^ *\}\n",
    re.MULTILINE | re.DOTALL,
)


def to_python(source: str) -> str:
    """The body of the kernel as Python that calls the methods of `Block`."""
    body = source[source.index("buf_dyn_shmem[];") + len("buf_dyn_shmem[];") : source.rindex("}")]
    body = _LDMATRIX.sub(r"ldmatrix \2 [\3] [\1]\n", body)
    body = _MMA.sub(r"mma [\1] [\2] [\3]\n", body)
    lines, depth = [], 0
    for line in body.splitlines():
        line = line.strip()
        if re.fullmatch(_IGNORED, line):
            continue
        if line == "}":
            depth -= 1
            continue
        lines.append("    " * depth + _expressions(_to_statement(line)))
        depth += line.endswith("{")
    return "\n".join(lines)


def _to_statement(line: str) -> str:
    for pattern, python in _STATEMENTS:
        if match := re.fullmatch(pattern, line):
            return match.expand(python)
    raise ValueError(f"a statement of another form: {line[:120]}")


def _expressions(text: str) -> str:
    for c, python in (("((int)threadIdx.x)", "t"), ("((int)blockIdx.x)", "bx"), ("((int)blockIdx.y)", "by"), ("&&", "&")):
        text = text.replace(c, python)
    return text


class Block:
    """One thread block. x_q int8 [M, K]; packed uint8 [N, K / 2]; c int32 [M, N] is written to."""

    def __init__(self, threads: int, shared_bytes: int, x_q: np.ndarray, packed: np.ndarray, c: np.ndarray):
        self.shared = np.zeros(shared_bytes, np.uint8)
        self.a, self.b, self.c = x_q.view(np.uint8).reshape(-1), packed.reshape(-1), c
        self.threads, self.lane = threads, np.arange(threads) % 32
        self.local, self.widened = np.zeros((threads, 8), np.uint8), np.zeros((threads, 16), np.int8)
        self.frag = {name: np.zeros((threads, 4096), np.uint8) for name in "AB"}
        self.acc = np.zeros((threads, 1024), np.int32)

    def run(self, code: str, bx: int, by: int) -> None:
        names = {
            name: getattr(self, name) for name in ("copy", "load", "widen", "store", "ldmatrix", "mma", "write", "a", "b")
        }
        exec(code, names | {"t": np.arange(self.threads), "bx": bx, "by": by, "m": len(self.c)})

    def _bytes(self, offset, count: int) -> np.ndarray:
        """[threads, count] consecutive indices."""
        return np.broadcast_to(offset, self.threads)[:, None] + np.arange(count)

    def copy(self, to, source, offset, valid) -> None:
        valid = np.broadcast_to(valid, self.threads)[:, None]
        self.shared[self._bytes(to, 16)] = np.where(valid, source[np.where(valid, self._bytes(offset, 16), 0)], 0)

    def load(self, offset) -> None:
        self.local[:] = self.shared[self._bytes(offset, 8)]

    def widen(self) -> None:
        self.widened[:, 0::2], self.widened[:, 1::2] = (
            (self.local & 15).view(np.int8) - 8,
            (self.local >> 4).view(np.int8) - 8,
        )

    def store(self, offset) -> None:
        self.shared[self._bytes(offset, 16)] = self.widened.view(np.uint8)

    def ldmatrix(self, name: str, register, address) -> None:
        """Lane 8 j + r gives row r of matrix j; lane 4 r + q gets bytes 4 q.. of row r of matrix j in register j."""
        rows = self.shared[self._bytes(address, 16)].reshape(-1, 4, 8, 4, 4)  # [warp, matrix, row, quarter, byte]
        self.frag[name][self._bytes_of_registers(register)] = rows.transpose(0, 2, 3, 1, 4).reshape(self.threads, 16)

    def _bytes_of_registers(self, register):
        return np.arange(self.threads)[:, None], register + np.arange(16)[None]

    def mma(self, c: int, a: int, b: int) -> None:
        """m16n8k32: lane 4 g + q holds k = 4 q + i and 16 + 4 q + i of rows g, g + 8 of A, of column g of B."""
        rows = self.frag["A"][:, a : a + 16].view(np.int8).reshape(-1, 8, 4, 2, 2, 4)  # [warp, g, q, k half, row half, i]
        columns = self.frag["B"][:, b : b + 8].view(np.int8).reshape(-1, 8, 4, 2, 4)  # [warp, column, q, k half, i]
        sums = np.einsum(
            "wgqhri,wcqhi->wrgc", rows.astype(np.int64), columns.astype(np.int64)
        )  # [warp, row half, g, column]
        pairs = sums.reshape(-1, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4)  # lane 4 g + q: columns 2 q, 2 q + 1 of both rows
        self.acc[:, c : c + 4] += pairs.reshape(self.threads, 4).astype(np.int32)

    def write(self, offset, register: int, valid) -> None:
        valid = np.broadcast_to(valid, self.threads)
        at = self._bytes(offset, 2)[valid]
        self.c.reshape(-1)[at] = self.acc[valid, register : register + 2]
