// How the blocks of a cluster (SM 90) exchange accumulators: data announce their own arrival at a barrier in the shared
// memory that they go to. A barrier that orders them instead (release, acquire) waits for all of a block's memory traffic.
#pragma once
#include "common.cuh"

__device__ inline void let_others_see_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ inline void arrive_expecting(unsigned barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ inline void wait(unsigned barrier, int parity) {
  asm volatile("{.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;}"
               ::"r"(barrier), "r"(parity) : "memory");
}

// A barrier that opens once, when all `bytes` have come. One thread calls init, before the other blocks may send, and
// expect after a barrier of its block (or racecheck takes the two for a race); bytes may have come by then.
__device__ inline void init(unsigned long long* barrier) {
  init_barrier(address_of(barrier), 1);
  let_others_see_barriers();
}
__device__ inline void expect(unsigned long long* barrier, int bytes) { arrive_expecting(address_of(barrier), bytes); }
__device__ inline void wait(unsigned long long* barrier) { wait(address_of(barrier), 0); }

// Copies in bulk to one's own shared memory, announced at the barrier too; addresses and bytes are multiples of 16.
__device__ inline void copy(unsigned to, const void* from, int bytes, unsigned barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}

// Writes to block `rank` of the cluster, at the addresses that `to` and `barrier` have in one's own shared memory.
__device__ inline void send(uint4 v, const void* to, unsigned long long* barrier, int rank) {
  asm volatile("{.reg .u32 at, signal;\n"
               "mapa.shared::cluster.u32 at, %4, %6;\nmapa.shared::cluster.u32 signal, %5, %6;\n"
               "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [at], {%0,%1,%2,%3}, [signal];}"
               ::"r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(address_of(to)), "r"(address_of(barrier)), "r"(rank)
               : "memory");
}
__device__ inline void send(float4 v, const void* to, unsigned long long* barrier, int rank) {
  asm volatile("{.reg .u32 at, signal;\n"
               "mapa.shared::cluster.u32 at, %4, %6;\nmapa.shared::cluster.u32 signal, %5, %6;\n"
               "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [at], {%0,%1,%2,%3}, [signal];}"
               ::"f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(address_of(to)), "r"(address_of(barrier)), "r"(rank)
               : "memory");
}
__device__ inline void send(float v, const void* to, unsigned long long* barrier, int rank) {
  asm volatile("{.reg .u32 at, signal;\n"
               "mapa.shared::cluster.u32 at, %1, %3;\nmapa.shared::cluster.u32 signal, %2, %3;\n"
               "st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [at], %0, [signal];}"
               ::"f"(v), "r"(address_of(to)), "r"(address_of(barrier)), "r"(rank) : "memory");
}

// Each thread once: after it has made ready what the other blocks write to; before it sends.
__device__ inline void arrive_in_cluster() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
__device__ inline void wait_for_cluster() { asm volatile("barrier.cluster.wait;" ::: "memory"); }
