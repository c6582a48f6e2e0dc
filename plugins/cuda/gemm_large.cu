// y[M, N] = x_q[M, K] (INT8) w[N, K]^T (INT4 or INT8) for large M: bound by the tensor cores. mma.sync, SM 80 and up;
// on SM 90 gemm_wgmma.cu is faster.
//
// A block computes 16 ROWS16 WARPS_N rows x 8 TOKENS8 WARPS_M tokens. Both operands come through a ring of STAGES
// shared-memory stages of K = 128 filled with cp.async. A stage is
//   x: [2 chunks][tokens of the block][64 bytes]        w: [2 chunks][row tiles of the block][one packed 16 x 64 tile]
// A lane reads 16 bytes at 16 * lane of 8 consecutive tokens, or of a tile: every read and every write of shared memory
// is linear in the lane and free of bank conflicts with no swizzle. That is what the "direct" layout is for.
//
// Warps never wait for each other at a barrier of the block, which would leave the tensor cores idle at every stage. A stage has
// two barriers in shared memory: `full`, on which the copies of all threads arrive, and `empty`, on which warps arrive when they
// have its last operands in registers. It is refilled half a chunk later, by when all of them have.
//
// grid (ceil(M / tokens of a block), N / rows of a block): blocks that share weights run together.
// shared memory STAGES * stage_bytes, or the epilogue's staging where that is more; and the barriers.
#include "common.cuh"

__device__ inline void arrive_when_copied(unsigned barrier) {  // when all copies that this thread has begun have landed
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void wait(unsigned barrier, int parity) {
  asm volatile("{.reg .pred done;\nagain:\nmbarrier.test_wait.parity.shared.b64 done, [%0], %1;\n@!done bra again;}"
               ::"r"(barrier), "r"(parity) : "memory");
}

// Registers that a thread needs: accumulators, a chunk's tokens and weights, both halves of these unpacked, and addresses.
constexpr int registers(int bits, int rows16, int tokens8) {
  return 4 * rows16 * tokens8 + 4 * tokens8 + (bits + 8) * rows16 + 24;
}

template <int BITS, int ROWS16, int TOKENS8, int WARPS_N, int WARPS_M, int STAGES, int EPILOGUE, class Out>
__global__ void
__launch_bounds__(32 * WARPS_N * WARPS_M, (1 << 16) / (32 * WARPS_N * WARPS_M * registers(BITS, ROWS16, TOKENS8)))
gemm_large(const signed char* x_q, const float* x_scale, const unsigned char* weight, const float* weight_scale,
           const float* bias, const Out* residual, Out* y, int* workspace, int tokens, int rows, int depth, Bf16* normed,
           const float* normed_gain, float* normed_squares) {
  constexpr int THREADS = 32 * WARPS_N * WARPS_M, TOKENS = 8 * TOKENS8 * WARPS_M, TILES = ROWS16 * WARPS_N;
  constexpr int TILE_BYTES = Fragment<BITS>::bytes();
  constexpr int X_BYTES = 2 * TOKENS * 64, STAGE_BYTES = X_BYTES + 2 * TILES * TILE_BYTES;
  extern __shared__ __align__(128) unsigned char shared[];

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_n = warp % WARPS_N, warp_m = warp / WARPS_N;
  const int first_token = blockIdx.x * TOKENS, first_tile = blockIdx.y * TILES;
  const int chunks = depth / 64, steps = chunks / 2;
  const unsigned shared_address = address_of(shared);

  const unsigned barriers = shared_address + STAGES * STAGE_BYTES;
  auto full = [&](int slot) { return barriers + slot * 16; };
  auto empty = [&](int slot) { return full(slot) + 8; };
  if (threadIdx.x < STAGES) init_barrier(full(threadIdx.x), THREADS), init_barrier(empty(threadIdx.x), WARPS_N * WARPS_M * ARRIVALS_OF_WARP);
  __syncthreads();

  // Four threads copy a token's chunk, a warp a tile.
  constexpr int AT_ONCE = THREADS / 4, WARPS = THREADS / 32, PARTS = BITS / 4;
  const int own_token = threadIdx.x / 4;
  const signed char* const from_x = x_q + size_t(first_token + own_token) * depth + threadIdx.x % 4 * 16;
  const unsigned char* const from_w = weight + size_t(first_tile + warp) * chunks * TILE_BYTES + lane * 16;
  auto fetch = [&](int step, int slot) {
    const unsigned stage = shared_address + slot * STAGE_BYTES;
#pragma unroll
    for (int token = 0; token < TOKENS; token += AT_ONCE)
#pragma unroll
      for (int chunk = 0; chunk < 2; ++chunk) {
        if (TOKENS % AT_ONCE && token + own_token >= TOKENS) break;
        copy_async(stage + ((chunk * TOKENS + token) * 4 + threadIdx.x) * 16, from_x + token * depth + step * 128 + chunk * 64,
                   first_token + token + own_token < tokens);
      }
#pragma unroll
    for (int tile = 0; tile < TILES; tile += WARPS)
#pragma unroll
      for (int chunk = 0; chunk < 2; ++chunk)
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
          if (TILES % WARPS && tile + warp >= TILES) break;
          copy_async(stage + X_BYTES + (chunk * TILES + tile + warp) * TILE_BYTES + part * 512 + lane * 16,
                     from_w + (size_t(tile) * chunks + 2 * step + chunk) * TILE_BYTES + part * 512, true);
        }
    arrive_when_copied(full(slot));
  };

  // A chunk's operands are read while the chunk before it is multiplied, each register as soon as its last product is under
  // way: the tensor cores do not wait for shared memory either.
  Fragment<BITS> w[ROWS16];
  uint4 x[TOKENS8];
  auto read_weights = [&](const unsigned char* stage, int chunk) {
    const unsigned char* const from = stage + X_BYTES + (chunk * TILES + warp_n * ROWS16) * TILE_BYTES + lane * 16;
#pragma unroll
    for (int i = 0; i < ROWS16; ++i)
#pragma unroll
      for (int part = 0; part < BITS / 4; ++part)
        w[i].raw[part] = *reinterpret_cast<const uint4*>(from + i * TILE_BYTES + part * 512);
  };
  auto read_tokens = [&](const unsigned char* stage, int chunk, int j) {
    const unsigned char* const from = stage + (chunk * TOKENS + warp_m * 8 * TOKENS8) * 64 + lane * 16;
    x[j] = *reinterpret_cast<const uint4*>(from + j * 512);
  };
  auto stage_of = [&](int slot) { return shared + slot * STAGE_BYTES; };

  wait_for_inputs();
  for (int step = 0; step < min(STAGES, steps); ++step) fetch(step, step);
  wait(full(0), 0);
  read_weights(shared, 0);
#pragma unroll
  for (int j = 0; j < TOKENS8; ++j) read_tokens(shared, 0, j);

  int acc[ROWS16][TOKENS8][4] = {};
  unsigned a[2][ROWS16][4];  // of both halves of a chunk: one is unpacked while the other is multiplied
  auto unpack = [&](int half, int i) { w[i].operand(half, a[half][i]); };
  auto multiply_first = [&] {
#pragma unroll
    for (int j = 0; j < TOKENS8; ++j)
#pragma unroll
      for (int i = 0; i < ROWS16; ++i) {
        mma(acc[i][j], a[0][i], x[j].x, x[j].y);
        if (j == 0) unpack(1, i);
      }
  };
  // The second half's registers take the chunk after it.
  auto multiply_second = [&](const unsigned char* stage, int chunk) {
    read_weights(stage, chunk);
#pragma unroll
    for (int j = 0; j < TOKENS8; ++j) {
#pragma unroll
      for (int i = 0; i < ROWS16; ++i) {
        mma(acc[i][j], a[1][i], x[j].z, x[j].w);
        if (j == TOKENS8 - 1) unpack(0, i);
      }
      read_tokens(stage, chunk, j);
    }
  };
  for (int i = 0; i < ROWS16; ++i) unpack(0, i);
  int slot = 0, parity = 0;  // of the stage in use; how often, modulo two, it has been filled before
  for (int step = 0; step < steps; ++step) {
    multiply_first();
    multiply_second(stage_of(slot), 1);
    give_back(empty(slot));
    multiply_first();
    if (step + STAGES < steps) {
      wait(empty(slot), parity);
      fetch(step + STAGES, slot);
    }
    slot = slot + 1 < STAGES ? slot + 1 : 0, parity ^= slot == 0;
    if (step + 1 < steps) wait(full(slot), parity);
    multiply_second(stage_of(slot), 0);  // behind the last chunk: whatever is there
  }

  let_next_kernel_start();
  __syncthreads();  // the ring is free
  int* const staging = reinterpret_cast<int*>(shared) + warp * staging_words(ROWS16);
  using E = Epilogue<BITS, EPILOGUE, Out>;
  const E epilogue = {x_scale, weight_scale, bias, residual, y, tokens, rows, {normed, normed_gain, normed_squares}};
  const int first_row = 16 * (first_tile + warp_n * ROWS16), first_token_of_warp = first_token + warp_m * 8 * TOKENS8;
  const typename E::Columns columns = columns_of_lane<ROWS16>(first_row, epilogue);
  Batches<ROWS16, TOKENS8, 1, E> batches;
  batches.load_first(first_token_of_warp, first_row, epilogue);
  store_warp_tile(acc, staging, first_token_of_warp, first_row, epilogue, columns, batches);
}
