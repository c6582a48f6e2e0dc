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

// Each sum of a kernel wants a USE of its own.
template <int USE = 0> __device__ inline float sum_of_block(float value) {
  __shared__ float of_warps[32];
  for (int mask = 16; mask; mask /= 2) value += __shfl_xor_sync(~0u, value, mask);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = value;
  __syncthreads();
  value = of_warps[0];
  for (int warp = 1; warp < blockDim.x / 32; ++warp) value += of_warps[warp];
  return value;
}

// Of values that are not negative, whose order is that of their bits. The turns of a loop alternate between 0 and 1.
__device__ inline float max_of_block(float value, int turn = 0) {
  __shared__ unsigned of_warps[2][32];
  const unsigned lane = threadIdx.x % 32, of_warp = __reduce_max_sync(~0u, __float_as_uint(value));
  if (lane == 0) of_warps[turn][threadIdx.x / 32] = of_warp;
  __syncthreads();
  return __uint_as_float(__reduce_max_sync(~0u, lane < blockDim.x / 32 ? of_warps[turn][lane] : 0));
}

struct SumAndMax { float sum, max; };

// sum_of_block and max_of_block of two values, with one barrier for both.
__device__ inline SumAndMax sum_and_max_of_block(float value, float not_negative) {
  __shared__ SumAndMax of_warps[32];
  for (int mask = 16; mask; mask /= 2) value += __shfl_xor_sync(~0u, value, mask);
  const unsigned lane = threadIdx.x % 32, of_warp = __reduce_max_sync(~0u, __float_as_uint(not_negative));
  if (lane == 0) of_warps[threadIdx.x / 32] = {value, __uint_as_float(of_warp)};
  __syncthreads();
  SumAndMax of_block = of_warps[0];
  for (int warp = 1; warp < blockDim.x / 32; ++warp) {
    of_block.sum += of_warps[warp].sum;
    of_block.max = fmaxf(of_block.max, of_warps[warp].max);
  }
  return of_block;
}
