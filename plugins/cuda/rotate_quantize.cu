// Float activations -> INT8 activations and one scale a token: the prologue of every group of quantized linears.
//
//   source     x[K], or RMSNorm(x) or LayerNorm(x) (* gain) (+ shift), or gelu_tanh(gate) * up of a row [gate K, up K]
//   x'         = (source * input_scale)[permutation] @ blockdiag(rotation)
//   x_scale    = max(absmax |x'|, 1e-12) / 127, or the given activation_scale
//   x_q        = clamp(round_half_even(x' / x_scale), -128, 127)
//
// One block a token; a thread holds VECTORS times 8 consecutive channels, so the row never leaves the registers. A
// block Hadamard (BLOCK = 16..128) is log2(BLOCK) stages of sums and differences: strides 1, 2, 4 inside the thread,
// the rest between lanes. A dense rotation (BLOCK = DENSE) reads `block` x `block` matrices, which every token reads again
// (meant for small M), and takes the row from shared memory.
//
// Gain, shift (adaptive norms: one row of their table), input_scale, permutation, activation_scale may be null.
// x_q is row-major [M, K'], or with slab_tokens > 0 in the slabs of plugins/layout.py, activation_slabs. K' >= K, a
// multiple of 8, is the K of the GEMM; the channels beyond K are zeros.
//
// With Out = Bf16, for float GEMMs, x' itself goes to x_q, row-major, and x_scale is not written.
//
// grid M, block a multiple of 32 with VECTORS * 8 * block >= K'; shared memory 4 K bytes for a dense rotation.
#include "quantize.cuh"

enum Source { PLAIN, RMS_NORM, LAYER_NORM };  // or GEGLU
enum Rotation { DENSE = 1 };                  // or NONE, or the block size of a Hadamard

// Channels k..k+7 of x', that is channels `permutation[k..]` of `row`; zeros beyond K.
template <class T> __device__ inline Eight<T> load8(const T* row, const int* permutation, int k, int depth) {
  Eight<T> out = {};
  if (k >= depth) return out;
  if (!permutation) return load(row + k);
  for (int i = 0; i < 8; ++i) out.v[i] = row[permutation[k + i]];
  return out;
}

// v[j] = sum_i row[i] R[i][j] for channels k..k+7 of `row`, R the matrix of their block.
__device__ inline void rotate_dense(const float* row, const float* rotation, int block, int k, float (&v)[8]) {
  const float* const inputs = row + k / block * block;
  const float* matrix = rotation + size_t(k / block) * block * block + k % block;
  for (int j = 0; j < 8; ++j) v[j] = 0;
  for (int i = 0; i < block; ++i, matrix += block) {
    float r[8];
    convert(load(matrix), r);
    for (int j = 0; j < 8; ++j) v[j] = fmaf(inputs[i], r[j], v[j]);
  }
}

template <class In, int SOURCE, int BLOCK, int VECTORS, class Out>
__global__ void __launch_bounds__(512)
rotate_quantize(const In* x, const float* gain, const float* shift, const float* input_scale, const int* permutation,
                const float* rotation, const float* activation_scale, Out* x_q, float* x_scale, int depth,
                int padded_depth, int row_stride, int block, int slab_tokens, float epsilon) {
  extern __shared__ __align__(16) float row_of_block[];
  const int token = blockIdx.x;
  const In* const row = x + size_t(token) * row_stride;
  auto channel = [&](int vector) { return 8 * int(vector * blockDim.x + threadIdx.x); };
  float v[VECTORS][8];

  let_next_kernel_start();
  // Gain, shift and input_scale are weights: where registers last, loaded while the kernel ahead still runs.
  constexpr bool EARLY = VECTORS == 1;
  Eight<float> factors[3];
  auto load_factor = [&](const float* factor, int n) { return load8(factor, permutation, channel(n), depth); };
  if (EARLY) {
    if (gain) factors[0] = load_factor(gain, 0);
    if (shift) factors[1] = load_factor(shift, 0);
    if (input_scale) factors[2] = load_factor(input_scale, 0);
  }
  const float fixed_scale = activation_scale ? *activation_scale : 0.0f, inverse_depth = 1.0f / depth;
  wait_for_inputs();
  Eight<In> first[VECTORS], second[SOURCE == GEGLU ? VECTORS : 1];  // all loads before the first use
#pragma unroll
  for (int n = 0; n < VECTORS; ++n) first[n] = load8(row, permutation, channel(n), depth);
  if constexpr (SOURCE == GEGLU)
#pragma unroll
    for (int n = 0; n < VECTORS; ++n) second[n] = load8(row + depth, permutation, channel(n), depth);
#pragma unroll
  for (int n = 0; n < VECTORS; ++n) {
    convert(first[n], v[n]);
    if constexpr (SOURCE == GEGLU)
      for (int i = 0; i < 8; ++i) v[n][i] = gelu_tanh(v[n][i]) * to_float(second[n].v[i]);
  }

  // Where nothing is added to it, RMSNorm's factor is applied with the scale, and cancels in x_q unless that is given.
  const bool factor_last = SOURCE == RMS_NORM && !shift;
  constexpr bool NORMALIZED = SOURCE == RMS_NORM || SOURCE == LAYER_NORM;
  float normalize = 1, squares = 0;
  if constexpr (SOURCE == LAYER_NORM) {
    float sum = 0;
#pragma unroll
    for (int n = 0; n < VECTORS; ++n)
      for (int i = 0; i < 8; ++i) sum += v[n][i];
    const float mean = sum_of_block<1>(sum) * inverse_depth;
#pragma unroll
    for (int n = 0; n < VECTORS; ++n)
      if (channel(n) < depth)
        for (int i = 0; i < 8; ++i) v[n][i] -= mean;
  }
  auto factor_of = [&](float sum) { return __frsqrt_rn(sum * inverse_depth + epsilon); };
  if (NORMALIZED) {
#pragma unroll
    for (int n = 0; n < VECTORS; ++n)
      for (int i = 0; i < 8; ++i) squares = fmaf(v[n][i], v[n][i], squares);
    if (!factor_last) normalize = factor_of(sum_of_block(squares));
  }

  float absmax = 0;
#pragma unroll
  for (int n = 0; n < VECTORS; ++n) {
    const int k = channel(n);
    if (NORMALIZED && !factor_last)
      for (int i = 0; i < 8; ++i) v[n][i] = __fmul_rn(v[n][i], normalize);
    if (gain) {
      const Eight<float> f = EARLY ? factors[0] : load_factor(gain, n);
      for (int i = 0; i < 8; ++i) v[n][i] = __fmul_rn(v[n][i], f.v[i]);
    }
    if (shift) {
      const Eight<float> f = EARLY ? factors[1] : load_factor(shift, n);
      for (int i = 0; i < 8; ++i) v[n][i] = __fadd_rn(v[n][i], f.v[i]);
    }
    if (input_scale) {
      const Eight<float> f = EARLY ? factors[2] : load_factor(input_scale, n);
      for (int i = 0; i < 8; ++i) v[n][i] = __fmul_rn(v[n][i], f.v[i]);
    }
    if (BLOCK > DENSE) hadamard<BLOCK>(v[n]);
    if (BLOCK == DENSE && k < depth)
      for (int i = 0; i < 8; ++i) row_of_block[k + i] = v[n][i];
  }
  if (BLOCK == DENSE) __syncthreads();
#pragma unroll
  for (int n = 0; n < VECTORS; ++n) {
    if (BLOCK == DENSE && channel(n) < depth) rotate_dense(row_of_block, rotation, block, channel(n), v[n]);
    for (int i = 0; i < 8; ++i) absmax = fmaxf(absmax, fabsf(v[n][i]));
  }

  float norm = NORM<BLOCK>;
  if (factor_last) {
    const SumAndMax of_block = sum_and_max_of_block(squares, absmax);
    norm *= factor_of(of_block.sum), absmax = of_block.max;
  } else if (!is_same<Out, Bf16> && !activation_scale) {
    absmax = max_of_block(absmax);
  }
  if constexpr (is_same<Out, Bf16>) {
#pragma unroll
    for (int n = 0; n < VECTORS; ++n) {
      for (int i = 0; i < 8; ++i) v[n][i] *= norm;
      if (channel(n) < padded_depth) store(x_q + size_t(token) * padded_depth + channel(n), v[n]);
    }
  } else {
    const TokenScale scale(fixed_scale, absmax, norm);
    if (threadIdx.x == 0) x_scale[token] = scale.value;
#pragma unroll
    for (int n = 0; n < VECTORS; ++n) {
      const int k = channel(n);
      if (k >= padded_depth) break;
      *reinterpret_cast<uint2*>(x_q + place_of(token, k, padded_depth, slab_tokens)) = scale.quantize(v[n]);
    }
  }
}
