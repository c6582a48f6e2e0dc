// attention.cu for few queries, heads of 256 and GPUs without clusters, with the same operands and results: SPLIT blocks share the
// keys of the same rows (row = token * HEADS + head) and meet in memory. mma.sync, SM 80 and up.
//
// A block has 16 ROWS16 rows and takes KEYS keys at a time, of which it usually has no more. Its 8 warps do not work on rows of their
// own, which would have each of them read all of K and V from shared memory and leave 8 results to merge. Instead
//   scores        warp w has keys 8 w.. of every 64, all rows. K goes from memory straight into registers, in the tensor cores'
//                 layout; q is in shared memory.
//   probabilities the warps tell each other their rows' maxima, and put exp2(s - m) in place of q, as bf16.
//   values        warp w has channels 32 w.., all rows and keys. V is in shared memory.
// The copies of q, K and V all start at once. What a block has found of a row goes to `partial`, o / l in 16 bits (the mean of values
// of v, it has their range, far from that of a half, whose 11 bits leave the error as it is) and log2 of the sum of
// exponentials. The last block to have done so merges the parts, in the order of their ranks: the same bits in every call.
//
// In shared memory, rows of 256 values are 512 bytes. A row's 16-byte pieces are exchanged: of V by piece ^ (key % 8), for
// ldmatrix, which reads a piece of 8 rows at once; of q by piece ^ (row % 2 * 4), as 8 lanes read 4 pieces of two rows. Rows of
// probabilities are an odd number of pieces apart.
//
// partial   of every SPLIT blocks that share rows [SPLIT] parts: [rows of a block][256] halves, then [rows of a block] floats
// counters  one for every SPLIT blocks, zero before and after
//
// grid (ceil(tokens * HEADS / (16 ROWS16)) * SPLIT, kv heads, images), block 256, shared memory as in
// plugins/kernels/attention_split.py.
#include "attention.cuh"

constexpr int DIMS = 256, WARPS = 8, ROW = 2 * DIMS;  // bytes

__device__ inline float half_to_float(unsigned short bits) { return to_float(Half{bits}); }

template <int HEADS, int ROWS16, int KEYS, int SPLIT>
__global__ void __launch_bounds__(32 * WARPS)
attention_split(const Bf16* q, const Bf16* k, const Bf16* v, const Bf16* own_k, const Bf16* own_v, Bf16* out,
                const int* past, int tokens, int keys, int own_keys, int q_stride, int kv_stride, int own_stride,
                int out_stride, int cache_ready, float scale, float* partial, int* counters) {
  constexpr int ROWS = 16 * ROWS16, TILES = (KEYS + 8 * WARPS - 1) / (8 * WARPS);  // of 8 keys, of a warp
  constexpr int P_ROW = 2 * KEYS + 16, Q_BYTES = ROWS * (ROW > P_ROW ? ROW : P_ROW);
  static_assert(KEYS % 16 == 0 && SPLIT > 1 && SPLIT <= 32);
  extern __shared__ __align__(128) unsigned char operands[];  // V [KEYS][ROW]; q [ROWS][ROW] or P [ROWS][P_ROW]; of_warps
  unsigned char* const q_shared = operands + KEYS * ROW;
  float* const of_warps = reinterpret_cast<float*>(q_shared + Q_BYTES);  // [ROWS][WARPS]: maxima, then sums
  const unsigned v_at = address_of(operands), q_at = v_at + KEYS * ROW;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int rank = blockIdx.x % SPLIT, first_row = blockIdx.x / SPLIT * ROWS, rows = min(ROWS, tokens * HEADS - first_row);
  if (past) keys += *past;
  q += size_t(blockIdx.z) * tokens * q_stride + blockIdx.y * HEADS * DIMS;
  k += size_t(blockIdx.z) * keys * kv_stride + blockIdx.y * DIMS;
  v += size_t(blockIdx.z) * keys * kv_stride + blockIdx.y * DIMS;
  out += size_t(blockIdx.z) * tokens * out_stride + blockIdx.y * HEADS * DIMS;
  const int units = (keys + own_keys + 15) / 16, end = min(units * (rank + 1) / SPLIT * 16, keys + own_keys);
  const int first = units * rank / SPLIT * 16, ready = cache_ready ? keys : 0;
  auto row_of = [&](const Bf16* in_cache, const Bf16* own, int key) {
    return key < keys ? in_cache + key * kv_stride : own + (key - keys) * own_stride;
  };
  auto padded_at = [&](int begin) { return (min(end - begin, KEYS) + 15) / 16 * 16; };
  auto has = [&](int tile, int padded) { return 8 * (warp + WARPS * tile) < padded; };

  // Of the tile of keys from `begin` on those from `low` to below `high`.
  uint4 k_row[TILES][8];  // piece p: channels 32 p + 8 t.. of key g of the tile
  auto fetch = [&](int begin, int low, int high) {
    const int padded = padded_at(begin);
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      const int key = min(begin + 8 * (warp + WARPS * tile) + g, end - 1);
      if (has(tile, padded) && low <= key && key < high) {
        const Bf16* const from = row_of(k, own_k, key) + 8 * t;
#pragma unroll
        for (int p = 0; p < 8; ++p) k_row[tile][p] = __ldcg(reinterpret_cast<const uint4*>(from + 32 * p));
      }
    }
#pragma unroll 2
    for (int i = 0; i < KEYS / WARPS; ++i) {
      const int place = warp + WARPS * i, key = min(begin + place, end - 1);
      if (place < padded && low <= key && key < high)
        copy_async(v_at + place * ROW + (lane ^ place % 8) * 16, row_of(v, own_v, key) + 8 * lane, begin + place < end);
    }
    commit_copies();
  };

  scale *= 1.4426950408889634f;  // exp(x) = exp2(x / ln 2)
  float o[ROWS16][4][4] = {}, m[ROWS16][2], l[ROWS16][2] = {};
  for (int i = 0; i < ROWS16; ++i) m[i][0] = m[i][1] = LOWEST;

  fetch(first, 0, ready);
  wait_for_inputs();
  for (int begin = first; begin < end; begin += KEYS) {
    const int count = min(end - begin, KEYS), padded = padded_at(begin);
#pragma unroll
    for (int i = 0; i < ROWS / WARPS; ++i) {
      const int row = warp + WARPS * i, at = first_row + min(row, rows - 1);
      copy_async(q_at + row * ROW + (lane ^ row % 2 * 4) * 16, q + size_t(at / HEADS) * q_stride + at % HEADS * DIMS + 8 * lane,
                 row < rows);
    }
    commit_copies();
    fetch(begin, begin == first ? ready : 0, end);

    wait_for_copies<1>();
    __syncthreads();  // q has landed for everyone
    float s[ROWS16][TILES][4] = {};
#pragma unroll
    for (int p = 0; p < 8; ++p) {
      uint4 query[ROWS16][2];  // channels 32 p + 8 t.. of rows g and g + 8
#pragma unroll
      for (int i = 0; i < ROWS16; ++i)
        for (int half = 0; half < 2; ++half)
          query[i][half] = *reinterpret_cast<const uint4*>(q_shared + (16 * i + 8 * half + g) * ROW + (4 * p + t ^ g % 2 * 4) * 16);
      // Both operands have the 4 channels of their words x and y as columns 2 t, + 1, + 8, + 9: which ones they are is
      // the same to the product.
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile)
        if (has(tile, padded)) {
          const uint4 b = k_row[tile][p];
#pragma unroll
          for (int i = 0; i < ROWS16; ++i) mma(s[i][tile], {query[i][0].x, query[i][1].x, query[i][0].y, query[i][1].y}, b.x, b.y);
#pragma unroll
          for (int i = 0; i < ROWS16; ++i) mma(s[i][tile], {query[i][0].z, query[i][1].z, query[i][0].w, query[i][1].w}, b.z, b.w);
        }
    }

#pragma unroll
    for (int i = 0; i < ROWS16; ++i)
      for (int half = 0; half < 2; ++half) {
        float top = LOWEST;
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
          for (int odd = 0; odd < 2; ++odd) {
            float& score = s[i][tile][2 * half + odd];
            score = 8 * (warp + WARPS * tile) + 2 * t + odd < count ? score * scale : -__int_as_float(0x7F800000);
            top = fmaxf(top, score);
          }
        top = max_of_row(top);
        if (t == 0) of_warps[(16 * i + 8 * half + g) * WARPS + warp] = top;
      }
    __syncthreads();  // and everyone is done with q
#pragma unroll
    for (int i = 0; i < ROWS16; ++i)
      for (int half = 0; half < 2; ++half) {
        const int row = 16 * i + 8 * half + g;
        const float4* const tops = reinterpret_cast<const float4*>(of_warps + row * WARPS);
        const float4 a = tops[0], b = tops[1];
        const float top = fmaxf(fmaxf(fmaxf(a.x, a.y), fmaxf(a.z, a.w)), fmaxf(fmaxf(b.x, b.y), fmaxf(b.z, b.w)));
        const float raised = fmaxf(m[i][half], top), factor = exp2_fast(m[i][half] - raised);
        m[i][half] = raised, l[i][half] *= factor;
#pragma unroll
        for (int n = 0; n < 4; ++n) o[i][n][2 * half] *= factor, o[i][n][2 * half + 1] *= factor;
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
          if (has(tile, padded)) {
            const float low = exp2_fast(s[i][tile][2 * half] - raised), high = exp2_fast(s[i][tile][2 * half + 1] - raised);
            l[i][half] += low + high;
            *reinterpret_cast<unsigned*>(q_shared + row * P_ROW + 2 * (8 * (warp + WARPS * tile) + 2 * t)) = pack2<Bf16>(low, high);
          }
      }
    wait_for_copies<0>();
    __syncthreads();  // V and all probabilities are there

    for (int step = 0; step < padded / 16; ++step) {
      unsigned p[ROWS16][4], b[2][4];
#pragma unroll
      for (int i = 0; i < ROWS16; ++i)
        load_matrices<false>(p[i], q_at + (16 * i + lane % 16) * P_ROW + 2 * (16 * step + lane / 16 * 8));
      const int key = 16 * step + lane / 8 % 2 * 8 + lane % 8;
#pragma unroll
      for (int n = 0; n < 2; ++n) load_matrices<true>(b[n], v_at + key * ROW + (4 * warp + 2 * n + lane / 16 ^ key % 8) * 16);
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int i = 0; i < ROWS16; ++i) mma(o[i][n], p[i], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
    }
    __syncthreads();  // shared memory is free
  }
  let_next_kernel_start();

  constexpr int PART = ROWS * (DIMS / 2 + 1);  // words
  const int group = (blockIdx.z * gridDim.y + blockIdx.y) * (gridDim.x / SPLIT) + blockIdx.x / SPLIT;
  float* const parts = partial + size_t(group) * SPLIT * PART;
#pragma unroll
  for (int i = 0; i < ROWS16; ++i)
    for (int half = 0; half < 2; ++half) {
      const float sum = sum_of_row(l[i][half]);
      if (t == 0) of_warps[(16 * i + 8 * half + g) * WARPS + warp] = sum;
    }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < ROWS16; ++i)
    for (int half = 0; half < 2; ++half) {
      const int row = 16 * i + 8 * half + g;
      const float4* const sums = reinterpret_cast<const float4*>(of_warps + row * WARPS);
      const float4 a = sums[0], b = sums[1];
      const float sum = a.x + a.y + a.z + a.w + b.x + b.y + b.z + b.w;
      const float inverse = sum > 0 ? __fdividef(1.0f, sum) : 0.0f;  // 0: not one key
      unsigned* const to = reinterpret_cast<unsigned*>(parts + rank * PART) + row * (DIMS / 2) + 16 * warp + t;
#pragma unroll
      for (int n = 0; n < 4; ++n) to[4 * n] = pack2<Half>(o[i][n][2 * half] * inverse, o[i][n][2 * half + 1] * inverse);
      if (warp == 0 && t == 0) parts[rank * PART + ROWS * (DIMS / 2) + row] = sum > 0 ? m[i][half] + log2_fast(sum) : LOWEST;
    }
  if (!is_last_block(counters + group, SPLIT)) return;

  // A warp takes a row, 8 channels a lane; lane i weighs part i. All parts of AT_ONCE rows are asked for at once.
  constexpr int EACH = ROWS / WARPS, AT_ONCE = SPLIT <= 8 ? EACH : SPLIT <= 16 && EACH > 2 ? 2 : 1;
#pragma unroll 1
  for (int turn = 0; turn < EACH; turn += AT_ONCE) {
    float logarithm[AT_ONCE];
    uint4 values[AT_ONCE][SPLIT];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int row = warp + WARPS * (turn + i);
      logarithm[i] = lane < SPLIT ? __ldcg(parts + lane * PART + ROWS * (DIMS / 2) + row) : LOWEST;
#pragma unroll
      for (int part = 0; part < SPLIT; ++part)
        values[i][part] = __ldcg(reinterpret_cast<const uint4*>(parts + part * PART + row * (DIMS / 2)) + lane);
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int row = warp + WARPS * (turn + i);
      const float factor = exp2_fast(logarithm[i] - reduce_warp<true>(logarithm[i]));
      const float weight = __fdividef(factor, reduce_warp<false>(lane < SPLIT ? factor : 0.0f));
      float sum[8] = {};
#pragma unroll
      for (int part = 0; part < SPLIT; ++part) {
        const float w = __shfl_sync(~0u, weight, part);
        const unsigned words[4] = {values[i][part].x, values[i][part].y, values[i][part].z, values[i][part].w};
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[j] = fmaf(w, half_to_float(words[j / 2] >> 16 * (j % 2)), sum[j]);
      }
      const int at = first_row + row;
      if (row < rows)
        *reinterpret_cast<uint4*>(out + size_t(at / HEADS) * out_stride + at % HEADS * DIMS + 8 * lane) = {
            pack2<Bf16>(sum[0], sum[1]), pack2<Bf16>(sum[2], sum[3]), pack2<Bf16>(sum[4], sum[5]), pack2<Bf16>(sum[6], sum[7])};
    }
  }
}
