// The residual stream goes on, and becomes INT8 for the linears behind a norm: rotate_quantize.cu's RMSNorm, Hadamard and INT8
// of a row that the launch ahead has left in PARTS parts (attention_wgmma.cu, the output projection).
//
//   y          = x + gate * sum of the parts, float32, in their order
//   x_q, x_scale  of Hadamard(RMSNorm(y) (* gain) (+ shift)), as rotate_quantize.cu has them
//
//   x, y               [M, K] float32; y may be x
//   parts              [PARTS, M, K] float32
//   gate, gain, shift  [K] float32, may be null; of adaptive norms one row of their table
//
// One block a token, 8 channels a thread, so the row never leaves the registers. x_q is [M, K], or in slabs.
// grid M, block a multiple of 32 with 8 * block >= K.
#include "quantize.cuh"

// 8 channels that another kernel has just written.
__device__ inline void load_fresh(const float* from, float (&to)[8]) {
  const Four<float>* const fours = reinterpret_cast<const Four<float>*>(from);
  const Four<float> both[2] = {load_fresh(fours), load_fresh(fours + 1)};
#pragma unroll
  for (int i = 0; i < 8; ++i) to[i] = both[i / 4].v[i % 4];
}

template <int PARTS, int BLOCK>
__global__ void __launch_bounds__(512)
residual_quantize(const float* x, const float* parts, const float* gate, const float* gain, const float* shift, float* y,
                  signed char* x_q, float* x_scale, int depth, int slab_tokens, float epsilon) {
  const int token = blockIdx.x, k = 8 * threadIdx.x;
  const size_t at = size_t(token) * depth + k, apart = size_t(gridDim.x) * depth;
  const bool valid = k < depth;

  let_next_kernel_start();
  Eight<float> factor, scale, add;  // weights, loaded while the kernel ahead still runs
  if (gate && valid) factor = load(gate + k);
  if (gain && valid) scale = load(gain + k);
  if (shift && valid) add = load(shift + k);
  wait_for_inputs();

  float v[8] = {}, squares = 0, absmax = 0;
  if (valid) {
    float part[PARTS][8];  // all loads before the first use
    load_fresh(x + at, v);
#pragma unroll
    for (int p = 0; p < PARTS; ++p) load_fresh(parts + p * apart + at, part[p]);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float sum = part[0][i];
#pragma unroll
      for (int p = 1; p < PARTS; ++p) sum += part[p][i];
      v[i] = gate ? fmaf(sum, factor.v[i], v[i]) : v[i] + sum;
    }
    store(y + at, v);
  }
  for (int i = 0; i < 8; ++i) squares = fmaf(v[i], v[i], squares);
  // Where nothing is added to it, the norm's factor is applied with the scale.
  auto norm_of = [&](float sum) { return __frsqrt_rn(sum * (1.0f / depth) + epsilon); };
  const float early = shift ? norm_of(sum_of_block(squares)) : 1.0f;
  for (int i = 0; i < 8; ++i) {
    if (shift) v[i] = __fmul_rn(v[i], early);
    if (gain && valid) v[i] = __fmul_rn(v[i], scale.v[i]);
    if (shift && valid) v[i] = __fadd_rn(v[i], add.v[i]);
  }
  if (BLOCK > 0) hadamard<BLOCK>(v);
  for (int i = 0; i < 8; ++i) absmax = fmaxf(absmax, fabsf(v[i]));
  const SumAndMax of_block = sum_and_max_of_block(squares, absmax);

  const TokenScale token_scale(0, of_block.max, NORM<BLOCK> * (shift ? 1.0f : norm_of(of_block.sum)));
  if (threadIdx.x == 0) x_scale[token] = token_scale.value;
  if (valid) *reinterpret_cast<uint2*>(x_q + place_of(token, k, depth, slab_tokens)) = token_scale.quantize(v);
}
