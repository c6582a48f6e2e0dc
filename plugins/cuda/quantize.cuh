// Rotated activations -> INT8: one scale a token, rounding, and where the bytes lie.
#pragma once
#include "row.cuh"

// 1 / sqrt(BLOCK), which is applied with the scale.
template <int BLOCK> constexpr float NORM = 1.0f;
template <> constexpr float NORM<16> = 0.25f;
template <> constexpr float NORM<32> = 0.17677669529663687f;
template <> constexpr float NORM<64> = 0.125f;
template <> constexpr float NORM<128> = 0.08838834764831845f;

// Multiplies the BLOCK channels that lie in this thread and its neighbors by H, Sylvester order.
template <int BLOCK> __device__ inline void hadamard(float (&v)[8]) {
#pragma unroll
  for (int stride = 1; stride < 8; stride *= 2)
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (!(i & stride)) {
        const float a = v[i], b = v[i + stride];
        v[i] = a + b, v[i + stride] = a - b;
      }
#pragma unroll
  for (int lanes = 1; lanes < BLOCK / 8; lanes *= 2)
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      v[i] = fmaf(v[i], threadIdx.x & lanes ? -1.0f : 1.0f, __shfl_xor_sync(~0u, v[i], lanes));
    }
}

// Adding this rounds to an integer, half to even, and leaves its two's complement in the low bits.
constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23

__device__ inline unsigned low_bytes(float a, float b, float c, float d) {
  const unsigned ab = __byte_perm(__float_as_uint(a), __float_as_uint(b), 0x0040);
  return __byte_perm(ab, __byte_perm(__float_as_uint(c), __float_as_uint(d), 0x0040), 0x5410);
}

// The scale of a token whose channels are v * norm: the given one, or with 0 that of `greatest`, the greatest of its |v|.
struct TokenScale {
  float value, norm, factor, lowest, highest;  // factor = norm / value to 4e-7 of it
  bool fixed;

  __device__ TokenScale(float fixed_scale, float greatest, float norm)
      : value(fixed_scale), norm(norm), factor(__fdividef(norm, fixed_scale)), fixed(fixed_scale) {
    if (!fixed) {
      greatest = fmaxf(greatest * norm, 1e-12f);
      value = __fdiv_rn(greatest, 127.0f), factor = __fdividef(127 * norm, greatest);  // not one after the other
    }
    lowest = __fdiv_rn(-128 * value, norm), highest = __fdiv_rn(127 * value, norm);
  }

  // The bytes of clamp(round_half_even(v * norm / value), -128, 127). v * factor is within 6e-5 of the quotient; only near
  // a tie is the true one, many times dearer, needed to round the same way. Overwrites v.
  __device__ uint2 quantize(float (&v)[8]) const {
    if (fixed)  // saturate; the greatest of a token never exceeds 127 otherwise
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = fminf(fmaxf(v[i], lowest), highest);
    float q[8], farthest = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      q[i] = fmaf(v[i], factor, ROUND);
      farthest = fmaxf(farthest, fabsf(fmaf(v[i], factor, ROUND - q[i])));
    }
    if (farthest > 0.4999f)
      for (int i = 0; i < 8; ++i) q[i] = __fdiv_rn(__fmul_rn(v[i], norm), value) + ROUND;
    return {low_bytes(q[0], q[1], q[2], q[3]), low_bytes(q[4], q[5], q[6], q[7])};
  }
};

// Of channels k..k + 7 of a token: row-major, or in the slabs of plugins/layout.py, activation_slabs.
__device__ inline size_t place_of(int token, int k, int depth, int slab_tokens) {
  if (!slab_tokens) return size_t(token) * depth + k;
  return (size_t(k / 128) * slab_tokens + token) * 128 + (k / 16 % 8 ^ token % 8) * 16 + k % 16;
}
