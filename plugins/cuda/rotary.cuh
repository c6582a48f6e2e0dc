// The rotary embedding of 8 neighboring channels of a head's first half with their 8 partners, in bf16.
#pragma once
#include "common.cuh"

// Two pairs (first, second) -> (first cos - second sin, second cos + first sin), each word two neighboring channels.
__device__ inline void rotate(unsigned& first, unsigned& second, const float* c, const float* s) {
  const float a[2] = {__uint_as_float(first << 16), __uint_as_float(first & 0xFFFF0000u)};
  const float b[2] = {__uint_as_float(second << 16), __uint_as_float(second & 0xFFFF0000u)};
  first = pack2<Bf16>(a[0] * c[0] - b[0] * s[0], a[1] * c[1] - b[1] * s[1]);
  second = pack2<Bf16>(b[0] * c[0] + a[0] * s[0], b[1] * c[1] + a[1] * s[1]);
}

// Cosines and sines of 8 channels: constants, which need not wait for the kernel ahead.
struct Angles {
  float c[8], s[8];

  __device__ void load(const float* cosine, const float* sine) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      *reinterpret_cast<float4*>(c + i) = __ldg(reinterpret_cast<const float4*>(cosine + i));
      *reinterpret_cast<float4*>(s + i) = __ldg(reinterpret_cast<const float4*>(sine + i));
    }
  }
  __device__ void turn(uint4& first, uint4& second) const {
    rotate(first.x, second.x, c, s);
    rotate(first.y, second.y, c + 2, s + 2);
    rotate(first.z, second.z, c + 4, s + 4);
    rotate(first.w, second.w, c + 6, s + 6);
  }
};
