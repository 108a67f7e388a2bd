// gate_residual: add a gated branch to the residual stream, alone or with the norm that follows.
//
//     out = x + gate * y
//     h   = LayerNorm(out; weight, bias, eps) * (1 + scale) + shift        where h is given
//
// x, y [B, L, D], the last dimension contiguous; out, h [B, L, D] contiguous; gate, scale, shift [1 or B, M, D] and weight,
// bias [D] float32. One team per token: 2 reads, 1 or 2 writes; h is computed from the rounded out, as if in two steps.
#include "modulate.cuh"

namespace dit {

template <typename T, int COUNT, int HELD>
struct GateResidualToken {
  GateResidual a;

  DIT_DEVICE void operator()(unsigned token, Team& team) const {
    const unsigned batch = token / a.length, place = token % a.length;
    const T* x = static_cast<const T*>(a.x) + batch * a.x_batch + place * a.x_token;
    const T* y = static_cast<const T*>(a.y) + batch * a.y_batch + place * a.y_token;
    const float* gate = chosen(a.gate, batch, place, a.width);
    T* out = static_cast<T*>(a.out) + int64_t(token) * a.width;
    auto row = row_of<COUNT, HELD>(team, a.width / COUNT, [out](int unit, float* to) {
      read_once<COUNT>(out + unit * COUNT, to);
    });
    row.fill([&](int unit, float* sum) {
      const int at = unit * COUNT;
      float branch[COUNT], factor[COUNT];
      read_once<COUNT>(x + at, sum);
      read_once<COUNT>(y + at, branch);
      if (gate != nullptr) {
        read_often<COUNT>(gate + at, factor);
#pragma unroll
        for (int k = 0; k < COUNT; ++k) branch[k] *= factor[k];
      }
#pragma unroll
      for (int k = 0; k < COUNT; ++k) sum[k] = widened(narrowed<T>(sum[k] + branch[k]));
      write<COUNT>(out + at, sum);
    });
    if (a.h != nullptr) {
      adapt<COUNT>(row, a.adaptation, batch, place, a.width, static_cast<T*>(a.h) + int64_t(token) * a.width);
    }
  }
};

cudaError_t gate_residual(const GateResidual& a, Dtype dtype, cudaStream_t stream) {
  return with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int COUNT = PIECE / sizeof(T), HELD = 4;
    const int lanes = team_size(a.width / COUNT, HELD);
    const bool fits = a.width % COUNT == 0 && aligned<T, COUNT>(a.x, a.x_batch, a.x_token) &&
                      aligned<T, COUNT>(a.y, a.y_batch, a.y_token) && aligned<T, COUNT>(a.out) &&
                      aligned<T, COUNT>(a.h) && aligned<COUNT>(a.gate) && aligned<COUNT>(a.adaptation);
    if (fits && lanes > 0) return launch(GateResidualToken<T, COUNT, HELD>{a}, a.batch * a.length, lanes, stream);
    return launch(GateResidualToken<T, 1, 0>{a}, a.batch * a.length, streaming_team(a.width), stream);
  });
}

}  // namespace dit
