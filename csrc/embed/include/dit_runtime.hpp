// dit-runtime in a C++ program: from a prompt to frames.
//
//   auto model = dit_runtime::Model::load("demo");
//   dit_runtime::Request request;
//   request.prompt = "a red ball rolls left over green grass";
//   auto video = model.generate(request, [](const dit_runtime::Step& step) { ... });
//   video.each_frame([](const dit_runtime::Frame& frame) { ... });
//
// `Model` and `Video` embed Python (the library dit_runtime::dit_runtime). The interpreter starts with the first model,
// in a thread of its own, without signal handlers, without a change of the host's locale, and deaf to PYTHONPATH and its
// like. Its lock is free whenever C++ code runs, callbacks included. All functions may be called from any thread: calls
// on one model take turns, calls on several overlap. Nothing of Python or PyTorch stands in this header.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace dit_runtime __attribute__((visibility("default"))) {

// A fault of ours, or of what is below us.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The request or its surroundings cannot work: one sentence says what was given, what is legal and what to do.
struct Refused : Error {
  using Error::Error;
};

// What stopped a generation that was cancelled.
struct Cancelled : Error {
  using Error::Error;
};

// Stops a generation from any thread, at its next step or frame. Copies share one state.
class Cancel {
 public:
  void operator()() const { *asked_ = true; }
  bool asked() const { return *asked_; }

 private:
  std::shared_ptr<std::atomic<bool>> asked_ = std::make_shared<std::atomic<bool>>(false);
};

// What to make; what is absent is the model's own published default. The names are those of runtime.Request.
struct Request {
  std::string prompt;
  std::string negative_prompt;
  std::optional<int> width, height;  // pixels
  std::optional<int> num_frames;
  std::optional<double> fps;
  std::optional<int> steps;
  std::optional<double> guidance;
  std::optional<std::uint64_t> seed;
  std::string more;  // a JSON object with further fields of runtime.Request, such as {"periodic": true}; or nothing
};

// One denoising step that is done.
struct Step {
  int done, total;
};

// One decoded frame: 8-bit RGB [height, width, 3], contiguous; valid during the callback.
struct Frame {
  const std::uint8_t* pixels;
  int width, height;
  int index, total;
};

using OnStep = std::function<void(const Step&)>;
using OnFrame = std::function<void(const Frame&)>;

struct __attribute__((visibility("hidden"))) Loaded;  // the Python side

// A video whose frames are decoded as they are asked for. What a callback throws ends the call and reaches its caller.
class Video {
 public:
  int width() const { return width_; }
  int height() const { return height_; }
  int num_frames() const { return num_frames_; }
  double fps() const { return fps_; }

  // Calls `on_frame` with each frame as soon as it is decoded.
  void each_frame(const OnFrame& on_frame) const;
  // All frames, 8-bit RGB [num_frames, height, width, 3].
  std::vector<std::uint8_t> frames() const;
  // Writes .mp4, .webm, .gif, .png or a folder of numbered .png, by the name; the file is there whole or not at all.
  void save(const std::string& path) const;
  // What was asked and done, seconds per stage: a JSON object; whole when the frames have been decoded.
  std::string receipt() const;

 private:
  friend class Model;
  std::shared_ptr<Loaded> loaded_;
  Cancel cancel_;
  int width_ = 0, height_ = 0, num_frames_ = 0;
  double fps_ = 0;
};

struct LoadOptions {
  std::string device = "auto";   // auto, cpu, cuda, cuda:N
  std::string dtype = "auto";    // auto, float32, bfloat16, float16
  std::string engine = "eager";  // eager, cuda_graph, inductor, tensorrt
};

class Model {
 public:
  // "demo", a folder, a published name, or a repository in the local Hugging Face cache.
  static Model load(const std::string& name, const LoadOptions& options = {});

  // Denoises, and returns the video, whose frames are still to be decoded. `on_step` is called after each step.
  Video generate(const Request& request, const OnStep& on_step = {}, const Cancel& cancel = {}) const;

 private:
  std::shared_ptr<Loaded> loaded_;
};

// Starts the interpreter now. `python` is that of the environment with dit-runtime, such as /srv/venv/bin/python; where
// empty, the one that CMake found. The first model starts it otherwise.
void start(const std::string& python = "");

// Ends the interpreter; models and videos must be gone. It cannot start again in this process: PyTorch and NumPy refuse
// to be loaded twice. A program that never calls this may simply exit.
void shutdown();

// --- Without Python: the library dit_runtime::engine, which needs libtorch alone. ---

enum class Dtype { float32, float64, bfloat16, float16, int64 };

// A tensor in memory. `data` points to contiguous elements on the engine's device; `shape` counts elements.
struct Tensor {
  std::shared_ptr<void> data;
  std::vector<std::int64_t> shape;
  Dtype dtype = Dtype::float32;
};

// One input or output of an engine, as its package declares it.
struct Port {
  std::string name;
  std::vector<std::int64_t> shape;
  Dtype dtype;
};

// A package that `python -m runtime build --package` wrote: one step of the transformer, or one chunk of the decoder.
class Engine {
 public:
  // Refused for a file that is none of our packages; `device` is the index of a GPU, -1 the one at hand.
  static Engine load(const std::string& file, int device = -1);

  const std::vector<Port>& inputs() const { return inputs_; }
  const std::vector<Port>& outputs() const { return outputs_; }
  // Facts about what is in it, such as "model", "part", "device".
  const std::map<std::string, std::string>& facts() const { return facts_; }

  // Runs once; Refused where the inputs are not what `inputs` says. `stream` is a cudaStream_t, or null. Calls take
  // turns.
  std::vector<Tensor> run(const std::vector<Tensor>& inputs, void* stream = nullptr) const;

 private:
  struct Package;
  std::shared_ptr<Package> package_;
  std::vector<Port> inputs_, outputs_;
  std::map<std::string, std::string> facts_;
};

}  // namespace dit_runtime
