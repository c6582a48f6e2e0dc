// attention.cu for SM 90 and heads of 256, with the same operands and results; wgmma reads a tile of K or V from shared
// memory once for 64 rows, mma.sync for 16.
//
// A block has 64 ROW_GROUPS rows (row = token * HEADS + head) and takes KEY_GROUPS * KEYS keys at a time through a ring
// of STAGES tiles; warpgroup (i, j) holds 64 rows and sees KEYS keys of each tile. SPLIT blocks (a cluster) share the
// keys of the same rows. HELPERS more warpgroups only copy and merge: one alone would be bound by its instructions.
//
// In shared memory a matrix [rows, 256] is four slabs of 64 channels, [rows][128 bytes], each row's 16-byte pieces
// exchanged by piece ^ (row % 8), the 128-byte swizzle. For q and k this is the layout with channels, the depth, along
// the row; for v, whose depth is the keys, the transposed one: the same bytes and another descriptor.
//
// grid (ceil(tokens * HEADS / (64 ROW_GROUPS)) * SPLIT, kv heads, images), block 128 (ROW_GROUPS KEY_GROUPS + HELPERS),
// cluster (SPLIT, 1, 1), shared memory as in plugins/attention.py.
#include "attention.cuh"
#include "wgmma_attention.cuh"  // generated, for KEYS = 8 SCORES8
// void wgmma_scores(float (&s)[SCORES8][4], unsigned long long q, unsigned long long k, int add)
// void wgmma_values(float (&o)[32][4], const unsigned (&p)[4], unsigned long long v)

__device__ inline unsigned address_of(const void* shared) { return unsigned(__cvta_generic_to_shared(shared)); }

// Descriptors: address / 16, then bytes / 16 from one slab to the next (only v crosses slabs), 1024 bytes from 8 rows
// to the next 8, 128-byte swizzle.
__device__ inline unsigned long long descriptor(unsigned address, int slab_bytes) {
  return (address >> 4 & 0x3FFF) | (unsigned long long)(slab_bytes >> 4) << 16 | 64ull << 32 | 1ull << 62;
}

__device__ inline void let_tensor_cores_see() {  // what this thread has written to shared memory
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ inline void begin_wgmma() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
template <int N> __device__ inline void finish_wgmma(float (&d)[N][4]) {  // d is not touched before
  asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int n = 0; n < N; ++n) asm volatile("" : "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])::"memory");
}

// Byte offset of 16-byte piece 0..31 of a row in a matrix of `rows` rows.
__device__ inline int offset_of(int rows, int row, int piece) {
  return piece / 8 * rows * 128 + row * 128 + (piece % 8 ^ row % 8) * 16;
}

template <int HEADS, int ROW_GROUPS, int KEY_GROUPS, int KEYS, int STAGES, int SPLIT, int HELPERS>
__global__ void __launch_bounds__(128 * (ROW_GROUPS * KEY_GROUPS + HELPERS), 1)
attention_wgmma(const Bf16* q, const Bf16* k, const Bf16* v, const Bf16* own_k, const Bf16* own_v, Bf16* out,
                const int* past, int tokens, int keys, int own_keys, int q_stride, int kv_stride, int own_stride, int out_stride,
                float scale) {
  constexpr int GROUPS = ROW_GROUPS * KEY_GROUPS, THREADS = 128 * (GROUPS + HELPERS);
  constexpr int DIMS = 256, ROWS = 64 * ROW_GROUPS, TILE = KEY_GROUPS * KEYS;
  constexpr int PIECES = DIMS / 8, STEP = THREADS / PIECES;  // a thread copies a piece of every STEP-th row
  constexpr int MATRIX = TILE * DIMS * 2;                    // bytes of a tile of k or of v
  extern __shared__ __align__(1024) unsigned char shared[];
  unsigned char* const queries = shared;                         // [ROWS, 256]
  unsigned char* const ring = shared + ROWS * DIMS * 2;          // [STAGES][k, v] [TILE, 256]
  const unsigned queries_address = address_of(queries), ring_address = address_of(ring);

  const int group = threadIdx.x / 128, row_group = group % ROW_GROUPS, key_group = group / ROW_GROUPS;
  const int rank = blockIdx.x % SPLIT, first_row = blockIdx.x / SPLIT * ROWS, rows = tokens * HEADS;
  if (past) keys += *past;
  const int share = ((keys + own_keys + SPLIT - 1) / SPLIT + 15) / 16 * 16;
  const int begin = rank * share, end = min(begin + share, keys + own_keys), tiles = (end - begin + TILE - 1) / TILE;
  q += size_t(blockIdx.z) * tokens * q_stride + blockIdx.y * HEADS * DIMS;
  k += size_t(blockIdx.z) * keys * kv_stride + blockIdx.y * DIMS;
  v += size_t(blockIdx.z) * keys * kv_stride + blockIdx.y * DIMS;
  out += size_t(blockIdx.z) * tokens * out_stride + blockIdx.y * HEADS * DIMS;

  const int piece = threadIdx.x % PIECES, row_of_thread = threadIdx.x / PIECES;
  auto fetch = [&](int tile) {
    const int first_key = begin + tile * TILE;
    const unsigned stage = ring_address + tile % STAGES * 2 * MATRIX;
    if (tile < tiles && first_key + TILE <= min(end, keys)) {  // the usual case, in few instructions
      size_t at = size_t(first_key + row_of_thread) * kv_stride + 8 * piece;
#pragma unroll
      for (int row = 0; row < TILE; row += STEP, at += STEP * kv_stride) {
        const unsigned to = stage + offset_of(TILE, row + row_of_thread, piece);
        copy_async(to, k + at, true);
        copy_async(to + MATRIX, v + at, true);
      }
    } else if (tile < tiles) {
#pragma unroll
      for (int row = 0; row < TILE; row += STEP) {
        const int wanted = first_key + row + row_of_thread, key = min(wanted, end - 1);
        const size_t at = (key < keys ? size_t(key) * kv_stride : size_t(key - keys) * own_stride) + 8 * piece;
        const unsigned to = stage + offset_of(TILE, row + row_of_thread, piece);
        copy_async(to, (key < keys ? k : own_k) + at, wanted < end);
        copy_async(to + MATRIX, (key < keys ? v : own_v) + at, wanted < end);
      }
    }
    commit_copies();
  };

  wait_for_inputs();
#pragma unroll
  for (int base = 0; base < ROWS; base += STEP) {
    const int of_block = base + row_of_thread, row = min(first_row + of_block, rows - 1);
    copy_async(queries_address + offset_of(ROWS, of_block, piece),
               q + size_t(row / HEADS) * q_stride + row % HEADS * DIMS + 8 * piece, true);
  }
#pragma unroll
  for (int stage = 0; stage < STAGES - 1; ++stage) fetch(stage);

  scale *= 1.4426950408889634f;  // exp(x) = exp2(x / ln 2)
  float o[DIMS / 8][4] = {}, m[2] = {LOWEST, LOWEST}, l[2] = {};
  for (int tile = 0; tile < tiles; ++tile) {
    const int first_key = begin + tile * TILE;
    unsigned char* const stage = ring + tile % STAGES * 2 * MATRIX;
    wait_for_copies<STAGES - 2>();
    let_tensor_cores_see();
    __syncthreads();  // this tile has landed for everyone, and everyone is done with the one refilled now
    fetch(tile + STAGES - 1);
    if (group >= GROUPS) continue;

    float s[KEYS / 8][4];
    const unsigned k_tile = address_of(stage) + key_group * KEYS * 128, v_tile = k_tile + MATRIX;
    begin_wgmma();
#pragma unroll
    for (int step = 0; step < DIMS / 16; ++step)  // 16 channels are 32 bytes
      wgmma_scores(s, descriptor(queries_address + step / 4 * ROWS * 128 + row_group * 64 * 128, 16) + step % 4 * 2,
                   descriptor(k_tile + step / 4 * TILE * 128, 16) + step % 4 * 2, step > 0);
    finish_wgmma(s);

    softmax(s, o, m, l, end - first_key - key_group * KEYS, scale);
    unsigned p[KEYS / 16][4];
#pragma unroll
    for (int j = 0; j < KEYS / 16; ++j) to_operand(s, j, p[j]);
    begin_wgmma();
#pragma unroll
    for (int j = 0; j < KEYS / 16; ++j) wgmma_values(o, p[j], descriptor(v_tile + j * 16 * 128, TILE * 128));
    finish_wgmma(o);
  }

  let_next_kernel_start();
  wait_for_copies<0>();  // also where there was no tile
  __syncthreads();       // shared memory is free
  float* const partial = reinterpret_cast<float*>(shared);
  if (group < GROUPS) deposit<ROWS>(partial, o, m, l, 64 * row_group + threadIdx.x / 32 % 4 * 16, key_group);
  merge<DIMS, HEADS, ROWS, KEY_GROUPS, SPLIT>(partial, rank, first_row, rows, out, out_stride);
}
