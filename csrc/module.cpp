// runtime._cuda: the operations as Python functions of integers (device pointers, sizes, steps in elements, a stream).
//
// For Python `runtime.kernels.cuda` is the side to call; C++ programs call this by pybind11, with memory and streams of
// their own (tests/embed/kernels.cpp), or compile operations.h and the .cu files in, without Python.
//
// A wrong argument is a ValueError, whatever CUDA reports a RuntimeError. Pointers are taken on trust. The module imports
// where no driver is, and says so when called there.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <tuple>

#include "operations.h"

namespace py = pybind11;

namespace {

using Pointer = uintptr_t;
using Pair = std::tuple<int64_t, int64_t>;
using Triple = std::tuple<int64_t, int64_t, int64_t>;
using Pointers = std::tuple<Pointer, Pointer, Pointer>;

[[noreturn]] void refuse(const std::string& sentence) { throw py::value_error(sentence); }

dit::Dtype dtype_of(const std::string& name) {
  if (name == "bfloat16") return dit::Dtype::bfloat16;
  if (name == "float16") return dit::Dtype::float16;
  if (name == "float32") return dit::Dtype::float32;
  refuse("dtype is '" + name + "'; legal: bfloat16, float16, float32");
}

int64_t bytes_of(dit::Dtype dtype) { return dtype == dit::Dtype::float32 ? 4 : 2; }

template <typename T>
T* pointer(const char* name, Pointer given, int64_t alignment) {
  if (given % alignment != 0) refuse(std::string(name) + " is not a multiple of " + std::to_string(alignment) + " bytes");
  return reinterpret_cast<T*>(given);
}

template <typename T>
T* needed(const char* name, Pointer given, int64_t alignment) {
  if (given == 0) refuse(std::string(name) + " is a null pointer");
  return pointer<T>(name, given, alignment);
}

const float* floats(const char* name, Pointer given) { return pointer<const float>(name, given, 4); }

int64_t within(const char* name, int64_t given, int64_t least, int64_t most) {
  if (given >= least && given <= most) return given;
  refuse(std::string(name) + " is " + std::to_string(given) + "; expected " + std::to_string(least) + " to " +
         std::to_string(most));
}

constexpr int64_t MOST = (int64_t(1) << 31) - 1;

// Rows are counted in 32 bits on the device; offsets are not.
void expect_countable(const char* name, std::initializer_list<int64_t> factors) {
  int64_t rows = 1;
  for (int64_t factor : factors) {
    if (factor == 0) return;
    if (rows > MOST / factor) refuse(std::string(name) + " are 2^31 or more in one call; split the call");
    rows *= factor;
  }
}

dit::Vectors vectors(const char* name, Pointer data, Pair steps, int64_t length) {
  dit::Vectors made;
  made.data = floats(name, data);
  if (made.data == nullptr) return made;
  made.batch_step = std::get<0>(steps);
  made.group = within((std::string(name) + " group").c_str(), std::get<1>(steps), 1, std::max<int64_t>(length, 1));
  return made;
}

dit::Adaptation adaptation(Pointer scale, Pair scale_steps, Pointer shift, Pair shift_steps, Pointer weight, Pointer bias,
                           double eps, int64_t length) {
  dit::Adaptation made;
  made.scale = vectors("scale", scale, scale_steps, length);
  made.shift = vectors("shift", shift, shift_steps, length);
  made.weight = floats("weight", weight);
  made.bias = floats("bias", bias);
  made.eps = float(eps);
  return made;
}

void expect_launched(cudaError_t status) {
  if (status == cudaSuccess) return;
  std::string sentence = cudaGetErrorString(status);
  if (status == cudaErrorInsufficientDriver || status == cudaErrorNoDevice || status == cudaErrorStubLibrary) {
    int version = 0;
    cudaDriverGetVersion(&version);
    sentence = version == 0 ? "no NVIDIA driver is on this machine (" + sentence + ")"
                            : "the NVIDIA driver cannot be used here (" + sentence + ")";
  } else if (status == cudaErrorNoKernelImageForDevice) {
    sentence += "; built for " DIT_ARCHITECTURES;
  }
  throw std::runtime_error("CUDA: " + sentence);
}

void modulate(Pointer x, Pair x_steps, Pointer out, Triple shape, Pointer scale, Pair scale_steps, Pointer shift,
              Pair shift_steps, Pointer weight, Pointer bias, double eps, bool rms, const std::string& dtype, Pointer stream) {
  const auto [batch, length, width] = shape;
  const dit::Dtype kind = dtype_of(dtype);
  dit::Modulate a;
  a.batch = within("batch", batch, 0, MOST), a.length = within("length", length, 0, MOST);
  a.width = within("width", width, 0, MOST);
  expect_countable("tokens", {batch, length});
  a.adaptation = adaptation(scale, scale_steps, shift, shift_steps, weight, bias, eps, length);
  a.adaptation.rms = rms;
  if (batch * length * width == 0) return;
  a.x = needed<const void>("x", x, bytes_of(kind)), a.out = needed<void>("out", out, bytes_of(kind));
  std::tie(a.x_batch, a.x_token) = x_steps;
  expect_launched(dit::modulate(a, kind, reinterpret_cast<cudaStream_t>(stream)));
}

void gate_residual(Pointer x, Pair x_steps, Pointer y, Pair y_steps, Pointer gate, Pair gate_steps, Pointer out,
                   Triple shape, Pointer h, Pointer scale, Pair scale_steps, Pointer shift, Pair shift_steps, Pointer weight,
                   Pointer bias, double eps, const std::string& dtype, Pointer stream) {
  const auto [batch, length, width] = shape;
  const dit::Dtype kind = dtype_of(dtype);
  dit::GateResidual a;
  a.batch = within("batch", batch, 0, MOST), a.length = within("length", length, 0, MOST);
  a.width = within("width", width, 0, MOST);
  expect_countable("tokens", {batch, length});
  a.gate = vectors("gate", gate, gate_steps, length);
  a.adaptation = adaptation(scale, scale_steps, shift, shift_steps, weight, bias, eps, length);
  if (batch * length * width == 0) return;
  a.x = needed<const void>("x", x, bytes_of(kind)), a.y = needed<const void>("y", y, bytes_of(kind));
  a.out = needed<void>("out", out, bytes_of(kind)), a.h = pointer<void>("h", h, bytes_of(kind));
  std::tie(a.x_batch, a.x_token) = x_steps;
  std::tie(a.y_batch, a.y_token) = y_steps;
  expect_launched(dit::gate_residual(a, kind, reinterpret_cast<cudaStream_t>(stream)));
}

dit::Norm norm_of(const std::string& name) {
  if (name == "rms") return dit::Norm::rms;
  if (name == "rms_head") return dit::Norm::rms_head;
  if (name == "layer_head") return dit::Norm::layer_head;
  if (name == "none") return dit::Norm::none;
  refuse("norm is '" + name + "'; legal: rms, rms_head, layer_head, none");
}

bool is_half(const std::string& pairing) {
  if (pairing != "half" && pairing != "interleaved") refuse("pairing is '" + pairing + "'; legal: interleaved, half");
  return pairing == "half";
}

void qk_norm_rope(Pointer qkv, Pair qkv_steps, Triple shape, int64_t heads, const std::string& norm, Pointer q_weight,
                  Pointer k_weight, Pointer q_bias, Pointer k_bias, double eps, const std::string& pairing, Pointer table,
                  Pointers axes_given, Triple pairs_given, Triple grid_given, Pair skip,
                  const std::string& dtype, Pointer stream) {
  const auto [batch, length, width] = shape;  // of q, of k
  const auto [t, h, w] = axes_given;
  const Pointer axes[3] = {t, h, w};
  const int64_t axis_pairs[3] = {std::get<0>(pairs_given), std::get<1>(pairs_given), std::get<2>(pairs_given)};
  const int64_t grid[3] = {std::get<0>(grid_given), std::get<1>(grid_given), std::get<2>(grid_given)};
  const dit::Dtype kind = dtype_of(dtype);
  dit::QkNormRope a;
  a.batch = within("batch", batch, 0, MOST), a.length = within("length", length, 0, MOST);
  within("width", width, 0, MOST / 3);
  a.heads = within("heads", heads, 1, MOST);
  if (width % heads != 0 || width / heads % 2 != 0) {
    refuse("width is " + std::to_string(width) + "; expected " + std::to_string(heads) + " heads of an even size");
  }
  a.size = width / heads;
  a.norm = norm_of(norm), a.half = is_half(pairing), a.eps = float(eps);
  expect_countable("tokens times heads", {batch, length, 2, a.norm == dit::Norm::rms ? 1 : heads});
  a.weight[0] = floats("q_weight", q_weight), a.weight[1] = floats("k_weight", k_weight);
  a.bias[0] = floats("q_bias", q_bias), a.bias[1] = floats("k_bias", k_bias);
  const auto [before, after] = skip;
  if (before < 0 || after < 0 || before + after > length) {
    refuse("skip is (" + std::to_string(before) + ", " + std::to_string(after) + "); expected at most " +
           std::to_string(length) + " tokens in all");
  }
  const bool by_axes = axes[0] != 0 && axes[1] != 0 && axes[2] != 0;
  if (table != 0 && by_axes) refuse("table and axes are both given");
  if (!by_axes && (axes[0] != 0 || axes[1] != 0 || axes[2] != 0)) refuse("axes has a null pointer beside others");
  if (table != 0 || by_axes) {
    a.rope.first = before, a.rope.count = length - before - after;
    a.rope.dense = pointer<const float>("table", table, 8);
  }
  if (by_axes && a.rope.count > 0) {
    for (int i = 0; i < 3; ++i) {
      a.rope.axis[i] = pointer<const float>("axes", axes[i], 8);
      a.rope.pairs[i] = within("axis_pairs", axis_pairs[i], 0, a.size / 2);
      a.rope.grid[i] = within("grid", grid[i], 0, MOST);
    }
    expect_countable("positions", {grid[0], grid[1], grid[2]});
    if (axis_pairs[0] + axis_pairs[1] + axis_pairs[2] != a.size / 2) refuse("axis_pairs do not sum to half a head");
    if (grid[0] * grid[1] * grid[2] != a.rope.count) refuse("grid does not hold the rotated tokens");
  }
  if (batch * length * width == 0) return;
  a.qkv = needed<void>("qkv", qkv, bytes_of(kind));
  std::tie(a.batch_step, a.token_step) = qkv_steps;
  expect_launched(dit::qk_norm_rope(a, kind, reinterpret_cast<cudaStream_t>(stream)));
}

void norm_silu(Pointer x, Triple x_steps, Pointer out, Triple shape, Pointer gamma, bool silu, int64_t upsample_width,
               const std::string& dtype, Pointer stream) {
  const auto [batch, pixels, channels] = shape;
  const dit::Dtype kind = dtype_of(dtype);
  dit::NormSilu a;
  a.batch = within("batch", batch, 0, MOST), a.pixels = within("pixels", pixels, 0, MOST);
  a.channels = within("channels", channels, 0, MOST);
  expect_countable("pixels", {batch, pixels});
  std::tie(a.batch_step, a.pixel_step, a.channel_step) = x_steps;
  a.silu = silu;
  a.upsample_width = within("upsample_width", upsample_width, 0, MOST);
  if (upsample_width > 0 && pixels % upsample_width != 0) refuse("upsample_width does not divide the pixels");
  if (upsample_width > 0 && (a.channel_step != 1 || out == x)) refuse("upsample wants channels-last and an out of its own");
  if (batch * pixels * channels == 0) return;
  a.x = needed<const void>("x", x, bytes_of(kind)), a.out = needed<void>("out", out, bytes_of(kind));
  a.gamma = needed<const float>("gamma", gamma, 4);
  expect_launched(dit::norm_silu(a, kind, reinterpret_cast<cudaStream_t>(stream)));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  using py::arg;
  m.doc() = "CUDA kernels on raw device pointers; `runtime.kernels.cuda` is the side to call.";
  m.attr("ARCHITECTURES") = DIT_ARCHITECTURES;
  const Pair none{0, 1};  // steps of vectors that are absent
  m.def("modulate", &modulate, py::kw_only(), arg("x"), arg("x_steps"), arg("out"), arg("shape"), arg("scale") = 0,
        arg("scale_steps") = none, arg("shift") = 0, arg("shift_steps") = none, arg("weight") = 0, arg("bias") = 0,
        arg("eps") = 1e-6, arg("rms") = false, arg("dtype"), arg("stream"),
        "out = LayerNorm(x) * (1 + scale) + shift, or with rms the RMS norm. shape (B, L, D); x_steps (batch, token); scale_steps, shift_steps "
        "(batch, tokens per vector).");
  m.def("gate_residual", &gate_residual, py::kw_only(), arg("x"), arg("x_steps"), arg("y"), arg("y_steps"),
        arg("gate") = 0, arg("gate_steps") = none, arg("out"), arg("shape"), arg("h") = 0, arg("scale") = 0,
        arg("scale_steps") = none, arg("shift") = 0, arg("shift_steps") = none, arg("weight") = 0, arg("bias") = 0,
        arg("eps") = 1e-6, arg("dtype"), arg("stream"),
        "out = x + gate * y and, where h is given, h = modulate(out). Arguments as of modulate.");
  m.def("qk_norm_rope", &qk_norm_rope, py::kw_only(), arg("qkv"), arg("qkv_steps"), arg("shape"), arg("heads"),
        arg("norm") = "rms", arg("q_weight") = 0, arg("k_weight") = 0, arg("q_bias") = 0, arg("k_bias") = 0,
        arg("eps") = 1e-6, arg("pairing") = "interleaved", arg("table") = 0, arg("axes") = Pointers{0, 0, 0},
        arg("axis_pairs") = Triple{0, 0, 0}, arg("grid") = Triple{0, 0, 0}, arg("skip") = Pair{0, 0}, arg("dtype"),
        arg("stream"),
        "Norm and rotate q and k of qkv [B, L, 3D] in place. shape (B, L, D); axes, axis_pairs, grid by (t, h, w).");
  m.def("norm_silu", &norm_silu, py::kw_only(), arg("x"), arg("x_steps"), arg("out"), arg("shape"), arg("gamma"),
        arg("silu") = true, arg("upsample_width") = 0, arg("dtype"), arg("stream"),
        "out = SiLU(x / |x| * sqrt(C) * gamma). shape (B, pixels, C); x_steps (batch, pixel, channel), out's as well.");
}
