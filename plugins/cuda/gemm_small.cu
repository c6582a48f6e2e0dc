// y[M, N] = x_q[M, K] (INT8) w[N, K]^T (INT4 or INT8) for small M, up to about 64: bound by the weights' bytes and by
// latency. mma.sync, SM 80 and up.
//
// Everything stays in registers until the end: a warp owns 16 ROWS16 rows of W, 8 TOKENS8 tokens and a share of K, and
// both operands are loaded from memory straight into the tensor cores' layout, 16 bytes a lane (weights are packed so,
// "direct" layout; of the activations a lane takes 16 consecutive bytes of one token). Nothing is shared between warps,
// so there is no barrier in the loop; STAGES chunks of K = 64 a warp are in flight.
//
// The WARPS of a block hold different parts of K and add their accumulators in shared memory. When N / (16 ROWS16) blocks
// are too few for the GPU, gridDim.y blocks split K further: on SM 90 they form a cluster and add through distributed
// shared memory; on older GPUs they add into `workspace` with integer atomics (exact in any order) and the last one
// finishes.
//
// grid (N / (16 ROWS16), split, ceil(M / (8 TOKENS8))), block 32 WARPS, cluster (1, split, 1) on SM 90,
// shared memory WARPS * 8 TOKENS8 * pitch(16 ROWS16) * 4 bytes.
#include "common.cuh"

// Reads written-by-others data past L1, which an overlapped launch may find stale.
__device__ inline uint4 load_activations(const signed char* from) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
  return v;
}

// Weights are read once and never change.
__device__ inline uint4 load_weights(const unsigned char* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
  return v;
}

template <int BITS, int ROWS16, int TOKENS8, int WARPS, int STAGES, int EPILOGUE, class Out>
__global__ void __launch_bounds__(32 * WARPS)
gemm_small(const signed char* x_q, const float* x_scale, const unsigned char* weight, const float* weight_scale,
           const float* bias, const Out* residual, Out* y, int* workspace, int tokens, int rows, int depth, Bf16* normed,
           const float* normed_gain, float* normed_squares) {
  using E = Epilogue<BITS, EPILOGUE, Out>;
  constexpr int ROWS = 16 * ROWS16, TOKENS = 8 * TOKENS8, PITCH = pitch(ROWS), THREADS = 32 * WARPS;
  constexpr int TILE_BYTES = Fragment<BITS>::bytes();
  extern __shared__ __align__(16) int partial[];  // [WARPS][TOKENS][PITCH]

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int split = gridDim.y, rank = blockIdx.y;
  const int chunks = depth / 64;
  const int begin = chunks * rank / split + warp, end = chunks * (rank + 1) / split;  // every WARPS-th of them
  const int first_token = blockIdx.z * TOKENS;

  const unsigned char* const weights = weight + size_t(blockIdx.x) * ROWS16 * chunks * TILE_BYTES + lane * 16;
  const signed char* const activations = x_q + size_t(first_token + lane / 4) * depth + lane % 4 * 16;

  Fragment<BITS> w[STAGES][ROWS16];
  uint4 x[STAGES][TOKENS8];
  int acc[ROWS16][TOKENS8][4] = {};

  auto fetch_weights = [&](int stage, int chunk) {
    if (chunk >= end) return;
#pragma unroll
    for (int i = 0; i < ROWS16; ++i)
#pragma unroll
      for (int part = 0; part < BITS / 4; ++part)
        w[stage][i].raw[part] = load_weights(weights + (size_t(i) * chunks + chunk) * TILE_BYTES + part * 512);
  };
  auto fetch_activations = [&](int stage, int chunk) {
    if (chunk >= end) return;
#pragma unroll
    for (int j = 0; j < TOKENS8; ++j) {
      const bool valid = first_token + 8 * j + lane / 4 < tokens;
      x[stage][j] = valid ? load_activations(activations + size_t(8 * j) * depth + chunk * 64) : uint4{0, 0, 0, 0};
    }
  };

  // This thread's share of the tile: quads rank * THREADS + thread, every split * THREADS, all in the same rows.
  constexpr int QUADS = E::QUADS * ROWS16, COUNT = (TOKENS * QUADS + THREADS - 1) / THREADS;
  static_assert(THREADS % QUADS == 0);
  const E epilogue = {x_scale, weight_scale, bias, residual, y, tokens, rows, {normed, normed_gain, normed_squares}};
  const int row = E::first_row(threadIdx.x % QUADS), n = blockIdx.x * ROWS + row;
  auto token_of = [&](int i) { return ((i * split + rank) * THREADS + int(threadIdx.x)) / QUADS; };

#pragma unroll
  for (int stage = 0; stage < STAGES; ++stage) fetch_weights(stage, begin + stage * WARPS);
#ifdef CHAIN
  const int rest = begin - warp + STAGES * WARPS;  // the chunks that come later
  for (int i = 0; i < ROWS16; ++i)
    prefetch_lines(weights - lane * 16 + (size_t(i) * chunks + rest) * TILE_BYTES, (end - rest) * TILE_BYTES, THREADS);
#endif
  const typename E::Columns columns = epilogue.columns(n);
  wait_for_inputs();
#pragma unroll
  for (int stage = 0; stage < STAGES; ++stage) fetch_activations(stage, begin + stage * WARPS);
  typename E::Inputs inputs[COUNT];
#pragma unroll
  for (int i = 0; i < COUNT; ++i)
    if (token_of(i) < TOKENS) inputs[i] = epilogue.inputs(first_token + token_of(i), n);

  for (int base = begin; base < end; base += STAGES * WARPS)
#pragma unroll
    for (int stage = 0; stage < STAGES; ++stage) {
      const int chunk = base + stage * WARPS;
      if (chunk >= end) break;
      multiply_chunk<BITS>(acc, w[stage], x[stage]);
      fetch_weights(stage, chunk + STAGES * WARPS);
      fetch_activations(stage, chunk + STAGES * WARPS);
    }

  let_next_kernel_start();
#pragma unroll
  for (int j = 0; j < TOKENS8; ++j)
#pragma unroll
    for (int i = 0; i < ROWS16; ++i) stage_fragment<ROWS16>(partial + (warp * TOKENS + 8 * j) * PITCH, i, acc[i][j]);
  __syncthreads();

  auto sum_of_warps = [&](int token, int row) {
    const int* const at = partial + token * PITCH + row;
    int4 sum = *reinterpret_cast<const int4*>(at);
#pragma unroll
    for (int other = 1; other < WARPS; ++other) sum = sum + *reinterpret_cast<const int4*>(at + other * TOKENS * PITCH);
    return sum;
  };
  auto store_share = [&](auto sum_of) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const int token = token_of(i);
      if (token < TOKENS)
        epilogue.store(first_token + token, n, columns, inputs[i],
                       [&](int offset) { return sum_of(token, row + offset); });
    }
  };

  if (split == 1) {
    store_share(sum_of_warps);
    return;
  }

  constexpr int ALL = TOKENS * ROWS / 4;
#if CLUSTER
  for (int quad = threadIdx.x; quad < ALL; quad += THREADS)  // in place: this thread alone reads these words
    *reinterpret_cast<int4*>(partial + quad / (ROWS / 4) * PITCH + quad % (ROWS / 4) * 4) =
        sum_of_warps(quad / (ROWS / 4), quad % (ROWS / 4) * 4);
  cluster_barrier();
  store_share([&](int token, int row) {
    int4 sum = load_remote(partial + token * PITCH + row, 0);
    for (int other = 1; other < split; ++other) sum = sum + load_remote(partial + token * PITCH + row, other);
    return sum;
  });
  cluster_wait_for_all();  // no block leaves while its shared memory is being read
#else
  // workspace: int32 [M padded, N] accumulators, then one counter a tile; all zero before and after.
  int* const sums = workspace + size_t(first_token) * rows + blockIdx.x * ROWS;
  int* const counter = workspace + size_t(gridDim.z) * TOKENS * rows + blockIdx.z * gridDim.x + blockIdx.x;
  for (int quad = threadIdx.x; quad < ALL; quad += THREADS) {
    const int token = quad / (ROWS / 4), first = quad % (ROWS / 4) * 4;
    const int4 sum = sum_of_warps(token, first);
    int* const at = sums + size_t(token) * rows + first;
    atomicAdd(at, sum.x), atomicAdd(at + 1, sum.y), atomicAdd(at + 2, sum.z), atomicAdd(at + 3, sum.w);
  }
  if (!is_last_block(counter, split)) return;
  for (int quad = threadIdx.x; quad < TOKENS * QUADS; quad += THREADS) {
    const int token = quad / QUADS;
    const typename E::Inputs in = epilogue.inputs(first_token + token, n);
    epilogue.store(first_token + token, n, columns, in, [&](int offset) {
      int4* const at = reinterpret_cast<int4*>(sums + size_t(token) * rows + row + offset);
      const int4 sum = __ldcg(at);
      *at = {0, 0, 0, 0};
      return sum;
    });
  }
#endif
}
