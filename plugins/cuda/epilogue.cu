// INT32 accumulators of a quantized linear -> float: the epilogue after a GEMM that has none of its own (BitBLAS's), and
// the one with an output rotation, which no GEMM has.
//
//   y'[m, n] = dequantized(acc[m, n], weight_scale[n], x_scale[m])
//   y        = activation((y' @ blockdiag(rotation) + bias) * gate[n]) + residual[m, n]      one rounding to Out at the end
//
// x_scale is one number a token (scale_stride 1) or one for all (0). rotation is [N / block, block, block]; bias, gate and
// residual may be null. EPILOGUE is NONE, GELU, or GEGLU: gelu_tanh of the first N / 2 channels times the others,
// [M, N / 2]. A thread block takes CHUNK columns of a token's y; with ROTATE `block` is a multiple of 4 that divides CHUNK
// and y's columns.
//
// grid (ceil(columns of y / CHUNK), M), 256 threads; y's columns a multiple of 4.
#include "common.cuh"

constexpr int CHUNK = 1024;

__device__ inline Four<float> four(const float* from) { return *reinterpret_cast<const Four<float>*>(from); }

template <class Out, bool ROTATE, int EPILOGUE>
__global__ void __launch_bounds__(CHUNK / 4)
epilogue(const int* acc, const float* x_scale, const float* weight_scale, const float* rotation, const float* bias,
           const float* gate, const Out* residual, Out* y, int rows, int scale_stride, int block) {
  constexpr int PARTS = EPILOGUE == GEGLU ? 2 : 1;
  __shared__ __align__(16) float chunks[PARTS][ROTATE ? CHUNK : 4];
  const int token = blockIdx.y, columns = rows / PARTS, column = blockIdx.x * CHUNK + 4 * threadIdx.x;
  const bool inside = column < columns;

  let_next_kernel_start();
  wait_for_inputs();
  const float of_token = load_fresh(x_scale + size_t(token) * scale_stride);
  float v[PARTS][4] = {};
#pragma unroll
  for (int part = 0; part < PARTS; ++part) {
    const int n = part * columns + column;
    if (inside) {
      const Four<int> four_acc = load_fresh(reinterpret_cast<const Four<int>*>(acc + size_t(token) * rows + n));
      const Four<float> scale = four(weight_scale + n);
      for (int i = 0; i < 4; ++i) v[part][i] = dequantized(four_acc.v[i], scale.v[i], of_token);
    }
    if constexpr (ROTATE)
      *reinterpret_cast<float4*>(chunks[part] + 4 * threadIdx.x) = {v[part][0], v[part][1], v[part][2], v[part][3]};
  }
  if (ROTATE) __syncthreads();
  if (!inside) return;
#pragma unroll
  for (int part = 0; part < PARTS; ++part) {
    const int n = part * columns + column;
    if constexpr (ROTATE) {
      const int first = 4 * threadIdx.x / block * block;
      const float* matrix = rotation + size_t(n / block) * block * block + n % block;
      for (int j = 0; j < 4; ++j) v[part][j] = 0;
      for (int i = 0; i < block; ++i, matrix += block) {
        const Four<float> r = four(matrix);
        for (int j = 0; j < 4; ++j) v[part][j] = fmaf(chunks[part][first + i], r.v[j], v[part][j]);
      }
    }
    if (bias) {
      const Four<float> add = four(bias + n);
      for (int i = 0; i < 4; ++i) v[part][i] = __fadd_rn(v[part][i], add.v[i]);
    }
    if (gate) {
      const Four<float> factor = four(gate + n);
      for (int i = 0; i < 4; ++i) v[part][i] = __fmul_rn(v[part][i], factor.v[i]);
    }
  }
  const size_t at = size_t(token) * columns + column;
  Four<Out> add = {};
  if (residual) add = load_fresh(reinterpret_cast<const Four<Out>*>(residual + at));
  for (int i = 0; i < 4; ++i) {
    if (EPILOGUE != NONE) v[0][i] = gelu_tanh(v[0][i]);
    if (EPILOGUE == GEGLU) v[0][i] *= v[PARTS - 1][i];
    if (residual) v[0][i] = __fadd_rn(v[0][i], to_float(add.v[i]));
  }
  if constexpr (is_same<Out, float>)
    *reinterpret_cast<float4*>(y + at) = {v[0][0], v[0][1], v[0][2], v[0][3]};
  else
    *reinterpret_cast<uint2*>(y + at) = {pack2<Out>(v[0][0], v[0][1]), pack2<Out>(v[0][2], v[0][3])};
}
