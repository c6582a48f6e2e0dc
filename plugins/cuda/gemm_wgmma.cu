// y[M, N] = x_q[M, K] (INT8) w[N, K]^T (INT4 or INT8) on SM 90, whose tensor cores reach full rate only through wgmma:
// D[64 rows of W, 8 TOKENS8 tokens] += A[64, 32] B[32, tokens], A in registers, B in shared memory.
//
// The weights are A: a warp's 16 rows are one packed tile ("wgmma" layout), decoded in registers while the previous
// instructions run. The activations are B, in slabs of K = 128 (plugins/layout.py, activation_slabs): the tokens of a
// tile are one contiguous piece, already in the 128-byte swizzle that the instruction reads, so one bulk copy brings
// them; another brings a warpgroup's weights of the step.
//
// Blocks are persistent and take tiles of 64 GROUPS rows x 8 TOKENS8 tokens in turn. A thread of its own keeps a ring
// of STAGES stages filled and runs on into the next tile while the GROUPS warpgroups are in the epilogue of the last.
// Where tiles are fewer than multiprocessors, SPLIT blocks, a cluster, share the K of a tile and add through
// distributed shared memory. For small M there is gemm_wgmma_small.cu; the epilogue for y of 16 bits is group_tile.cuh.
//
// EPILOGUE is one of common.cuh's Epilogue, or with SPLIT = 1 and y in bf16 ROTARY: of q, k, v rows as plugins/layout.py
// interleave_rotary has them, HEAD_DIMS a head, one KV head. q and k, rounded to bf16, are turned by the angles of their
// position; q goes to y, k and v to rows of their own. Token i has position first_position + i, with `past` + *past, and with
// to_cache its key and value go to the row of that number, else to row i.
//
// grid: SPLIT = 1: as many blocks as run at once, or fewer; else SPLIT * tiles, cluster SPLIT.
// block 128 GROUPS + 128 (GROUPS = 1: 160); shared memory STAGES * sizeof(Stage) + 4 GROUPS * 4 * staging_words(1),
// with SPLIT > 1 the larger of STAGES * sizeof(Stage) and 4 GROUPS * 4 * (RECEIVED + STAGED), one after the other.
#include "gemm_wgmma.cuh"
#include "group_tile.cuh"

// Three warpgroups have 168 registers a thread; the producer hands most of its own to the other two, who wait for them:
// 40 + 2 * 232 = 3 * 168. One more would never come.
template <int COUNT> __device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> __device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int BITS, int GROUPS, int TOKENS8, int STAGES, int SPLIT, int EPILOGUE, class Out>
__global__ void __launch_bounds__(128 * GROUPS + (GROUPS > 1 ? 128 : 32), 1)
gemm_wgmma(const signed char* x_q, const float* x_scale, const unsigned char* weight, const float* weight_scale,
           const float* bias, const Out* residual, Out* y, int* workspace, int tokens, int rows, int depth, Bf16* normed,
           const float* normed_gain, float* normed_squares, Out* k, Out* v, const float* cosine, const float* sine,
           const int* past, int kv_stride, int first_position, int to_cache) {
  constexpr int TOKENS = 8 * TOKENS8, WARPS = 4 * GROUPS, TILE_BYTES = Fragment<BITS>::bytes();
  struct Stage {
    unsigned char x[TOKENS * 128];               // swizzled; 1024-byte aligned
    unsigned char w[GROUPS][4][2][TILE_BYTES];  // of a warp: two tiles of K = 64
  };
  static_assert(sizeof(Stage) % 1024 == 0);
  extern __shared__ __align__(1024) unsigned char shared[];
  Stage* const stages = reinterpret_cast<Stage*>(shared);
  int* const staging = reinterpret_cast<int*>(stages + STAGES);
  __shared__ __align__(8) unsigned long long barriers[2 * STAGES];
  __shared__ unsigned long long arrived;
  const unsigned full = address_of(barriers), empty = full + 8 * STAGES;

  const int warp = threadIdx.x / 32;
  const int rank = blockIdx.x % SPLIT, block = blockIdx.x / SPLIT, blocks = gridDim.x / SPLIT;
  const int tile_steps = depth / 128, first_step = tile_steps * rank / SPLIT;
  const int steps = tile_steps * (rank + 1) / SPLIT - first_step;  // of this block
  const int token_blocks = (tokens + TOKENS - 1) / TOKENS;
  const int tiles = token_blocks * (rows / (64 * GROUPS));  // blocks that run together share weights

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      init_barrier(full + 8 * stage, 1);
      init_barrier(empty + 8 * stage, WARPS * ARRIVALS_OF_WARP);
    }
    let_others_see_barriers();
    if (SPLIT > 1) init(&arrived);
  }
  __syncthreads();
  if (SPLIT > 1 && threadIdx.x == 0) expect(&arrived, GROUPS * received_bytes<SPLIT, 1, TOKENS8>(rank));

  if (warp >= WARPS) {
    if (GROUPS > 1) give_registers<40>();
    if (threadIdx.x == 128 * GROUPS) {
      int stage = 0, phase = 0;
      auto advance = [&] {
        if (++stage == STAGES) stage = 0, phase ^= 1;
      };
      const unsigned long long once = evict_first();
      const unsigned char* w = nullptr;  // the weights of the next step
      auto seek_weights = [&](int tile) {
        w = weight + (size_t(tile / token_blocks) * GROUPS * tile_steps + first_step) * sizeof(Stage::w[0]);
      };
      auto fetch_weights = [&] {
        arrive_expecting(full + 8 * stage, sizeof(Stage));
        for (int group = 0; group < GROUPS; ++group)  // few copies: one costs its thread about 100 clocks
          copy(address_of(stages[stage].w[group]), w + size_t(group) * tile_steps * sizeof(Stage::w[0]),
               sizeof(Stage::w[0]), full + 8 * stage, once);
        w += sizeof(Stage::w[0]);
      };
      const int ahead = min(STAGES, steps);  // weights of the first tile need not wait for the activations
      seek_weights(block);
      for (int step = 0; step < ahead; ++step, advance()) fetch_weights();
      wait_for_inputs();
      stage = phase = 0;
      for (int tile = block; tile < tiles; tile += blocks) {
        if (tile != block) seek_weights(tile);
        const signed char* x = x_q + (size_t(first_step) * token_blocks + tile % token_blocks) * TOKENS * 128;
        for (int step = 0; step < steps; ++step, advance()) {
          if (tile != block || step >= ahead) {
            wait(empty + 8 * stage, phase ^ 1);  // passes at once in the first round
            fetch_weights();
          }
          copy(address_of(stages[stage].x), x, TOKENS * 128, full + 8 * stage);
          x += size_t(token_blocks) * TOKENS * 128;
        }
      }
    }
    let_next_kernel_start();
  } else {
    if (GROUPS > 1) take_registers<232>();
    using E = Epilogue<BITS, EPILOGUE, Out>;
    const E epilogue = {x_scale, weight_scale, bias, residual, y, tokens, rows, {normed, normed_gain, normed_squares}};
    constexpr bool IN_PLACE = SPLIT == 1 && sizeof(Out) == 2;  // store_group_tile works where the accumulators are
    constexpr bool TURNS = EPILOGUE == ROTARY;
    static_assert(!TURNS || (SPLIT == 1 && is_same<Out, Bf16>));
    constexpr bool EARLY = SPLIT == 1 && !IN_PLACE && TOKENS8 <= 16;  // there are registers for what the tile is added to
    constexpr int AHEAD = EARLY ? (TOKENS8 + batch_of(1) - 1) / batch_of(1) : 1;
    const int position = first_position + (TURNS && past ? *past : 0);
    const Heads<Out> heads = {k, v, cosine, sine, kv_stride, position, to_cache ? position : 0};
    int count = 0;  // steps taken so far
    wait_for_inputs();  // for the tokens' scales
    for (int tile = block; tile < tiles; tile += blocks) {
      const int first_token = tile % token_blocks * TOKENS, first_row = tile / token_blocks * 64 * GROUPS + 16 * warp;
      const TokenScales<IN_PLACE ? TOKENS8 : 1> scales(x_scale, first_token, tokens);
      const RowFactors<BITS> factors(weight_scale, bias, first_row);
      Turns<TURNS ? TOKENS8 : 1, Out> turns(heads, y, first_row - 16 * (warp % 4), tokens, rows);
      if (TURNS) turns.load_first(first_token);
      Batches<1, TOKENS8, AHEAD, E> batches;
      typename E::Columns columns;
      if (!IN_PLACE) columns = columns_of_lane<1>(first_row, epilogue);
      if (EARLY) batches.load_first(first_token, first_row, epilogue);
      int acc[1][TOKENS8][4] = {};
      auto release = [&](int count) { give_back(empty + 8 * (count % STAGES)); };
      auto consume = [&](int count, bool first, unsigned (&a)[4][4]) {
        const int stage = count % STAGES;
        wait(full + 8 * stage, count / STAGES & 1);
        multiply_step<BITS>(acc[0], stages[stage].w[warp / 4][warp % 4], stages[stage].x, a);
        if (!first) release(count - 1);  // its instructions are done, this step's are running
      };
      unsigned even[4][4], odd[4][4];  // the operands of running instructions must stay as they are
      int step = 0;
      for (; step + 1 < steps; step += 2) {
        consume(count + step, step == 0, even);
        consume(count + step + 1, false, odd);
      }
      if (step < steps) consume(count + step, step == 0, even);
      finish_steps();
      count += steps;
      release(count - 1);
      if (tile + blocks >= tiles) let_next_kernel_start();
      if constexpr (IN_PLACE)
        if (EPILOGUE != NONE || !residual) {
          int* const of_group = staging + warp / 4 * 4 * staging_words(1);
          const int row_of_group = first_row - 16 * (warp % 4);
          if (bias)
            store_group_tile<true>(acc[0], of_group, scales, factors, first_token, row_of_group, epilogue, turns);
          else
            store_group_tile<false>(acc[0], of_group, scales, factors, first_token, row_of_group, epilogue, turns);
          continue;
        }
      if (IN_PLACE) columns = columns_of_lane<1>(first_row, epilogue);
      if constexpr (SPLIT == 1) {
        if (!EARLY) batches.load_first(first_token, first_row, epilogue);
        store_warp_tile(acc, staging + warp * staging_words(1), first_token, first_row, epilogue, columns, batches);
      } else {  // one tile a block: the ring is free as soon as all warps are through
        asm volatile("bar.sync 1, %0;" ::"n"(128 * GROUPS) : "memory");
        arrive_in_cluster();
        int* const received = reinterpret_cast<int*>(shared) + warp * RECEIVED<SPLIT, TOKENS8>;
        int* const staged = received + (WARPS - warp) * RECEIVED<SPLIT, TOKENS8> + warp * STAGED<SPLIT, TOKENS8>;
        wait_for_cluster();
        send_parts<SPLIT, 1>(acc[0], received, 0, staged, &arrived, rank);
        const Share<SPLIT, TOKENS8, E> share(rank, first_token, first_row, epilogue);  // in the registers of acc
        store_share<SPLIT, 1>(received, staged, &arrived, first_token, first_row, epilogue, columns, share);
      }
    }
  }
}
