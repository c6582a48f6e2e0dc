// INT4 weights of a float GEMM, plugins/layout.py, pack_int4_fragments.
#pragma once
#include "common.cuh"

__device__ inline unsigned word(const uint4& of, int i) { return i == 0 ? of.x : i == 1 ? of.y : i == 2 ? of.z : of.w; }

// A lane's 8 weights of a 16 x 16 tile as the operand a0..a3 of mma.m16n8k16, bf16. Nibbles i and i + 4 of the word are the
// values of a_i, as w + 8: put into the mantissa of 128 they are 128 + w + 8, exactly.
__device__ inline uint4 int4_to_bf16(unsigned word) {
  auto pair = [word](int i) {
    const unsigned shifted = (word >> 4 * i & 0x000F000Fu) | 0x43004300u;  // 128 twice
    unsigned out;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(shifted), "r"(0x3F803F80u), "r"(0xC308C308u));  // - 136
    return out;
  };
  return {pair(0), pair(1), pair(2), pair(3)};
}
