// What row.cuh takes from CUDA, made of CPU threads: one per lane, one CTA after the other. For tests without a GPU.
//
// A plain C++ compiler includes this file, and the kernels, teams and index arithmetic then run as they stand on host
// memory. Races and the memory system are what it does not show.
#pragma once

#include <barrier>
#include <cmath>
#include <thread>
#include <vector>

#undef __shared__
#define __shared__ static
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

namespace dit {

struct Extent {
  unsigned x;
};

inline thread_local Extent threadIdx, blockIdx, blockDim;

struct Cta {
  std::barrier<> barrier;
  std::vector<float> slots;

  explicit Cta(unsigned lanes) : barrier(lanes), slots(lanes) {}
};

inline thread_local Cta* cta = nullptr;

inline void __syncthreads() { cta->barrier.arrive_and_wait(); }

// All lanes of the CTA call it equally often; a lane that has returned is not waited for.
inline float __shfl_xor_sync(unsigned, float value, int far) {
  cta->slots[threadIdx.x] = value;
  cta->barrier.arrive_and_wait();
  const float other = cta->slots[threadIdx.x ^ far];
  cta->barrier.arrive_and_wait();
  return other;
}

template <class Kernel>
void emulate(unsigned ctas, unsigned lanes, Kernel kernel) {
  for (unsigned block = 0; block < ctas; ++block) {
    Cta shared(lanes);
    std::vector<std::thread> threads;
    for (unsigned lane = 0; lane < lanes; ++lane) {
      threads.emplace_back([&, lane] {
        threadIdx = {lane}, blockIdx = {block}, blockDim = {lanes}, cta = &shared;
        kernel();
        shared.barrier.arrive_and_drop();
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
}

}  // namespace dit
