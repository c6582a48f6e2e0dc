// The epilogue of a warpgroup that has all accumulators of its 64 rows x 8 TOKENS8 tokens, for y of 16-bit floats and no
// residual.
//
// It works where the accumulators are: lane 4 g + t of warp w has, of every 8 tokens, tokens 2 t and 2 t + 1 of rows
// 16 w + g (d[0], d[1]) and 16 w + g + 8 (d[2], d[3]), with GEGLU of a gate and of the up that belongs to it. Nothing
// waits for another lane until `stmatrix` has turned 8 channels x 8 tokens into 16 bytes of each token; then the group
// stores whole rows of its tile, 64 or 128 bytes. (common.cuh, store_warp_tile, takes a turn through shared memory for
// every 8 tokens.) With ROTARY it turns them on their way: the same bits as those of a rotary.cu behind it.
#pragma once
#include "cluster.cuh"
#include "rotary.cuh"

// 8 x 8 values of 16 bits, two neighbors of a row a lane as in mma's operands, to 8 rows of shared memory, transposed.
__device__ inline void store_transposed(unsigned to, unsigned pair) {
  asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(to), "r"(pair) : "memory");
}
// A barrier of the 128 threads of warpgroup `group`; barrier 1 is for all warpgroups.
__device__ inline void meet_group(int group) { asm volatile("bar.sync %0, 128;" ::"r"(2 + group) : "memory"); }

// The scales of a tile's tokens, loaded ahead by each warp: lane l has tokens 64 i + 2 l, + 1.
template <int TOKENS8> struct TokenScales {
  float v[(TOKENS8 + 7) / 8][2] = {};

  __device__ TokenScales(const float* x_scale, int first_token, int tokens) {
    for (int i = 0; i < (TOKENS8 + 7) / 8; ++i)
      for (int odd = 0; odd < 2; ++odd) {
        const int token = 64 * i + 2 * (threadIdx.x % 32) + odd;
        if (token < 8 * TOKENS8 && first_token + token < tokens) v[i][odd] = load_fresh(x_scale + first_token + token);
      }
  }
  // Of this lane's two tokens of group j of 8.
  __device__ void of(int j, float (&scale)[2]) const {
    for (int odd = 0; odd < 2; ++odd) scale[odd] = __shfl_sync(~0u, v[j / 8][odd], j % 8 * 4 + threadIdx.x % 4);
  }
};

// The scales and the bias of a lane's two rows, loaded ahead: nobody has read them before, so they come from memory.
template <int BITS> struct RowFactors {
  float scale[2], bias[2] = {};

  __device__ RowFactors(const float* weight_scale, const float* biases, int first_row) {
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + threadIdx.x % 32 / 4 + 8 * half;
      scale[half] = weight_scale[row] * (BITS == 4 ? 0.0625f : 1.0f);  // INT4 weights come times 16
      if (biases) bias[half] = biases[row];
    }
  }
};

// Staging has room for a part of a group's tile only, which is stored in passes: of so many groups of 8 tokens, for CHUNKS
// pieces of 16 bytes a token.
template <int TOKENS8, int CHUNKS> constexpr int ROOM = 4 * 4 * staging_words(1) / (8 * 16 * CHUNKS);
template <int TOKENS8, int CHUNKS> constexpr int PASSES = (TOKENS8 + ROOM<TOKENS8, CHUNKS> - 1) / ROOM<TOKENS8, CHUNKS>;
template <int TOKENS8, int CHUNKS> constexpr int PASS = (TOKENS8 + PASSES<TOKENS8, CHUNKS> - 1) / PASSES<TOKENS8, CHUNKS>;

// Of the epilogue ROTARY: where keys and values go, and what angles turn queries and keys.
template <class Out> struct Heads {
  Out *k, *v;
  const float *cosine, *sine;  // [positions, HEAD_DIMS / 2]
  int kv_stride;
  int position, kv_row;  // of token 0: its position, and the row that its key and value go to
};

// What a thread turns of a group's tile, which is part of one head: of every 32nd token one of four pairs of chunks, 8 channels
// of the first half and their partners in the second; of v 16 channels that stay as they are. The angles are loaded a pass ahead.
template <int TOKENS8, class Out> struct Turns {
  static constexpr int COUNT = (PASS<TOKENS8, 8> + 3) / 4;  // of a pass
  const float *cosine, *sine;
  Out* to;
  int stride, apart, tokens;
  bool turned;
  Angles angles[COUNT];

  // The thread's pair, and its i-th token of a pass.
  __device__ static int pair() { return threadIdx.x % 4; }
  __device__ static int token(int i) { return threadIdx.x % 128 / 4 + 32 * i; }

  __device__ Turns(const Heads<Out>& heads, Out* y, int first_row, int tokens, int rows) : tokens(tokens) {
    const int head = first_row / HEAD_DIMS, queries = rows / HEAD_DIMS - 2, row = first_row % HEAD_DIMS + 16 * pair();
    turned = head <= queries;
    apart = turned ? HEAD_DIMS / 2 : 8;
    stride = head < queries ? rows : heads.kv_stride;
    to = head < queries ? y + head * HEAD_DIMS : (turned ? heads.k : heads.v) + size_t(heads.kv_row) * stride;
    to += turned ? row / 2 : row;
    const size_t at = size_t(heads.position) * (HEAD_DIMS / 2) + row / 2;
    cosine = heads.cosine + at, sine = heads.sine + at;
  }
  __device__ void load(int i, int token) {
    const size_t at = size_t(token) * (HEAD_DIMS / 2);
    if (turned && token < tokens) angles[i].load(cosine + at, sine + at);
  }
  __device__ void load_first(int first_token) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
      if (token(i) < 8 * PASS<TOKENS8, 8>) load(i, first_token + token(i));
  }
  __device__ void store(int i, int token, uint4 first, uint4 second) const {
    if (turned) angles[i].turn(first, second);
    Out* const target = to + size_t(token) * stride;
    *reinterpret_cast<uint4*>(target) = first;
    *reinterpret_cast<uint4*>(target + apart) = second;
  }
};

// first_row: of the group. BIASED: whether epilogue.bias is there. turns: for ROTARY, the first pass's angles loaded.
template <bool BIASED, int BITS, int EPILOGUE, class Out, int TOKENS8, class Turns>
__device__ inline void store_group_tile(const int (&acc)[TOKENS8][4], int* staging, const TokenScales<TOKENS8>& scales,
                                        const RowFactors<BITS>& factors, int first_token, int first_row,
                                        const Epilogue<BITS, EPILOGUE, Out>& epilogue, Turns& turns) {
  static_assert(sizeof(Out) == 2);
  constexpr int PARTS = EPILOGUE == GEGLU ? 2 : 1, CHUNKS = 8 / PARTS;  // of 16 bytes, of a token
  constexpr int GROUPS_OF_8 = PASS<TOKENS8, CHUNKS>;  // of a pass
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32, group = threadIdx.x / 128;
  const int columns = epilogue.rows / PARTS, first_column = first_row / PARTS;
  // Chunks that are stored together, one each of 8 tokens or several each of fewer, have different banks.
  auto place = [](int token, int chunk) { return (token * CHUNKS + (chunk ^ token * CHUNKS / 8 % CHUNKS)) * 16; };
  const unsigned at = address_of(staging);

  unsigned target[2];  // of lanes 0..7, which give stmatrix its addresses
  for (int half = 0; half < 2; ++half) target[half] = at + place(lane % 8, PARTS == 2 ? warp : 2 * warp + half);
#pragma unroll
  for (int first = 0; first < TOKENS8; first += GROUPS_OF_8) {
    constexpr int BYTES = 8 * 16 * CHUNKS;  // of 8 tokens
    meet_group(group);  // what was staged before has been stored
#pragma unroll
    for (int j = first; j < min(first + GROUPS_OF_8, TOKENS8); ++j) {
      float of_token[2], v[2][2];
      scales.of(j, of_token);
      for (int half = 0; half < 2; ++half)
        for (int odd = 0; odd < 2; ++odd) {
          v[half][odd] = dequantized(acc[j][2 * half + odd], factors.scale[half], of_token[odd]);
          if (BIASED) v[half][odd] = __fadd_rn(v[half][odd], factors.bias[half]);
        }
      if constexpr (PARTS == 2)
        store_transposed(target[0] + (j - first) * BYTES,
                         pack2<Out>(gelu_tanh(v[0][0]) * v[1][0], gelu_tanh(v[0][1]) * v[1][1]));
      else
        for (int half = 0; half < 2; ++half) {
          for (float& value : v[half]) value = EPILOGUE == GELU ? gelu_tanh(value) : value;
          store_transposed(target[half] + (j - first) * BYTES, pack2<Out>(v[half][0], v[half][1]));
        }
    }
    meet_group(group);
    const int tokens = 8 * min(GROUPS_OF_8, TOKENS8 - first), first_of_pass = first_token + 8 * first;
    if constexpr (EPILOGUE == ROTARY) {
      auto staged = [&](int token, int chunk) {
        return *reinterpret_cast<const uint4*>(reinterpret_cast<char*>(staging) + place(token, chunk));
      };
#pragma unroll
      for (int i = 0; i < Turns::COUNT; ++i) {
        const int token = turns.token(i), chunk = 2 * turns.pair();
        if (token >= tokens || first_of_pass + token >= epilogue.tokens) break;
        turns.store(i, first_of_pass + token, staged(token, chunk), staged(token, chunk + 1));
        if (first + GROUPS_OF_8 < TOKENS8) turns.load(i, first_of_pass + 8 * GROUPS_OF_8 + token);
      }
    } else
#pragma unroll
      for (int item = thread; item < tokens * CHUNKS; item += 128) {
        const int token = item / CHUNKS, chunk = item % CHUNKS;
        if (first_of_pass + token >= epilogue.tokens) break;
        const uint4 value = *reinterpret_cast<const uint4*>(reinterpret_cast<char*>(staging) + place(token, chunk));
        *reinterpret_cast<uint4*>(epilogue.y + size_t(first_of_pass + token) * columns + first_column + 8 * chunk) = value;
      }
  }
}
