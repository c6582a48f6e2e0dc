// The loops of runtime/images.py, which says what they compute; called through ctypes. Built where there is a C compiler.
//
// An image is [height, width, 3], of any strides. Along an axis, output i is the weighted sum of the `taps` inputs from
// first[i] on, all of them in the image. A pixel is loaded as a vector of four values, the last of no account.
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GLIBC__)
#define FOR_EACH_CPU __attribute__((target_clones("avx2", "default")))
#else
#define FOR_EACH_CPU
#endif

typedef int32_t Ints __attribute__((vector_size(16)));
typedef float Floats __attribute__((vector_size(16)));

typedef struct {
  const char* data;
  int64_t height, width, row, column, channel; // the last three: strides in bytes
} Image;

typedef struct {
  int64_t size, taps;
  const int32_t* first; // [size]
  const void* weights; // [size, taps]
} Axis;

const int32_t resize_version = 1; // of the functions' arguments: images.py takes no other

enum { FRACTION = 22, BLOCK = 32, ROWS = 4 };

static inline Ints load(const int32_t* pixel) {
  Ints values;
  memcpy(&values, pixel, sizeof values);
  return values;
}

static inline void widen(const Image* image, int64_t y, int32_t* to) {
  const uint8_t* const from = (const uint8_t*)image->data + y * image->row;
  if (image->column == 3 && image->channel == 1)
    for (int64_t x = 0; x < 3 * image->width; ++x) to[x] = from[x];
  else
    for (int64_t x = 0; x < image->width; ++x)
      for (int c = 0; c < 3; ++c) to[3 * x + c] = from[x * image->column + c * image->channel];
}

// uint8 -> uint8 with integer weights, FRACTION bits of them behind the point, first along rows, then along columns.
// Computes rows begin .. end - 1 of the result.
//
//   out   the result, rows `out_row` bytes apart
//   work  bytes: 4 ROWS (3 image width + 3 result width + 2) + 3 result width (input rows of these rows) + BLOCK
FOR_EACH_CPU void resize_bytes(
    const Image* image, const Axis* rows, const Axis* columns, int64_t begin, int64_t end, uint8_t* out, int64_t out_row,
    void* work) {
  const int64_t top = rows->first[begin], bottom = rows->first[end - 1] + rows->taps, width = 3 * columns->size;
  const int32_t half = 1 << (FRACTION - 1);
  const int64_t wide_width = 3 * image->width + 1, sums_width = width + 1;
  int32_t* const wide = work; // ROWS rows as integers, [ROWS, wide_width]
  int32_t* const sums = wide + ROWS * wide_width; // [ROWS, sums_width]
  uint8_t* const narrow = (uint8_t*)(sums + ROWS * sums_width); // [bottom - top, width]
  for (int64_t y = top; y < bottom; y += ROWS) {
    const int64_t count = bottom - y < ROWS ? bottom - y : ROWS;
    for (int64_t row = 0; row < count; ++row) widen(image, y + row, wide + row * wide_width);
    const int32_t* weight = columns->weights;
    for (int64_t x = 0; x < columns->size; ++x) {
      const int32_t* pixel = wide + 3 * columns->first[x];
      Ints sum[ROWS];
      for (int row = 0; row < ROWS; ++row) sum[row] = (Ints){half, half, half, half};
      for (int64_t tap = 0; tap < columns->taps; ++tap, pixel += 3, ++weight)
        for (int row = 0; row < ROWS; ++row) sum[row] += load(pixel + row * wide_width) * *weight;
      for (int row = 0; row < ROWS; ++row) memcpy(sums + row * sums_width + 3 * x, &sum[row], sizeof sum[row]);
    }
    for (int64_t row = 0; row < count; ++row) {
      uint8_t* const to = narrow + (y + row - top) * width;
      for (int64_t x = 0; x < width; ++x) to[x] = sums[row * sums_width + x] >> FRACTION;
    }
  }
  for (int64_t y = begin; y < end; ++y) {
    const uint8_t* const from = narrow + (rows->first[y] - top) * width;
    const int32_t* const weight = (const int32_t*)rows->weights + y * rows->taps;
    for (int64_t x = 0; x < width; x += BLOCK) {
      int32_t sum[BLOCK];
      for (int i = 0; i < BLOCK; ++i) sum[i] = half;
      for (int64_t tap = 0; tap < rows->taps; ++tap)
        for (int i = 0; i < BLOCK; ++i) sum[i] += weight[tap] * from[tap * width + x + i];
      uint8_t bytes[BLOCK];
      for (int i = 0; i < BLOCK; ++i) bytes[i] = sum[i] >> FRACTION;
      memcpy(out + y * out_row + x, bytes, width - x < BLOCK ? width - x : BLOCK);
    }
  }
}

// uint8 / 255, or float, -> float with float weights of at most 2 taps along both axes, each operation rounded: along
// columns, then along rows; then clamped to low .. high, doubled and less 1. Computes rows begin .. end - 1 of the result.
//
//   is_float  whether the image is of floats
//   out       the result, rows `out_row` floats apart
//   work      floats: 3 image width + 1 + 2 (3 result width + 1)
FOR_EACH_CPU void resize_floats(
    const Image* image, int is_float, const Axis* rows, const Axis* columns, int64_t begin, int64_t end, float low,
    float high, float* out, int64_t out_row, float* work) {
  const int64_t width = 3 * columns->size;
  float* const wide = work; // a row as floats, [3 image width + 1]
  float* const narrow[2] = {wide + 3 * image->width + 1, wide + 3 * image->width + width + 2}; // even and odd rows
  int64_t held[2] = {-1, -1};
  for (int64_t y = begin; y < end; ++y) {
    for (int64_t from_y = rows->first[y]; from_y < rows->first[y] + rows->taps; ++from_y) {
      if (held[from_y & 1] == from_y) continue;
      held[from_y & 1] = from_y;
      const char* const from = image->data + from_y * image->row;
      if (!is_float && image->column == 3 && image->channel == 1)
        for (int64_t x = 0; x < 3 * image->width; ++x) wide[x] = ((const uint8_t*)from)[x] / 255.f;
      else
        for (int64_t x = 0; x < image->width; ++x)
          for (int c = 0; c < 3; ++c) {
            const char* const value = from + x * image->column + c * image->channel;
            wide[3 * x + c] = is_float ? *(const float*)value : *(const uint8_t*)value / 255.f;
          }
      float* const to = narrow[from_y & 1];
      const float* weight = columns->weights;
      for (int64_t x = 0; x < columns->size; ++x, weight += columns->taps) {
        const float* const pixel = wide + 3 * columns->first[x];
        Floats left, right = {0};
        memcpy(&left, pixel, sizeof left);
        left *= weight[0];
        if (columns->taps == 2) {
          memcpy(&right, pixel + 3, sizeof right);
          left += right * weight[1];
        }
        memcpy(to + 3 * x, &left, sizeof left);
      }
    }
    const float* const upper = narrow[rows->first[y] & 1];
    const float* const lower = narrow[(rows->first[y] + rows->taps - 1) & 1];
    const float* const weight = (const float*)rows->weights + y * rows->taps;
    float* const to = out + y * out_row;
    for (int64_t x = 0; x < width; ++x) {
      float value = upper[x] * weight[0];
      if (rows->taps == 2) value += lower[x] * weight[1];
      value = value < low ? low : value > high ? high : value;
      to[x] = value * 2 - 1;
    }
  }
}
