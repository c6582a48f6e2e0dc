// Rounds columns of a weight one after the other, each made up for the errors of those before it. For k = 0, 1, ..:
//
//   q[k] = clamp(round_half_even((w[k] + carried[k]) / scale)), e[k] = w[k] - q[k] scale,
//   carried[j] += feedback[k][j] e[k] for j > k
//
// in float32 with each operation rounded on its own (no fused multiply-add), as PyTorch computes it on a CPU.
//
//   columns   w [count, rows]: a column of the weight is contiguous; count <= COLUMNS
//   scale     [rows]
//   feedback  [count, count], its rows `stride` apart, read above the diagonal
//   carried   [count, rows]; e is left there
//   quantized [count, rows], integers of `bits`
//
// A thread takes a row of the weight and holds what is carried in registers. grid ceil(rows / 128), block 128.

template <int COLUMNS> __global__ void __launch_bounds__(128)
compensate(const float* columns, const float* scale, const float* feedback, float* carried, signed char* quantized, int rows,
           int count, int stride, int bits) {
  __shared__ float shared[COLUMNS][COLUMNS];
  for (int i = threadIdx.x; i < COLUMNS * COLUMNS; i += 128) {
    const int k = i / COLUMNS, j = i % COLUMNS;
    shared[k][j] = k < j && j < count ? feedback[size_t(k) * stride + j] : 0;
  }
  __syncthreads();
  const int row = blockIdx.x * 128 + threadIdx.x;
  if (row >= rows) return;
  const float step = scale[row], high = (1 << (bits - 1)) - 1, low = -high - 1;
  float sum[COLUMNS];
#pragma unroll
  for (int k = 0; k < COLUMNS; ++k) sum[k] = k < count ? carried[size_t(k) * rows + row] : 0;
#pragma unroll
  for (int k = 0; k < COLUMNS; ++k)
    if (k < count) {
      const size_t at = size_t(k) * rows + row;
      const float w = columns[at], q = fminf(fmaxf(rintf(__fdiv_rn(__fadd_rn(w, sum[k]), step)), low), high);
      const float error = __fsub_rn(w, __fmul_rn(q, step));
      quantized[at] = int(q);
      carried[at] = error;
#pragma unroll
      for (int j = k + 1; j < COLUMNS; ++j) sum[j] = __fadd_rn(sum[j], __fmul_rn(shared[k][j], error));
    }
}
