// Kernels that follow each other, as one launch. For GPUs without programmatic dependent launch: there a launch waits for the
// end of the one ahead, and only then begins to load its weights.
//
// A part of a chain is a kernel with its grid. The parts' blocks follow each other in one grid, whose blocks start in that
// order: those of the next part are there, their weights loaded, while the part ahead still runs, and wait_for_inputs() waits
// until all of its blocks are done. A block thus waits for blocks that have started before it alone, and the foremost for none:
// however few fit on the GPU at a time, and whatever else runs there, the chain goes on. (That blocks start in the order of
// their index is what decoupled look-back relies on, too.)
//
//   links        of each part, how many of its blocks are done; zero before the launch
//   stale_links  those of the launch ahead, which this one clears
//
// "parts.cuh" is generated (plugins/kernels/chain.py): the sources of the parts, and the kernel.
//
// grid the sum of the parts', block and shared memory the greatest of theirs.
#define CHAIN
#include "attention.cuh"
#include "int4.cuh"
#include "quantize.cuh"

// What a block's kernel takes for its place in a launch of its own; and the link that it waits for, null in the first part.
struct Place {
  uint3 block, blocks, threads;
  const int* ahead;
  int blocks_ahead;
};
__shared__ Place of_chain;

__device__ inline void wait_for_inputs() {
  if (!of_chain.ahead) return;
  if (threadIdx.x == 0) {
    int done;
    do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(done) : "l"(of_chain.ahead) : "memory");
    while (done < of_chain.blocks_ahead);
  }
  __syncthreads();
}

// Begins block `block` of a part with a grid of X x Y x Z blocks. False: this thread is none of its.
template <int X, int Y, int Z, int THREADS>
__device__ inline bool enter(int block, const int* ahead, int blocks_ahead) {
  if (threadIdx.x >= THREADS) return false;
  if (threadIdx.x == 0)
    of_chain = {{unsigned(block % X), unsigned(block / X % Y), unsigned(block / (X * Y))}, {X, Y, Z}, {THREADS, 1, 1},
                ahead, blocks_ahead};
  __syncthreads();
  return true;
}

// Ends a block. All that its threads have written is there for those who see it in the link.
__device__ inline void leave(int* link) {
  __syncthreads();
  if (threadIdx.x == 0) asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(link) : "memory");
}

#include "parts.cuh"
