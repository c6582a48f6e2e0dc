// bf16 activations -> block Hadamard of 64 -> INT8 and one scale a token, for large M: what rotate_quantize.cu does for
// PLAIN and 64, with the rotation by the tensor cores. The bits are those of its definition, but for additions in another
// order.
//
// A warp takes 16 blocks of 64 channels. Channel i of a block, in bits i = h t1 t0 l e1 e0: lane 4 g + t loads of blocks g
// and g + 8 the channels 8 t .. 8 t + 7 (h = 0) and 32 + 8 t .. (h = 1), 16 bytes each, as bf16 operand A of four
// multiplications of k = 16: number (h, l) has the channels with these bits, its k being (t, e). B is the Hadamard matrix
// over those 4 bits; the one over h and l is in the signs, + B or - B, with which a result adds up its four:
//
//   x'[h' n l'] = sum_(h, l) (-1)^(h h' + l l') sum_(t, e) A_(h, l)[t, e] (-1)^popcount((t, e) & n)
//
// The columns n are ordered so that a lane ends up with the channels that it has loaded. Products are +- x, so exact.
//
// Blocks take tokens in turn, with copies of the next ones under way: each lane copies what it will read itself.
//
// grid: as many blocks as run at once, or fewer; block 32 threads for every 1024 channels; K a multiple of 1024, at most
// 16 K; shared memory STAGES * 2 K bytes.
#include "cluster.cuh"
#include "quantize.cuh"

__device__ inline void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

constexpr int STAGES = 3;

__global__ void __launch_bounds__(512, 2)
hadamard_quantize(const Bf16* x, signed char* x_q, float* x_scale, int tokens, int depth, int row_stride,
                  int slab_tokens) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  auto channel = [&](int row, int h) { return 1024 * warp + 64 * (g + 8 * row) + 32 * h + 8 * t; };

  let_next_kernel_start();
  unsigned b[2][2];  // of columns n = (t' of the result, e'), even and odd pairs of e'
  for (int tile = 0; tile < 2; ++tile)
    for (int pair = 0; pair < 2; ++pair) {
      const int n = g / 2 * 4 + tile * 2 + g % 2, k = 4 * t + 2 * pair;
      b[tile][pair] = 0x3F803F80 ^ (__popc(k & n) & 1) << 15 ^ unsigned(__popc((k + 1) & n) & 1) << 31;
    }
  auto add_product = [&](float (&d)[4], const unsigned (&a)[4], int tile, int negative) {
    const unsigned signs = negative ? 0x80008000 : 0;
    mma(d, a, {b[tile][0] ^ signs, b[tile][1] ^ signs});
  };
  extern __shared__ uint4 ring[];  // [STAGES][4][threads]
  uint4* const of_thread = ring + threadIdx.x;
  auto copy_token = [&](int token, int stage) {
    const Bf16* const row = x + size_t(token) * row_stride;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (token < tokens)
        copy_async(address_of(of_thread + (4 * stage + i) * blockDim.x), row + channel(i / 2, i % 2), true);
    commit_copies();
  };

  wait_for_inputs();
  for (int ahead = 0; ahead < STAGES - 1; ++ahead) copy_token(blockIdx.x + ahead * gridDim.x, ahead);
  for (int token = blockIdx.x, turn = 0, stage = 0; token < tokens; token += gridDim.x, turn ^= 1) {
    copy_token(token + (STAGES - 1) * gridDim.x, stage == 0 ? STAGES - 1 : stage - 1);
    wait_for_copies<STAGES - 1>();
    uint4 in[2][2];  // of blocks g and g + 8: h = 0, 1
#pragma unroll
    for (int i = 0; i < 4; ++i) in[i / 2][i % 2] = of_thread[(4 * stage + i) * blockDim.x];
    stage = stage + 1 == STAGES ? 0 : stage + 1;
    float v[2][2][8], absmax = 0;  // as `in`
#pragma unroll
    for (int to_h = 0; to_h < 2; ++to_h)
#pragma unroll
      for (int to_l = 0; to_l < 2; ++to_l)
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          float d[4] = {};
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const uint4 upper = in[0][h], lower = in[1][h];
            add_product(d, {upper.x, lower.x, upper.y, lower.y}, tile, h & to_h);
            add_product(d, {upper.z, lower.z, upper.w, lower.w}, tile, h & to_h ^ to_l);
          }
          for (int i = 0; i < 4; ++i) {
            v[i / 2][to_h][4 * to_l + 2 * tile + i % 2] = d[i];
            absmax = fmaxf(absmax, fabsf(d[i]));
          }
        }

    const TokenScale scale(0, max_of_block(absmax, turn), NORM<64>);
    if (threadIdx.x == 0) x_scale[token] = scale.value;
#pragma unroll
    for (int row = 0; row < 2; ++row)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        *reinterpret_cast<uint2*>(x_q + place_of(token, channel(row, h), depth, slab_tokens)) = scale.quantize(v[row][h]);
  }
}
