// qk_norm_rope: normalise the queries and keys of one projection, then turn them by 3D rotary embedding, in place.
//
//     q = rotate(norm(qkv[..., :D];   q_weight, q_bias))
//     k = rotate(norm(qkv[..., D:2D]; k_weight, k_bias))        v = qkv[..., 2D:] is not touched
//
//     norm    rms over the width D, rms or layer norm over each head, or none
//     rotate  (a, b) -> (a cos - b sin, a sin + b cos) for each pair (a, b) of a head
//
// qkv [B, L, 3D], the last dimension contiguous. A row is what is normed together: a token's q or k (D numbers) for rms,
// one head of it (K numbers) otherwise. A unit is PAIRS neighbouring pairs of a head. One team per row: read once, written
// once. Rotary tables are read from the caches: one row per token (dense), or a few KB per axis.
#include "row.cuh"

namespace dit {

// Where the first number of a pair stands in a row: pairs are counted over all heads.
template <bool HALF>
DIT_DEVICE unsigned place_of(unsigned pair, unsigned half) { return HALF ? pair / half * 2 * half + pair % half : 2 * pair; }

// Read the pairs from `place` on: COUNT = 2 * PAIRS numbers; HALF: PAIRS first ones, then PAIRS second ones.
template <int PAIRS, bool HALF, bool OFTEN, typename T>
DIT_DEVICE void read_pairs(const T* row, unsigned place, unsigned half, float* to) {
  if constexpr (HALF || PAIRS == 1) {
    read<T, PAIRS, OFTEN>(row + place, to);
    read<T, PAIRS, OFTEN>(row + place + (HALF ? half : 1), to + PAIRS);
  } else {
    read<T, 2 * PAIRS, OFTEN>(row + place, to);
  }
}

template <int PAIRS, bool HALF, typename T>
DIT_DEVICE void write_pairs(T* row, unsigned place, unsigned half, const float* from) {
  if constexpr (HALF || PAIRS == 1) {
    write<PAIRS>(row + place, from);
    write<PAIRS>(row + place + (HALF ? half : 1), from + PAIRS);
  } else {
    write<2 * PAIRS>(row + place, from);
  }
}

// One token's rows in the tables.
struct Turns {
  const Rope& rope;
  const float* dense;
  unsigned row[3];  // where the rows of the axes start

  DIT_DEVICE Turns(const Rope& rope, unsigned position, unsigned half)
      : rope(rope), dense(rope.dense + int64_t(position) * half * 2) {
    const unsigned line = position / rope.grid[2];
    row[0] = line / rope.grid[1] * rope.pairs[0];
    row[1] = line % rope.grid[1] * rope.pairs[1];
    row[2] = position % rope.grid[2] * rope.pairs[2];
  }

  // (cos, sin) of the pairs of a head from `pair` on.
  template <int PAIRS>
  DIT_DEVICE void read(unsigned pair, float* to) const {
    if (rope.dense != nullptr) {
      read_often<2 * PAIRS>(dense + 2 * pair, to);
      return;
    }
#pragma unroll
    for (int k = 0; k < PAIRS; ++k) {
      unsigned at = pair + k;
      int axis = 0;
      if (at >= rope.pairs[0]) at -= rope.pairs[0], axis = 1;
      if (axis == 1 && at >= rope.pairs[1]) at -= rope.pairs[1], axis = 2;
      const float* table = axis == 0 ? rope.axis[0] : axis == 1 ? rope.axis[1] : rope.axis[2];
      read_often<2>(table + 2 * int64_t((axis == 0 ? row[0] : axis == 1 ? row[1] : row[2]) + at), to + 2 * k);
    }
  }
};

template <typename T, int PAIRS, int HELD, bool HALF>
struct QkNormRopeRow {
  QkNormRope a;

  DIT_DEVICE void operator()(unsigned index, Team& team) const {
    const unsigned heads = a.norm == Norm::rms ? 1 : a.heads;  // rows of one q or k
    const int width = a.norm == Norm::rms ? a.heads * a.size : a.size;
    const unsigned half = a.size / 2, head = index % heads, part = index / heads % 2, token = index / heads / 2;
    const unsigned batch = token / a.length, place = token % a.length;
    T* x = static_cast<T*>(a.qkv) + batch * a.batch_step + place * a.token_step + (part * a.heads + head) * a.size;
    const unsigned position = place - a.rope.first;  // wraps before the first
    const bool rotated = position < a.rope.count;
    if (a.norm == Norm::none && !rotated) return;

    auto row = row_of<2 * PAIRS, HELD>(team, width / (2 * PAIRS), [x, half](int unit, float* to) {
      read_pairs<PAIRS, HALF, false>(x, place_of<HALF>(unit * PAIRS, half), half, to);
    });
    row.read();
    float mean = 0.0f, factor = 1.0f;
    if (a.norm == Norm::layer_head) mean = row.sum() / width;
    if (a.norm != Norm::none) factor = 1.0f / sqrtf(row.squares(mean) / width + a.eps);

    const Turns turns(a.rope, rotated ? position : 0, half);
    float turn[2 * PAIRS];  // (cos, sin) of each pair; often the same for all units of a lane
    unsigned turn_pair = ~0u;
    row.each([&](int unit, const float* values) {
      const unsigned pair = unit * PAIRS, at = place_of<HALF>(pair, half);
      float h[2 * PAIRS], vector[2 * PAIRS];
#pragma unroll
      for (int k = 0; k < 2 * PAIRS; ++k) h[k] = (values[k] - mean) * factor;
      if (a.weight[part] != nullptr) {
        read_pairs<PAIRS, HALF, true>(a.weight[part], at, half, vector);
#pragma unroll
        for (int k = 0; k < 2 * PAIRS; ++k) h[k] *= vector[k];
      }
      if (a.bias[part] != nullptr) {
        read_pairs<PAIRS, HALF, true>(a.bias[part], at, half, vector);
#pragma unroll
        for (int k = 0; k < 2 * PAIRS; ++k) h[k] += vector[k];
      }
      if (rotated) {
        if (turn_pair != pair % half) {
          turn_pair = pair % half;
          turns.template read<PAIRS>(turn_pair, turn);
        }
#pragma unroll
        for (int k = 0; k < PAIRS; ++k) {
          float &first = h[HALF ? k : 2 * k], &second = h[HALF ? k + PAIRS : 2 * k + 1];
          const float cosine = turn[2 * k], sine = turn[2 * k + 1], turned = first * cosine - second * sine;
          second = first * sine + second * cosine;
          first = turned;
        }
      }
      write_pairs<PAIRS, HALF>(x, at, half, h);
    });
  }
};

template <typename T, bool HALF>
cudaError_t launch_paired(const QkNormRope& a, cudaStream_t stream) {
  constexpr int COUNT = PIECE / sizeof(T), PAIRS = HALF ? COUNT : COUNT / 2, HELD = HALF ? 2 : 4;
  const unsigned heads = a.norm == Norm::rms ? 1 : a.heads, rows = a.batch * a.length * 2 * heads;
  const int width = a.norm == Norm::rms ? a.heads * a.size : a.size;
  const int lanes = team_size(width / (2 * PAIRS), HELD);
  bool fits = a.size / 2 % PAIRS == 0 && aligned<T, COUNT>(a.qkv, a.batch_step, a.token_step) &&
              aligned<float, 2 * PAIRS>(a.rope.dense);
  for (int part = 0; part < 2; ++part) {
    fits = fits && aligned<float, COUNT>(a.weight[part]) && aligned<float, COUNT>(a.bias[part]);
  }
  if (fits && lanes > 0) return launch(QkNormRopeRow<T, PAIRS, HELD, HALF>{a}, rows, lanes, stream);
  return launch(QkNormRopeRow<T, 1, 0, HALF>{a}, rows, streaming_team(width / 2), stream);
}

cudaError_t qk_norm_rope(const QkNormRope& a, Dtype dtype, cudaStream_t stream) {
  return with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    return a.half ? launch_paired<T, true>(a, stream) : launch_paired<T, false>(a, stream);
  });
}

}  // namespace dit
