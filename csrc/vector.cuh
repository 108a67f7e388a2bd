// Loads and stores of a few neighbouring numbers at once, as float32 in registers.
//
// A run of COUNT numbers moves in pieces of at most 16 bytes (128 bits), so its address is a multiple of the piece.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define DIT_DEVICE __device__ __forceinline__
#else  // emulate.h
#define DIT_DEVICE inline
#endif

namespace dit {

constexpr int PIECE = 16;  // bytes that one lane loads or stores at once

template <int BYTES> struct Piece;
template <> struct Piece<2> { using type = unsigned short; };
template <> struct Piece<4> { using type = unsigned; };
template <> struct Piece<8> { using type = uint2; };
template <> struct Piece<16> { using type = uint4; };

template <typename T, int COUNT>
constexpr int piece_count = COUNT * int(sizeof(T)) < PIECE ? COUNT : PIECE / int(sizeof(T));

DIT_DEVICE float widened(float value) { return value; }
DIT_DEVICE float widened(__half value) { return __half2float(value); }
DIT_DEVICE float widened(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T> DIT_DEVICE T narrowed(float value);
template <> DIT_DEVICE float narrowed<float>(float value) { return value; }
template <> DIT_DEVICE __half narrowed<__half>(float value) { return __float2half_rn(value); }
template <> DIT_DEVICE __nv_bfloat16 narrowed<__nv_bfloat16>(float value) { return __float2bfloat16_rn(value); }

template <typename T, int COUNT, bool OFTEN>
DIT_DEVICE void read(const T* from, float* to) {
  constexpr int STEP = piece_count<T, COUNT>;
  using Word = typename Piece<STEP * sizeof(T)>::type;
#pragma unroll
  for (int i = 0; i < COUNT; i += STEP) {
    const Word* place = reinterpret_cast<const Word*>(from + i);
#ifdef __CUDACC__
    const Word word = OFTEN ? __ldg(place) : __ldcs(place);
#else
    const Word word = *place;
#endif
    T items[STEP];
    memcpy(items, &word, sizeof(word));
#pragma unroll
    for (int k = 0; k < STEP; ++k) to[i + k] = widened(items[k]);
  }
}

// Read what nobody reads again soon: it leaves the caches first, as all that is written.
template <int COUNT, typename T>
DIT_DEVICE void read_once(const T* from, float* to) { read<T, COUNT, false>(from, to); }

// Read what all rows share, and no kernel writes meanwhile.
template <int COUNT, typename T>
DIT_DEVICE void read_often(const T* from, float* to) { read<T, COUNT, true>(from, to); }

template <int COUNT, typename T>
DIT_DEVICE void write(T* to, const float* from) {
  constexpr int STEP = piece_count<T, COUNT>;
  using Word = typename Piece<STEP * sizeof(T)>::type;
#pragma unroll
  for (int i = 0; i < COUNT; i += STEP) {
    T items[STEP];
#pragma unroll
    for (int k = 0; k < STEP; ++k) items[k] = narrowed<T>(from[i + k]);
    Word word;
    memcpy(&word, items, sizeof(word));
#ifdef __CUDACC__
    __stcs(reinterpret_cast<Word*>(to + i), word);
#else
    *reinterpret_cast<Word*>(to + i) = word;
#endif
  }
}

// Host side: may runs of COUNT numbers of T be read at `data`, and at every multiple of the steps from there?
template <typename T, int COUNT>
bool aligned(const void* data, int64_t step = 0, int64_t other_step = 0) {
  constexpr int STEP = piece_count<T, COUNT>;
  return reinterpret_cast<uintptr_t>(data) % (STEP * sizeof(T)) == 0 && step % STEP == 0 && other_step % STEP == 0;
}

}  // namespace dit
