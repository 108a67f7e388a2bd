// norm_silu: normalise each pixel over its channels, then SiLU, then (if asked) twice the size by repeating pixels.
//
//     h   = x / max(|x|, 1e-12) * sqrt(C) * gamma        |x| is the Euclidean norm over the C channels
//     out = h * sigmoid(h)                               (out = h without silu)
//
// x [B, pixels, C] by its steps; gamma [C] float32. Channels-last (channel_step 1): one team per pixel, read once, written
// once (four times with upsample: out [B, lines, 2, width, 2, C] contiguous). Channels-first: one lane per pixel, whose
// neighbours read its neighbours; x is read twice.
#include "row.cuh"

namespace dit {

DIT_DEVICE float sigmoid(float value) {
#ifdef __CUDACC__
  return __fdividef(1.0f, 1.0f + __expf(-value));
#else
  return 1.0f / (1.0f + expf(-value));
#endif
}

template <typename T, int COUNT, int HELD>
struct NormSiluPixel {
  NormSilu a;

  DIT_DEVICE void operator()(unsigned index, Team& team) const {
    const int64_t start = index / a.pixels * a.batch_step + index % a.pixels * a.pixel_step;
    const T* x = static_cast<const T*>(a.x) + start;
    const int64_t step = COUNT * a.channel_step;
    auto row = row_of<COUNT, HELD>(team, a.channels / COUNT, [x, step](int unit, float* to) {
      read_once<COUNT>(x + unit * step, to);
    });
    row.read();
    const float factor = sqrtf(float(a.channels)) / fmaxf(sqrtf(row.squares(0.0f)), 1e-12f);
    T* out = static_cast<T*>(a.out) + start;
    if (a.upsample_width > 0) {
      const unsigned line = index / a.upsample_width, column = index % a.upsample_width;
      out = static_cast<T*>(a.out) + (int64_t(line) * 4 * a.upsample_width + 2 * column) * a.channels;
    }
    row.each([&](int unit, const float* values) {
      float h[COUNT], gain[COUNT];
      read_often<COUNT>(a.gamma + unit * COUNT, gain);
#pragma unroll
      for (int k = 0; k < COUNT; ++k) {
        h[k] = values[k] * factor * gain[k];
        if (a.silu) h[k] *= sigmoid(h[k]);
      }
      T* to = out + unit * step;
      write<COUNT>(to, h);
      if (a.upsample_width > 0) {
        const int64_t below = int64_t(2) * a.upsample_width * a.channels;
        write<COUNT>(to + a.channels, h);
        write<COUNT>(to + below, h);
        write<COUNT>(to + below + a.channels, h);
      }
    });
  }
};

cudaError_t norm_silu(const NormSilu& a, Dtype dtype, cudaStream_t stream) {
  return with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int COUNT = PIECE / sizeof(T), HELD = 4;
    const int lanes = team_size(a.channels / COUNT, HELD);
    const bool fits = a.channel_step == 1 && a.channels % COUNT == 0 &&
                      aligned<T, COUNT>(a.x, a.batch_step, a.pixel_step) && aligned<T, COUNT>(a.out) &&
                      aligned<float, COUNT>(a.gamma);
    if (fits && lanes > 0) return launch(NormSiluPixel<T, COUNT, HELD>{a}, a.batch * a.pixels, lanes, stream);
    const int some = a.channel_step == 1 ? streaming_team(a.channels) : 1;
    return launch(NormSiluPixel<T, 1, 0>{a}, a.batch * a.pixels, some, stream);
  });
}

}  // namespace dit
