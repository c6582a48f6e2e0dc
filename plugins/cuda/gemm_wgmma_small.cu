// gemm_wgmma.cu for small M, up to about 64, where the latency of each step takes the time and not bytes or arithmetic:
// the weights of a block are under way before the kernel ahead has ended, and its GROUPS warpgroups take the steps of
// K = 128 in turn, so that one decodes while another multiplies. SPLIT blocks, a cluster, share the K of a tile too. The
// accumulators of all of them meet as gemm_wgmma.cuh describes, each warpgroup finishing a part of the tokens.
//
// A block has one tile, 64 rows x 8 TOKENS8 tokens. A warp of its own fills the ring of STAGES stages, first a lane a
// stage; step s of the block is in stage s % STAGES and belongs to warpgroup s % GROUPS.
//
// grid (N / 64 * SPLIT, ceil(M / (8 TOKENS8))), cluster SPLIT, block 128 GROUPS + 32; shared memory STAGES *
// sizeof(Stage) + 4 GROUPS * 4 * (RECEIVED + STAGED).
#include "gemm_wgmma.cuh"

template <int BITS, int TOKENS8, int STAGES, int GROUPS, int SPLIT, int EPILOGUE, class Out>
__global__ void __launch_bounds__(128 * GROUPS + 32, 1)
gemm_wgmma_small(const signed char* x_q, const float* x_scale, const unsigned char* weight, const float* weight_scale,
                 const float* bias, const Out* residual, Out* y, int* workspace, int tokens, int rows, int depth,
                 Bf16* normed, const float* normed_gain, float* normed_squares) {
  constexpr int TOKENS = 8 * TOKENS8, WARPS = 4 * GROUPS, HOLDERS = SPLIT * GROUPS;
  struct Stage {
    unsigned char x[TOKENS * 128];                   // swizzled; 1024-byte aligned
    unsigned char w[4][2][Fragment<BITS>::bytes()];  // of a warp: two tiles of K = 64
  };
  static_assert(sizeof(Stage) % 1024 == 0 && STAGES <= 32);
  static_assert(STAGES % GROUPS == 0 && STAGES >= 2 * GROUPS);  // a stage is free when its warpgroup's next step is done
  extern __shared__ __align__(1024) unsigned char shared[];
  Stage* const stages = reinterpret_cast<Stage*>(shared);
  int* const sums = reinterpret_cast<int*>(stages + STAGES);  // [WARPS][RECEIVED], [WARPS][STAGED]
  __shared__ __align__(8) unsigned long long barriers[2 * STAGES];
  __shared__ unsigned long long arrived;
  const unsigned full = address_of(barriers), empty = full + 8 * STAGES;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp / 4;
  const int rank = blockIdx.x % SPLIT, tile = blockIdx.x / SPLIT, first_token = blockIdx.y * TOKENS;
  const int tile_steps = depth / 128, first_step = tile_steps * rank / SPLIT;
  const int steps = tile_steps * (rank + 1) / SPLIT - first_step;  // of this block

  if (warp == WARPS && lane < STAGES) {
    init_barrier(full + 8 * lane, 1);
    init_barrier(empty + 8 * lane, 4 * ARRIVALS_OF_WARP);  // the warps of its warpgroup
    if (SPLIT > 1 && lane == 0) init(&arrived);
    let_others_see_barriers();
  }
  __syncthreads();
  if (SPLIT > 1) arrive_in_cluster();

  if (warp == WARPS) {
    if (SPLIT > 1 && lane == 0) expect(&arrived, received_bytes<HOLDERS, GROUPS, TOKENS8>(rank));
    const unsigned char* const w = weight + (size_t(tile) * tile_steps + first_step) * sizeof(Stage::w);
    const signed char* const x = x_q + (size_t(first_step) * gridDim.y + blockIdx.y) * TOKENS * 128;
    const unsigned long long once = evict_first();
    auto fetch_weights = [&](int step) {
      const int stage = step % STAGES;
      arrive_expecting(full + 8 * stage, sizeof(Stage));
      copy(address_of(stages[stage].w), w + step * sizeof(Stage::w), sizeof(Stage::w), full + 8 * stage, once);
    };
    auto fetch_activations = [&](int step) {
      const int stage = step % STAGES;
      copy(address_of(stages[stage].x), x + size_t(step) * gridDim.y * TOKENS * 128, TOKENS * 128, full + 8 * stage);
    };
    if (lane < STAGES && lane < steps) fetch_weights(lane);
    wait_for_inputs();
    if (lane < STAGES && lane < steps) fetch_activations(lane);
    if (lane == 0)
      for (int step = STAGES; step < steps; ++step) {
        wait(empty + 8 * (step % STAGES), (step / STAGES & 1) ^ 1);
        fetch_weights(step);
        fetch_activations(step);
      }
    let_next_kernel_start();
    return;  // a block's barriers are used by its warpgroups only, from here on
  }

  using E = Epilogue<BITS, EPILOGUE, Out>;
  const E epilogue = {x_scale, weight_scale, bias, residual, y, tokens, rows, {normed, normed_gain, normed_squares}};
  const int part = rank * GROUPS + group, first_row = tile * 64 + 16 * (warp % 4);
  const typename E::Columns columns = columns_of_lane<1>(first_row, epilogue);
  wait_for_inputs();
  const Share<HOLDERS, TOKENS8, E> share(part, first_token, first_row, epilogue);  // later, it would be one more trip to L2

  int acc[TOKENS8][4] = {};
  auto consume = [&](int step, unsigned (&a)[4][4]) {
    const Stage& stage = stages[step % STAGES];
    wait(full + 8 * (step % STAGES), step / STAGES & 1);
    multiply_step<BITS>(acc, stage.w[warp % 4], stage.x, a);
    if (step >= GROUPS) give_back(empty + 8 * ((step - GROUPS) % STAGES));  // that step is multiplied
  };
  unsigned even[4][4], odd[4][4];
  int step = group;
  for (; step + GROUPS < steps; step += 2 * GROUPS) {
    consume(step, even);
    consume(step + GROUPS, odd);
  }
  if (step < steps) consume(step, even);
  finish_steps();

  int* const received = sums + warp * RECEIVED<HOLDERS, TOKENS8>;
  int* const staging = sums + WARPS * RECEIVED<HOLDERS, TOKENS8> + warp * STAGED<HOLDERS, TOKENS8>;
  if (SPLIT > 1) wait_for_cluster();
  send_parts<HOLDERS, GROUPS>(acc, received, 4 * RECEIVED<HOLDERS, TOKENS8>, staging, &arrived, share.part);
  store_share<HOLDERS, GROUPS>(received, staging, &arrived, first_token, first_row, epilogue, columns, share);
}
