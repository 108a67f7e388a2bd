// Packages of runtime/engines/packages.py, run by libtorch's loader of ahead-of-time compiled models.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/inductor/aoti_runner/model_container_runner.h>

#include <ATen/ops/from_blob.h>
#include <c10/core/InferenceMode.h>

#include <mutex>
#include <sstream>

#include "dit_runtime.hpp"

namespace dit_runtime {

namespace {

constexpr const char* FORMAT = "1";

struct Kind {
  const char* name;
  Dtype ours;
  at::ScalarType theirs;
};

constexpr Kind KINDS[] = {
    {"float32", Dtype::float32, at::kFloat}, {"float64", Dtype::float64, at::kDouble},
    {"bfloat16", Dtype::bfloat16, at::kBFloat16}, {"float16", Dtype::float16, at::kHalf},
    {"int64", Dtype::int64, at::kLong},
};

const Kind& kind_of(Dtype dtype) {
  for (const Kind& kind : KINDS) {
    if (kind.ours == dtype) return kind;
  }
  throw Refused("a tensor has a dtype that is none of Dtype's");
}

std::string told(Dtype dtype, const std::vector<std::int64_t>& shape) {
  std::ostringstream text;
  text << kind_of(dtype).name << " [";
  for (std::size_t i = 0; i < shape.size(); ++i) text << (i ? ", " : "") << shape[i];
  return text.str() + "]";
}

// "x float32 1 4 2 4 6; sigma float64 1" as ports.
std::vector<Port> ports_of(const std::string& text) {
  std::vector<Port> found;
  std::istringstream all(text);
  for (std::string each; std::getline(all, each, ';');) {
    std::istringstream words(each);
    Port port;
    std::string dtype;
    words >> port.name >> dtype;
    for (std::int64_t size; words >> size;) port.shape.push_back(size);
    for (const Kind& kind : KINDS) {
      if (kind.name == dtype) port.dtype = kind.ours;
    }
    found.push_back(std::move(port));
  }
  return found;
}

std::string first_line(const std::exception& error) {
  const std::string text = error.what();
  return text.substr(0, text.find('\n'));
}

}  // namespace

struct Engine::Package {
  std::unique_ptr<torch::inductor::AOTIModelPackageLoader> loader;
  at::Device device = at::kCPU;
  std::mutex turn;
};

Engine Engine::load(const std::string& file, int device) {
  Engine engine;
  engine.package_ = std::make_shared<Package>();
  try {
    auto& loader = engine.package_->loader;
    loader = std::make_unique<torch::inductor::AOTIModelPackageLoader>(file, "model", false, 1, device);
    const auto facts = loader->get_metadata();
    engine.facts_ = {facts.begin(), facts.end()};
  } catch (const std::exception& error) {
    throw Refused(file + " cannot be loaded (" + first_line(error) +
                  "); it wants the libtorch that wrote it, and its device: write it here by `python -m runtime build "
                  "--engine inductor --package FOLDER`");
  }
  auto& facts = engine.facts_;
  if (facts["dit_runtime"] != FORMAT) {
    throw Refused(file + " is no package of dit-runtime, or of another version; write it by `python -m runtime build "
                         "--engine inductor --package FOLDER`");
  }
  engine.inputs_ = ports_of(facts["inputs"]), engine.outputs_ = ports_of(facts["outputs"]);
  if (facts["AOTI_DEVICE_KEY"] == "cuda") engine.package_->device = at::Device(at::kCUDA, std::int8_t(device));
  return engine;
}

std::vector<Tensor> Engine::run(const std::vector<Tensor>& inputs, void* stream) const {
  if (package_ == nullptr) throw Refused("this engine is empty; make it by Engine::load");
  if (inputs.size() != inputs_.size()) {
    throw Refused(std::to_string(inputs.size()) + " inputs are given; this package takes " +
                  std::to_string(inputs_.size()));
  }
  c10::InferenceMode guard;
  std::vector<at::Tensor> given;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    const Tensor& tensor = inputs[i];
    const Port& port = inputs_[i];
    if (tensor.dtype != port.dtype || tensor.shape != port.shape || tensor.data == nullptr) {
      throw Refused(port.name + " is " + (tensor.data ? told(tensor.dtype, tensor.shape) : "a null pointer") +
                    "; expected " + told(port.dtype, port.shape));
    }
    const auto options = at::TensorOptions(kind_of(tensor.dtype).theirs).device(package_->device);
    given.push_back(at::from_blob(tensor.data.get(), tensor.shape, options));
  }
  std::vector<at::Tensor> made;
  try {
    std::lock_guard turn(package_->turn);
    made = package_->loader->run(given, stream);
  } catch (const std::exception& error) {
    throw Error(first_line(error));
  }
  std::vector<Tensor> results;
  for (std::size_t i = 0; i < made.size(); ++i) {
    const auto whole = std::make_shared<at::Tensor>(made[i].contiguous());
    results.push_back({std::shared_ptr<void>(whole, whole->data_ptr()), whole->sizes().vec(), outputs_.at(i).dtype});
  }
  return results;
}

}  // namespace dit_runtime
