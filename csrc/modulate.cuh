// The norm of a token and what follows it: shared by modulate.cu and gate_residual.cu.
#pragma once

#include "row.cuh"

namespace dit {

// The vector for a token, or null.
DIT_DEVICE const float* chosen(const Vectors& vectors, unsigned batch, unsigned place, int width) {
  if (vectors.data == nullptr) return nullptr;
  return vectors.data + batch * vectors.batch_step + int64_t(place / vectors.group) * width;
}

// to = ((row - mean) / deviation * weight + bias) * (1 + scale) + shift; for the RMS norm the mean is taken as 0
template <int COUNT, typename T, class TokenRow>
DIT_DEVICE void adapt(TokenRow& row, const Adaptation& a, unsigned batch, unsigned place, int width, T* to) {
  const float mean = a.rms ? 0.0f : row.sum() / width;
  const float factor = 1.0f / sqrtf(row.squares(mean) / width + a.eps);
  const float* scale = chosen(a.scale, batch, place, width);
  const float* shift = chosen(a.shift, batch, place, width);
  row.each([&](int unit, const float* values) {
    const int at = unit * COUNT;
    float h[COUNT], vector[COUNT];
#pragma unroll
    for (int k = 0; k < COUNT; ++k) h[k] = (values[k] - mean) * factor;
    if (a.weight != nullptr) {
      read_often<COUNT>(a.weight + at, vector);
#pragma unroll
      for (int k = 0; k < COUNT; ++k) h[k] *= vector[k];
    }
    if (a.bias != nullptr) {
      read_often<COUNT>(a.bias + at, vector);
#pragma unroll
      for (int k = 0; k < COUNT; ++k) h[k] += vector[k];
    }
    if (scale != nullptr) {
      read_often<COUNT>(scale + at, vector);
#pragma unroll
      for (int k = 0; k < COUNT; ++k) h[k] *= 1.0f + vector[k];
    }
    if (shift != nullptr) {
      read_often<COUNT>(shift + at, vector);
#pragma unroll
      for (int k = 0; k < COUNT; ++k) h[k] += vector[k];
    }
    write<COUNT>(to + at, h);
  });
}

// Host side: may all vectors be read in runs of COUNT numbers?
template <int COUNT>
bool aligned(const Vectors& vectors) { return aligned<float, COUNT>(vectors.data, vectors.batch_step); }

template <int COUNT>
bool aligned(const Adaptation& a) {
  return aligned<COUNT>(a.scale) && aligned<COUNT>(a.shift) && aligned<float, COUNT>(a.weight) &&
         aligned<float, COUNT>(a.bias);
}

}  // namespace dit
