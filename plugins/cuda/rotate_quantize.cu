// Float activations -> INT8 activations and one scale a token: the prologue of every group of quantised linears.
//
//   source     x[K], or RMSNorm(x) (* gain) (+ shift), or gelu_tanh(gate) * up of a row [gate K, up K]
//   x'         = (source * input_scale)[permutation] @ blockdiag(rotation)
//   x_scale    = max(absmax |x'|, 1e-12) / 127, or the given activation_scale
//   x_q        = clamp(round_half_even(x' / x_scale), -128, 127)
//
// One block a token; a thread holds VECTORS times 8 consecutive channels, so the row never leaves the registers. A block
// Hadamard (BLOCK = 16..128) is log2(BLOCK) stages of sums and differences: strides 1, 2, 4 inside the thread, the rest
// between lanes. A dense rotation (BLOCK = DENSE) reads `block` x `block` matrices and takes the row from shared memory.
//
// Gain, shift (adaptive norms: one row of their table), input_scale, permutation, activation_scale may be null.
// x_q is row-major [M, K], or with slab_tokens > 0 in the slabs of plugins/layout.py, activation_slabs.
//
// grid M, block a multiple of 32 with VECTORS * 8 * block >= K; shared memory 4 K bytes for a dense rotation, else none.
#include "common.cuh"

constexpr int PLAIN = 0, RMS_NORM = 1, GEGLU = 2;
constexpr int NONE = 0, DENSE = 1;

__device__ inline void load8(const float* from, float (&v)[8]) {
  const float4 a = *reinterpret_cast<const float4*>(from), b = *reinterpret_cast<const float4*>(from + 4);
  v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}
template <class In> __device__ inline void load8(const In* from, float (&v)[8]) {
  const uint4 raw = *reinterpret_cast<const uint4*>(from);
  const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = to_float(In{static_cast<unsigned short>(words[i / 2] >> (i % 2 * 16))});
}

// Channels k..k+7 of x', that is source channels `permutation[k..]`; zeros beyond K.
template <class T> __device__ inline void load8(const T* row, const int* permutation, int k, int depth, float (&v)[8]) {
  if (k >= depth) {
    for (int i = 0; i < 8; ++i) v[i] = 0;
  } else if (permutation) {
    for (int i = 0; i < 8; ++i) v[i] = to_float(row[permutation[k + i]]);
  } else {
    load8(row + k, v);
  }
}

template <bool MAX> __device__ inline float reduce_block(float value) {
  __shared__ float of_warps[32];
  auto combine = [](float a, float b) { return MAX ? fmaxf(a, b) : a + b; };
  for (int mask = 16; mask; mask /= 2) value = combine(value, __shfl_xor_sync(~0u, value, mask));
  __syncthreads();  // of_warps may still be read by an earlier reduction
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = value;
  __syncthreads();
  value = of_warps[0];
  for (int warp = 1; warp < blockDim.x / 32; ++warp) value = combine(value, of_warps[warp]);
  return value;
}

// Multiplies the BLOCK channels that lie in this thread and its neighbours by H / sqrt(BLOCK), Sylvester order.
template <int BLOCK> __device__ inline void hadamard(float (&v)[8]) {
#pragma unroll
  for (int stride = 1; stride < 8; stride *= 2)
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (!(i & stride)) {
        const float a = v[i], b = v[i + stride];
        v[i] = a + b, v[i + stride] = a - b;
      }
#pragma unroll
  for (int lanes = 1; lanes < BLOCK / 8; lanes *= 2)
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float other = __shfl_xor_sync(~0u, v[i], lanes);
      v[i] = threadIdx.x & lanes ? other - v[i] : v[i] + other;
    }
  constexpr float NORM = BLOCK == 16 ? 0.25f : BLOCK == 32 ? 0.17677669529663687f : BLOCK == 64 ? 0.125f : 0.08838834764831845f;
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] *= NORM;
}

// v[j] = sum_i row[i] R[i][j] for channels k..k+7 of `row`, R the matrix of their block.
__device__ inline void rotate_dense(const float* row, const float* rotation, int block, int k, float (&v)[8]) {
  const float* const inputs = row + k / block * block;
  const float* matrix = rotation + size_t(k / block) * block * block + k % block;
  for (int j = 0; j < 8; ++j) v[j] = 0;
  for (int i = 0; i < block; ++i, matrix += block) {
    float r[8];
    load8(matrix, r);
    for (int j = 0; j < 8; ++j) v[j] = fmaf(inputs[i], r[j], v[j]);
  }
}

// round_half_even(value / scale), saturated. value * (1 / scale) is within 1e-4 of the quotient for all that do not
// saturate; only near a tie is the true quotient, many times dearer, needed to round the same way.
__device__ inline unsigned quantize(float value, float scale, float inverse) {
  float ratio = value * inverse;
  if (fabsf(fabsf(ratio - rintf(ratio)) - 0.5f) < 1e-3f) ratio = __fdiv_rn(value, scale);
  int q;
  asm("cvt.rni.sat.s8.f32 %0, %1;" : "=r"(q) : "f"(ratio));
  return q & 0xFF;
}

template <class In, int SOURCE, int BLOCK, int VECTORS>
__global__ void __launch_bounds__(512)
rotate_quantize(const In* x, const float* gain, const float* shift, const float* input_scale, const int* permutation,
                const float* rotation, const float* activation_scale, signed char* x_q, float* x_scale, int depth,
                int row_stride, int block, int slab_tokens, float epsilon) {
  extern __shared__ __align__(16) float row_of_block[];
  const int token = blockIdx.x;
  const In* const row = x + size_t(token) * row_stride;
  auto channel = [&](int vector) { return 8 * int(vector * blockDim.x + threadIdx.x); };
  float v[VECTORS][8];

  let_next_kernel_start();
  wait_for_inputs();
#pragma unroll
  for (int n = 0; n < VECTORS; ++n) {
    load8(row, permutation, channel(n), depth, v[n]);
    if (SOURCE == GEGLU) {
      float up[8];
      load8(row + depth, permutation, channel(n), depth, up);
      for (int i = 0; i < 8; ++i) v[n][i] = gelu_tanh(v[n][i]) * up[i];
    }
  }

  float normalise = 1;
  if (SOURCE == RMS_NORM) {
    float squares = 0;
#pragma unroll
    for (int n = 0; n < VECTORS; ++n)
      for (int i = 0; i < 8; ++i) squares = fmaf(v[n][i], v[n][i], squares);
    normalise = __frsqrt_rn(reduce_block<false>(squares) / depth + epsilon);
  }

  float absmax = 0;
#pragma unroll
  for (int n = 0; n < VECTORS; ++n) {
    const int k = channel(n);
    if (SOURCE == RMS_NORM)
      for (int i = 0; i < 8; ++i) v[n][i] = __fmul_rn(v[n][i], normalise);
    float f[8];
    if (gain) {
      load8(gain, permutation, k, depth, f);
      for (int i = 0; i < 8; ++i) v[n][i] = __fmul_rn(v[n][i], f[i]);
    }
    if (shift) {
      load8(shift, permutation, k, depth, f);
      for (int i = 0; i < 8; ++i) v[n][i] = __fadd_rn(v[n][i], f[i]);
    }
    if (input_scale) {
      load8(input_scale, permutation, k, depth, f);
      for (int i = 0; i < 8; ++i) v[n][i] = __fmul_rn(v[n][i], f[i]);
    }
    if (BLOCK > DENSE) hadamard<BLOCK>(v[n]);
    if (BLOCK == DENSE && k < depth)
      for (int i = 0; i < 8; ++i) row_of_block[k + i] = v[n][i];
  }
  if (BLOCK == DENSE) __syncthreads();
#pragma unroll
  for (int n = 0; n < VECTORS; ++n) {
    if (BLOCK == DENSE && channel(n) < depth) rotate_dense(row_of_block, rotation, block, channel(n), v[n]);
    for (int i = 0; i < 8; ++i) absmax = fmaxf(absmax, fabsf(v[n][i]));
  }

  const float scale = activation_scale ? *activation_scale : __fdiv_rn(fmaxf(reduce_block<true>(absmax), 1e-12f), 127.0f);
  const float inverse = __fdiv_rn(1.0f, scale);
  if (threadIdx.x == 0) x_scale[token] = scale;
#pragma unroll
  for (int n = 0; n < VECTORS; ++n) {
    const int k = channel(n);
    if (k >= depth) break;
    uint2 packed = {0, 0};
    for (int i = 0; i < 4; ++i) {
      packed.x |= quantize(v[n][i], scale, inverse) << (8 * i);
      packed.y |= quantize(v[n][i + 4], scale, inverse) << (8 * i);
    }
    const size_t swizzled = (k / 16 % 8 ^ token % 8) * 16 + k % 16;
    const size_t at = slab_tokens ? (size_t(k / 128) * slab_tokens + token) * 128 + swizzled : size_t(token) * depth + k;
    *reinterpret_cast<uint2*>(x_q + at) = packed;
  }
}
