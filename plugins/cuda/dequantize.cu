// INT32 sums of a quantised linear -> float: the epilogue behind a GEMM that has none of its own (BitBLAS's).
//
//   y'[m, n] = (float(acc[m, n]) * weight_scale[n]) * x_scale[m]     float32, in this order
//   y        = y' @ blockdiag(rotation) + bias + residual[m, n]      one rounding to Out at the end
//
// x_scale is one number a token (scale_stride 1) or one for all (0). rotation is [N / block, block, block]; bias and
// residual may be null. A thread block takes CHUNK columns of a token; with ROTATE `block` is a multiple of 4 that divides CHUNK.
//
// grid (ceil(N / CHUNK), M), 256 threads; N a multiple of 4.
#include "common.cuh"

constexpr int CHUNK = 1024;

template <class Out, bool ROTATE>
__global__ void __launch_bounds__(CHUNK / 4)
dequantize(const int* acc, const float* x_scale, const float* weight_scale, const float* rotation, const float* bias,
           const Out* residual, Out* y, int rows, int scale_stride, int block) {
  __shared__ __align__(16) float chunk[ROTATE ? CHUNK : 4];
  const int token = blockIdx.y, n = blockIdx.x * CHUNK + 4 * threadIdx.x;
  const size_t at = size_t(token) * rows + n;

  float v[4] = {};
  if (n < rows) {
    const int4 sums = *reinterpret_cast<const int4*>(acc + at);
    const float4 scale = *reinterpret_cast<const float4*>(weight_scale + n);
    const float of_token = x_scale[size_t(token) * scale_stride];
    v[0] = __fmul_rn(__fmul_rn(sums.x, scale.x), of_token);
    v[1] = __fmul_rn(__fmul_rn(sums.y, scale.y), of_token);
    v[2] = __fmul_rn(__fmul_rn(sums.z, scale.z), of_token);
    v[3] = __fmul_rn(__fmul_rn(sums.w, scale.w), of_token);
  }
  if constexpr (ROTATE) {
    *reinterpret_cast<float4*>(chunk + 4 * threadIdx.x) = {v[0], v[1], v[2], v[3]};
    __syncthreads();
    const int first = 4 * threadIdx.x / block * block, column = 4 * threadIdx.x - first;
    const float* matrix = rotation + size_t(n / block) * block * block + column;
    for (int j = 0; j < 4; ++j) v[j] = 0;
    if (n < rows)
      for (int i = 0; i < block; ++i, matrix += block) {
        const float4 r = *reinterpret_cast<const float4*>(matrix);
        v[0] = fmaf(chunk[first + i], r.x, v[0]);
        v[1] = fmaf(chunk[first + i], r.y, v[1]);
        v[2] = fmaf(chunk[first + i], r.z, v[2]);
        v[3] = fmaf(chunk[first + i], r.w, v[3]);
      }
  }
  if (n >= rows) return;
  if (bias) {
    const float4 add = *reinterpret_cast<const float4*>(bias + n);
    v[0] = __fadd_rn(v[0], add.x), v[1] = __fadd_rn(v[1], add.y);
    v[2] = __fadd_rn(v[2], add.z), v[3] = __fadd_rn(v[3], add.w);
  }
  if (residual) {
    const Four<Out> add = *reinterpret_cast<const Four<Out>*>(residual + at);
    for (int i = 0; i < 4; ++i) v[i] = __fadd_rn(v[i], to_float(add.v[i]));
  }
  if constexpr (is_same<Out, float>)
    *reinterpret_cast<float4*>(y + at) = {v[0], v[1], v[2], v[3]};
  else
    *reinterpret_cast<uint2*>(y + at) = {pack2<Out>(v[0], v[1]), pack2<Out>(v[2], v[3])};
}
