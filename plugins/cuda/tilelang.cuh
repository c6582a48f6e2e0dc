// What the kernels that BitBLAS generates call of TileLang's templates, which would bring in CUTLASS and the CUDA headers.
#pragma once
#define __asm__ asm
#define __volatile__ volatile

typedef unsigned int uint;
typedef unsigned char uchar;

namespace tl {

__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int GROUPS> __device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

// BYTES from global to shared memory in the background; zeros where not valid.
template <int BYTES> __device__ inline void cp_async_gs_conditional(const void* to, const void* from, bool valid) {
  static_assert(BYTES == 16);
  const unsigned address = unsigned(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(valid ? 16 : 0) : "memory");
}

template <int BYTES> __device__ inline void cp_async_gs(const void* to, const void* from) {
  cp_async_gs_conditional<BYTES>(to, from, true);
}

// The order of thread blocks: panels of WIDTH rows of blocks, walked back and forth, so that neighbors share operands.
template <int WIDTH> __device__ inline dim3 rasterization2DRow() {
  const unsigned block = blockIdx.x + blockIdx.y * gridDim.x;
  const unsigned panel_blocks = WIDTH * gridDim.x, panel = block / panel_blocks, within = block % panel_blocks;
  const bool last = (panel + 1) * WIDTH >= gridDim.y;
  const unsigned rows = last ? gridDim.y - panel * WIDTH : WIDTH;
  const unsigned column = within / rows;
  return dim3(panel % 2 ? gridDim.x - 1 - column : column, within % rows + panel * WIDTH, blockIdx.z);
}

}  // namespace tl

// 16 INT4, stored plus 8 with the lower index in the low nibble, as INT8.
__device__ inline void decode_int4(const signed char (&packed)[8], signed char (&values)[16]) {
  const uint2 words = *reinterpret_cast<const uint2*>(packed);
  uint4 out;
  auto widen = [](unsigned word, unsigned& first, unsigned& second) {
    // (u | 128) - 8 borrows from no neighbor; its upper bit is set where u - 8 is not negative.
    const unsigned low = (((word & 0x0F0F0F0Fu) | 0x80808080u) - 0x08080808u) ^ 0x80808080u;
    const unsigned high = ((((word >> 4) & 0x0F0F0F0Fu) | 0x80808080u) - 0x08080808u) ^ 0x80808080u;
    first = __byte_perm(low, high, 0x5140);
    second = __byte_perm(low, high, 0x7362);
  };
  widen(words.x, out.x, out.y);
  widen(words.y, out.z, out.w);
  *reinterpret_cast<uint4*>(values) = out;
}
