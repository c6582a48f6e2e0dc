// LayerNorm (CENTER) or RMSNorm of the rows of a matrix.
//
//   n = (x - mean) / sqrt(variance + epsilon), or x / sqrt(mean of squares + epsilon);  y = n (* gain) (+ shift)
//
//   x, y         [tokens, depth], rows `x_stride` and `y_stride` apart; y may be x where their types agree
//   gain, shift  [depth] float32 constants, may be null
//
// One block a token; a thread holds VECTORS times 8 consecutive channels, so the row never leaves the registers and the
// variance is that of centered values. depth and strides are multiples of 8.
// grid tokens, block a multiple of 32 with VECTORS * 8 * block >= depth.
#include "row.cuh"

template <class In, class Out, bool CENTER, int VECTORS>
__global__ void __launch_bounds__(512)
normalize(const In* x, const float* gain, const float* shift, Out* y, int depth, int x_stride, int y_stride,
          float epsilon) {
  const In* const row = x + size_t(blockIdx.x) * x_stride;
  Out* const to = y + size_t(blockIdx.x) * y_stride;
  auto channel = [&](int vector) { return 8 * int(vector * blockDim.x + threadIdx.x); };
  float v[VECTORS][8] = {};
  Eight<float> scale[VECTORS], add[VECTORS];

  let_next_kernel_start();
#pragma unroll
  for (int n = 0; n < VECTORS; ++n) {
    const int k = channel(n);
    for (int i = 0; i < 8; ++i) scale[n].v[i] = 1, add[n].v[i] = 0;
    if (gain && k < depth) scale[n] = load(gain + k);
    if (shift && k < depth) add[n] = load(shift + k);
  }
  wait_for_inputs();
#pragma unroll
  for (int n = 0; n < VECTORS; ++n)
    if (channel(n) < depth) convert(load(row + channel(n)), v[n]);

  if (CENTER) {
    float sum = 0;
#pragma unroll
    for (int n = 0; n < VECTORS; ++n)
      for (int i = 0; i < 8; ++i) sum += v[n][i];
    const float mean = sum_of_block(sum) / depth;
#pragma unroll
    for (int n = 0; n < VECTORS; ++n)
      if (channel(n) < depth)
        for (int i = 0; i < 8; ++i) v[n][i] -= mean;
  }
  float squares = 0;
#pragma unroll
  for (int n = 0; n < VECTORS; ++n)
    for (int i = 0; i < 8; ++i) squares = fmaf(v[n][i], v[n][i], squares);
  const float factor = __frsqrt_rn(sum_of_block<1>(squares) / depth + epsilon);

#pragma unroll
  for (int n = 0; n < VECTORS; ++n) {
    if (channel(n) >= depth) break;
    for (int i = 0; i < 8; ++i) v[n][i] = fmaf(v[n][i] * factor, scale[n].v[i], add[n].v[i]);
    store(to + channel(n), v[n]);
  }
}
