// What the attention kernels with wgmma share.
#pragma once
#include "attention.cuh"

__device__ inline void let_tensor_cores_see() {  // what this thread has written to shared memory
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ inline void begin_wgmma() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_wgmma() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until all but the latest GROUPS of those committed are done. d is theirs, and not touched before.
template <int GROUPS, int N> __device__ inline void wait_for_wgmma(float (&d)[N][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory");
#pragma unroll
  for (int n = 0; n < N; ++n) asm volatile("" : "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])::"memory");
}
