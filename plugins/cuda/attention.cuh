// What the attention kernels share: the softmax of a tile of scores and the merge of what different keys gave.
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

__device__ inline float log2_fast(float v) {
  float out;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(v));
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

template <bool MAX> __device__ inline float reduce_warp(float v) {
  for (int mask = 16; mask; mask /= 2) {
    const float other = __shfl_xor_sync(~0u, v, mask);
    v = MAX ? fmaxf(v, other) : v + other;
  }
  return v;
}

// d[16, 8] += a[16, 16] b[16, 8]. Lane 4 g + t holds
//   a[0]: row g, columns 2 t, 2 t + 1;  a[1]: row g + 8;  a[2], a[3]: the same, columns + 8
//   b0: rows 2 t, 2 t + 1 of column g;  b1: rows + 8
//   d[0], d[1]: row g, columns 2 t, 2 t + 1;  d[2], d[3]: row g + 8
// so that d of two neighboring tiles of 8 columns is, as bf16, an a.
__device__ inline void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of 16-bit values; lane 8 i + r gives the address of row r of matrix i. A lane gets columns 2 t, 2 t + 1 of row g
// of each, or TRANSPOSED rows 2 t, 2 t + 1 of column g.
template <bool TRANSPOSED> __device__ inline void load_matrices(unsigned (&m)[4], unsigned at) {
  if constexpr (TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"(at) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"(at) : "memory");
}

constexpr float LOWEST = -1e30f;  // m before the first key: finite, so that exp2(-inf - m) is 0 and not NaN
constexpr float SLACK = 8;        // m follows the maximum when it is this far behind: exp2(s - m) stays below 256

// Of the scores s of a tile (lane 4 g + t: columns 8 j + 2 t, + 1), the greatest of either row, times scale; those of the keys
// from `left` on become -inf.
template <int TILES>
__device__ inline void top_of_rows(float (&s)[TILES][4], float (&top)[2], int left, float scale) {
  const int t = threadIdx.x % 4;
  if (left < 8 * TILES)
#pragma unroll
    for (int j = 0; j < TILES; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (8 * j + 2 * t + i % 2 >= left) s[j][i] = -__int_as_float(0x7F800000);

  top[0] = s[0][0], top[1] = s[0][2];
#pragma unroll
  for (int j = 0; j < TILES; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) top[i / 2] = fmaxf(top[i / 2], s[j][i]);
  top[0] = max_of_row(top[0]) * scale, top[1] = max_of_row(top[1]) * scale;
}

// Scores become exp2(scale s - m), those of the keys from `left` on 0. When m follows the maximum, what was summed with the
// old m is scaled.
template <int TILES, int COLUMNS8>
__device__ inline void softmax(float (&s)[TILES][4], float (&o)[COLUMNS8][4], float (&m)[2], float (&l)[2], int left,
                               float scale) {
  float top[2];
  top_of_rows(s, top, left, scale);
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

// A warp's o, m and l into shared memory, `partial` [KEY_WARPS][ROWS][PITCH]: rows of o, PADDED columns, and m, l. PITCH is
// 32 bytes modulo 64, so that the 8-byte stores of a warp fall into different banks.
template <int ROWS, int COLUMNS8>
__device__ inline void deposit(float* partial, const float (&o)[COLUMNS8][4], const float (&m)[2], float (&l)[2],
                               int first_row, int key_warp) {
  constexpr int PADDED = 8 * COLUMNS8, PITCH = PADDED + 8;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  l[0] = sum_of_row(l[0]), l[1] = sum_of_row(l[1]);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float* const row = partial + (key_warp * ROWS + first_row + g + 8 * half) * PITCH;
#pragma unroll
    for (int n = 0; n < COLUMNS8; ++n)
      *reinterpret_cast<float2*>(row + 8 * n + 2 * t) = {o[n][2 * half], o[n][2 * half + 1]};
    if (t == 0) *reinterpret_cast<float2*>(row + PADDED) = {m[half], l[half]};
  }
}

// The merges compute, from what was deposited, out = sum_i w_i o_i / sum_i w_i l_i, w_i = exp2(m_i - max m).
//
// The parts of one row in a block's shared memory as one: sum_i w_i o_i of four columns, sum_i w_i l_i, and max m.
struct Merged { float4 sum; float m, l; };

template <int ROWS, int PITCH, int PARTS> __device__ inline Merged merged(const float* row, int column) {
  constexpr int PADDED = PITCH - 8;
  Merged v = {{}, row[PADDED], 0};
#pragma unroll
  for (int part = 1; part < PARTS; ++part) v.m = fmaxf(v.m, row[part * ROWS * PITCH + PADDED]);
#pragma unroll
  for (int part = 0; part < PARTS; ++part) {
    const float* const at = row + part * ROWS * PITCH;
    const float weight = exp2_fast(at[PADDED] - v.m);
    const float4 o = *reinterpret_cast<const float4*>(at + column);
    v.l = fmaf(weight, at[PADDED + 1], v.l);
    v.sum.x = fmaf(weight, o.x, v.sum.x), v.sum.y = fmaf(weight, o.y, v.sum.y);
    v.sum.z = fmaf(weight, o.z, v.sum.z), v.sum.w = fmaf(weight, o.w, v.sum.w);
  }
  return v;
}

// Over the block: a thread takes four columns of a row at a time.
template <int DIMS, int HEADS, int ROWS, int PARTS>
__device__ inline void merge_in_block(const float* partial, int first_row, int rows, Bf16* out, int out_stride) {
  constexpr int PADDED = (DIMS + 15) / 16 * 16, PITCH = PADDED + 8, QUADS = DIMS / 4;
  for (int quad = threadIdx.x; quad < ROWS * QUADS; quad += blockDim.x) {
    const int row = first_row + quad / QUADS, column = quad % QUADS * 4;
    if (row >= rows) break;
    const Merged v = merged<ROWS, PITCH, PARTS>(partial + quad / QUADS * PITCH, column);
    const float inverse = __fdividef(1.0f, v.l);
    *reinterpret_cast<uint2*>(out + size_t(row / HEADS) * out_stride + row % HEADS * DIMS + column) = {
        pack2<Bf16>(v.sum.x * inverse, v.sum.y * inverse), pack2<Bf16>(v.sum.z * inverse, v.sum.w * inverse)};
  }
}

#if CLUSTER
// What block `rank` of the cluster has where this block has `local`.
__device__ inline float4 load_of_block(const float* local, int rank) {
  const int4 v = load_remote(reinterpret_cast<const int*>(local), rank);
  return {__int_as_float(v.x), __int_as_float(v.y), __int_as_float(v.z), __int_as_float(v.w)};
}

// Over the block's KEY_WARPS and SPLIT blocks. Each block finishes ROWS / SPLIT rows, few, whose parts are far away: a
// warp takes a row and asks for all of it at once; lane i weighs part i.
template <int DIMS, int HEADS, int ROWS, int KEY_WARPS, int SPLIT>
__device__ inline void merge_in_cluster(const float* partial, int rank, int first_row, int rows, Bf16* out,
                                        int out_stride) {
  constexpr int PADDED = (DIMS + 15) / 16 * 16, PITCH = PADDED + 8, SHARE = ROWS / SPLIT, PARTS = SPLIT * KEY_WARPS;
  static_assert(ROWS % SPLIT == 0 && PARTS <= 32);
  const int lane = threadIdx.x % 32;
  cluster_barrier();
  for (int i = threadIdx.x / 32; i < SHARE && first_row + rank * SHARE + i < rows; i += blockDim.x / 32) {
    const int row = first_row + rank * SHARE + i;
    const float* const from = partial + (rank * SHARE + i) * PITCH;
    float m = LOWEST, l = 0;
    if (lane < PARTS) {
      const float4 tail = load_of_block(from + lane % KEY_WARPS * ROWS * PITCH + PADDED, lane / KEY_WARPS);
      m = tail.x, l = tail.y;
    }
    const float factor = exp2_fast(m - reduce_warp<true>(m));
    const float weight = __fdividef(factor, reduce_warp<false>(factor * l));
    float weights[PARTS];
#pragma unroll
    for (int part = 0; part < PARTS; ++part) weights[part] = __shfl_sync(~0u, weight, part);
#pragma unroll
    for (int base = 0; base < DIMS; base += 128) {
      const int column = base + 4 * lane;
      if (column >= DIMS) break;
      float4 sum = {};
#pragma unroll
      for (int part = 0; part < PARTS; ++part) {
        const float4 o = load_of_block(from + part % KEY_WARPS * ROWS * PITCH + column, part / KEY_WARPS);
        sum.x = fmaf(weights[part], o.x, sum.x), sum.y = fmaf(weights[part], o.y, sum.y);
        sum.z = fmaf(weights[part], o.z, sum.z), sum.w = fmaf(weights[part], o.w, sum.w);
      }
      *reinterpret_cast<uint2*>(out + size_t(row / HEADS) * out_stride + row % HEADS * DIMS + column) = {
          pack2<Bf16>(sum.x, sum.y), pack2<Bf16>(sum.z, sum.w)};
    }
  }
  cluster_wait_for_all();  // no block leaves while its shared memory is being read
}
#endif

template <int DIMS, int HEADS, int ROWS, int KEY_WARPS, int SPLIT>
__device__ inline void merge(const float* partial, int rank, int first_row, int rows, Bf16* out, int out_stride) {
  if constexpr (SPLIT == 1) {
    __syncthreads();
    merge_in_block<DIMS, HEADS, ROWS, KEY_WARPS>(partial, first_row, rows, out, out_stride);
  } else {
#if CLUSTER
    merge_in_cluster<DIMS, HEADS, ROWS, KEY_WARPS, SPLIT>(partial, rank, first_row, rows, out, out_stride);
#else
    static_assert(SPLIT == 1, "blocks exchange sums within a cluster");
#endif
  }
}
