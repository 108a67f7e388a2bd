// modulate: normalise each token, then scale and shift it (adaptive layer norm).
//
//     out = norm(x; weight, bias, eps) * (1 + scale) + shift          // LayerNorm or RMS norm
//
// x [B, L, D], its last dimension contiguous; out [B, L, D] contiguous; scale, shift [1 or B, M, D] and weight, bias [D]
// float32. One team per token: x is read once, out written once; mean and variance are two passes over registers.
#include "modulate.cuh"

namespace dit {

template <typename T, int COUNT, int HELD>
struct ModulateToken {
  Modulate a;

  DIT_DEVICE void operator()(unsigned token, Team& team) const {
    const unsigned batch = token / a.length, place = token % a.length;
    const T* x = static_cast<const T*>(a.x) + batch * a.x_batch + place * a.x_token;
    auto row = row_of<COUNT, HELD>(team, a.width / COUNT, [x](int unit, float* to) {
      read_once<COUNT>(x + unit * COUNT, to);
    });
    row.read();
    adapt<COUNT>(row, a.adaptation, batch, place, a.width, static_cast<T*>(a.out) + int64_t(token) * a.width);
  }
};

cudaError_t modulate(const Modulate& a, Dtype dtype, cudaStream_t stream) {
  return with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int COUNT = PIECE / sizeof(T), HELD = 4;
    const int lanes = team_size(a.width / COUNT, HELD);
    const bool fits = a.width % COUNT == 0 && aligned<T, COUNT>(a.x, a.x_batch, a.x_token) &&
                      aligned<T, COUNT>(a.out) && aligned<COUNT>(a.adaptation);
    if (fits && lanes > 0) return launch(ModulateToken<T, COUNT, HELD>{a}, a.batch * a.length, lanes, stream);
    return launch(ModulateToken<T, 1, 0>{a}, a.batch * a.length, streaming_team(a.width), stream);
  });
}

}  // namespace dit
