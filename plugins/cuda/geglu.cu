// y = gelu_tanh(gate) * up of the output [gate, up] of a GEMM, bf16.
//
//   x  [tokens, 2 width] -> y [tokens, width]; width is a multiple of 8
//
// grid (width / (8 block), rounded up, tokens), any block.
#include "row.cuh"

__global__ void geglu(const Bf16* x, Bf16* y, int width) {
  const int k = 8 * (blockIdx.x * blockDim.x + threadIdx.x);
  const Bf16* const row = x + 2 * size_t(blockIdx.y) * width;
  let_next_kernel_start();
  wait_for_inputs();
  if (k >= width) return;
  const Eight<Bf16> first = load(row + k), second = load(row + width + k);
  float gate[8], up[8];
  convert(first, gate);
  convert(second, up);
  for (int i = 0; i < 8; ++i) gate[i] = gelu_tanh(gate[i]) * up[i];
  store(y + size_t(blockIdx.y) * width + k, gate);
}
