// y[M, N] = x_q[M, K] (INT8) w[N, K]^T (INT4 or INT8) for large M: bound by the tensor cores. mma.sync, SM 80 and up;
// on SM 90 gemm_wgmma.cu is faster.
//
// A block computes 16 ROWS16 WARPS_N rows x 8 TOKENS8 WARPS_M tokens. Both operands come through a ring of STAGES
// shared-memory stages of K = 128 filled with cp.async. A stage is
//   x: [2 chunks][tokens of the block][64 bytes]        w: [2 chunks][row tiles of the block][one packed 16 x 64 tile]
// A lane reads 16 bytes at 16 * lane of 8 consecutive tokens, or of a tile: every read and every write of shared memory
// is linear in the lane and free of bank conflicts with no swizzle. That is what the "direct" layout is for.
//
// grid (ceil(M / tokens of a block), N / rows of a block): blocks that share weights run together.
// shared memory STAGES * stage_bytes, or the epilogue's staging where that is more.
#include "common.cuh"

template <int BITS, int ROWS16, int TOKENS8, int WARPS_N, int WARPS_M, int STAGES, int EPILOGUE, class Out>
__global__ void __launch_bounds__(32 * WARPS_N * WARPS_M)
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
  const unsigned shared_address = unsigned(__cvta_generic_to_shared(shared));

  auto fetch = [&](int step) {
    if (step < steps) {
      const unsigned stage = shared_address + step % STAGES * STAGE_BYTES;
#pragma unroll
      for (int base = 0; base < X_BYTES / 16; base += THREADS) {
        const int piece = base + threadIdx.x, chunk = piece / (4 * TOKENS), token = first_token + piece / 4 % TOKENS;
        if (X_BYTES / 16 % THREADS && piece >= X_BYTES / 16) break;
        const bool valid = token < tokens;
        const signed char* const row = x_q + size_t(valid ? token : 0) * depth;
        copy_async(stage + 16 * piece, row + step * 128 + chunk * 64 + piece % 4 * 16, valid);
      }
      constexpr int PIECES = TILE_BYTES / 16;
#pragma unroll
      for (int base = 0; base < 2 * TILES * PIECES; base += THREADS) {
        const int piece = base + threadIdx.x, tile = piece / PIECES, chunk = tile / TILES;
        if (2 * TILES * PIECES % THREADS && piece >= 2 * TILES * PIECES) break;
        const size_t packed = size_t(first_tile + tile % TILES) * chunks + 2 * step + chunk;
        copy_async(stage + X_BYTES + 16 * piece, weight + packed * TILE_BYTES + piece % PIECES * 16, true);
      }
    }
    commit_copies();
  };

  wait_for_inputs();
  for (int step = 0; step < STAGES - 1; ++step) fetch(step);

  int acc[ROWS16][TOKENS8][4] = {};
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<STAGES - 2>();
    __syncthreads();  // this stage has landed for everyone, and everyone is done with the one refilled now
    fetch(step + STAGES - 1);
    const unsigned char* const stage = shared + step % STAGES * STAGE_BYTES;
#pragma unroll
    for (int chunk = 0; chunk < 2; ++chunk) {
      Fragment<BITS> w[ROWS16];
      uint4 x[TOKENS8];
      const unsigned char* const from_w = stage + X_BYTES + (chunk * TILES + warp_n * ROWS16) * TILE_BYTES + lane * 16;
      const unsigned char* const from_x = stage + (chunk * TOKENS + warp_m * 8 * TOKENS8) * 64 + lane * 16;
#pragma unroll
      for (int i = 0; i < ROWS16; ++i)
#pragma unroll
        for (int part = 0; part < BITS / 4; ++part)
          w[i].raw[part] = *reinterpret_cast<const uint4*>(from_w + i * TILE_BYTES + part * 512);
#pragma unroll
      for (int j = 0; j < TOKENS8; ++j) x[j] = *reinterpret_cast<const uint4*>(from_x + j * 512);
      multiply_chunk<BITS>(acc, w, x);
    }
  }

  let_next_kernel_start();
  wait_for_copies<0>();
  __syncthreads();
  int* const staging = reinterpret_cast<int*>(shared) + warp * staging_words(ROWS16);
  const Epilogue<BITS, EPILOGUE, Out> epilogue = {x_scale, weight_scale, bias, residual, y, tokens, rows,
                                                  {normed, normed_gain, normed_squares}};
  const int first_row = 16 * (first_tile + warp_n * ROWS16);
  store_warp_tile(acc, staging, first_token + warp_m * 8 * TOKENS8, first_row, epilogue,
                  columns_of_lane<ROWS16>(first_row, epilogue));
}
