// What the attention kernels share: the softmax of a tile of scores and the merge of sums over different keys.
//
// A warp holds 16 rows, row = token * HEADS + head; lane 4 g + t has rows g and g + 8 of them. Of each row it keeps
//   m: what it subtracts in the exponent,  l = sum exp2(s - m),  o = sum exp2(s - m) v.
#pragma once
#include "common.cuh"

__device__ inline float exp2_fast(float v) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(v));
  return out;
}

// Reduces over the 4 lanes that hold a row of d.
__device__ inline float max_of_row(float v) {
  v = fmaxf(v, __shfl_xor_sync(~0u, v, 1));
  return fmaxf(v, __shfl_xor_sync(~0u, v, 2));
}
__device__ inline float sum_of_row(float v) {
  v += __shfl_xor_sync(~0u, v, 1);
  return v + __shfl_xor_sync(~0u, v, 2);
}

// The address of what block `rank` of the cluster has where this block has `local`, and a store to such an address.
template <int SPLIT> __device__ inline unsigned address_in_block(const float* local, int rank) {
  unsigned address = unsigned(__cvta_generic_to_shared(local));
#if CLUSTER
  if constexpr (SPLIT > 1) asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(rank));
#endif
  return address;
}
template <int SPLIT> __device__ inline void store_in_block(unsigned address, float a, float b) {
#if CLUSTER
  if constexpr (SPLIT > 1)
    asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(a), "f"(b) : "memory");
#endif
  if constexpr (SPLIT == 1)
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(a), "f"(b) : "memory");
}

template <int SPLIT> __device__ inline void barrier_of_blocks() {
#if CLUSTER
  if constexpr (SPLIT > 1) cluster_barrier();
#else
  static_assert(SPLIT == 1, "blocks exchange sums within a cluster");
#endif
  if constexpr (SPLIT == 1) __syncthreads();
}

// One quad of o with its m and l.
struct Sums { float4 o; float m, l; };

template <int PARTS> __device__ inline Sums merge(const Sums (&parts)[PARTS]) {
  Sums all = {{0, 0, 0, 0}, parts[0].m, 0};
#pragma unroll
  for (int i = 1; i < PARTS; ++i) all.m = fmaxf(all.m, parts[i].m);
#pragma unroll
  for (int i = 0; i < PARTS; ++i) {
    const float weight = exp2_fast(parts[i].m - all.m);
    all.l = fmaf(weight, parts[i].l, all.l);
    all.o.x = fmaf(weight, parts[i].o.x, all.o.x), all.o.y = fmaf(weight, parts[i].o.y, all.o.y);
    all.o.z = fmaf(weight, parts[i].o.z, all.o.z), all.o.w = fmaf(weight, parts[i].o.w, all.o.w);
  }
  return all;
}

constexpr float LOWEST = -1e30f;  // m before the first key: finite, so that exp2(-inf - m) is 0 and not NaN
constexpr float SLACK = 8;        // m follows the maximum only when it is this far behind: exp2(s - m) stays below 256

// Scores s of a tile (lane 4 g + t: columns 8 j + 2 t, + 1) become exp2(scale s - m), those of the keys from `left` on 0.
// When m follows the maximum, what was summed with the old m is scaled.
template <int TILES, int COLUMNS8>
__device__ inline void softmax(float (&s)[TILES][4], float (&o)[COLUMNS8][4], float (&m)[2], float (&l)[2], int left,
                               float scale) {
  const int t = threadIdx.x % 4;
  if (left < 8 * TILES)
#pragma unroll
    for (int j = 0; j < TILES; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (8 * j + 2 * t + i % 2 >= left) s[j][i] = -__int_as_float(0x7F800000);

  float top[2] = {s[0][0], s[0][2]};
#pragma unroll
  for (int j = 0; j < TILES; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) top[i / 2] = fmaxf(top[i / 2], s[j][i]);
  top[0] = max_of_row(top[0]) * scale, top[1] = max_of_row(top[1]) * scale;
  if (__any_sync(~0u, top[0] > m[0] + SLACK || top[1] > m[1] + SLACK))
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float raised = fmaxf(m[half], top[half]), factor = exp2_fast(m[half] - raised);
      m[half] = raised;
      l[half] *= factor;
#pragma unroll
      for (int n = 0; n < COLUMNS8; ++n) o[n][2 * half] *= factor, o[n][2 * half + 1] *= factor;
    }
#pragma unroll
  for (int j = 0; j < TILES; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[j][i] = exp2_fast(fmaf(s[j][i], scale, -m[i / 2]));
      l[i / 2] += s[j][i];
    }
}

// Rows 2 j, 2 j + 1 of 8 columns of s as the operand a of 16 keys.
template <int TILES> __device__ inline void to_operand(const float (&s)[TILES][4], int j, unsigned (&p)[4]) {
  p[0] = pack2<Bf16>(s[2 * j][0], s[2 * j][1]), p[1] = pack2<Bf16>(s[2 * j][2], s[2 * j][3]);
  p[2] = pack2<Bf16>(s[2 * j + 1][0], s[2 * j + 1][1]), p[3] = pack2<Bf16>(s[2 * j + 1][2], s[2 * j + 1][3]);
}

// Merges the warps' sums and writes out = o / l. Each of the SPLIT blocks finishes ROWS / SPLIT of the rows: it gets every
// other block's sums of them pushed into its shared memory, `partial`,
//   [SPLIT][KEY_WARPS][ROWS / SPLIT][PITCH], PITCH = DIMS, rounded up to 16, + 8; m and l ride in the padding.
// The pitch is 32 bytes modulo 64, so that the 8-byte stores of a warp fall into different banks. Shared memory must be
// free of other use in this block; the barriers here see to the others.
template <int DIMS, int HEADS, int ROWS, int KEY_WARPS, int SPLIT, int COLUMNS8>
__device__ inline void finish(float* partial, const float (&o)[COLUMNS8][4], float (&m)[2], float (&l)[2], int warp_row,
                              int key_warp, int rank, int first_row, int rows, Bf16* out, int out_stride) {
  constexpr int PADDED = 8 * COLUMNS8, PITCH = PADDED + 8, SHARE = ROWS / SPLIT, PARTS = SPLIT * KEY_WARPS;
  constexpr int QUADS = DIMS / 4;
  static_assert(ROWS % SPLIT == 0);
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  l[0] = sum_of_row(l[0]), l[1] = sum_of_row(l[1]);
  barrier_of_blocks<SPLIT>();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp_row + g + 8 * half;
    const float* const local = partial + ((rank * KEY_WARPS + key_warp) * SHARE + row % SHARE) * PITCH;
    const unsigned to = address_in_block<SPLIT>(local, row / SHARE);
#pragma unroll
    for (int n = 0; n < DIMS / 8; ++n)
      store_in_block<SPLIT>(to + (8 * n + 2 * t) * 4, o[n][2 * half], o[n][2 * half + 1]);
    if (t == 0) store_in_block<SPLIT>(to + PADDED * 4, m[half], l[half]);
  }
  barrier_of_blocks<SPLIT>();

  for (int quad = threadIdx.x; quad < SHARE * QUADS; quad += blockDim.x) {
    const int of_share = quad / QUADS, row = first_row + rank * SHARE + of_share, column = quad % QUADS * 4;
    if (row >= rows) break;
    Sums parts[PARTS];
#pragma unroll
    for (int i = 0; i < PARTS; ++i) {
      const float* const from = partial + (i * SHARE + of_share) * PITCH;
      parts[i] = {*reinterpret_cast<const float4*>(from + column), from[PADDED], from[PADDED + 1]};
    }
    const Sums all = merge(parts);
    const float inverse = __fdividef(1.0f, all.l);
    *reinterpret_cast<uint2*>(out + size_t(row / HEADS) * out_stride + row % HEADS * DIMS + column) = {
        pack2<Bf16>(all.o.x * inverse, all.o.y * inverse), pack2<Bf16>(all.o.z * inverse, all.o.w * inverse)};
  }
}
