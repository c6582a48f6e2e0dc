// Rotary embedding of the output of a qkv GEMM: queries in place, keys and values into the cache. bf16, one KV head.
//
//   qkv                  [tokens, HEADS * DIMS of q, DIMS of k, DIMS of v], rows `stride` apart
//   cosine, sine         [positions, DIMS / 2] float32; token i has position first_position + i, with `past` (null, or
//                        the device's address of a number that is known only when the kernel runs) + *past
//   k_cache, v_cache     [positions, DIMS], rows `cache_stride` apart; null: k in place, and v stays where it is
//
// Channel c turns with c + DIMS / 2; a thread has 8 channels and their 8 partners.
// grid tokens, block (HEADS + 2) DIMS / 16.
#include "common.cuh"

// Two pairs (first, second) -> (first cos - second sin, second cos + first sin), each word two neighboring channels.
__device__ inline void rotate(unsigned& first, unsigned& second, const float* c, const float* s) {
  const float a[2] = {__uint_as_float(first << 16), __uint_as_float(first & 0xFFFF0000u)};
  const float b[2] = {__uint_as_float(second << 16), __uint_as_float(second & 0xFFFF0000u)};
  first = pack2<Bf16>(a[0] * c[0] - b[0] * s[0], a[1] * c[1] - b[1] * s[1]);
  second = pack2<Bf16>(b[0] * c[0] + a[0] * s[0], b[1] * c[1] + a[1] * s[1]);
}

template <int HEADS, int DIMS>
__global__ void __launch_bounds__((HEADS + 2) * DIMS / 16)
rotary(Bf16* qkv, const float* cosine, const float* sine, Bf16* k_cache, Bf16* v_cache, const int* past,
       int first_position, int stride, int cache_stride) {
  constexpr int PIECES = DIMS / 16;  // of 8 channels in half a head
  const int head = threadIdx.x / PIECES, piece = threadIdx.x % PIECES;
  const size_t position = first_position + blockIdx.x + (past ? *past : 0), angles = position * (DIMS / 2) + 8 * piece;
  float c[8], s[8];  // constants: they need not wait
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    *reinterpret_cast<float4*>(c + i) = __ldg(reinterpret_cast<const float4*>(cosine + angles + i));
    *reinterpret_cast<float4*>(s + i) = __ldg(reinterpret_cast<const float4*>(sine + angles + i));
  }
  let_next_kernel_start();
  wait_for_inputs();

  uint4* const from = reinterpret_cast<uint4*>(qkv + size_t(blockIdx.x) * stride + head * DIMS) + piece;
  if (head > HEADS && !v_cache) return;
  uint4 first = __ldcg(from), second = __ldcg(from + PIECES);
  uint4* to = from;
  if (head >= HEADS && k_cache)
    to = reinterpret_cast<uint4*>((head == HEADS ? k_cache : v_cache) + position * cache_stride) + piece;
  if (head <= HEADS) {
    rotate(first.x, second.x, c, s);
    rotate(first.y, second.y, c + 2, s + 2);
    rotate(first.z, second.z, c + 4, s + 4);
    rotate(first.w, second.w, c + 6, s + 6);
  }
  to[0] = first, to[PIECES] = second;
}
