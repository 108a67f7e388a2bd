// A C++ caller of the kernels on raw pointers: kernels FOLDER, where the Python module `_cuda` is. It is the emulated one
// here, so that the memory of this process stands for a GPU's, and the null stream for any.
#include <pybind11/embed.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

constexpr int BATCH = 2, LENGTH = 3, WIDTH = 8;
constexpr int BATCH_STEP = 40, TOKEN_STEP = 10;  // in elements; between the rows lies what is not x's

std::uintptr_t address(const std::vector<float>& numbers) { return reinterpret_cast<std::uintptr_t>(numbers.data()); }

// The largest difference between `out` [B, L, D] and LayerNorm(x).
double difference(const std::vector<float>& x, const std::vector<float>& out) {
  double most = 0;
  for (int row = 0; row < BATCH * LENGTH; ++row) {
    const float* from = x.data() + row / LENGTH * BATCH_STEP + row % LENGTH * TOKEN_STEP;
    double mean = 0, square = 0;
    for (int i = 0; i < WIDTH; ++i) mean += from[i] / WIDTH;
    for (int i = 0; i < WIDTH; ++i) square += (from[i] - mean) * (from[i] - mean) / WIDTH;
    for (int i = 0; i < WIDTH; ++i) {
      const double expected = (from[i] - mean) / std::sqrt(square + 1e-6);
      const double found = std::abs(out[row * WIDTH + i] - expected);
      most = found <= most ? most : found;  // also takes NaN
    }
  }
  return most;
}

}  // namespace

int main(int, char** given) {
  py::scoped_interpreter python;
  py::module_::import("sys").attr("path").attr("insert")(0, given[1]);
  const py::object modulate = py::module_::import("_cuda").attr("modulate");
  std::vector<float> x(BATCH * BATCH_STEP, NAN), out(BATCH * LENGTH * WIDTH, NAN);
  for (int row = 0; row < BATCH * LENGTH; ++row) {
    float* to = x.data() + row / LENGTH * BATCH_STEP + row % LENGTH * TOKEN_STEP;
    for (int i = 0; i < WIDTH; ++i) to[i] = std::sin(float(row * WIDTH + i));
  }
  const auto call = [&](std::uintptr_t from) {
    modulate("x"_a = from, "x_steps"_a = py::make_tuple(BATCH_STEP, TOKEN_STEP), "out"_a = address(out),
             "shape"_a = py::make_tuple(BATCH, LENGTH, WIDTH), "dtype"_a = "float32", "stream"_a = 0);
  };
  call(address(x));
  std::printf("difference: %g\n", difference(x, out));
  for (const std::uintptr_t wrong : {std::uintptr_t(0), address(x) + 1}) {
    try {
      call(wrong);
    } catch (const py::error_already_set& error) {
      std::printf("refused: %s\n", error.what());
    }
  }
}
