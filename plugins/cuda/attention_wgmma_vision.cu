// attention.cu for SM 90, heads of 72 and up to 256 keys, SigLIP's, with the same operands and results; no cache, so
// neither `past` nor own keys.
//
// A block has 64 ROW_GROUPS rows (row = token * HEADS + head), 64 a warpgroup, and all keys at once, in PARTS. Each part
// has a maximum and an o of its own, merged in registers at the end: no part waits for another's maximum, and the tensor
// cores multiply for one part while the threads compute another's exponentials.
//
// In shared memory K and V have one layout: 9 columns of 16-byte pieces, [channel / 8][key]. The pieces of 8 keys are 128
// bytes in a row, which wgmma takes, without swizzle, as 8 keys x 8 channels for either product. From a column to the next
// it is an odd number of pieces, so that those of a key, which neighboring threads copy, fall into different banks.
// Behind V is a tenth column, of ones: its product is the sum of the exponentials, as they were rounded for o.
//
// 72 channels are 4.5 times wgmma's depth of 16: the last step takes channels 56 to 71, whose first half, of the step
// before, meets zeros in q.
//
// grid (ceil(tokens * HEADS / (64 ROW_GROUPS)), kv heads, images), block 128 ROW_GROUPS, shared memory as in
// plugins/kernels/attention_wgmma_vision.py.
#include "attention_wgmma.cuh"
#include "wgmma_vision.cuh"  // generated, for PART = 8 PART8 keys
// void wgmma_scores(float (&s)[PART8][4], const unsigned (&q)[4], unsigned long long k, int add)
// void wgmma_values(float (&o)[10][4], const unsigned (&p)[4], unsigned long long v, int add)

constexpr int DIMS = 72, KEYS = 256, PIECES = DIMS / 8, ROW = 2 * DIMS;  // ROW, COLUMN, MATRIX: bytes
constexpr int COLUMN = 16 * (KEYS + 1), MATRIX = PIECES * COLUMN;
constexpr int STEPS = 4;  // of 16 keys, whose exponentials the tensor cores are given at a time

// The first piece of step 0..4 of 16 channels.
__device__ constexpr int piece_of(int step) { return step < 4 ? 2 * step : PIECES - 2; }

// Descriptors: address / 16, then bytes / 16 from 8 to the next 8 along the depth (of 16), and across it. No swizzle.
__device__ inline unsigned long long descriptor(unsigned address, int along, int across) {
  return (address >> 4 & 0x3FFF) | (unsigned long long)(along >> 4) << 16 | (unsigned long long)(across >> 4) << 32;
}

// Calls body(row, piece) for every 32nd piece of ROWS rows: a warp's lanes take neighboring ones.
template <int ROWS, class Body> __device__ inline void for_each_piece(Body body) {
  const int lane = threadIdx.x % 32;
  unsigned row = lane / PIECES, piece = lane % PIECES;
#pragma unroll
  for (int left = ROWS * PIECES; left > 0; left -= 32) {
    if (left >= 32 || lane < left) body(row, piece);
    row += 32 / PIECES, piece += 32 % PIECES;
    if (piece >= PIECES) ++row, piece -= PIECES;
  }
}

template <int HEADS, int ROW_GROUPS, int PARTS>
__global__ void __launch_bounds__(128 * ROW_GROUPS, 2 / ROW_GROUPS)
attention_wgmma_vision(const Bf16* q, const Bf16* k, const Bf16* v, const Bf16* own_k, const Bf16* own_v, Bf16* out,
                       const int* past, int tokens, int keys, int own_keys, int q_stride, int kv_stride,
                       int own_stride, int out_stride, int cache_ready, float scale) {
  constexpr int PART = KEYS / PARTS, WARPS = 4 * ROW_GROUPS;
  extern __shared__ __align__(128) unsigned char shared[];  // K, V [MATRIX]; ones [COLUMN]; q, later out [][ROW]
  const unsigned k_at = address_of(shared), v_at = k_at + MATRIX;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const unsigned first_row = (blockIdx.x * WARPS + warp) * 16, rows = tokens * HEADS;  // of the warp's 16
  unsigned char* const staging = shared + 2 * MATRIX + COLUMN + warp * 16 * ROW;
  q += size_t(blockIdx.z) * tokens * q_stride + blockIdx.y * HEADS * DIMS;
  k += size_t(blockIdx.z) * keys * kv_stride + blockIdx.y * DIMS;
  v += size_t(blockIdx.z) * keys * kv_stride + blockIdx.y * DIMS;
  out += size_t(blockIdx.z) * tokens * out_stride + blockIdx.y * HEADS * DIMS;

  auto fetch = [&](const Bf16* from, unsigned to, int part) {
    for_each_piece<PART / WARPS>([&](unsigned row, unsigned piece) {
      const unsigned key = part * PART + warp * (PART / WARPS) + row;
      copy_async(to + piece * COLUMN + key * 16, from + (key * kv_stride + 8 * piece), key < keys);
    });
    commit_copies();
  };
  auto wait_for_part = [&] {  // the next of those fetched
    wait_for_copies<2 * PARTS - 1>();
    commit_copies();  // none, so that as many as before may be on their way
    let_tensor_cores_see();
    __syncthreads();
  };

#pragma unroll
  for (int i = 0; i < KEYS; i += 32 * WARPS)
    *reinterpret_cast<uint4*>(shared + 2 * MATRIX + (i + threadIdx.x) * 16) = {0x3F80, 0, 0, 0};  // 1 and zeros
  asm volatile("" : "+l"(q), "+l"(k), "+l"(v));  // computed here, not anew with every offset

  wait_for_inputs();
  for_each_piece<16>([&](unsigned i, unsigned piece) {
    const unsigned row = first_row + i;
    copy_async(address_of(staging) + i * ROW + piece * 16,
               q + (row / HEADS * q_stride + row % HEADS * DIMS + 8 * piece), row < rows);
  });
#pragma unroll
  for (int part = 0; part < PARTS; ++part) fetch(k, k_at, part);
#pragma unroll
  for (int part = 0; part < PARTS; ++part) fetch(v, v_at, part);

  unsigned query[5][4];
  float s[PARTS][PART / 8][4];
#pragma unroll
  for (int part = 0; part < PARTS; ++part) {
    wait_for_part();
    if (part == 0) {
#pragma unroll
      for (int step = 0; step < 5; ++step)
        load_matrices<false>(query[step], address_of(staging) + lane % 16 * ROW + (piece_of(step) + lane / 16) * 16);
      query[4][0] = query[4][1] = 0;
    }
    begin_wgmma();
#pragma unroll
    for (int step = 0; step < 5; ++step)
      wgmma_scores(s[part], query[step],
                   descriptor(k_at + piece_of(step) * COLUMN + part * PART * 16, COLUMN, 128), step > 0);
    commit_wgmma();
  }

  scale *= 1.4426950408889634f;  // exp(x) = exp2(x / ln 2)
  float o[PARTS][PIECES + 1][4], m[PARTS][2];
  unsigned p[PARTS][PART / 16][4];
#pragma unroll
  for (int part = 0; part < PARTS; ++part) {
    wait_for_wgmma<PARTS - 1>(s[part]);
    top_of_rows(s[part], m[part], keys - part * PART, scale);
    m[part][0] = fmaxf(m[part][0], LOWEST), m[part][1] = fmaxf(m[part][1], LOWEST);  // LOWEST: not one key
#pragma unroll
    for (int step = 0; step < PART / 16; step += STEPS) {
#pragma unroll
      for (int j = step; j < step + STEPS; ++j) {
#pragma unroll
        for (int i = 0; i < 8; ++i)
          s[part][2 * j + i / 4][i % 4] = exp2_fast(fmaf(s[part][2 * j + i / 4][i % 4], scale, -m[part][i / 2 % 2]));
        to_operand(s[part], j, p[part][j]);
      }
      if (step == 0) wait_for_part();
      begin_wgmma();
#pragma unroll
      for (int j = step; j < step + STEPS; ++j)
        wgmma_values(o[part], p[part][j], descriptor(v_at + (part * PART + 16 * j) * 16, 128, COLUMN), j > 0);
    }
    commit_wgmma();
  }
  let_next_kernel_start();
#pragma unroll
  for (int part = 0; part < PARTS; ++part) wait_for_wgmma<0>(o[part]);

#pragma unroll
  for (int half = 0; half < 2; ++half) {  // out = sum_i w_i o_i / sum_i w_i l_i, w_i = exp2(m_i - max m)
    float greatest = LOWEST, sum = 0, weights[PARTS];
#pragma unroll
    for (int part = 0; part < PARTS; ++part) greatest = fmaxf(greatest, m[part][half]);
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      weights[part] = exp2_fast(m[part][half] - greatest);
      sum = fmaf(weights[part], o[part][PIECES][2 * half], sum);
    }
    const float inverse = __fdividef(1.0f, __shfl_sync(~0u, sum, lane - t));  // of four lanes the first has it
#pragma unroll
    for (int part = 0; part < PARTS; ++part) weights[part] *= inverse;
#pragma unroll
    for (int n = 0; n < PIECES; ++n) {
      float low = 0, high = 0;
#pragma unroll
      for (int part = 0; part < PARTS; ++part) {
        low = fmaf(weights[part], o[part][n][2 * half], low);
        high = fmaf(weights[part], o[part][n][2 * half + 1], high);
      }
      *reinterpret_cast<unsigned*>(staging + (g + 8 * half) * ROW + n * 16 + t * 4) = pack2<Bf16>(low, high);
    }
  }
  __syncwarp();
  for_each_piece<16>([&](unsigned i, unsigned piece) {
    const unsigned row = first_row + i;
    if (row < rows)
      *reinterpret_cast<uint4*>(out + (row / HEADS * out_stride + row % HEADS * DIMS + 8 * piece)) =
          *reinterpret_cast<const uint4*>(staging + i * ROW + piece * 16);
  });
}
