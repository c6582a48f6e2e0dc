// A row of channels spread over a thread block, 8 consecutive channels a vector.
#pragma once
#include "common.cuh"

// 8 consecutive channels as they lie in memory.
template <class T> struct alignas(16) Eight { T v[8]; };

template <class T> __device__ inline Eight<T> load(const T* from) { return *reinterpret_cast<const Eight<T>*>(from); }

template <class T> __device__ inline void convert(const Eight<T>& from, float (&to)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) to[i] = to_float(from.v[i]);
}

__device__ inline void store(float* to, const float (&v)[8]) {
  reinterpret_cast<float4*>(to)[0] = {v[0], v[1], v[2], v[3]};
  reinterpret_cast<float4*>(to)[1] = {v[4], v[5], v[6], v[7]};
}
__device__ inline void store(Bf16* to, const float (&v)[8]) {
  *reinterpret_cast<uint4*>(to) = {pack2<Bf16>(v[0], v[1]), pack2<Bf16>(v[2], v[3]), pack2<Bf16>(v[4], v[5]),
                                   pack2<Bf16>(v[6], v[7])};
}

template <bool MAX> __device__ inline float reduce_block(float value) {
  __shared__ float of_warps[32];
  auto combine = [](float a, float b) { return MAX ? fmaxf(a, b) : a + b; };
  for (int mask = 16; mask; mask /= 2) value = combine(value, __shfl_xor_sync(~0u, value, mask));
  __syncthreads();  // of_warps may still be read by an earlier reduction
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = value;
  __syncthreads();
  value = of_warps[0];
  for (int warp = 1; warp < blockDim.x / 32; ++warp) value = combine(value, of_warps[warp]);
  return value;
}
