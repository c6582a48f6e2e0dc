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
// distributed shared memory.
//
// grid: SPLIT = 1: as many blocks as run at once, or fewer; else SPLIT * tiles, cluster SPLIT.
// block 128 GROUPS + 128 (GROUPS = 1: 160); shared memory STAGES * sizeof(Stage) + 4 GROUPS * 4 * staging_words(1),
// with SPLIT > 1 STAGES * sizeof(Stage) and 4 GROUPS * 4 * (RECEIVED + STAGED), side by side where TOKENS8 <= 8, else
// in the same place.
#include "cluster.cuh"
#include "wgmma.cuh"  // generated: void wgmma(int (&d)[TOKENS8][4], const unsigned (&a)[4], unsigned long long b)

__device__ inline void init_barrier(unsigned barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
__device__ inline void arrive(unsigned barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void arrive_expecting(unsigned barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ inline void wait(unsigned barrier, int parity) {
  asm volatile("{.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;}"
               ::"r"(barrier), "r"(parity) : "memory");
}
__device__ inline void copy(unsigned to, const void* from, int bytes, unsigned barrier) {  // announced at the barrier
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}

// Matrix descriptor of B: address / 16, 1024 bytes from 8 tokens to the next 8, 128-byte swizzle. K = 32 further: + 2.
__device__ inline unsigned long long descriptor(unsigned address) {
  return (address >> 4 & 0x3FFF) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

// Three warpgroups share 64 K registers, 168 a thread; the producer hands most of its own to the other two.
template <int COUNT> __device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> __device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// store_warp_tile where SPLIT blocks hold parts of the sums: each finishes every SPLIT-th group of 8 tokens, GROUPS_OF_8
// at most, and the others send theirs, as the tensor cores left them: 16 bytes of each lane. RECEIVED and STAGED are
// words of a warp.
template <int SPLIT, int TOKENS8> constexpr int GROUPS_OF_8 = (TOKENS8 + SPLIT - 1) / SPLIT;
template <int SPLIT, int TOKENS8> constexpr int RECEIVED = GROUPS_OF_8<SPLIT, TOKENS8> * SPLIT * 32 * 4;
template <int SPLIT, int TOKENS8> constexpr int STAGED = GROUPS_OF_8<SPLIT, TOKENS8> * 8 * pitch(16);

template <int SPLIT, int TOKENS8, class Epilogue>
__device__ inline void store_split_tile(const int (&acc)[1][TOKENS8][4], int* received, int* staging,
                                        unsigned long long* arrived, int rank, int first_token, int first_row,
                                        const Epilogue& epilogue, const typename Epilogue::Columns& columns) {
  constexpr int COUNT = GROUPS_OF_8<SPLIT, TOKENS8>;
  const int lane = threadIdx.x % 32, row = Epilogue::first_row(lane % Epilogue::QUADS), n = first_row + row;
  const int token = lane / Epilogue::QUADS;  // with GEGLU half the lanes suffice
#pragma unroll
  for (int j = 0; j < TOKENS8; ++j) {
    const int (&d)[4] = acc[0][j];
    send(uint4{unsigned(d[0]), unsigned(d[1]), unsigned(d[2]), unsigned(d[3])},
         received + ((j / SPLIT * SPLIT + rank) * 32 + lane) * 4, arrived, j % SPLIT);
  }
  typename Epilogue::Inputs inputs[COUNT];
#pragma unroll
  for (int i = 0; i < COUNT; ++i) inputs[i] = epilogue.inputs(first_token + 8 * (rank + i * SPLIT) + token, n);
  wait(arrived);
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    int4 sum = {};
#pragma unroll
    for (int part = 0; part < SPLIT; ++part)
      sum = sum + *reinterpret_cast<const int4*>(received + ((i * SPLIT + part) * 32 + lane) * 4);
    stage_fragment<1>(staging + i * 8 * pitch(16), 0, {sum.x, sum.y, sum.z, sum.w});
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const int j = rank + i * SPLIT;
    const int* const at = staging + (8 * i + token) * pitch(16) + row;
    if (j < TOKENS8 && token < 8)
      epilogue.store(first_token + 8 * j + token, n, columns, inputs[i],
                     [at](int offset) { return *reinterpret_cast<const int4*>(at + offset); });
  }
}

template <int BITS, int GROUPS, int TOKENS8, int STAGES, int SPLIT, bool GEGLU, class Out>
__global__ void __launch_bounds__(128 * GROUPS + (GROUPS > 1 ? 128 : 32), 1)
gemm_wgmma(const signed char* x_slabs, const float* x_scale, const unsigned char* weight, const float* weight_scale,
           const float* bias, const Out* residual, Out* y, int* workspace, int tokens, int rows, int depth) {
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

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int rank = blockIdx.x % SPLIT, block = blockIdx.x / SPLIT, blocks = gridDim.x / SPLIT;
  const int tile_steps = depth / 128, first_step = tile_steps * rank / SPLIT;
  const int steps = tile_steps * (rank + 1) / SPLIT - first_step;  // of this block
  const int token_blocks = (tokens + TOKENS - 1) / TOKENS;
  const int tiles = token_blocks * (rows / (64 * GROUPS));  // blocks that run together share weights

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      init_barrier(full + 8 * stage, 1);
      init_barrier(empty + 8 * stage, WARPS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    if (SPLIT > 1) expect(&arrived, (TOKENS8 - rank + SPLIT - 1) / SPLIT * SPLIT * WARPS * 512);
  }
  __syncthreads();
  constexpr bool FEW = TOKENS8 <= 8;
  if (SPLIT > 1 && FEW) arrive_in_cluster();  // there is room for the others' sums beside the ring

  if (warp >= WARPS) {
    if (GROUPS > 1) give_registers<40>();
    if (threadIdx.x == 128 * GROUPS) {
      int stage = 0, phase = 0;
      auto advance = [&] {
        if (++stage == STAGES) stage = 0, phase ^= 1;
      };
      const unsigned char* w = nullptr;  // the weights of the next step
      auto seek_weights = [&](int tile) {
        w = weight + (size_t(tile / token_blocks) * GROUPS * tile_steps + first_step) * sizeof(Stage::w[0]);
      };
      auto fetch_weights = [&] {
        arrive_expecting(full + 8 * stage, sizeof(Stage));
        for (int group = 0; group < GROUPS; ++group)  // few copies: one costs its thread about 100 clocks
          copy(address_of(stages[stage].w[group]), w + size_t(group) * tile_steps * sizeof(Stage::w[0]),
               sizeof(Stage::w[0]), full + 8 * stage);
        w += sizeof(Stage::w[0]);
      };
      const int ahead = min(STAGES, steps);  // weights of the first tile need not wait for the activations
      seek_weights(block);
      for (int step = 0; step < ahead; ++step, advance()) fetch_weights();
      wait_for_inputs();
      stage = phase = 0;
      for (int tile = block; tile < tiles; tile += blocks) {
        if (tile != block) seek_weights(tile);
        const signed char* x = x_slabs + (size_t(first_step) * token_blocks + tile % token_blocks) * TOKENS * 128;
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
    using E = Epilogue<BITS, GEGLU, Out>;
    const E epilogue = {x_scale, weight_scale, bias, residual, y, tokens, rows};
    int count = 0;  // steps taken so far
    for (int tile = block; tile < tiles; tile += blocks) {
      const int first_token = tile % token_blocks * TOKENS, first_row = tile / token_blocks * 64 * GROUPS + 16 * warp;
      typename E::Columns columns;
      if (FEW) columns = columns_of_lane<1>(first_row, epilogue);  // many tokens leave no registers to load it ahead
      int acc[1][TOKENS8][4] = {};
      auto release = [&](int count) {
        if (lane == 0) arrive(empty + 8 * (count % STAGES));
      };
      auto consume = [&](int count, bool first, unsigned (&a)[4][4]) {
        const int stage = count % STAGES;
        wait(full + 8 * stage, count / STAGES & 1);
        const unsigned char(&mine)[2][TILE_BYTES] = stages[stage].w[warp / 4][warp % 4];
#pragma unroll
        for (int chunk = 0; chunk < 2; ++chunk) {
          Fragment<BITS> w;
#pragma unroll
          for (int part = 0; part < BITS / 4; ++part)
            w.raw[part] = *reinterpret_cast<const uint4*>(mine[chunk] + part * 512 + lane * 16);
          w.operand(0, a[2 * chunk]);
          w.operand(1, a[2 * chunk + 1]);
        }
        for (int k = 0; k < 4; ++k)  // the operands are computed here, not between the instructions below
          asm volatile("" : "+r"(a[k][0]), "+r"(a[k][1]), "+r"(a[k][2]), "+r"(a[k][3])::"memory");
        const unsigned long long b = descriptor(address_of(stages[stage].x));
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int k = 0; k < 4; ++k) wgmma(acc[0], a[k], b + 2 * k);
        asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 1;" ::: "memory");
        if (!first) release(count - 1);  // its instructions are done, this step's are running
      };
      unsigned even[4][4], odd[4][4];  // the operands of running instructions must stay as they are
      int step = 0;
      for (; step + 1 < steps; step += 2) {
        consume(count + step, step == 0, even);
        consume(count + step + 1, false, odd);
      }
      if (step < steps) consume(count + step, step == 0, even);
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
      count += steps;
      release(count - 1);
      if (tile + blocks >= tiles) let_next_kernel_start();
      wait_for_inputs();  // the epilogue reads the tokens' scales
      if (!FEW) columns = columns_of_lane<1>(first_row, epilogue);
      if constexpr (SPLIT == 1)
        store_warp_tile(acc, staging + warp * staging_words(1), first_token, first_row, epilogue, columns);
      else {  // one tile a block: the ring is free as soon as all warps are through
        if (!FEW) {
          asm volatile("bar.sync 1, %0;" ::"n"(128 * GROUPS) : "memory");
          arrive_in_cluster();
        }
        int* const received = (FEW ? staging : reinterpret_cast<int*>(shared)) + warp * RECEIVED<SPLIT, TOKENS8>;
        int* const staged = received + (WARPS - warp) * RECEIVED<SPLIT, TOKENS8> + warp * STAGED<SPLIT, TOKENS8>;
        wait_for_cluster();
        store_split_tile<SPLIT>(acc, received, staged, &arrived, rank, first_token, first_row, epilogue, columns);
      }
    }
  }
}
