// Rotary embedding of the output of a qkv GEMM: queries in place, keys and values into the cache. bf16, one KV head.
//
//   qkv                  [tokens, HEADS * DIMS of q, DIMS of k, DIMS of v], rows `stride` apart
//   cosine, sine         [positions, DIMS / 2] float32; token i has position first_position + i, with `past` (null, or
//                        the device's address of a number that is known only when the kernel runs) + *past
//   k_cache, v_cache     [positions, DIMS], rows `cache_stride` apart; null: k in place, and v stays where it is
//
// Channel c turns with c + DIMS / 2; a thread has 8 channels and their 8 partners.
// grid tokens, block (HEADS + 2) DIMS / 16.
#include "rotary.cuh"

template <int HEADS, int DIMS>
__global__ void __launch_bounds__((HEADS + 2) * DIMS / 16)
rotary(Bf16* qkv, const float* cosine, const float* sine, Bf16* k_cache, Bf16* v_cache, const int* past,
       int first_position, int stride, int cache_stride) {
  constexpr int PIECES = DIMS / 16;  // of 8 channels in half a head
  const int head = threadIdx.x / PIECES, piece = threadIdx.x % PIECES;
  const size_t position = first_position + blockIdx.x + (past ? *past : 0), at = position * (DIMS / 2) + 8 * piece;
  Angles angles;
  angles.load(cosine + at, sine + at);
  let_next_kernel_start();
  wait_for_inputs();

  uint4* const from = reinterpret_cast<uint4*>(qkv + size_t(blockIdx.x) * stride + head * DIMS) + piece;
  if (head > HEADS && !v_cache) return;
  uint4 first = __ldcg(from), second = __ldcg(from + PIECES);
  uint4* to = from;
  if (head >= HEADS && k_cache)
    to = reinterpret_cast<uint4*>((head == HEADS ? k_cache : v_cache) + position * cache_stride) + piece;
  if (head <= HEADS) angles.turn(first, second);
  to[0] = first, to[PIECES] = second;
}
