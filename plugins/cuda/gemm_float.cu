// y[M, N] = x[M, K] w[N, K]^T for small M, up to about 64: bf16 operands, float32 accumulators; the weights may be INT4
// (BITS), which becomes bf16 in registers. One kernel has all that the float linears of the action expert need: the norm
// before, the epilogue after. mma.sync, SM 80 and up.
//
//   r   = 1, or with NORM 1 / sqrt(mean_k X[m, k]^2 + epsilon), where x = X * gain is what the writer of the residual
//         stream X has left, with sums of squares (common.cuh, ForNorm): r scales a whole row, so it can follow the
//         multiplication
//   y   = (acc * r) * channel_scale[n] + bias[n], either may be null; then, by EPILOGUE,
//     NONE    + residual[m, n] (float32, may be null or, when y is float, y itself); y in float32 may leave something
//             for a norm itself
//     SILU    y / (1 + exp(-y))
//     GEGLU   rows as plugins/layout.py interleave_gate_up has them: gelu_tanh(gate) * up, [M, N / 2]
//     ROTARY  of q, k, v rows as interleave_rotary has them, HEAD_DIMS a head, one KV head: q and k turned by the
//             angles of their position, q to y, k and v to rows of their own; all bf16
//
// A warp owns 16 ROWS16 rows of W, 8 TOKENS8 tokens and every WARPS-th chunk of K = 64 of its block. Weights come from
// memory straight into the tensor cores' layout (plugins/layout.py, pack_float_fragments or pack_int4_fragments), STAGES
// chunks ahead: the first to registers and the rest to L2 before the kernel ahead has ended. Activations go through a
// ring of STAGES chunks in shared memory, the warp's own: loaded straight into the tensor cores' layout they would be
// pieces of 8 cache lines at a time, and the number of such requests would bound this kernel, not the bytes.
//
// WARPS warps of a block and SPLIT blocks share K. A block adds its warps' accumulators, and then
//   in a cluster     sends those of token m to the block that finishes it, m % SPLIT;
//   without (SM 80)  leaves them in `partial`, [grid z, grid x][SPLIT][tokens][rows of a block], and the last block to have done so
//                    finishes all tokens. `counters`, one for every SPLIT blocks, are zero before and after.
// All additions have a fixed order, that of the ranks, so the result is reproducible, and the same in both.
//
// grid (N / (16 ROWS16), SPLIT, ceil(M / (8 TOKENS8))), block 32 WARPS, cluster (1, SPLIT, 1) or none, shared memory as in
// plugins/kernels/gemm_float.py.
#include "int4.cuh"

// d[16 weight rows, 8 tokens] += a[16, 16] b[16, 8]; which lane holds what of d is as in common.cuh.
__device__ inline void mma(float (&d)[4], const uint4& a, uint2 b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
}

// Weights are read once and never change. `policy` is evict_first's, where L2 holds what the next step reads again.
__device__ inline uint4 load_weights(const uint4* from, unsigned long long policy) {
  uint4 v;
#if __CUDA_ARCH__ == 900
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0,%1,%2,%3}, [%4], %5;"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from), "l"(policy));
#else
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
#endif
  return v;
}

// Asks for the bytes behind `from` (16-byte multiples) to be in L2.
__device__ inline void prefetch(const void* from, int bytes, unsigned long long policy) {
#if __CUDA_ARCH__ == 900
  asm volatile("cp.async.bulk.prefetch.L2.global.L2::cache_hint [%0], %1, %2;" ::"l"(from), "r"(bytes), "l"(policy)
               : "memory");
#elif __CUDA_ARCH__ > 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}

__device__ inline float4 load4(const float* from) { return *reinterpret_cast<const float4*>(from); }
__device__ inline float4 operator+(float4 a, float4 b) { return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }

// The sum of COUNT quads `stride` floats apart, in this order. FRESH: other blocks have just written them.
template <int COUNT, bool FRESH = false> __device__ inline float4 sum_quads(const float* at, int stride) {
  auto load = [&](int i) {
    const float4* const from = reinterpret_cast<const float4*>(at + i * stride);
    return FRESH ? __ldcg(from) : *from;
  };
  float4 sum = load(0);
#pragma unroll
  for (int i = 1; i < COUNT; ++i) sum = sum + load(i);
  return sum;
}

#if CLUSTER
#include "cluster.cuh"
constexpr bool IN_CLUSTER = true;
#else
constexpr bool IN_CLUSTER = false;
#endif

__device__ inline void store4(float* to, const float (&v)[4]) {
  *reinterpret_cast<float4*>(to) = {v[0], v[1], v[2], v[3]};
}
__device__ inline void store4(Bf16* to, const float (&v)[4]) {
  *reinterpret_cast<uint2*>(to) = {pack2<Bf16>(v[0], v[1]), pack2<Bf16>(v[2], v[3])};
}

// The epilogue. A thread finishes 4 consecutive rows of W for a token: a quad, whose first row is n; with
// GEGLU and ROTARY also the 4 rows that belong to them, n + 8...
template <int EPILOGUE, class Out> struct Output {
  const float *channel_scale, *bias, *residual, *cosine, *sine;
  Out *y, *k, *v;
  int rows, y_stride, kv_stride;
  int position;   // of token 0
  int first_row;  // of k and v, that token 0 goes to
  ForNorm for_norm;

  static constexpr int PARTS = EPILOGUE == GEGLU || EPILOGUE == ROTARY ? 2 : 1;
  static constexpr int QUADS = 4 / PARTS;  // of 16 rows
  __device__ static int row_of(int quad) { return quad / QUADS * 16 + quad % QUADS * 4; }

  struct Columns { float4 scale[PARTS], bias[PARTS]; };
  struct Inputs { float4 a, b; };  // residual; or cosine and sine, of v 1 and 0

  __device__ Columns columns(int n) const {
    Columns c;
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      c.scale[part] = channel_scale ? load4(channel_scale + n + 8 * part) : float4{1, 1, 1, 1};
      c.bias[part] = bias ? load4(bias + n + 8 * part) : float4{0, 0, 0, 0};
    }
    return c;
  }

  __device__ bool is_v(int n) const { return n >= rows - HEAD_DIMS; }

  __device__ Inputs inputs(int token, int n) const {
    Inputs in = {};
    if (EPILOGUE == ROTARY) in.a = {1, 1, 1, 1};
    if (EPILOGUE == NONE && residual)
      in.a = load_fresh(reinterpret_cast<const float4*>(residual + size_t(token) * y_stride + n));
    if (EPILOGUE == ROTARY && !is_v(n)) {
      const size_t at = size_t(position + token) * (HEAD_DIMS / 2) + n % HEAD_DIMS / 16 * 8 + n % 16;
      in.a = load4(cosine + at), in.b = load4(sine + at);
    }
    return in;
  }

  struct Values { float v[PARTS][4]; };

  // Of the accumulators of rows n.. and n + 8...
  __device__ Values values(const Columns& c, const Inputs& in, float r, float4 first, float4 second) const {
    Values out;
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      const float4 sum = part ? second : first, scale = c.scale[part], add = c.bias[part];
      out.v[part][0] = sum.x * r * scale.x + add.x;
      out.v[part][1] = sum.y * r * scale.y + add.y;
      out.v[part][2] = sum.z * r * scale.z + add.z;
      out.v[part][3] = sum.w * r * scale.w + add.w;
    }
    const float a[4] = {in.a.x, in.a.y, in.a.z, in.a.w}, b[4] = {in.b.x, in.b.y, in.b.z, in.b.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& one = out.v[0][i];
      float& other = out.v[PARTS - 1][i];
      if (EPILOGUE == NONE) one += a[i];
      if (EPILOGUE == SILU) one = __fdividef(one, 1.0f + __expf(fminf(-one, 80.0f)));
      if (EPILOGUE == GEGLU) one = gelu_tanh(one) * other;
      if (EPILOGUE == ROTARY) {
        const float before = one;
        one = before * a[i] - other * b[i], other = other * a[i] + before * b[i];
      }
    }
    return out;
  }

  __device__ void store(int token, int n, const Values& values) const {
    if constexpr (EPILOGUE == ROTARY) {
      const int heads = rows / HEAD_DIMS - 2, head = n / HEAD_DIMS, row16 = n % HEAD_DIMS / 16;
      const size_t row = size_t(first_row + token) * kv_stride;
      Out* const to = head < heads ? y + size_t(token) * y_stride + head * HEAD_DIMS : (is_v(n) ? v : k) + row;
      const int channel = (is_v(n) ? 16 : 8) * row16 + n % 16;
      store4(to + channel, values.v[0]);
      store4(to + channel + (is_v(n) ? 8 : HEAD_DIMS / 2), values.v[1]);
    } else {
      store4(y + size_t(token) * y_stride + n / 16 * 16 / PARTS + n % 16, values.v[0]);
      if (EPILOGUE == NONE && is_same<Out, float>) for_norm.store(token, n, rows, values.v[0]);
    }
  }
};

template <int ROWS16, int TOKENS8, int WARPS, int STAGES, int SPLIT, bool NORM, int EPILOGUE, class Out, int BITS>
__global__ void __launch_bounds__(32 * WARPS)
gemm_float(const Bf16* x, const float* squares, const uint4* weight, const float* channel_scale, const float* bias,
           const float* residual, Out* y, Out* k, Out* v, const float* cosine, const float* sine, const int* past,
           int tokens, int rows, int depth, int y_stride, int kv_stride, int first_position, int to_cache,
           float epsilon, Bf16* normed, const float* normed_gain, float* normed_squares, float* partial, int* counters) {
  using O = Output<EPILOGUE, Out>;
  constexpr int ROWS = 16 * ROWS16, TOKENS = 8 * TOKENS8, PITCH = pitch(ROWS), THREADS = 32 * WARPS;
  constexpr int TILES = 4, ROW = TILES * 16 * 2;  // of K = 16 in a chunk; bytes of a token in a chunk
  constexpr int RING = STAGES * TOKENS * ROW / 4, REGION = RING > TOKENS * PITCH ? RING : TOKENS * PITCH;
  extern __shared__ __align__(128) float shared[];  // [WARPS][REGION]: ring, then acc; [SPLIT][SLOTS][PITCH] of all

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int rank = blockIdx.y, tiles = depth / 16, chunks = (tiles + TILES - 1) / TILES;
  const int begin = chunks * rank / SPLIT, end = chunks * (rank + 1) / SPLIT, steps = (end - begin + WARPS - 1) / WARPS;
  const int first_token = blockIdx.z * TOKENS;
  tokens = min(tokens - first_token, TOKENS);  // of this block
  x += size_t(first_token) * depth;

  constexpr bool INT4 = BITS == 4;
  constexpr int LOADS = INT4 ? 1 : TILES;  // of 16 bytes, a chunk of 16 rows
  const int loads = INT4 ? chunks : tiles;  // of all K
  const uint4* const weights = weight + size_t(blockIdx.x) * ROWS16 * loads * 32;
  float* const own = shared + warp * REGION;
  const unsigned ring = unsigned(__cvta_generic_to_shared(own));

  uint4 w[STAGES][LOADS][ROWS16];
  float acc[ROWS16][TOKENS8][4] = {};

  const unsigned long long once = evict_first();
  auto fetch_weights = [&](int stage, int i, int step) {  // of tile i; beyond the end the activations are zero
    if (INT4 && i < TILES - 1) return;  // with the last tile, all
    const int chunk = begin + step * WARPS + warp, from = min(INT4 ? chunk : chunk * TILES + i, loads - 1);
#pragma unroll
    for (int row16 = 0; row16 < ROWS16; ++row16)
      w[stage][INT4 ? 0 : i][row16] = load_weights(weights + (size_t(row16) * loads + from) * 32 + lane, once);
  };

  // Pieces of 16 bytes, PIECES a token. The 16 channels of a tile are a unit; unit u of a token stands at u ^ (token %
  // SPREAD), so that reads of neighboring tokens find different banks.
  constexpr int PIECES = ROW / 16, UNIT = ROW / TILES, SPREAD = 128 / UNIT, AT_ONCE = 32 / PIECES;  // tokens
  static_assert(AT_ONCE % SPREAD == 0);
  const int token_of_lane = lane / PIECES, piece = lane % PIECES, place = piece ^ token_of_lane % SPREAD * (UNIT / 16);
  auto fetch_activations = [&](int step) {
    const int channel = ((begin + step * WARPS + warp) * TILES * 16) + piece * 8;
    const int valid_tokens = channel < min(end * TILES * 16, depth) ? tokens - token_of_lane : 0;
    const Bf16* from = x + size_t(token_of_lane) * depth + channel;
    const unsigned to = ring + (step % STAGES * TOKENS + token_of_lane) * ROW + place * 16;
    if (step < steps)
#pragma unroll
      for (int token = 0; token < TOKENS; token += AT_ONCE) {
        copy_async(to + token * ROW, from, token < valid_tokens);
        from += AT_ONCE * depth;
      }
    commit_copies();
  };
  auto multiply = [&](int stage, int i) {
    const char* const at = reinterpret_cast<const char*>(own) + (stage * TOKENS + g) * ROW + (i ^ g % SPREAD) * UNIT +
                           t * 8;
    uint2 b[TOKENS8];  // all loads before the first use
#pragma unroll
    for (int j = 0; j < TOKENS8; ++j) b[j] = *reinterpret_cast<const uint2*>(at + 8 * j * ROW);
    uint4 decoded[ROWS16];
    if constexpr (INT4)
#pragma unroll
      for (int row16 = 0; row16 < ROWS16; ++row16) decoded[row16] = int4_to_bf16(word(w[stage][0][row16], i));
#pragma unroll
    for (int j = 0; j < TOKENS8; ++j)
#pragma unroll
      for (int row16 = 0; row16 < ROWS16; ++row16) mma(acc[row16][j], INT4 ? decoded[row16] : w[stage][i][row16], b[j]);
  };

#pragma unroll
  for (int stage = 0; stage < STAGES; ++stage)
#pragma unroll
    for (int i = 0; i < TILES; ++i) fetch_weights(stage, i, stage);
  const int rest = (begin + STAGES * WARPS) * LOADS, last = min(end * LOADS, loads);
  if (threadIdx.x < ROWS16 && rest < last)
    prefetch(weights + (size_t(threadIdx.x) * loads + rest) * 32, (last - rest) * 512, once);
  const int position = first_position + (past ? *past : 0);
  constexpr int FINISHERS = IN_CLUSTER ? SPLIT : 1;             // blocks; without a cluster the last one
  constexpr int SLOTS = (TOKENS + FINISHERS - 1) / FINISHERS;  // tokens that this block finishes: finisher, + FINISHERS...
  const int finisher = IN_CLUSTER ? rank : 0;
  constexpr int ALL = ROWS / 4;                        // quads of a token's accumulators
#if CLUSTER
  __shared__ unsigned long long arrived;
  if (SPLIT > 1) {
    if (threadIdx.x == 0) init(&arrived);
    cluster_wait_for_all();
    const int owned = max(tokens - rank + SPLIT - 1, 0) / SPLIT;
    if (threadIdx.x == 0) expect(&arrived, owned * SPLIT * ALL * 16);
  }
#endif
  wait_for_inputs();
  for (int step = 0; step < STAGES; ++step) fetch_activations(step);
  // Four lanes add the squares of a token. Each has 4 quads of them under way while the tiles are multiplied, enough
  // for K = 1024.
  constexpr int TOKENS_A_ROUND = THREADS / 4, ROUNDS = NORM ? (TOKENS + TOKENS_A_ROUND - 1) / TOKENS_A_ROUND : 0;
  const int quads = depth / 64;
  auto load_squares = [&](int round, int quad) {
    const int token = min(round * TOKENS_A_ROUND + int(threadIdx.x) / 4, tokens - 1);
    const float4 four = load_fresh(reinterpret_cast<const float4*>(squares) + size_t(first_token + token) * quads +
                                   min(quad, quads - 1));
    return quad < quads ? four : float4{0, 0, 0, 0};
  };
  float4 early[ROUNDS > 0 ? ROUNDS : 1][4];
#pragma unroll
  for (int round = 0; round < ROUNDS; ++round)
#pragma unroll
    for (int i = 0; i < 4; ++i) early[round][i] = load_squares(round, lane % 4 + 4 * i);

  for (int first_step = 0; first_step < steps; first_step += STAGES)
#pragma unroll
    for (int stage = 0; stage < STAGES; ++stage) {
      const int step = first_step + stage;
      if (step >= steps) break;
      wait_for_copies<STAGES - 1>();
      __syncwarp();
#pragma unroll
      for (int i = 0; i < TILES; ++i) {
        multiply(stage, i);
        if (step + STAGES < steps) fetch_weights(stage, i, step + STAGES);
      }
      __syncwarp();
      fetch_activations(step + STAGES);
    }
  let_next_kernel_start();

  // Quads of this block's share of the tile: all of a thread's are in the same rows. Their operands come while
  // the accumulators are added.
  constexpr int QUADS = O::QUADS * ROWS16, COUNT = (SLOTS * QUADS + THREADS - 1) / THREADS;
  static_assert(THREADS % QUADS == 0);
  const O output = {channel_scale, bias, residual, cosine, sine, y, k, v, rows, y_stride, kv_stride, position,
                    to_cache ? position : 0, {normed, normed_gain, normed_squares}};
  const int row = O::row_of(threadIdx.x % QUADS), n = blockIdx.x * ROWS + row;
  auto slot_of = [&](int i) { return (i * THREADS + int(threadIdx.x)) / QUADS; };
  auto token_of = [&](int i) { return slot_of(i) * FINISHERS + finisher; };
  const typename O::Columns columns = output.columns(n);
  typename O::Inputs inputs[COUNT];
#pragma unroll
  for (int i = 0; i < COUNT; ++i)
    if (token_of(i) < tokens) inputs[i] = output.inputs(first_token + token_of(i), n);

  __shared__ float inverse_rms[TOKENS];
#pragma unroll
  for (int round = 0; round < ROUNDS; ++round) {
    float4 four = early[round][0] + early[round][1] + early[round][2] + early[round][3];
    for (int quad = 16 + lane % 4; quad < quads; quad += 4) four = four + load_squares(round, quad);
    float sum = four.x + four.y + four.z + four.w;
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const int token = round * TOKENS_A_ROUND + threadIdx.x / 4;
    if (lane % 4 == 0 && token < TOKENS) inverse_rms[token] = rsqrtf(__fdividef(sum, depth) + epsilon);
  }
#pragma unroll
  for (int j = 0; j < TOKENS8; ++j) {
    float* const of_tokens = own + 8 * j * PITCH;
#pragma unroll
    for (int row16 = 0; row16 < ROWS16; ++row16) stage_fragment<ROWS16>(of_tokens, row16, acc[row16][j]);
  }
  __syncthreads();

  float* received = shared + WARPS * REGION;  // the SPLIT parts of the tokens that this block finishes
  constexpr int EACH = (TOKENS * ALL + THREADS - 1) / THREADS;
  auto quad_of = [&](int i) { return min(i * THREADS + int(threadIdx.x), TOKENS * ALL - 1); };
  auto is_mine = [&](int i) { return i * THREADS + threadIdx.x < TOKENS * ALL && quad_of(i) / ALL < tokens; };
  if constexpr (SPLIT > 1) {
    float4 sums[EACH];  // all of them before the first goes away
#pragma unroll
    for (int i = 0; i < EACH; ++i)
      sums[i] = sum_quads<WARPS>(shared + quad_of(i) / ALL * PITCH + quad_of(i) % ALL * 4, REGION);
#if CLUSTER
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int token = quad_of(i) / ALL, row = quad_of(i) % ALL * 4;
      if (is_mine(i))
        send(sums[i], received + (rank * SLOTS + token / SPLIT) * PITCH + row, &arrived, token % SPLIT);
    }
    wait(&arrived);
#else
    const int group = blockIdx.z * gridDim.x + blockIdx.x;
    received = partial + size_t(group) * SPLIT * TOKENS * ROWS;
#pragma unroll
    for (int i = 0; i < EACH; ++i)
      if (is_mine(i)) *reinterpret_cast<float4*>(received + (rank * TOKENS * ALL + quad_of(i)) * 4) = sums[i];
    if (!is_last_block(counters + group, SPLIT)) return;
#endif
  }
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const int slot = min(slot_of(i), SLOTS - 1);
    auto sum = [&](int row) {
      if constexpr (SPLIT == 1) return sum_quads<WARPS>(shared + slot * PITCH + row, REGION);
      else if constexpr (IN_CLUSTER) return sum_quads<SPLIT>(received + slot * PITCH + row, SLOTS * PITCH);
      else return sum_quads<SPLIT, true>(received + slot * ROWS + row, TOKENS * ROWS);
    };
    const float r = NORM && token_of(i) < TOKENS ? inverse_rms[token_of(i)] : 1.0f;
    const typename O::Values values = output.values(columns, inputs[i], r, sum(row), sum(row + 8 * (O::PARTS - 1)));
    if (slot_of(i) < SLOTS && token_of(i) < tokens) output.store(first_token + token_of(i), n, values);
  }
}
