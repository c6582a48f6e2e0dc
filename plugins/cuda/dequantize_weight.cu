// INT4 weights of a float GEMM -> bf16, for a library that multiplies large M: y[n, k] = q[n, k] * weight_scale[n].
//
//   weight  as plugins/layout.py, pack_int4_fragments, has it -> y [N, K]; N and K in multiples of 16
//
// A warp takes 16 rows x 64 channels. grid ceil(N / 16 * ceil(K / 64) / 8), block 256.
#include "int4.cuh"

// Two bf16 integers times the scale of their row.
__device__ inline unsigned scaled(unsigned pair, float scale) {
  return pack2<Bf16>(__uint_as_float(pair << 16) * scale, __uint_as_float(pair & 0xFFFF0000u) * scale);
}

__global__ void __launch_bounds__(256)
dequantize_weight(const uint4* weight, const float* weight_scale, Bf16* y, int rows, int depth) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, chunks = (depth + 63) / 64;
  const int unit = blockIdx.x * 8 + threadIdx.x / 32, row = unit / chunks * 16 + g, column = unit % chunks * 64 + 4 * t;
  let_next_kernel_start();
  if (row >= rows) return;
  const uint4 four_tiles = weight[size_t(unit) * 32 + lane];
  const float upper = weight_scale[row], lower = weight_scale[row + 8];
  wait_for_inputs();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint4 a = int4_to_bf16(word(four_tiles, i));
    Bf16* const to = y + size_t(row) * depth + column + 16 * i;
    if (column + 16 * i >= depth) break;
    *reinterpret_cast<uint2*>(to) = {scaled(a.x, upper), scaled(a.z, upper)};
    *reinterpret_cast<uint2*>(to + 8 * size_t(depth)) = {scaled(a.y, lower), scaled(a.w, lower)};
  }
}
