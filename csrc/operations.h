// The operations of this folder: arguments, and one function each that checks nothing, launches and returns.
//
// Memory is given as raw device pointers, sizes in elements and steps (strides) in elements; arithmetic is float32.
// Dimension key: B batch, L tokens, D width, N heads, K head size, M modulation groups, C channels.
// A formula and its layout stand at the head of the operation's .cu file.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace dit {

enum class Dtype { bfloat16, float16, float32 };

// Float32 vectors [1 or B, M, D], one for `group` consecutive tokens; `batch_step` is 0 where the batch shares them.
struct Vectors {
  const float* data = nullptr;  // null: absent
  int64_t batch_step = 0;
  unsigned group = 1;
};

// The norm of a token and what follows it; each pointer may be null.
struct Adaptation {
  bool rms = false;  // else layer norm
  Vectors scale, shift;
  const float* weight = nullptr;  // [D]
  const float* bias = nullptr;    // [D]
  float eps = 0;
};

struct Modulate {
  const void* x = nullptr;  // [B, L, D]
  int64_t x_batch = 0, x_token = 0;
  void* out = nullptr;  // [B, L, D] contiguous
  unsigned batch = 0, length = 0;
  int width = 0;
  Adaptation adaptation;
};

struct GateResidual {
  const void* x = nullptr;  // [B, L, D]
  const void* y = nullptr;  // [B, L, D]
  int64_t x_batch = 0, x_token = 0, y_batch = 0, y_token = 0;
  Vectors gate;
  void* out = nullptr;  // [B, L, D] contiguous
  void* h = nullptr;    // the same, or null: no norm
  unsigned batch = 0, length = 0;
  int width = 0;
  Adaptation adaptation;
};

enum class Norm { rms, rms_head, layer_head, none };

// (cos, sin) float32 of each pair of a head: `dense` [R, K/2, 2], or one table [positions, pairs, 2] per axis of a
// (t, h, w) grid of R tokens, w fastest; both absent: no rotation.
struct Rope {
  const float* dense = nullptr;
  const float* axis[3] = {nullptr, nullptr, nullptr};
  unsigned pairs[3] = {0, 0, 0};  // sum to K/2
  unsigned grid[3] = {1, 1, 1};   // multiply to R
  unsigned first = 0;             // the token that position 0 belongs to; those before, and from first + R on, stay
  unsigned count = 0;             // R; 0 where both are absent
};

struct QkNormRope {
  void* qkv = nullptr;  // [B, L, 3 N K]; the last dimension is contiguous
  int64_t batch_step = 0, token_step = 0;
  unsigned batch = 0, length = 0;
  int heads = 0, size = 0;
  Norm norm = Norm::rms;
  const float* weight[2] = {nullptr, nullptr};  // of q and k: [N K] for rms, [K] for norms over heads, or null
  const float* bias[2] = {nullptr, nullptr};    // [K], layer_head only, or null
  float eps = 0;
  bool half = false;  // pairs are (x[i], x[i + K/2]); else (x[2i], x[2i+1])
  Rope rope;
};

struct NormSilu {
  const void* x = nullptr;  // [B, pixels, C] by its steps
  void* out = nullptr;      // the same steps (it may be x); with upsample [B, pixels / width, 2, width, 2, C]
  const float* gamma = nullptr;  // [C]
  unsigned batch = 0, pixels = 0;
  int channels = 0;
  int64_t batch_step = 0, pixel_step = 0, channel_step = 1;
  bool silu = true;
  unsigned upsample_width = 0;  // pixels of a line; 0: no upsampling
};

cudaError_t modulate(const Modulate&, Dtype, cudaStream_t);
cudaError_t gate_residual(const GateResidual&, Dtype, cudaStream_t);
cudaError_t qk_norm_rope(const QkNormRope&, Dtype, cudaStream_t);
cudaError_t norm_silu(const NormSilu&, Dtype, cudaStream_t);

}  // namespace dit
