// What the kernels share: number formats, tensor core operands, the epilogue, ordering between kernels.
// Compiled by NVRTC without any system header.
#pragma once

struct Bf16 { unsigned short bits; };
struct Half { unsigned short bits; };

template <class T> struct alignas(4 * sizeof(T)) Four { T v[4]; };

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

// Kernels launched with overlap (programmatic dependent launch, SM 90) start while their predecessor still runs.
// Weights may be read at once; everything another kernel writes only after wait_for_inputs(). A GEMM lets the next
// kernel start when its own loads are over, the short prologues at once, so that the GEMM after them loads weights
// meanwhile. (GEMMs that let it start at once, or prologues that do so late, made a chain slower.) No-ops in an
// ordinary launch. NO_PDL, NO_CLUSTER: plugins/nvrtc.py defines them for GPUs that are not to use these features.
__device__ inline void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900 && !defined(NO_PDL)
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ inline void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900 && !defined(NO_PDL)
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Past the multiprocessor's own cache: a line there may be older than what blocks elsewhere have written to it, when
// kernels overlap.
template <class T> __device__ inline T load_fresh(const T* from) { return __ldcg(from); }
template <class T> __device__ inline Four<T> load_fresh(const Four<T>* from) {
  union { Four<T> value; uint2 pair; uint4 quad; } bits;
  if constexpr (sizeof(Four<T>) == 8) bits.pair = __ldcg(reinterpret_cast<const uint2*>(from));
  else bits.quad = __ldcg(reinterpret_cast<const uint4*>(from));
  return bits.value;
}

// For copies of what no kernel reads again soon, as weights: it leaves L2 before activations and caches do.
__device__ inline unsigned long long evict_first() {
  unsigned long long policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ inline int4 operator+(int4 a, int4 b) { return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }

// Copies to shared memory, in the background and in groups.
__device__ inline void copy_async(unsigned to, const void* from, bool valid) {  // 16 bytes, zeros where not valid
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0));
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int GROUPS> __device__ inline void wait_for_copies() {  // until all but the latest GROUPS have landed
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

// Whether this is the last of `blocks` blocks to come here: it then sees what all of them have written to memory before. All threads
// of each block call it. `counter` is zero before the first and after the last. A fence of one thread, between barriers of its
// block, is one for the whole block.
__device__ inline bool is_last_block(int* counter, int blocks) {
  __syncthreads();
  bool is_last = false;
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicAdd(counter, 1) == blocks - 1;
    if (is_last) *counter = 0;
    __threadfence();
  }
  return __syncthreads_or(is_last);
}

__device__ inline unsigned address_of(const void* shared) { return unsigned(__cvta_generic_to_shared(shared)); }

// Barriers in shared memory, by address.
__device__ inline void init_barrier(unsigned barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ inline void arrive(unsigned barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// A warp gives a stage of a ring back, which all its lanes have read: lane 0 speaks for them. racecheck takes that for lane
// 0's own word, so there each lane speaks for itself.
#ifdef FOR_RACECHECK
constexpr int ARRIVALS_OF_WARP = 32;
#else
constexpr int ARRIVALS_OF_WARP = 1;
#endif
__device__ inline void give_back(unsigned barrier) {
  __syncwarp();
  if (threadIdx.x % 32 < ARRIVALS_OF_WARP) arrive(barrier);
}

// Blocks of a cluster (SM 90) that split K add their accumulators through each other's shared memory.
#if __CUDA_ARCH__ >= 900 && !defined(NO_CLUSTER)
#define CLUSTER 1
__device__ inline void cluster_barrier() {  // shared memory written before it can be read after it
  asm volatile("barrier.cluster.arrive;\nbarrier.cluster.wait;" ::: "memory");
}
__device__ inline void cluster_wait_for_all() {  // the same without the wait for stores to global memory
  asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;" ::: "memory");
}

// Reads the shared memory of block `rank` of the cluster at the address that `local` has in one's own.
__device__ inline int4 load_remote(const int* local, int rank) {
  int4 v;
  asm volatile("{.reg .u32 remote;\nmapa.shared::cluster.u32 remote, %4, %5;\n"
               "ld.shared::cluster.v4.u32 {%0,%1,%2,%3}, [remote];}"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(unsigned(__cvta_generic_to_shared(local))), "r"(rank));
  return v;
}
#endif

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

// A warp's tile times one chunk of K = 64: `tokens[j]` holds 16 consecutive bytes of token 8 j + g (the "direct"
// layout).
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

// 0.5 g (1 + tanh(u)) = g / (1 + exp(-2 u)), u = sqrt(2 / pi) (g + 0.044715 g^3): one exponential, no cancellation.
__device__ inline float gelu_tanh(float g) {
  constexpr float LINEAR = -2 * 0.7978845608028654f * 1.4426950408889634f, CUBIC = 0.044715f * LINEAR;
  const float exponent = fminf(g * fmaf(CUBIC, g * g, LINEAR), 115.0f);  // 115: all stays finite, and below 1e-34 g
  float power, inverse;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(exponent));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.0f + power));
  return g * inverse;
}

// What an integer accumulator stands for, float32 in this order.
__device__ inline float dequantized(int sum, float weight_scale, float x_scale) {
  return __fmul_rn(__fmul_rn(__int2float_rn(sum), weight_scale), x_scale);
}

// The epilogues of a GEMM. A kernel takes those that the head of its source names.
enum Finish { NONE, SILU, GELU, GEGLU, ROTARY };

// What the residual stream's writer leaves for a norm whose reader is gemm_float: y * gain[n] in bf16 (gain may be null),
// [tokens, N], and of every 16 channels the sum of y^2, [tokens, N / 16]. `x` is null where nobody wants it.
struct ForNorm {
  Bf16* x;
  const float* gain;
  float* squares;

  // Channels n..n + 3 of a token; four neighboring lanes have 16 channels.
  __device__ void store(int token, int n, int channels, const float (&v)[4]) const {
    if (!x) return;
    float4 factor = {1, 1, 1, 1};
    if (gain) factor = *reinterpret_cast<const float4*>(gain + n);
    *reinterpret_cast<uint2*>(x + size_t(token) * channels + n) = {
        pack2<Bf16>(v[0] * factor.x, v[1] * factor.y), pack2<Bf16>(v[2] * factor.z, v[3] * factor.w)};
    const unsigned lanes = 0xFu << threadIdx.x % 32 / 4 * 4;
    float sum = v[0] * v[0] + v[1] * v[1] + v[2] * v[2] + v[3] * v[3];
    sum += __shfl_xor_sync(lanes, sum, 1);
    sum += __shfl_xor_sync(lanes, sum, 2);
    if (threadIdx.x % 4 == 0) squares[size_t(token) * (channels / 16) + n / 16] = sum;
  }
};

// y = dequantized(acc, weight_scale[n], x_scale[m]) (+ bias[n]) (+ residual[m, n]), float32 in this order, one rounding
// at the end. bias and residual may be null; residual may be y itself. Out = int stores acc.
//
// EPILOGUE is NONE, or with no residual GELU: gelu_tanh of that; or GEGLU: the rows of every 16 are 8 of the gate and the 8
// of up that belong to them, and what is stored is gelu_tanh(gate) * up [M, N / 2].
//
// A thread stores 4 consecutive channels of a token: a quad, whose first row (of gate) is n. Everything but the
// accumulators is loaded ahead: `columns` even before wait_for_inputs, `inputs` after it.
template <int BITS, int EPILOGUE, class Out> struct Epilogue {
  const float* x_scale;
  const float* weight_scale;
  const float* bias;
  const Out* residual;
  Out* y;
  int tokens, rows;  // M, N
  ForNorm for_norm;  // with y in float32

  static constexpr int PARTS = EPILOGUE == GEGLU ? 2 : 1;  // gate and up
  static constexpr int QUADS = 4 / PARTS;                // of 16 rows
  __device__ static int first_row(int quad) { return quad / QUADS * 16 + quad % QUADS * 4; }

  struct Columns { float4 scale[PARTS], bias[PARTS]; };
  struct Inputs { float scale; Four<Out> residual; };

  __device__ Columns columns(int n) const {
    Columns c = {};
    if constexpr (!is_same<Out, int>)
      for (int part = 0; part < PARTS; ++part) {
        c.scale[part] = *reinterpret_cast<const float4*>(weight_scale + n + 8 * part);
        if (bias) c.bias[part] = *reinterpret_cast<const float4*>(bias + n + 8 * part);
      }
    return c;
  }

  __device__ Inputs inputs(int token, int n) const {
    Inputs in = {};
    if (is_same<Out, int> || token >= tokens) return in;
    in.scale = load_fresh(x_scale + token);
    if (residual) in.residual = load_fresh(reinterpret_cast<const Four<Out>*>(residual + size_t(token) * rows + n));
    return in;
  }

  // sum(offset) gives the accumulators of rows n + offset .. + 3.
  template <class Sum> __device__ void store(int token, int n, const Columns& c, const Inputs& in, Sum sum) const {
    if (token >= tokens) return;
    Out* const target = y + (size_t(token) * rows + n / 16 * 16) / PARTS + n % 16;
    if constexpr (is_same<Out, int>) {
      const int4 acc = sum(0);
      constexpr int SHIFT = BITS == 4 ? 4 : 0;  // INT4 weights come times 16
      *reinterpret_cast<int4*>(target) = {acc.x >> SHIFT, acc.y >> SHIFT, acc.z >> SHIFT, acc.w >> SHIFT};
    } else {
      float v[PARTS][4];
      for (int part = 0; part < PARTS; ++part) {
        const int4 acc = sum(8 * part);
        const float4 scale = c.scale[part], add = c.bias[part];
        v[part][0] = biased(acc.x, scale.x, in.scale, add.x);
        v[part][1] = biased(acc.y, scale.y, in.scale, add.y);
        v[part][2] = biased(acc.z, scale.z, in.scale, add.z);
        v[part][3] = biased(acc.w, scale.w, in.scale, add.w);
      }
      for (int i = 0; i < 4; ++i)
        if (EPILOGUE == GEGLU)
          v[0][i] = gelu_tanh(v[0][i]) * v[PARTS - 1][i];
        else if (EPILOGUE == GELU)
          v[0][i] = gelu_tanh(v[0][i]);
        else if (residual)
          v[0][i] = __fadd_rn(v[0][i], to_float(in.residual.v[i]));
      if constexpr (is_same<Out, float>) {
        *reinterpret_cast<float4*>(target) = {v[0][0], v[0][1], v[0][2], v[0][3]};
        if (EPILOGUE == NONE) for_norm.store(token, n, rows, v[0]);
      } else
        *reinterpret_cast<uint2*>(target) = {pack2<Out>(v[0][0], v[0][1]), pack2<Out>(v[0][2], v[0][3])};
    }
  }

  __device__ float biased(int acc, float scale, float token_scale, float add) const {
    const float value = dequantized(BITS == 4 ? acc >> 4 : acc, scale, token_scale);
    return bias ? __fadd_rn(value, add) : value;
  }
};

// Accumulators pass through shared memory to become rows of y. A row of `pitch(rows)` words a token puts the 32 lanes
// of a store (tokens 2 t, rows g) into 32 different banks, since 2 * pitch = 8 (mod 32).
__host__ __device__ constexpr int pitch(int rows) { return rows + 4; }

template <int ROWS16, class Sum>
__device__ inline void stage_fragment(Sum* staging, int row16, const Sum (&d)[4]) {
  const int lane = threadIdx.x % 32, row = 16 * row16 + lane / 4, token = 2 * (lane % 4);
  constexpr int P = pitch(16 * ROWS16);
  staging[token * P + row] = d[0];
  staging[(token + 1) * P + row] = d[1];
  staging[token * P + row + 8] = d[2];
  staging[(token + 1) * P + row + 8] = d[3];
}

// Words of shared memory that store_warp_tile wants for each warp: ROWS16 * batch tiles of 16 rows x 8 tokens.
__host__ __device__ constexpr int batch_of(int rows16) { return rows16 >= 4 ? 1 : 4 / rows16; }
__host__ __device__ constexpr int staging_words(int rows16) { return batch_of(rows16) * 8 * pitch(16 * rows16); }

// The columns of the quads that a lane stores of a warp's tile whose rows are first_row...
template <int ROWS16, class Epilogue>
__device__ inline typename Epilogue::Columns columns_of_lane(int first_row, const Epilogue& epilogue) {
  return epilogue.columns(first_row + Epilogue::first_row(threadIdx.x % 32 % (Epilogue::QUADS * ROWS16)));
}

// A warp's tile, rows first_row.., tokens first_token.., is written in batches of 8 or more tokens. These are the inputs of
// the quads that a lane stores, of AHEAD batches at a time.
template <int ROWS16, int TOKENS8, int AHEAD, class Epilogue> struct Batches {
  static constexpr int SIZE = batch_of(ROWS16), QUADS = Epilogue::QUADS * ROWS16, ITEMS = SIZE * 8 * QUADS / 32;
  static constexpr int COUNT = (TOKENS8 + SIZE - 1) / SIZE;
  static_assert(32 % QUADS == 0);  // so a lane's rows are the same in every batch
  typename Epilogue::Inputs inputs[AHEAD][ITEMS];

  // Of the lane's i-th quad of a batch: its token, and its first row of the tile.
  __device__ static int token(int i) { return (threadIdx.x % 32 + 32 * i) / QUADS; }
  __device__ static int row() { return Epilogue::first_row(threadIdx.x % 32 % QUADS); }

  __device__ void load(int batch, int first_token, int first_row, const Epilogue& epilogue) {
#pragma unroll
    for (int i = 0; i < ITEMS; ++i)
      inputs[batch % AHEAD][i] = epilogue.inputs(first_token + 8 * SIZE * batch + token(i), first_row + row());
  }
  __device__ void load_first(int first_token, int first_row, const Epilogue& epilogue) {
#pragma unroll
    for (int batch = 0; batch < AHEAD && batch < COUNT; ++batch) load(batch, first_token, first_row, epilogue);
  }
};

// Writes a warp's tile. The first of `batches` have been loaded; the loads of others are under way while those before them
// are written. `columns` is what columns_of_lane has loaded.
template <int ROWS16, int TOKENS8, int AHEAD, class Epilogue>
__device__ inline void store_warp_tile(const int (&acc)[ROWS16][TOKENS8][4], int* staging, int first_token,
                                       int first_row, const Epilogue& epilogue,
                                       const typename Epilogue::Columns& columns,
                                       Batches<ROWS16, TOKENS8, AHEAD, Epilogue>& batches) {
  using B = Batches<ROWS16, TOKENS8, AHEAD, Epilogue>;
  const int row = B::row(), n = first_row + row;
#pragma unroll
  for (int batch = 0; batch < B::COUNT; ++batch) {
    typename Epilogue::Inputs now[B::ITEMS];
#pragma unroll
    for (int i = 0; i < B::ITEMS; ++i) now[i] = batches.inputs[batch % AHEAD][i];
    if (batch + AHEAD < B::COUNT) batches.load(batch + AHEAD, first_token, first_row, epilogue);
    const int base = batch * B::SIZE;
#pragma unroll
    for (int j = 0; j < B::SIZE && base + j < TOKENS8; ++j)
#pragma unroll
      for (int i = 0; i < ROWS16; ++i)
        stage_fragment<ROWS16>(staging + j * 8 * pitch(16 * ROWS16), i, acc[i][base + j]);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < B::ITEMS; ++i) {
      const int token = B::token(i);
      const int* const at = staging + token * pitch(16 * ROWS16) + row;
      if (8 * base + token < 8 * TOKENS8)  // the last batch may be short
        epilogue.store(first_token + 8 * base + token, n, columns, now[i],
                       [at](int offset) { return *reinterpret_cast<const int4*>(at + offset); });
    }
    __syncwarp();
  }
}
