// What enters the transformers: patches of the images, rows of the token table.
#include "row.cuh"

// Cameras' bytes -> a matrix with a row a patch, so that SigLIP's patch convolution is a GEMM.
//
//   images  [cameras, size, size, 3] bytes, red, green and blue of a pixel side by side
//   y       [cameras * (size / PATCH)^2, pitch] of byte / 127.5 - 1; column (c * PATCH + row) * PATCH + column, the order
//           of a convolution weight [out, 3, PATCH, PATCH]; zeros from 3 PATCH^2 on. pitch is even
//
// grid (patches of an image, cameras), any block. A thread takes two neighboring pixels, three 2-byte loads (PATCH is
// even, and a patch begins at any even byte), to a word of each of the three planes.
template <int PATCH> __global__ void patches(const unsigned char* images, Bf16* y, int size, int pitch) {
  static_assert(PATCH % 2 == 0);
  constexpr int PLANE = PATCH * PATCH;
  const int across = size / PATCH, top = blockIdx.x / across * PATCH, left = blockIdx.x % across * PATCH;
  const unsigned char* const corner = images + 3 * ((size_t(blockIdx.y) * size + top) * size + left);
  Bf16* const to = y + (size_t(blockIdx.y) * gridDim.x + blockIdx.x) * pitch;
  // Division and difference are rounded to float32 one after the other, as on the host.
  auto value = [](unsigned byte) { return __fsub_rn(__fdiv_rn(float(byte & 255), 127.5f), 1.f); };

  let_next_kernel_start();
  wait_for_inputs();
  for (int at = 2 * threadIdx.x; at < PLANE; at += 2 * blockDim.x) {
    const auto* const from = reinterpret_cast<const unsigned short*>(corner + 3 * (at / PATCH * size + at % PATCH));
    const unsigned rg = from[0], br = from[1], gb = from[2];
    *reinterpret_cast<unsigned*>(to + at) = pack2<Bf16>(value(rg), value(br >> 8));
    *reinterpret_cast<unsigned*>(to + PLANE + at) = pack2<Bf16>(value(rg >> 8), value(gb));
    *reinterpret_cast<unsigned*>(to + 2 * PLANE + at) = pack2<Bf16>(value(br), value(gb >> 8));
  }
  for (int at = 3 * PLANE + 2 * threadIdx.x; at < pitch; at += 2 * blockDim.x) *reinterpret_cast<unsigned*>(to + at) = 0;
}

// The same from floats in [-1, 1], for images that were resized in floating point: y is theirs, rounded to bf16. A thread
// takes two pixels in three 8-byte loads.
template <int PATCH> __global__ void float_patches(const float* images, Bf16* y, int size, int pitch) {
  static_assert(PATCH % 2 == 0);
  constexpr int PLANE = PATCH * PATCH;
  const int across = size / PATCH, top = blockIdx.x / across * PATCH, left = blockIdx.x % across * PATCH;
  const float* const corner = images + 3 * ((size_t(blockIdx.y) * size + top) * size + left);
  Bf16* const to = y + (size_t(blockIdx.y) * gridDim.x + blockIdx.x) * pitch;

  let_next_kernel_start();
  wait_for_inputs();
  for (int at = 2 * threadIdx.x; at < PLANE; at += 2 * blockDim.x) {
    const auto* const from = reinterpret_cast<const float2*>(corner + 3 * (at / PATCH * size + at % PATCH));
    const float2 rg = from[0], br = from[1], gb = from[2];
    *reinterpret_cast<unsigned*>(to + at) = pack2<Bf16>(rg.x, br.y);
    *reinterpret_cast<unsigned*>(to + PLANE + at) = pack2<Bf16>(rg.y, gb.x);
    *reinterpret_cast<unsigned*>(to + 2 * PLANE + at) = pack2<Bf16>(br.x, gb.y);
  }
  for (int at = 3 * PLANE + 2 * threadIdx.x; at < pitch; at += 2 * blockDim.x) *reinterpret_cast<unsigned*>(to + at) = 0;
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
