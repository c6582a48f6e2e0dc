// Keys, rotary-embedded, and values of some tokens, from the output of the qkv GEMM into a cache: bf16, one KV head.
//
//   k, v               [tokens, DIMS], rows `stride` apart
//   cosine, sine       [positions, DIMS / 2] float32; token i has position first_position + i
//   k_cache, v_cache   [tokens, DIMS], rows `cache_stride` apart
//
// A thread takes two pairs of channels of a key and four channels of the value. grid ceil(tokens * DIMS / 4 / block).
#include "common.cuh"

template <int DIMS>
__global__ void __launch_bounds__(256)
store_keys_values(const Bf16* k, const Bf16* v, const float* cosine, const float* sine, Bf16* k_cache, Bf16* v_cache,
                  int tokens, int first_position, int stride, int cache_stride) {
  constexpr int WORDS = DIMS / 4;  // of half a key
  const int token = (blockIdx.x * blockDim.x + threadIdx.x) / WORDS, word = threadIdx.x % WORDS;
  let_next_kernel_start();
  wait_for_inputs();
  if (token >= tokens) return;
  const unsigned* const key = reinterpret_cast<const unsigned*>(k + size_t(token) * stride) + word;
  const uint2 value = __ldcg(reinterpret_cast<const uint2*>(v + size_t(token) * stride) + word);
  unsigned first = __ldcg(key), second = __ldcg(key + WORDS);
  const size_t angles = size_t(first_position + token) * (DIMS / 2) + 2 * word;
  rotate_pairs(first, second, cosine + angles, sine + angles);
  unsigned* const to = reinterpret_cast<unsigned*>(k_cache + size_t(token) * cache_stride) + word;
  to[0] = first, to[WORDS] = second;
  reinterpret_cast<uint2*>(v_cache + size_t(token) * cache_stride)[word] = value;
}
