// attention.cu for many queries, heads of 256 and GPUs without wgmma, with the same operands and results. mma.sync, SM 80 and up.
//
// A block has 64 rows (row = token * HEADS + head) and takes 64 keys at a time. Its 8 warps share both products, so that each reads
// from shared memory about as much as it multiplies: with rows of its own, a warp would read all of K and V for 16 of them.
//   scores   warp (i, j) has rows 16 i.. and keys 32 j.. of the 64, and its rows' queries in registers
//   values   warp w has all rows and channels 32 w.., from the probabilities that all have left in shared memory
// A row's maximum m and sum of exponentials are kept by the two warps that have its scores; the others are told by which
// factor the maximum has scaled what they have. K of the next keys is copied during the second product, V during the first.
//
// In shared memory, rows of 256 values are 512 bytes, their 16-byte pieces exchanged by piece ^ (row % 8), for ldmatrix, which
// reads a piece of 8 rows at once. Rows of probabilities are an odd number of pieces apart.
//
// grid (ceil(tokens * HEADS / 64), kv heads, images), block 256, shared memory as in plugins/kernels/attention_tile.py.
#include "attention.cuh"

constexpr int DIMS = 256, WARPS = 8, ROWS = 64, KEYS = 64, ROW = 2 * DIMS, P_ROW = 2 * KEYS + 16;  // ROW, P_ROW: bytes

template <int HEADS>
__global__ void __launch_bounds__(32 * WARPS)
attention_tile(const Bf16* q, const Bf16* k, const Bf16* v, const Bf16* own_k, const Bf16* own_v, Bf16* out,
               const int* past, int tokens, int keys, int own_keys, int q_stride, int kv_stride, int own_stride,
               int out_stride, int cache_ready, float scale) {
  extern __shared__ __align__(128) unsigned char shared[];  // K, V [KEYS][ROW]; P [ROWS][P_ROW]
  float* const of_halves = reinterpret_cast<float*>(shared + 2 * KEYS * ROW + ROWS * P_ROW);  // [ROWS][2]: maxima, sums
  float* const factors = of_halves + 2 * ROWS;                                                // [ROWS]
  const unsigned k_at = address_of(shared), v_at = k_at + KEYS * ROW, p_at = v_at + KEYS * ROW;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int first_of_warp = 16 * (warp % 4), half_of_keys = warp / 4;
  const int first_row = blockIdx.x * ROWS, rows = min(ROWS, tokens * HEADS - first_row);
  wait_for_inputs();
  if (past) keys += *past;
  q += size_t(blockIdx.z) * tokens * q_stride + blockIdx.y * HEADS * DIMS;
  k += size_t(blockIdx.z) * keys * kv_stride + blockIdx.y * DIMS;
  v += size_t(blockIdx.z) * keys * kv_stride + blockIdx.y * DIMS;
  out += size_t(blockIdx.z) * tokens * out_stride + blockIdx.y * HEADS * DIMS;
  const int end = keys + own_keys;

  // A warp copies a row at a time.
  auto fetch = [&](unsigned to, const Bf16* in_cache, const Bf16* own, int begin) {
#pragma unroll
    for (int i = 0; i < KEYS / WARPS; ++i) {
      const int row = warp + WARPS * i, key = min(begin + row, end - 1);
      const Bf16* const from = key < keys ? in_cache + size_t(key) * kv_stride : own + size_t(key - keys) * own_stride;
      copy_async(to + row * ROW + (lane ^ row % 8) * 16, from + 8 * lane, begin + row < end);
    }
  };
  fetch(k_at, k, own_k, 0);
  commit_copies();

  unsigned query[DIMS / 16][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = min(first_of_warp + g + i % 2 * 8, rows - 1) + first_row;
    const Bf16* const from = q + size_t(row / HEADS) * q_stride + row % HEADS * DIMS + i / 2 * 8 + 2 * t;
#pragma unroll
    for (int step = 0; step < DIMS / 16; ++step) query[step][i] = __ldcg(reinterpret_cast<const unsigned*>(from + 16 * step));
  }

  scale *= 1.4426950408889634f;  // exp(x) = exp2(x / ln 2)
  float o[4][4][4] = {}, m[2] = {LOWEST, LOWEST}, l[2] = {};
  for (int begin = 0; begin < end; begin += KEYS) {
    wait_for_copies<0>();
    __syncthreads();  // K has landed for everyone, and everyone is done with the V and P before
    fetch(v_at, v, own_v, begin);
    commit_copies();
    float s[4][4] = {};
    const int k_row = 32 * half_of_keys + lane / 16 * 8 + lane % 8;
#pragma unroll
    for (int step = 0; step < DIMS / 16; ++step)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        unsigned b[4];
        load_matrices<false>(b, k_at + (k_row + 16 * j) * ROW + (2 * step + lane / 8 % 2 ^ k_row % 8) * 16);
        mma(s[2 * j], query[step], b[0], b[1]);
        mma(s[2 * j + 1], query[step], b[2], b[3]);
      }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = LOWEST;
#pragma unroll
      for (int n = 0; n < 4; ++n)
        for (int odd = 0; odd < 2; ++odd) {
          float& score = s[n][2 * half + odd];
          score = begin + 32 * half_of_keys + 8 * n + 2 * t + odd < end ? score * scale : -__int_as_float(0x7F800000);
          top = fmaxf(top, score);
        }
      top = max_of_row(top);
      if (t == 0) of_halves[2 * (first_of_warp + 8 * half + g) + half_of_keys] = top;
    }
    __syncthreads();  // the maxima are there, and everyone is done with K
    if (begin + KEYS < end) fetch(k_at, k, own_k, begin + KEYS);
    commit_copies();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_of_warp + 8 * half + g;
      const float2 tops = *reinterpret_cast<const float2*>(of_halves + 2 * row);
      const float raised = fmaxf(m[half], fmaxf(tops.x, tops.y)), factor = exp2_fast(m[half] - raised);
      m[half] = raised, l[half] *= factor;
      if (t == 0 && half_of_keys == 0) factors[row] = factor;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float low = exp2_fast(s[n][2 * half] - raised), high = exp2_fast(s[n][2 * half + 1] - raised);
        l[half] += low + high;
        *reinterpret_cast<unsigned*>(shared + 2 * KEYS * ROW + row * P_ROW + 2 * (32 * half_of_keys + 8 * n + 2 * t)) =
            pack2<Bf16>(low, high);
      }
    }
    wait_for_copies<1>();
    __syncthreads();  // V, all probabilities and factors are there
#pragma unroll
    for (int i = 0; i < 4; ++i)
      for (int half = 0; half < 2; ++half) {
        const float factor = factors[16 * i + 8 * half + g];
#pragma unroll
        for (int n = 0; n < 4; ++n) o[i][n][2 * half] *= factor, o[i][n][2 * half + 1] *= factor;
      }
#pragma unroll
    for (int step = 0; step < KEYS / 16; ++step) {
      unsigned p[4][4], b[2][4];
      const int key = 16 * step + lane / 8 % 2 * 8 + lane % 8;
#pragma unroll
      for (int n = 0; n < 2; ++n) load_matrices<true>(b[n], v_at + key * ROW + (4 * warp + 2 * n + lane / 16 ^ key % 8) * 16);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        load_matrices<false>(p[i], p_at + (16 * i + lane % 16) * P_ROW + 2 * (16 * step + lane / 16 * 8));
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int n = 0; n < 4; ++n) mma(o[i][n], p[i], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
    }
  }
  let_next_kernel_start();

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum = sum_of_row(l[half]);
    if (t == 0) of_halves[2 * (first_of_warp + 8 * half + g) + half_of_keys] = sum;
  }
  __syncthreads();  // the sums are there, and K and V are free
#pragma unroll
  for (int i = 0; i < 4; ++i)
    for (int half = 0; half < 2; ++half) {
      const int row = 16 * i + 8 * half + g;
      const float2 sums = *reinterpret_cast<const float2*>(of_halves + 2 * row);
      const float inverse = __fdividef(1.0f, sums.x + sums.y);
#pragma unroll
      for (int n = 0; n < 4; ++n)
        *reinterpret_cast<unsigned*>(shared + row * ROW + (4 * warp + n ^ row % 8) * 16 + 4 * t) =
            pack2<Bf16>(o[i][n][2 * half] * inverse, o[i][n][2 * half + 1] * inverse);
    }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < ROWS / WARPS; ++i) {
    const int row = warp + WARPS * i, at = first_row + row;
    if (row < rows)
      *reinterpret_cast<uint4*>(out + size_t(at / HEADS) * out_stride + at % HEADS * DIMS + 8 * lane) =
          *reinterpret_cast<const uint4*>(shared + row * ROW + (lane ^ row % 8) * 16);
  }
}
