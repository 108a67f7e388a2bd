// Engines and threads: engines FILE. Four threads share one engine, two more load one of their own; what each gets must
// be what one call alone gives.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <future>
#include <vector>

#include "dit_runtime.hpp"

using namespace dit_runtime;

namespace {

std::size_t count(const std::vector<std::int64_t>& shape) {
  std::size_t found = 1;
  for (const std::int64_t size : shape) found *= std::size_t(size);
  return found;
}

// Numbers for a port: float32, or float64 for sigma.
Tensor filled(const Port& port) {
  const std::size_t length = count(port.shape);
  if (port.dtype == Dtype::float64) {
    return {std::shared_ptr<double>(new double[length]{0.5}, std::default_delete<double[]>()), port.shape, port.dtype};
  }
  std::shared_ptr<float> numbers(new float[length], std::default_delete<float[]>());
  for (std::size_t i = 0; i < length; ++i) numbers.get()[i] = std::sin(float(i));
  return {numbers, port.shape, port.dtype};
}

std::vector<float> run(const Engine& engine) {
  std::vector<Tensor> inputs;
  for (const Port& port : engine.inputs()) inputs.push_back(filled(port));
  const Tensor made = engine.run(inputs)[0];
  std::vector<float> numbers(count(made.shape));
  std::memcpy(numbers.data(), made.data.get(), numbers.size() * sizeof(float));
  return numbers;
}

}  // namespace

int main(int, char** given) {
  const Engine shared = Engine::load(given[1]);
  const std::vector<float> alone = run(shared);
  std::vector<std::future<bool>> threads;
  for (int i = 0; i < 6; ++i) {
    threads.push_back(std::async(std::launch::async, [&, i] {
      const Engine engine = i < 4 ? shared : Engine::load(given[1]);
      return run(engine) == alone && run(engine) == alone;
    }));
  }
  bool same = true;
  for (auto& thread : threads) same = thread.get() && same;
  try {
    shared.run({});
  } catch (const Refused& error) {
    std::printf("refused: %s\n", error.what());
  }
  std::printf("threads: %s\n", same ? "the same numbers" : "other numbers");
}
