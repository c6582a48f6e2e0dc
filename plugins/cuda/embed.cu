// What enters the transformers: patches of the images, rows of the token table.
#include "row.cuh"

// Images -> a matrix with a row a patch, so that SigLIP's patch convolution is a GEMM.
//
//   images  [cameras, 3, size, size] float32
//   y       [cameras * (size / PATCH)^2, pitch]; column (c * PATCH + row) * PATCH + column, the order of a convolution
//           weight [out, 3, PATCH, PATCH]; zeros from 3 PATCH^2 on. pitch is a multiple of 8
//
// grid (patches of an image, cameras), any block. PATCH is even: two neighbouring columns are one 8-byte load.
template <int PATCH> __global__ void patches(const float* images, Bf16* y, int size, int pitch) {
  static_assert(PATCH % 2 == 0);
  const int across = size / PATCH, top = blockIdx.x / across * PATCH, left = blockIdx.x % across * PATCH;
  const float* const corner = images + (size_t(3 * blockIdx.y) * size + top) * size + left;
  Bf16* const to = y + (size_t(blockIdx.y) * gridDim.x + blockIdx.x) * pitch;

  let_next_kernel_start();
  wait_for_inputs();
  for (int first = 8 * threadIdx.x; first < pitch; first += 8 * blockDim.x) {
    float v[8] = {};
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      const int at = first + i, c = at / (PATCH * PATCH), row = at / PATCH % PATCH, column = at % PATCH;
      if (c >= 3) break;
      const float2 pair = *reinterpret_cast<const float2*>(corner + (size_t(c) * size + row) * size + column);
      v[i] = pair.x, v[i + 1] = pair.y;
    }
    store(to + first, v);
  }
}

// Rows of the token table -> the residual stream: y = rows * scale.
//
//   rows  [tokens, depth]; y [tokens, depth], rows `y_stride` apart; depth and y_stride are multiples of 8
//
// grid tokens, any block.
__global__ void tokens(const Bf16* rows, float* y, int depth, int y_stride, float scale) {
  const Bf16* const row = rows + size_t(blockIdx.x) * depth;
  float* const to = y + size_t(blockIdx.x) * y_stride;
  let_next_kernel_start();
  wait_for_inputs();
  for (int k = 8 * threadIdx.x; k < depth; k += 8 * blockDim.x) {
    float v[8];
    convert(load(row + k), v);
    for (int i = 0; i < 8; ++i) v[i] *= scale;
    store(to + k, v);
  }
}
