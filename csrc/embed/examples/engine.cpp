// Runs packages without Python: engine FOLDER INPUTS OUTPUTS [STEPS]
//
// FOLDER holds what `python -m runtime build --engine inductor --package FOLDER` wrote; INPUTS the bare numbers of the
// noise (x.bin) and of the text embeddings, zero behind the prompt's tokens (text.bin). Plain Euler steps without
// guidance, sigma falling evenly from 1 to 0; OUTPUTS gets latents.bin and frames.rgb, 8-bit RGB [frames, height, width, 3].
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <numeric>

#include "dit_runtime.hpp"

using dit_runtime::Dtype;
using dit_runtime::Engine;
using dit_runtime::Port;
using dit_runtime::Tensor;

namespace {

std::size_t count(const Port& port) {
  return std::accumulate(port.shape.begin(), port.shape.end(), std::size_t(1), std::multiplies<>());
}

// A float32 tensor of zeros for a port.
Tensor zeros(const Port& port) {
  return {std::shared_ptr<void>(new float[count(port)](), [](void* p) { delete[] static_cast<float*>(p); }), port.shape,
          Dtype::float32};
}

float* numbers(const Tensor& tensor) { return static_cast<float*>(tensor.data.get()); }

Tensor read(const std::string& file, const Port& port) {
  Tensor tensor = zeros(port);
  std::ifstream in(file, std::ios::binary);
  if (!in.read(static_cast<char*>(tensor.data.get()), std::streamsize(count(port) * sizeof(float)))) {
    throw dit_runtime::Refused(file + " is not there, or too short");
  }
  return tensor;
}

// Latents [1, C, T, H, W] -> frame t as [1, C, 1, H, W].
Tensor latent_frame(const Tensor& latents, const Port& port, std::int64_t t) {
  Tensor frame = zeros(port);
  const std::int64_t channels = latents.shape[1], frames = latents.shape[2], cells = latents.shape[3] * latents.shape[4];
  for (std::int64_t c = 0; c < channels; ++c) {
    std::memcpy(numbers(frame) + c * cells, numbers(latents) + (c * frames + t) * cells, cells * sizeof(float));
  }
  return frame;
}

// Pixels [1, 3, F, H, W] in [-1, 1] -> 8-bit RGB, frame by frame.
void write_frames(std::ofstream& out, const Tensor& pixels) {
  const std::int64_t frames = pixels.shape[2], area = pixels.shape[3] * pixels.shape[4];
  std::vector<unsigned char> bytes(area * 3);
  for (std::int64_t f = 0; f < frames; ++f) {
    for (std::int64_t c = 0; c < 3; ++c) {
      const float* plane = numbers(pixels) + (c * frames + f) * area;
      for (std::int64_t i = 0; i < area; ++i) {
        bytes[i * 3 + c] = static_cast<unsigned char>(std::nearbyint(std::clamp((plane[i] + 1) * 127.5f, 0.0f, 255.0f)));
      }
    }
    out.write(reinterpret_cast<const char*>(bytes.data()), std::streamsize(bytes.size()));
  }
}

void make(const std::string& folder, const std::string& inputs, const std::string& outputs, int steps) {
  const Engine step = Engine::load(folder + "/step-1.pt2");
  const Engine first = Engine::load(folder + "/decode-first.pt2"), next = Engine::load(folder + "/decode-next.pt2");
  const Port &x_port = step.inputs()[0], &text_port = step.inputs()[2];
  const Tensor x = read(inputs + "/x.bin", x_port), text = read(inputs + "/text.bin", text_port);
  for (int i = 0; i < steps; ++i) {
    const auto sigma = std::make_shared<double>(1.0 - double(i) / steps);
    const Tensor velocity = step.run({x, {sigma, {1}, Dtype::float64}, text})[0];
    for (std::size_t j = 0; j < count(x_port); ++j) numbers(x)[j] -= numbers(velocity)[j] / float(steps);
  }
  std::ofstream(outputs + "/latents.bin", std::ios::binary)
      .write(reinterpret_cast<const char*>(numbers(x)), std::streamsize(count(x_port) * sizeof(float)));
  std::ofstream frames(outputs + "/frames.rgb", std::ios::binary);
  std::vector<Tensor> kept;  // what the decoder remembers
  for (std::size_t i = 1; i < first.inputs().size(); ++i) kept.push_back(zeros(first.inputs()[i]));
  for (std::int64_t t = 0; t < x.shape[2]; ++t) {
    kept.insert(kept.begin(), latent_frame(x, first.inputs()[0], t));
    kept = (t ? next : first).run(kept);
    write_frames(frames, kept.front());
    kept.erase(kept.begin());
  }
}

}  // namespace

int main(int count, char** given) {
  if (count < 4) {
    std::fprintf(stderr, "usage: engine FOLDER INPUTS OUTPUTS [STEPS]\n");
    return 2;
  }
  try {
    make(given[1], given[2], given[3], count > 4 ? std::atoi(given[4]) : 10);
  } catch (const dit_runtime::Refused& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
