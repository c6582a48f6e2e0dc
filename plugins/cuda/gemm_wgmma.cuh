// What the GEMMs with wgmma share: the bulk copies of a ring and how its stages are given back, one step of K = 128,
// accumulators of several holders.
#pragma once
#include "cluster.cuh"
#include "wgmma.cuh"  // generated: void wgmma(int (&d)[TOKENS8][4], const unsigned (&a)[4], unsigned long long b)

__device__ inline void copy(unsigned to, const void* from, int bytes, unsigned barrier, unsigned long long policy) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
               ::"r"(to), "l"(from), "r"(bytes), "r"(barrier), "l"(policy) : "memory");
}

// Matrix descriptor of B: address / 16, 1024 bytes from 8 tokens to the next 8, 128-byte swizzle. K = 32 further: + 2.
__device__ inline unsigned long long descriptor(unsigned address) {
  return (address >> 4 & 0x3FFF) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

// acc[64 rows, tokens] += a step of K = 128: `w` are a warp's two packed tiles of K = 64, `x` the slab of activations.
// `a` holds the operands of running instructions and must stay as it is until they are done, so callers alternate
// between two. Returns when the step before is done.
template <int BITS, int TOKENS8>
__device__ inline void multiply_step(int (&acc)[TOKENS8][4], const unsigned char (&w)[2][Fragment<BITS>::bytes()],
                                     const unsigned char* x, unsigned (&a)[4][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int chunk = 0; chunk < 2; ++chunk) {
    Fragment<BITS> tile;
#pragma unroll
    for (int part = 0; part < BITS / 4; ++part)
      tile.raw[part] = *reinterpret_cast<const uint4*>(w[chunk] + part * 512 + lane * 16);
    tile.operand(0, a[2 * chunk]);
    tile.operand(1, a[2 * chunk + 1]);
  }
  for (int k = 0; k < 4; ++k)  // the operands are computed here, not between the instructions below
    asm volatile("" : "+r"(a[k][0]), "+r"(a[k][1]), "+r"(a[k][2]), "+r"(a[k][3])::"memory");
  const unsigned long long b = descriptor(address_of(x));
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
  for (int k = 0; k < 4; ++k) wgmma(acc, a[k], b + 2 * k);
  asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 1;" ::: "memory");
}
__device__ inline void finish_steps() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// store_warp_tile where HOLDERS warps hold parts of the same accumulators, GROUPS of them in each block of a cluster.
// Holder `part`, which is warpgroup part % GROUPS of block part / GROUPS, finishes every HOLDERS-th group of 8 tokens; the
// others send theirs, as the tensor cores left them, 16 bytes of each lane. A warp has room for RECEIVED words of them
// at `received`, its namesake in the next warpgroup `apart` words further, and STAGED words at `staging`.
template <int HOLDERS, int TOKENS8> constexpr int GROUPS_OF_8 = (TOKENS8 + HOLDERS - 1) / HOLDERS;
template <int HOLDERS, int TOKENS8> constexpr int RECEIVED =
    HOLDERS == 1 ? 0 : GROUPS_OF_8<HOLDERS, TOKENS8> * HOLDERS * 32 * 4;
template <int HOLDERS, int TOKENS8> constexpr int STAGED = GROUPS_OF_8<HOLDERS, TOKENS8> * 8 * pitch(16);
// Bytes that come to a block, for expect().
template <int HOLDERS, int GROUPS, int TOKENS8> __device__ inline int received_bytes(int rank) {
  int groups_of_8 = 0;
  for (int group = 0; group < GROUPS; ++group)
    groups_of_8 += (TOKENS8 - (rank * GROUPS + group) + HOLDERS - 1) / HOLDERS;
  return groups_of_8 * HOLDERS * 4 * 512;
}

// The quads that a lane of holder `part` finishes: its i-th is in token token(i) of the tile, staged in row of_warp(i).
template <int HOLDERS, int TOKENS8, class Epilogue> struct Share {
  static constexpr int ITEMS = (GROUPS_OF_8<HOLDERS, TOKENS8> * 8 * Epilogue::QUADS + 31) / 32;
  typename Epilogue::Inputs inputs[ITEMS];
  int part, lane = threadIdx.x % 32, row = Epilogue::first_row(threadIdx.x % 32 % Epilogue::QUADS);

  __device__ int of_warp(int i) const { return (lane + 32 * i) / Epilogue::QUADS; }
  __device__ int token(int i) const { return 8 * (part + of_warp(i) / 8 * HOLDERS) + of_warp(i) % 8; }

  // What the epilogue needs of other kernels; after wait_for_inputs.
  __device__ Share(int part, int first_token, int first_row, const Epilogue& epilogue) : part(part) {
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) inputs[i] = epilogue.inputs(first_token + token(i), first_row + row);
  }
};

// Before: everyone has room for what it receives (a cluster: wait_for_cluster).
template <int HOLDERS, int GROUPS, int TOKENS8>
__device__ inline void send_parts(const int (&acc)[TOKENS8][4], int* received, int apart, int* staging,
                                  unsigned long long* arrived, int part) {
  const int lane = threadIdx.x % 32;
  if constexpr (HOLDERS == 1) {
#pragma unroll
    for (int j = 0; j < TOKENS8; ++j) stage_fragment<1>(staging + j * 8 * pitch(16), 0, acc[j]);
  } else {
    constexpr bool ALONE = HOLDERS == GROUPS;  // no cluster, for which alone `send` is an instruction
    int* const of_first_group = received - part % GROUPS * apart;
#pragma unroll
    for (int j = 0; j < TOKENS8; ++j) {
      const int (&d)[4] = acc[j];
      const int holder = j % HOLDERS;
      int* const to = of_first_group + holder % GROUPS * apart + ((j / HOLDERS * HOLDERS + part) * 32 + lane) * 4;
      if (ALONE)
        *reinterpret_cast<int4*>(to) = {d[0], d[1], d[2], d[3]};
      else
        send(uint4{unsigned(d[0]), unsigned(d[1]), unsigned(d[2]), unsigned(d[3])}, to, arrived, holder / GROUPS);
    }
  }
}

template <int HOLDERS, int GROUPS, int TOKENS8, class Epilogue>
__device__ inline void store_share(const int* received, int* staging, unsigned long long* arrived, int first_token,
                                   int first_row, const Epilogue& epilogue, const typename Epilogue::Columns& columns,
                                   const Share<HOLDERS, TOKENS8, Epilogue>& share) {
  const int lane = threadIdx.x % 32;
  if constexpr (HOLDERS > 1) {
    if (HOLDERS == GROUPS)
      asm volatile("bar.sync 1, %0;" ::"n"(128 * GROUPS) : "memory");
    else
      wait(arrived);
#pragma unroll
    for (int i = 0; i < GROUPS_OF_8<HOLDERS, TOKENS8>; ++i) {
      int4 sum = {};
#pragma unroll
      for (int from = 0; from < HOLDERS; ++from)
        sum = sum + *reinterpret_cast<const int4*>(received + ((i * HOLDERS + from) * 32 + lane) * 4);
      stage_fragment<1>(staging + i * 8 * pitch(16), 0, {sum.x, sum.y, sum.z, sum.w});
    }
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < share.ITEMS; ++i) {
    const int* const at = staging + share.of_warp(i) * pitch(16) + share.row;
    if (share.token(i) < 8 * TOKENS8 && share.of_warp(i) < 8 * GROUPS_OF_8<HOLDERS, TOKENS8>)
      epilogue.store(first_token + share.token(i), first_row + share.row, columns, share.inputs[i],
                     [at](int offset) { return *reinterpret_cast<const int4*>(at + offset); });
  }
}
