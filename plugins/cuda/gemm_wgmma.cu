// y[M, N] = x_q[M, K] (INT8) w[N, K]^T (INT4 or INT8) for many tokens on SM 90, whose tensor cores reach full rate only
// through wgmma: D[64 rows of W, 8 TOKENS8 tokens] += A[64, 32] B[32, tokens], A in registers, B in shared memory.
//
// The weights are A: a warp's 16 rows are one packed tile ("wgmma" layout), decoded in registers while the previous
// instructions run. The activations are B, in slabs of K = 128 (plugins/layout.py, activation_slabs): the tokens of a
// block are one contiguous piece, already in the 128-byte swizzle that the instruction reads, so one bulk copy brings
// them. A warp of its own keeps a ring of STAGES stages filled; GROUPS warpgroups consume them.
//
// INT8 at full rate asks more of L2 than it delivers (a block of 128 rows x 208 tokens: 42 bytes a clock and SM against
// about 25), so the blocks of a cluster, which have different rows and the same tokens, each fetch a part of the
// activations and multicast it to all.
//
// grid (token blocks, N / (64 GROUPS)), block 128 GROUPS + 32, cluster (1, any, 1); shared memory STAGES * sizeof(Stage)
// + 4 GROUPS * staging_words(1) * 4.
#include "common.cuh"
#include "wgmma.cuh"  // generated: void wgmma(int (&d)[TOKENS8][4], const unsigned (&a)[4], unsigned long long b)

__device__ inline unsigned address_of(const void* shared) { return unsigned(__cvta_generic_to_shared(shared)); }

__device__ inline void init_barrier(unsigned barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
__device__ inline void arrive_expecting(unsigned barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Default (block) scope here and in `wait`: only shared memory that has been read is handed over, and the semantics of
// cluster scope would cost a full memory barrier a step (measured: 1,200 clocks).
__device__ inline void arrive_in(unsigned barrier, int rank) {  // at the same barrier of block `rank` of the cluster
  asm volatile("{.reg .u32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
               "mbarrier.arrive.shared::cluster.b64 _, [remote];}" ::"r"(barrier), "r"(rank) : "memory");
}
__device__ inline void wait(unsigned barrier, int parity) {
  asm volatile("{.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
               "@!done bra again;}" ::"r"(barrier), "r"(parity) : "memory");
}
__device__ inline void cluster_barrier() {  // of execution; orders no memory
  asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;" ::: "memory");
}

// Bulk copies that announce their bytes at `barrier`; the second one in every block of the cluster.
__device__ inline void copy(unsigned to, const void* from, int bytes, unsigned barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}
__device__ inline void copy_to_all(unsigned to, const void* from, int bytes, unsigned barrier, int blocks) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;"
               ::"r"(to), "l"(from), "r"(bytes), "r"(barrier), "h"(static_cast<unsigned short>((1 << blocks) - 1)) : "memory");
}

// Matrix descriptor of B: address / 16, 1024 bytes from 8 tokens to the next 8, 128-byte swizzle. K = 32 further: + 2.
__device__ inline unsigned long long descriptor(unsigned address) {
  return (address >> 4 & 0x3FFF) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

template <int BITS, int GROUPS, int TOKENS8, int STAGES, bool GEGLU, class Out>
__global__ void __launch_bounds__(128 * GROUPS + 32, 1)
gemm_wgmma(const signed char* x_slabs, const float* x_scale, const unsigned char* weight, const float* weight_scale,
           const float* bias, const Out* residual, Out* y, int* workspace, int tokens, int rows, int depth) {
  constexpr int TOKENS = 8 * TOKENS8, TILES = 4 * GROUPS, TILE_BYTES = Fragment<BITS>::bytes();
  struct Stage {
    unsigned char x[TOKENS * 128];                // swizzled; 1024-byte aligned
    unsigned char w[GROUPS][4][2][TILE_BYTES];  // of a warp: two tiles of K = 64
  };
  static_assert(sizeof(Stage) % 1024 == 0);
  extern __shared__ __align__(1024) unsigned char shared[];
  Stage* const stages = reinterpret_cast<Stage*>(shared);
  int* const staging = reinterpret_cast<int*>(stages + STAGES);
  __shared__ __align__(8) unsigned long long barriers[2 * STAGES];
  const unsigned full = address_of(barriers), empty = full + 8 * STAGES;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int blocks = [] { unsigned n; asm("mov.u32 %0, %%cluster_nctaid.y;" : "=r"(n)); return int(n); }();
  const int rank = [] { unsigned n; asm("mov.u32 %0, %%cluster_ctaid.y;" : "=r"(n)); return int(n); }();
  const int first_tile = blockIdx.y * TILES, steps = depth / 128;

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      init_barrier(full + 8 * stage, 1);
      init_barrier(empty + 8 * stage, TILES * blocks);  // every consuming warp of the cluster
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  cluster_barrier();

  if (warp == TILES) {
    if (lane == 0) {
      const size_t slab_bytes = size_t(gridDim.x) * TOKENS * 128;
      const int part = TOKENS / blocks * 128;
      auto fetch_weights = [&](int step) {
        const int stage = step % STAGES;
        arrive_expecting(full + 8 * stage, sizeof(Stage));
        for (int group = 0; group < GROUPS; ++group)  // few copies: one costs its thread about 100 clocks
          copy(address_of(stages[stage].w[group]), weight + (size_t(first_tile / 4 + group) * steps + step) * 8 * TILE_BYTES,
               8 * TILE_BYTES, full + 8 * stage);
      };
      auto fetch_activations = [&](int step) {
        const int stage = step % STAGES;
        const signed char* const from = x_slabs + step * slab_bytes + size_t(blockIdx.x) * TOKENS * 128 + rank * part;
        const unsigned to = address_of(stages[stage].x) + rank * part;
        blocks == 1 ? copy(to, from, part, full + 8 * stage) : copy_to_all(to, from, part, full + 8 * stage, blocks);
      };
      for (int step = 0; step < min(STAGES, steps); ++step) fetch_weights(step);
      wait_for_inputs();
      for (int step = 0; step < min(STAGES, steps); ++step) fetch_activations(step);
      for (int step = STAGES; step < steps; ++step) {
        wait(empty + 8 * (step % STAGES), step / STAGES - 1 & 1);
        fetch_weights(step);
        fetch_activations(step);
      }
    }
    __syncwarp();
    let_next_kernel_start();
  } else {
    int acc[1][TOKENS8][4] = {};
    auto release = [&](int step) {
      if (lane < blocks) arrive_in(empty + 8 * (step % STAGES), lane);
    };
    auto consume = [&](int step, unsigned (&a)[4][4]) {
      const int stage = step % STAGES;
      wait(full + 8 * stage, step / STAGES & 1);
#pragma unroll
      for (int chunk = 0; chunk < 2; ++chunk) {
        Fragment<BITS> w;
#pragma unroll
        for (int part = 0; part < BITS / 4; ++part)
          w.raw[part] = *reinterpret_cast<const uint4*>(stages[stage].w[warp / 4][warp % 4][chunk] + part * 512 + lane * 16);
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
      if (step) release(step - 1);  // its instructions are done, this step's are running
    };
    unsigned even[4][4], odd[4][4];  // the operands of running instructions must stay as they are
    int step = 0;
    for (; step + 1 < steps; step += 2) {
      consume(step, even);
      consume(step + 1, odd);
    }
    if (step < steps) consume(step, even);
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    let_next_kernel_start();
    wait_for_inputs();  // the epilogue reads the tokens' scales
    store_warp_tile(acc, staging + warp * staging_words(1), blockIdx.x * TOKENS, 16 * (first_tile + warp),
                    Epilogue<BITS, GEGLU, Out>{x_scale, weight_scale, bias, residual, y, tokens, rows});
  }
  cluster_barrier();  // no block leaves while others may still arrive at its barriers
}
