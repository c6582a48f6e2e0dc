// out = softmax(scale q k^T) v for every attention of the policy: bf16 in and out, float32 softmax, no mask (absent
// tokens were compacted away). mma.sync, SM 80 and up.
//
//   q, out     [tokens, kv heads, HEADS, DIMS], rows `q_stride` and `out_stride` apart; HEADS query heads share K and V
//   k, v       [keys, kv heads, DIMS], rows `kv_stride` apart
//   past       null, or the device's address of a number of keys to add to `keys`: how many there are is then known
//              only when the kernel runs (a prompt shorter than its buffer)
//   own_k..    `own_keys` more rows somewhere else: the suffix attends to the prefix's cache and to itself, in place
//   cache_ready  of use to attention_wgmma.cu alone
//   images     blockIdx.z: each has `tokens` rows of q and `keys` rows of k and v, after those of the image before
//
// Queries that share K and V are the rows of one matrix, row = token * HEADS + head. A block has 16 ROW_WARPS of them
// and takes KEY_WARPS * KEYS keys at a time through a ring of STAGES tiles in shared memory; warp (i, j) holds 16 rows
// and sees KEYS keys of each tile. SPLIT blocks share the keys of the same rows. Every warp keeps
//   m: what it subtracts in the exponent,  l = sum exp2(s - m),  o = sum exp2(s - m) v,
// and l and o of different keys are merged at the end, within the block and then over the SPLIT blocks, a cluster (SM 90), in
// float32. (attention_split.cu needs no cluster.)
//
// Rows in shared memory are PITCH elements apart, 8 more than DIMS rounded up to 16: an odd multiple of 16 bytes, so
// that ldmatrix finds the 8 rows of a matrix in different banks. The merge has rows of as many floats, 32 bytes modulo
// 64: its 8-byte stores are free of conflicts too, and m and l ride in the padding.
//
// grid (ceil(tokens * HEADS / (16 ROW_WARPS)) * SPLIT, kv heads, images), block 32 ROW_WARPS KEY_WARPS,
// cluster (SPLIT, 1, 1), shared memory as in plugins/kernels/attention.py.
#include "attention.cuh"

template <int DIMS, int HEADS, int ROW_WARPS, int KEY_WARPS, int KEYS, int STAGES, int SPLIT>
__global__ void __launch_bounds__(32 * ROW_WARPS * KEY_WARPS)
attention(const Bf16* q, const Bf16* k, const Bf16* v, const Bf16* own_k, const Bf16* own_v, Bf16* out, const int* past,
          int tokens, int keys, int own_keys, int q_stride, int kv_stride, int own_stride, int out_stride,
          int cache_ready, float scale) {
  constexpr int THREADS = 32 * ROW_WARPS * KEY_WARPS, ROWS = 16 * ROW_WARPS, TILE = KEY_WARPS * KEYS;
  constexpr int PADDED = (DIMS + 15) / 16 * 16, PITCH = PADDED + 8;
  extern __shared__ __align__(128) unsigned char shared[];
  Bf16* const ring = reinterpret_cast<Bf16*>(shared);  // [STAGES][K, V][TILE][PITCH]

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int row_warp = warp % ROW_WARPS, key_warp = warp / ROW_WARPS;
  const int rank = blockIdx.x % SPLIT, first_row = blockIdx.x / SPLIT * ROWS, rows = tokens * HEADS;
  if (past) keys += *past;
  const int share = ((keys + own_keys + SPLIT - 1) / SPLIT + 15) / 16 * 16;
  const int begin = rank * share, end = min(begin + share, keys + own_keys), tiles = (end - begin + TILE - 1) / TILE;
  q += size_t(blockIdx.z) * tokens * q_stride + blockIdx.y * HEADS * DIMS;
  k += size_t(blockIdx.z) * keys * kv_stride + blockIdx.y * DIMS;
  v += size_t(blockIdx.z) * keys * kv_stride + blockIdx.y * DIMS;
  out += size_t(blockIdx.z) * tokens * out_stride + blockIdx.y * HEADS * DIMS;

  auto fetch = [&](int tile) {
    if (tile < tiles) {
      constexpr int PIECES = DIMS / 8, COUNT = TILE * PIECES;
      const unsigned stage = unsigned(__cvta_generic_to_shared(ring + tile % STAGES * 2 * TILE * PITCH));
#pragma unroll
      for (int base = 0; base < COUNT; base += THREADS) {
        const int piece = base + threadIdx.x, row = piece / PIECES, column = piece % PIECES * 8;
        if (COUNT % THREADS && piece >= COUNT) break;
        const int wanted = begin + tile * TILE + row, key = min(wanted, end - 1);
        const size_t at = (key < keys ? size_t(key) * kv_stride : size_t(key - keys) * own_stride) + column;
        const unsigned to = stage + (row * PITCH + column) * int(sizeof(Bf16));
        copy_async(to, (key < keys ? k : own_k) + at, wanted < end);
        copy_async(to + TILE * PITCH * int(sizeof(Bf16)), (key < keys ? v : own_v) + at, wanted < end);
      }
    }
    commit_copies();
  };

  wait_for_inputs();
#pragma unroll
  for (int stage = 0; stage < STAGES - 1; ++stage) fetch(stage);
  if (DIMS < PADDED)  // the columns that round DIMS up have to be finite
    for (int row = threadIdx.x; row < STAGES * 2 * TILE; row += THREADS)
      *reinterpret_cast<uint4*>(ring + row * PITCH + DIMS) = {0, 0, 0, 0};

  unsigned query[PADDED / 16][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = first_row + 16 * row_warp + g + i % 2 * 8;
    const Bf16* const from = q + size_t(row / HEADS) * q_stride + row % HEADS * DIMS;
#pragma unroll
    for (int step = 0; step < PADDED / 16; ++step) {
      const int column = 16 * step + i / 2 * 8 + 2 * t;
      query[step][i] = row < rows && column < DIMS ? __ldcg(reinterpret_cast<const unsigned*>(from + column)) : 0;
    }
  }

  scale *= 1.4426950408889634f;  // exp(x) = exp2(x / ln 2)
  float o[PADDED / 8][4] = {}, m[2] = {LOWEST, LOWEST}, l[2] = {};
  for (int tile = 0; tile < tiles; ++tile) {
    wait_for_copies<STAGES - 2>();
    __syncthreads();  // this tile has landed for everyone, and everyone is done with the one refilled now
    fetch(tile + STAGES - 1);
    const Bf16* const k_tile = ring + (tile % STAGES * 2 * TILE + key_warp * KEYS) * PITCH;
    const Bf16* const v_tile = k_tile + TILE * PITCH;

    float s[KEYS / 8][4] = {};
    const Bf16* const k_row = k_tile + (lane / 16 * 8 + lane % 8) * PITCH + lane / 8 % 2 * 8;
#pragma unroll
    for (int step = 0; step < PADDED / 16; ++step)
#pragma unroll
      for (int j = 0; j < KEYS / 16; ++j) {
        unsigned b[4];
        load_matrices<false>(b, address_of(k_row + 16 * j * PITCH + 16 * step));
        mma(s[2 * j], query[step], b[0], b[1]);
        mma(s[2 * j + 1], query[step], b[2], b[3]);
      }

    softmax(s, o, m, l, end - begin - tile * TILE - key_warp * KEYS, scale);
    const Bf16* const v_row = v_tile + (lane / 8 % 2 * 8 + lane % 8) * PITCH + lane / 16 * 8;
#pragma unroll
    for (int j = 0; j < KEYS / 16; ++j) {
      unsigned p[4];
      to_operand(s, j, p);
#pragma unroll
      for (int n = 0; n < PADDED / 16; ++n) {
        unsigned b[4];
        load_matrices<true>(b, address_of(v_row + 16 * j * PITCH + 16 * n));
        mma(o[2 * n], p, b[0], b[1]);
        mma(o[2 * n + 1], p, b[2], b[3]);
      }
    }
  }

  let_next_kernel_start();
  __syncthreads();  // the ring is free
  float* const partial = reinterpret_cast<float*>(shared);
  deposit<ROWS>(partial, o, m, l, 16 * row_warp, key_warp);
  merge<DIMS, HEADS, ROWS, KEY_WARPS, SPLIT>(partial, rank, first_row, rows, out, out_stride);
}
