// Linears between the robot's action dimensions and the expert's width, float32 throughout.
#include "common.cuh"

__device__ inline void store(float* to, const float (&v)[4]) {
  *reinterpret_cast<float4*>(to) = {v[0], v[1], v[2], v[3]};
}
__device__ inline void store(Bf16* to, const float (&v)[4]) {
  *reinterpret_cast<uint2*>(to) = {pack2<Bf16>(v[0], v[1]), pack2<Bf16>(v[2], v[3])};
}

// y = activation(x @ weight + bias) for a K of at most 64.
//
//   x       [TOKENS, depth], depth = K <= 64, a multiple of 4
//   weight  [depth, columns]; bias [columns], may be null
//   y       [TOKENS, columns]; in float32 it may leave something for a norm (common.cuh, ForNorm)
//
// A block has 16 columns for all tokens, so that the weight is read once, ahead of the wait, with one load a thread. Four
// threads share a token.
// grid columns / 16, block 256.
template <int ACTIVATION, class Out, int TOKENS>
__global__ void __launch_bounds__(256)
linear_narrow(const float* x, const float* weight, const float* bias, Out* y, int depth, int columns, Bf16* normed,
              const float* normed_gain, float* normed_squares) {
  constexpr int MAX_DEPTH = 64;
  __shared__ Four<float> of_block[MAX_DEPTH][4];
  const int quarter = threadIdx.x % 4, column = 16 * blockIdx.x + 4 * quarter;
  const ForNorm for_norm = {normed, normed_gain, normed_squares};
  let_next_kernel_start();
  if (threadIdx.x / 4 < depth)
    of_block[threadIdx.x / 4][quarter] =
        *reinterpret_cast<const Four<float>*>(weight + size_t(threadIdx.x / 4) * columns + column);
  Four<float> add = {};
  if (bias) add = *reinterpret_cast<const Four<float>*>(bias + column);
  __syncthreads();
  wait_for_inputs();

  for (int token = threadIdx.x / 4; token < TOKENS; token += 64) {
    Four<float> in[MAX_DEPTH / 4];  // all loads before the first use
#pragma unroll
    for (int i = 0; i < MAX_DEPTH / 4; ++i)
      if (4 * i < depth) in[i] = *reinterpret_cast<const Four<float>*>(x + size_t(token) * depth + 4 * i);
    float sums[4] = {add.v[0], add.v[1], add.v[2], add.v[3]};
#pragma unroll
    for (int k = 0; k < MAX_DEPTH; ++k) {
      if (k >= depth) break;
      const Four<float> w = of_block[k][quarter];
      for (int j = 0; j < 4; ++j) sums[j] = fmaf(in[k / 4].v[k % 4], w.v[j], sums[j]);
    }
    if (ACTIVATION == SILU)
      for (int i = 0; i < 4; ++i) sums[i] = sums[i] / (1.0f + expf(-sums[i]));
    store(y + size_t(token) * columns + column, sums);
    if (is_same<Out, float>) for_norm.store(token, column, columns, sums);
  }
}

// The end of a denoising step: flow += (RMSNorm(x) (* gain) (+ shift)) @ weight + bias, in place. With a HISTORY, that sum is
// the step's change d, and the solver combines it with those of earlier steps (Multistep of plugins/ops.py):
//
//   flow += b_0 d + b_1 history_0 + b_2 history_1 + ...;  history = d, history_0, ... without the last
//
//   x            [tokens, depth]
//   gain, shift  [depth], may be null
//   weight       [depth, COLUMNS]; bias [COLUMNS]; both already times the length of the step
//   flow         [tokens, COLUMNS]
//   history      [HISTORY, tokens, COLUMNS], in place; coefficients [1 + HISTORY], b; both null without a HISTORY
//
// With r = 1 / sqrt(mean of x^2 + epsilon) the result is
//
//   r sum_k x_k (gain_k weight_k) + sum_k shift_k weight_k.
//
// Everything but x is constant and read ahead of the wait, and r joins at the end, so that one reduction over the block
// does for both dot products and the squares. A block has 16 columns of a token; 4 threads share a row of the weight.
// grid (COLUMNS / 16, tokens), block 512.
template <int COLUMNS, int HISTORY>
__global__ void __launch_bounds__(512)
flow_step(const float* x, const float* gain, const float* shift, const float* weight, const float* bias, float* flow,
          float* history, const float* coefficients, int depth, float epsilon) {
  static_assert(COLUMNS % 16 == 0);
  constexpr int ROWS = 8, APART = 128, WARPS = 16;  // a thread's rows of the weight at a time, in steps of 128
  struct Sums { float product[4], shift[4], squares; };
  __shared__ Sums of_warps[WARPS][4];
  const int row = threadIdx.x / 4, quarter = threadIdx.x % 4;
  const float* const slice = weight + 16 * blockIdx.x + 4 * quarter;
  const float* const input = x + size_t(blockIdx.y) * depth;
  Sums sums = {};

  let_next_kernel_start();
  for (int first = 0; first < depth; first += ROWS * APART) {
    float w[ROWS][4], in[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int k = first + row + i * APART;
      Four<float> from = {};
      if (k < depth) from = *reinterpret_cast<const Four<float>*>(slice + size_t(k) * COLUMNS);
      const float factor = gain && k < depth ? gain[k] : 1.0f, add = shift && k < depth ? shift[k] : 0.0f;
      for (int j = 0; j < 4; ++j) {
        w[i][j] = from.v[j] * factor;
        sums.shift[j] = fmaf(from.v[j], add, sums.shift[j]);
      }
    }
    wait_for_inputs();  // returns at once after the first time
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int k = first + row + i * APART;
      in[i] = k < depth ? input[k] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      for (int j = 0; j < 4; ++j) sums.product[j] = fmaf(in[i], w[i][j], sums.product[j]);
      sums.squares = fmaf(in[i], in[i], sums.squares);
    }
  }

  const int column = 16 * blockIdx.x + threadIdx.x % 16;
  const size_t place = size_t(blockIdx.y) * COLUMNS + column, apart = size_t(gridDim.y) * COLUMNS;
  float product = 0, constant = bias[column], squares = 0, before = flow[place];
  float earlier[HISTORY + 1] = {};
#pragma unroll
  for (int i = 0; i < HISTORY; ++i) earlier[i] = history[i * apart + place];
#pragma unroll
  for (int mask = 4; mask < 32; mask *= 2) {  // over the 8 rows of the warp
    for (int j = 0; j < 4; ++j) {
      sums.product[j] += __shfl_xor_sync(~0u, sums.product[j], mask);
      sums.shift[j] += __shfl_xor_sync(~0u, sums.shift[j], mask);
    }
    sums.squares += __shfl_xor_sync(~0u, sums.squares, mask);
  }
  if (threadIdx.x % 32 < 4) of_warps[threadIdx.x / 32][quarter] = sums;
  __syncthreads();
  if (threadIdx.x >= 16) return;
#pragma unroll
  for (int warp = 0; warp < WARPS; ++warp) {
    const Sums& part = of_warps[warp][threadIdx.x / 4];
    product += part.product[threadIdx.x % 4];
    constant += part.shift[threadIdx.x % 4];
    squares += part.squares;
  }
  const float change = fmaf(product, __frsqrt_rn(squares / depth + epsilon), constant);
  float combined = change;
  if (HISTORY > 0) combined *= coefficients[0];
#pragma unroll
  for (int i = 0; i < HISTORY; ++i) {
    combined = fmaf(coefficients[1 + i], earlier[i], combined);
    history[i * apart + place] = i == 0 ? change : earlier[i - 1];
  }
  flow[place] = before + combined;
}
