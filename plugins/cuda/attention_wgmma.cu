// attention.cu for SM 90 and heads of 256, with the same operands and results; wgmma reads a tile of K or V from shared
// memory once for 64 rows, mma.sync for 16.
//
// A block has 64 ROW_GROUPS rows (row = token * HEADS + head) and takes KEY_GROUPS * KEYS keys at a time through a ring
// of STAGES tiles; warpgroup (i, j) holds 64 rows and sees KEYS keys of each tile. HELPERS more warpgroups only copy
// and merge: one alone would be bound by its instructions. SPLIT blocks (a cluster) share the keys of the same rows;
// each sends what it found for a row, o / l in 16 bits and log2 of the sum of exponentials, to the block that finishes
// it.
//
// With cache_ready the kernels ahead do not write k and v, only q and own_k.., so that k and v are fetched while the
// kernel ahead still runs. Where one tile a block is all there is, STAGES = 1 leaves room beside that kernel's blocks.
//
// With OUTPUTS > 0 the output projection follows, which saves the launch of a GEMM. HEADS is 1 then, so that row = token, and
// blockIdx.y is the query head; all heads share K and V. The merged rows go to every block of the cluster, as bf16, and each
// block multiplies them by its OUTPUTS channels of the head's part of the weight (plugins/layout.py, pack_head_slabs), which it
// began to fetch before the kernel ahead had ended. `out` is then float32 [heads][tokens][out_stride], out_stride = SPLIT *
// OUTPUTS: what each head adds to the projection.
//
// In shared memory a matrix [rows, 256] is four slabs of 64 channels, [rows][128 bytes], each row's 16-byte pieces
// exchanged by piece ^ (row % 8), the 128-byte swizzle. For q and k this is the layout with channels, the depth, along
// the row; for v, whose depth is the keys, the transposed one: the same bytes and another descriptor.
//
// grid (ceil(tokens * HEADS / (64 ROW_GROUPS)) * SPLIT, kv heads or with OUTPUTS query heads, images), block 128 (ROW_GROUPS
// KEY_GROUPS + HELPERS), cluster (SPLIT, 1, 1), shared memory as in plugins/kernels/attention_wgmma.py.
#include "attention.cuh"
#include "cluster.cuh"
#include "wgmma_attention.cuh"  // generated, for 8 SCORES8 = KEYS and, if any, OUTPUTS
// void wgmma_scores(float (&s)[SCORES8][4], unsigned long long q, unsigned long long k, int add)
// void wgmma_values(float (&o)[32][4], const unsigned (&p)[4], unsigned long long v)

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

// A row of 256 values of 16 bits in shared memory has its 16-byte pieces exchanged too, by piece ^ (row % 8).
constexpr int ROW = 512;

// o / l of a warp's rows to `staging` [16][ROW]; a lane's rows are g and g + 8. The mean of values of v, it has their
// range, far from that of a half, whose 11 bits leave the error as it is.
__device__ inline void stage_rows(unsigned char* staging, const float (&o)[32][4], const float (&l)[2]) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float inverse = l[half] > 0 ? __fdividef(1.0f, l[half]) : 0.0f;  // 0: not one key
#pragma unroll
    for (int n = 0; n < 32; ++n)
      *reinterpret_cast<unsigned*>(staging + (g + 8 * half) * ROW + (n ^ g) * 16 + t * 4) =
          pack2<Half>(o[n][2 * half] * inverse, o[n][2 * half + 1] * inverse);
  }
}

// sum += weight * the 8 values of a piece.
__device__ inline void add_piece(float (&sum)[8], float weight, uint4 piece) {
  const unsigned words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
  for (int i = 0; i < 8; ++i)
    sum[i] = fmaf(weight, to_float(Half{static_cast<unsigned short>(words[i / 2] >> 16 * (i % 2))}), sum[i]);
}

// sum_i w_i o_i, w_i = exp2(a_i) / sum_j exp2(a_j), of the rows that this block finishes, of `rows` in the tile; a warp takes a
// row. pieces [SPLIT][SHARE][ROW] and logarithms a [SPLIT][SHARE] are what the blocks have sent. deliver(row, piece) gets the
// lane's 8 channels, 8 lane.., in bf16.
template <int ROWS, int SPLIT, class Deliver>
__device__ inline void merge_received(const unsigned char* pieces, const float* logarithms, int rank, int rows,
                                      Deliver deliver) {
  constexpr int SHARE = ROWS / SPLIT;
  const int lane = threadIdx.x % 32;
  for (int i = threadIdx.x / 32; i < SHARE; i += blockDim.x / 32) {
    const int of_block = rank * SHARE + i;
    if (of_block >= rows) break;
    float weights[SPLIT], greatest = LOWEST, total = 0;  // by every lane for itself, which is shorter than by shuffles
#pragma unroll
    for (int part = 0; part < SPLIT; ++part) greatest = fmaxf(greatest, weights[part] = logarithms[part * SHARE + i]);
#pragma unroll
    for (int part = 0; part < SPLIT; ++part) total += weights[part] = exp2_fast(weights[part] - greatest);
    const float inverse = __fdividef(1.0f, total);
    float sum[8] = {};
#pragma unroll
    for (int part = 0; part < SPLIT; ++part)
      add_piece(sum, weights[part] * inverse,
                *reinterpret_cast<const uint4*>(pieces + (part * SHARE + i) * ROW + (lane ^ of_block % 8) * 16));
    deliver(of_block, uint4{pack2<Bf16>(sum[0], sum[1]), pack2<Bf16>(sum[2], sum[3]), pack2<Bf16>(sum[4], sum[5]),
                            pack2<Bf16>(sum[6], sum[7])});
  }
}

// out[rows of the tile, OUTPUTS] = x[64, 256] weight[OUTPUTS, 256]^T by one warpgroup, both operands in shared memory.
template <int OUTPUTS>
__device__ inline void project(unsigned x, unsigned weight, int rows, float* out, int out_stride) {
  float y[OUTPUTS / 8][4];
  begin_wgmma();
#pragma unroll
  for (int step = 0; step < 16; ++step)
    wgmma_scores(y, descriptor(x + step / 4 * 64 * 128, 16) + step % 4 * 2,
                 descriptor(weight + step / 4 * OUTPUTS * 128, 16) + step % 4 * 2, step > 0);
  finish_wgmma(y);
  const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first + 8 * half;
    if (row < rows)
#pragma unroll
      for (int n = 0; n < OUTPUTS / 8; ++n)
        *reinterpret_cast<float2*>(out + row * out_stride + 8 * n + lane % 4 * 2) = {y[n][2 * half], y[n][2 * half + 1]};
  }
}

template <int HEADS, int ROW_GROUPS, int KEY_GROUPS, int KEYS, int STAGES, int SPLIT, int HELPERS, int OUTPUTS, class Out>
__global__ void __launch_bounds__(128 * (ROW_GROUPS * KEY_GROUPS + HELPERS), 1)
attention_wgmma(const Bf16* q, const Bf16* k, const Bf16* v, const Bf16* own_k, const Bf16* own_v, Out* out,
                const int* past, int tokens, int keys, int own_keys, int q_stride, int kv_stride, int own_stride,
                int out_stride, int cache_ready, float scale, const uint4* weight) {
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
  const int kv_head = OUTPUTS ? 0 : blockIdx.y;
  if (past) keys += *past;
  // A block takes its share of either kind of keys, so that all wait alike for the kernel that computes the own ones.
  const auto begin_of = [](int count, int rank) { return count * rank / SPLIT; };
  const int first_key = begin_of(keys, rank), cached_keys = begin_of(keys, rank + 1) - first_key;
  const int first_own = begin_of(own_keys, rank), all_keys = cached_keys + begin_of(own_keys, rank + 1) - first_own;
  const int tiles = max((all_keys + TILE - 1) / TILE, 1);  // perhaps one without keys
  q += size_t(blockIdx.z) * tokens * q_stride + blockIdx.y * HEADS * DIMS;
  k += size_t(blockIdx.z) * keys * kv_stride + kv_head * DIMS;
  v += size_t(blockIdx.z) * keys * kv_stride + kv_head * DIMS;

  const int piece = threadIdx.x % PIECES, row_of_thread = threadIdx.x / PIECES % STEP;  // a known range
  auto fetch = [&](int tile, bool cached, bool own) {  // rows of k and v: those in the cache; own rows, and zeros behind
    if (tile >= tiles) return;
    const unsigned stage = ring_address + tile % STAGES * 2 * MATRIX;
    const int before = tile * TILE, in_cache = max(min(cached_keys - before, TILE), 0);
    auto copy = [&](const Bf16* k, const Bf16* v, size_t at, int row, bool valid) {
      const unsigned to = stage + offset_of(TILE, row, piece);
      copy_async(to, k + at + 8 * piece, valid);
      copy_async(to + MATRIX, v + at + 8 * piece, valid);
    };
    if (cached)
#pragma unroll 4  // all of them would be more instructions than the caches for them like
      for (int row = row_of_thread; row < in_cache; row += STEP)
        copy(k, v, size_t(first_key + before + row) * kv_stride, row, true);
    if (own)
      for (int row = in_cache + row_of_thread; row < TILE; row += STEP) {
        const bool valid = before + row < all_keys;
        const size_t at = valid ? size_t(first_own + before + row - cached_keys) * own_stride : 0;
        copy(valid ? own_k : k, valid ? own_v : v, at, row, valid);
      }
  };

  __shared__ unsigned long long arrived, merged, fetched;  // all parts of this block's rows; all rows of o; the weight
  __shared__ float logarithms[ROWS];                       // [SPLIT][ROWS / SPLIT]
  constexpr int STAGED = ROWS * ROW, WEIGHT = OUTPUTS * DIMS * 2;  // bytes
  constexpr int RING = STAGES * 2 * MATRIX;
  unsigned char* const rows_of_o = ring + STAGED;  // [ROWS, 256], merged; by then the ring is free
  const unsigned weight_address = ring_address + (RING > 2 * STAGED ? RING : 2 * STAGED);
  if (SPLIT > 1 && threadIdx.x == 0) {
    init(&arrived);
    if (OUTPUTS) init(&merged), init(&fetched);
  }
  constexpr int AHEAD = STAGES > 1 ? STAGES - 1 : 1;  // tiles on their way
  if (cache_ready)
#pragma unroll
    for (int tile = 0; tile < AHEAD; ++tile) fetch(tile, true, false);
  if constexpr (OUTPUTS > 0) {
    __syncthreads();
    if (threadIdx.x == 0) {
      expect(&fetched, WEIGHT);
      copy(weight_address, weight + (size_t(blockIdx.y) * SPLIT + rank) * (WEIGHT / 16), WEIGHT, address_of(&fetched));
    }
  }
  wait_for_inputs();
  constexpr int TURN = STEP < 8 ? 8 / STEP : 1;  // so many times STEP rows further the swizzle is the same
  static_assert(ROWS % STEP == 0 && TILE % STEP == 0);
#pragma unroll
  for (int i = 0; i < ROWS / STEP; ++i) {
    const unsigned row = first_row + i * STEP + row_of_thread;
    copy_async(queries_address + offset_of(ROWS, i % TURN * STEP + row_of_thread, piece) + i / TURN * TURN * STEP * 128,
               q + (row / HEADS * q_stride + row % HEADS * DIMS + 8 * piece), row < rows);
  }
#pragma unroll
  for (int tile = 0; tile < AHEAD; ++tile) {
    fetch(tile, !cache_ready, true);
    commit_copies();
  }

  scale *= 1.4426950408889634f;  // exp(x) = exp2(x / ln 2)
  float o[DIMS / 8][4] = {}, m[2] = {LOWEST, LOWEST}, l[2] = {};
  for (int tile = 0; tile < tiles; ++tile) {
    unsigned char* const stage = ring + tile % STAGES * 2 * MATRIX;
    if (STAGES == 1 && tile > 0) {
      __syncthreads();
      fetch(tile, true, true);
      commit_copies();
    }
    wait_for_copies<AHEAD - 1>();
    let_tensor_cores_see();
    __syncthreads();  // this tile has landed for everyone, and everyone is done with the one refilled now
    if (STAGES > 1) {
      fetch(tile + AHEAD, true, true);
      commit_copies();
    }
    const bool is_last = tile + 1 == tiles;
    if (group >= GROUPS) {
      if (SPLIT > 1 && is_last) arrive_in_cluster();
      continue;
    }

    float s[KEYS / 8][4];
    const unsigned k_tile = address_of(stage) + key_group * KEYS * 128, v_tile = k_tile + MATRIX;
    begin_wgmma();
#pragma unroll
    for (int step = 0; step < DIMS / 16; ++step)  // 16 channels are 32 bytes
      wgmma_scores(s, descriptor(queries_address + step / 4 * ROWS * 128 + row_group * 64 * 128, 16) + step % 4 * 2,
                   descriptor(k_tile + step / 4 * TILE * 128, 16) + step % 4 * 2, step > 0);
    finish_wgmma(s);
    if (SPLIT > 1 && is_last) arrive_in_cluster();  // the place of q is free

    softmax(s, o, m, l, all_keys - tile * TILE - key_group * KEYS, scale);
    unsigned p[KEYS / 16][4];
#pragma unroll
    for (int j = 0; j < KEYS / 16; ++j) to_operand(s, j, p[j]);
    begin_wgmma();
#pragma unroll
    for (int j = 0; j < KEYS / 16; ++j) wgmma_values(o, p[j], descriptor(v_tile + j * 16 * 128, TILE * 128));
    finish_wgmma(o);
  }

  let_next_kernel_start();
  wait_for_copies<0>();
  __syncthreads();  // the ring is free
  if constexpr (SPLIT == 1) {
    out += size_t(blockIdx.z) * tokens * out_stride + blockIdx.y * HEADS * DIMS;
    float* const partial = reinterpret_cast<float*>(shared);
    if (group < GROUPS) deposit<ROWS>(partial, o, m, l, 64 * row_group + threadIdx.x / 32 % 4 * 16, key_group);
    __syncthreads();
    merge_in_block<DIMS, HEADS, ROWS, KEY_GROUPS>(partial, first_row, rows, out, out_stride);
  } else {
    static_assert(KEY_GROUPS == 1 && ROWS % SPLIT == 0 && SPLIT <= 32);
    static_assert(!OUTPUTS || (HEADS == 1 && ROW_GROUPS == 1 && HELPERS == 0));
    constexpr int SHARE = ROWS / SPLIT;
    unsigned char* const received = queries;  // [SPLIT][SHARE][ROW]
    if (threadIdx.x == 0) {
      expect(&arrived, ROWS * (ROW + int(sizeof(float))));
      if (OUTPUTS) expect(&merged, min(rows - first_row, ROWS) * ROW);
    }
    if (group < GROUPS) {
      const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 16;  // row of the block that is the warp's first
      unsigned char* const staging = ring + first * ROW;
      l[0] = sum_of_row(l[0]), l[1] = sum_of_row(l[1]);
      stage_rows(staging, o, l);
      __syncwarp();
      wait_for_cluster();
      auto place_of = [&](int row) { return rank * SHARE + row % SHARE; };
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const uint4 piece = *reinterpret_cast<const uint4*>(staging + i * ROW + lane * 16);
        send(piece, received + place_of(first + i) * ROW + lane * 16, &arrived, (first + i) / SHARE);
      }
      const int row = first + lane / 4 + lane % 4 * 8;  // of the four lanes that hold two rows, two send
      if (lane % 4 < 2)
        send(lane % 4 ? m[1] + log2_fast(l[1]) : m[0] + log2_fast(l[0]), logarithms + place_of(row), &arrived,
             row / SHARE);
    } else {
      wait_for_cluster();
    }
    wait(&arrived);
    const int of_tile = min(rows - first_row, ROWS), lane = threadIdx.x % 32;
    if constexpr (OUTPUTS == 0) {
      out += size_t(blockIdx.z) * tokens * out_stride + blockIdx.y * HEADS * DIMS;
      merge_received<ROWS, SPLIT>(received, logarithms, rank, of_tile, [&](int row, uint4 piece) {
        row += first_row;
        *reinterpret_cast<uint4*>(out + size_t(row / HEADS) * out_stride + row % HEADS * DIMS + 8 * lane) = piece;
      });
    } else {
      // A block that has sent its part of these rows is done with its ring, but for what it sends from there.
      merge_received<ROWS, SPLIT>(received, logarithms, rank, of_tile, [&](int row, uint4 piece) {
#pragma unroll
        for (int to = 0; to < SPLIT; ++to) send(piece, rows_of_o + offset_of(ROWS, row, lane), &merged, to);
      });
      wait(&fetched);
      wait(&merged);
      let_tensor_cores_see();
      out += (size_t(blockIdx.y) * tokens + first_row) * out_stride + rank * OUTPUTS;
      project<OUTPUTS>(address_of(rows_of_o), weight_address, of_tile, out, out_stride);
    }
  }
}
