// What the kernels share: number formats, tensor core operands, the epilogue, ordering between kernels.
// Compiled by NVRTC without any system header.
#pragma once

struct Bf16 { unsigned short bits; };
struct Half { unsigned short bits; };

template <class A, class B> constexpr bool is_same = false;
template <class A> constexpr bool is_same<A, A> = true;

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(Bf16 v) { return __uint_as_float(unsigned(v.bits) << 16); }
__device__ inline float to_float(Half v) {
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(v.bits));
  return out;
}

// Two floats, rounded to nearest even, as one word; `low` goes to the lower address.
template <class T> __device__ inline unsigned pack2(float low, float high);
template <> __device__ inline unsigned pack2<Bf16>(float low, float high) {
  unsigned out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
template <> __device__ inline unsigned pack2<Half>(float low, float high) {
  unsigned out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

// Kernels launched with overlap (programmatic dependent launch, SM 90) start while their predecessor still runs. Weights
// may be read at once; everything another kernel writes only after wait_for_inputs(). No-ops in an ordinary launch.
__device__ inline void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ inline void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Weights of one 16 x 64 tile in a lane: plugins/layout.py, pack_fragments. 4 bits: one 16-byte load, 8 bits: two.
template <int BITS> struct Fragment {
  uint4 raw[BITS / 4];

  __device__ static constexpr int bytes() { return 32 * 4 * BITS; }  // of a whole tile

  // The operand a[0..3] of instruction `step`. INT4 comes out times 16 (the nibble stays in the high half of its byte,
  // where its sign bit is the byte's), which the epilogue divides out exactly: 1.5 instructions for 4 weights.
  __device__ void operand(int step, unsigned (&a)[4]) const {
    if constexpr (BITS == 4) {
      const unsigned upper = step ? raw[0].z : raw[0].x, lower = step ? raw[0].w : raw[0].y;
      a[0] = (upper << 4) & 0xF0F0F0F0u;
      a[1] = (lower << 4) & 0xF0F0F0F0u;
      a[2] = upper & 0xF0F0F0F0u;
      a[3] = lower & 0xF0F0F0F0u;
    } else {
      a[0] = raw[step].x, a[1] = raw[step].y, a[2] = raw[step].z, a[3] = raw[step].w;
    }
  }
};

// d[16 weight rows, 8 tokens] += a[16 rows, 32] b[32, 8]. Lane 4 g + t holds d[0], d[1]: row g, tokens 2 t, 2 t + 1;
// d[2], d[3]: row g + 8.
__device__ inline void mma(int (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// A warp's tile times one chunk of K = 64: `tokens[j]` holds 16 consecutive bytes of token 8 j + g (the "direct" order).
template <int BITS, int ROWS16, int TOKENS8>
__device__ inline void multiply_chunk(int (&acc)[ROWS16][TOKENS8][4], const Fragment<BITS> (&weight)[ROWS16],
                                      const uint4 (&tokens)[TOKENS8]) {
#pragma unroll
  for (int step = 0; step < 2; ++step)
#pragma unroll
    for (int i = 0; i < ROWS16; ++i) {
      unsigned a[4];
      weight[i].operand(step, a);
#pragma unroll
      for (int j = 0; j < TOKENS8; ++j)
        mma(acc[i][j], a, step ? tokens[j].z : tokens[j].x, step ? tokens[j].w : tokens[j].y);
    }
}

// y = (float(acc) * weight_scale[n]) * x_scale[m] (+ bias[n]) (+ residual[m, n]), float32 in this order, one rounding at
// the end. bias and residual may be null; residual may be y itself. Out = int stores acc.
template <int BITS, class Out> struct Epilogue {
  const float* x_scale;
  const float* weight_scale;
  const float* bias;
  const Out* residual;
  Out* y;
  int tokens, rows;  // M, N

  // Four consecutive rows n..n+3 of one token.
  __device__ void store(int token, int n, int4 sum) const {
    if (token >= tokens) return;
    if (BITS == 4) sum = {sum.x >> 4, sum.y >> 4, sum.z >> 4, sum.w >> 4};
    Out* const target = y + size_t(token) * rows + n;
    if constexpr (is_same<Out, int>) {
      *reinterpret_cast<int4*>(target) = sum;
    } else {
      const float4 scale = *reinterpret_cast<const float4*>(weight_scale + n);
      const float token_scale = x_scale[token];
      float v[4] = {__fmul_rn(__fmul_rn(sum.x, scale.x), token_scale), __fmul_rn(__fmul_rn(sum.y, scale.y), token_scale),
                    __fmul_rn(__fmul_rn(sum.z, scale.z), token_scale), __fmul_rn(__fmul_rn(sum.w, scale.w), token_scale)};
      if (bias)
        for (int i = 0; i < 4; ++i) v[i] = __fadd_rn(v[i], bias[n + i]);
      if (residual)
        for (int i = 0; i < 4; ++i) v[i] = __fadd_rn(v[i], to_float(residual[size_t(token) * rows + n + i]));
      if constexpr (is_same<Out, float>)
        *reinterpret_cast<float4*>(target) = {v[0], v[1], v[2], v[3]};
      else
        *reinterpret_cast<uint2*>(target) = {pack2<Out>(v[0], v[1]), pack2<Out>(v[2], v[3])};
    }
  }
};

// Accumulators pass through shared memory to become rows of y. A row of `pitch(rows)` words a token puts the 32 lanes of
// a store (tokens 2 t, rows g) into 32 different banks, since 2 * pitch = 8 (mod 32).
__host__ __device__ constexpr int pitch(int rows) { return rows + 4; }

template <int ROWS16>
__device__ inline void stage_fragment(int* staging, int row16, const int (&d)[4]) {
  const int lane = threadIdx.x % 32, row = 16 * row16 + lane / 4, token = 2 * (lane % 4);
  constexpr int P = pitch(16 * ROWS16);
  staging[token * P + row] = d[0];
  staging[(token + 1) * P + row] = d[1];
  staging[token * P + row + 8] = d[2];
  staging[(token + 1) * P + row + 8] = d[3];
}

// Writes a warp's tile: rows first_row.., tokens first_token.., 8 tokens at a time through pitch(16 ROWS16) * 8 words.
template <int ROWS16, int TOKENS8, int BITS, class Out>
__device__ inline void store_warp_tile(const int (&acc)[ROWS16][TOKENS8][4], int* staging, int first_token,
                                       int first_row, const Epilogue<BITS, Out>& epilogue) {
#pragma unroll
  for (int j = 0; j < TOKENS8; ++j) {
#pragma unroll
    for (int i = 0; i < ROWS16; ++i) stage_fragment<ROWS16>(staging, i, acc[i][j]);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < ROWS16; ++i) {
      const int quad = threadIdx.x % 32 + 32 * i, token = quad / (4 * ROWS16), n = quad % (4 * ROWS16) * 4;
      const int4 sum = *reinterpret_cast<const int4*>(staging + token * pitch(16 * ROWS16) + n);
      epilogue.store(first_token + 8 * j + token, first_row + n, sum);
    }
    __syncwarp();
  }
}
