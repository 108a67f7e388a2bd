// Rows: every operation here is the same work on many rows of memory, each done by one team of lanes.
//
// A team is 1, 2, 4 ... 32 lanes of a warp, or all warps of a CTA. It reads its row once, in units of COUNT numbers,
// and keeps it in registers, HELD units per lane, from the first reduction to the write. With HELD = 0 nothing is
// kept and each pass reads again: slower, for any width.
#pragma once

#include "operations.h"
#include "vector.cuh"

#ifndef __CUDACC__
#include "emulate.h"
#endif

namespace dit {

constexpr int MAX_LANES = 512;  // of a team; leaves each lane up to 128 registers
constexpr int MAX_WARPS = MAX_LANES / 32;
#ifdef __CUDACC__
constexpr int SMALL_CTA = 128;  // lanes of a CTA that holds several teams
#else
constexpr int SMALL_CTA = 32;
#endif

struct Team {
  int rank, size;
  float (*partial)[MAX_WARPS];  // [2], shared by the CTA: a sum's slots are free again after the next sum's barrier
  int turn = 0;

  DIT_DEVICE Team(int rank, int size, float (*partial)[MAX_WARPS]) : rank(rank), size(size), partial(partial) {}

  // The sum over all lanes of the team, the same bits in each.
  DIT_DEVICE float sum(float value) {
    value = butterfly(value, size < 32 ? size : 32);
    if (size <= 32) return value;
    turn ^= 1;
    if (rank % 32 == 0) partial[turn][rank / 32] = value;
    __syncthreads();
    const int warp = rank % MAX_WARPS;
    return butterfly(warp < size / 32 ? partial[turn][warp] : 0.0f, MAX_WARPS);
  }

  // The sum over aligned groups of so many lanes, a power of 2.
  DIT_DEVICE static float butterfly(float value, int lanes) {
    for (int far = lanes / 2; far > 0; far /= 2) value += __shfl_xor_sync(~0u, value, far);
    return value;
  }
};

template <class Body>
__global__ void __launch_bounds__(MAX_LANES, 1) rows_kernel(const __grid_constant__ Body body, unsigned rows, int size) {
  __shared__ float partial[2][MAX_WARPS];
  const unsigned row = blockIdx.x * (blockDim.x / size) + threadIdx.x / size;
  if (row >= rows) return;
  Team team(threadIdx.x % size, size, partial);
  body(row, team);
}

// Let teams of `size` lanes call body(row, team) for all rows, fewer than 2^31.
template <class Body>
cudaError_t launch(const Body& body, unsigned rows, int size, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  const unsigned lanes = size > 32 ? size : SMALL_CTA;
  const unsigned teams = lanes / size, ctas = rows / teams + (rows % teams != 0);
#ifdef __CUDACC__
  rows_kernel<<<ctas, lanes, 0, stream>>>(body, rows, size);
  return cudaGetLastError();
#else
  emulate(ctas, lanes, [&] { rows_kernel(body, rows, size); });
  return cudaSuccess;
#endif
}

template <int COUNT, int HELD, class Load>
struct Row {
  Team& team;
  int units;  // of the row, COUNT numbers each
  Load load;  // load(unit, float* to)
  float held[HELD > 0 ? HELD : 1][COUNT];

  DIT_DEVICE Row(Team& team, int units, Load load) : team(team), units(units), load(load) {}

  // Let make(unit, float* to) give this lane's units; with HELD = 0 later passes `load` them.
  template <class Make>
  DIT_DEVICE void fill(Make make) {
    if constexpr (HELD > 0) {
#pragma unroll
      for (int i = 0; i < HELD; ++i) {
        const int unit = i * team.size + team.rank;
        if (unit < units) make(unit, held[i]);
      }
    } else {
      for (int unit = team.rank; unit < units; unit += team.size) make(unit, held[0]);
    }
  }

  DIT_DEVICE void read() {
    if constexpr (HELD > 0) fill(load);
  }

  // Call visit(unit, const float* values) for each of this lane's units.
  template <class Visit>
  DIT_DEVICE void each(Visit visit) {
    fill([&](int unit, float* values) {
      if constexpr (HELD == 0) load(unit, values);
      visit(unit, values);
    });
  }

  // Over the whole row, the same in all lanes.
  DIT_DEVICE float sum() {
    float total = 0.0f;
    each([&](int, const float* values) {
#pragma unroll
      for (int k = 0; k < COUNT; ++k) total += values[k];
    });
    return team.sum(total);
  }

  DIT_DEVICE float squares(float mean) {
    float total = 0.0f;
    each([&](int, const float* values) {
#pragma unroll
      for (int k = 0; k < COUNT; ++k) total += (values[k] - mean) * (values[k] - mean);
    });
    return team.sum(total);
  }
};

template <int COUNT, int HELD, class Load>
DIT_DEVICE Row<COUNT, HELD, Load> row_of(Team& team, int units, Load load) {
  return Row<COUNT, HELD, Load>(team, units, load);
}

// Host side: the lanes for a row of so many units if each holds at most `held`; 0: no team is large enough.
inline int team_size(int units, int held) {
  const int lanes = (units + held - 1) / held;
  if (lanes > MAX_LANES) return 0;
  if (lanes > 32) return (lanes + 31) / 32 * 32;
  int size = 1;
  while (size < lanes) size *= 2;
  return size;
}

// Host side: the lanes for a row that is not held.
inline int streaming_team(int units) {
  const int size = team_size(units, 8);
  return size > 0 ? size : MAX_LANES;
}

// Host side: return use(T()) for the C++ type of a dtype.
template <class Use>
cudaError_t with_type(Dtype dtype, Use use) {
  switch (dtype) {
    case Dtype::bfloat16: return use(__nv_bfloat16());
    case Dtype::float16: return use(__half());
    default: return use(float());
  }
}

}  // namespace dit
