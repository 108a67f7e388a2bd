// Model and Video: runtime.load, runtime.generate and what they return.
#include <cstring>
#include <mutex>

#include "interpreter.hpp"

namespace dit_runtime {

namespace {

// What the host asked to be told; a long video's later windows call it while frames are decoded.
struct Calls {
  OnStep on_step;
  Cancel cancel;
  std::exception_ptr thrown;
};

}  // namespace

// A Python object and the model's turn: calls on one model come one after the other, also from inside a callback.
struct Loaded {
  py::object object;
  std::shared_ptr<std::recursive_mutex> turn;
  std::shared_ptr<Calls> calls;

  explicit Loaded(std::shared_ptr<std::recursive_mutex> turn) : turn(std::move(turn)) {}
  Loaded(const Loaded&) = delete;
  ~Loaded() {
    {
      py::gil_scoped_acquire lock;
      object.release().dec_ref();
    }
    leave_interpreter();
  }
};

namespace {

const Loaded& there(const std::shared_ptr<Loaded>& loaded) {
  if (loaded == nullptr) throw Refused("this model or video is empty; make it by Model::load or Model::generate");
  return *loaded;
}

// Calls a function of the host without the interpreter's lock; what it throws is kept, and Python is told to stop.
template <typename Function>
void in_host(Calls& calls, const std::string& where, Function&& function) {
  {
    py::gil_scoped_release unlocked;
    try {
      function();
    } catch (...) {
      calls.thrown = std::current_exception();
    }
  }
  if (calls.thrown == nullptr && !calls.cancel.asked()) return;
  py::set_error(py::module_::import("runtime").attr("Cancelled"), ("cancelled after " + where).c_str());
  throw py::error_already_set();
}

std::string place(const char* what, int done, int total) {
  return std::string(what) + " " + std::to_string(done) + " of " + std::to_string(total);
}

// Calls Python with the model's turn and the interpreter's lock held; what the host's callbacks threw comes first.
template <typename Function>
auto on_turn(const Loaded& loaded, const std::shared_ptr<Calls>& calls, Function&& function) {
  std::lock_guard turn(*loaded.turn);
  if (calls != nullptr) calls->thrown = nullptr;
  try {
    return in_python(std::forward<Function>(function));
  } catch (const Error&) {
    if (calls != nullptr && calls->thrown != nullptr) std::rethrow_exception(std::exchange(calls->thrown, nullptr));
    throw;
  }
}

py::dict fields(const Request& request) {
  py::dict given;
  if (!request.more.empty()) {
    py::object more;
    try {
      more = py::module_::import("json").attr("loads")(request.more);
    } catch (py::error_already_set&) {  // said below
    }
    if (!more || !py::isinstance<py::dict>(more)) {
      throw Refused("Request::more is " + request.more + "; legal: a JSON object");
    }
    given = more;
  }
  const auto put = [&](const char* name, const auto& value) {
    if (value) given[name] = *value;
  };
  given["prompt"] = request.prompt, given["negative_prompt"] = request.negative_prompt;
  put("width", request.width), put("height", request.height), put("num_frames", request.num_frames);
  put("fps", request.fps), put("steps", request.steps), put("guidance", request.guidance), put("seed", request.seed);
  return given;
}

py::object request_of(const Request& request) {
  const py::object kind = py::module_::import("runtime").attr("Request");
  const py::dict given = fields(request);
  const py::object known = kind.attr("__dataclass_fields__");
  for (const auto& item : given) {
    if (!known.contains(item.first)) {
      throw Refused("Request::more has " + std::string(py::str(item.first)) + ", which is no field of a request");
    }
  }
  return kind(**given);
}

}  // namespace

Model Model::load(const std::string& name, const LoadOptions& options) {
  enter_interpreter("");
  std::shared_ptr<Loaded> loaded;
  try {
    loaded = std::make_shared<Loaded>(std::make_shared<std::recursive_mutex>());
  } catch (...) {
    leave_interpreter();
    throw;
  }
  in_python([&] {
    loaded->object = py::module_::import("runtime").attr("load")(
        name, py::arg("device") = options.device, py::arg("dtype") = options.dtype, py::arg("engine") = options.engine);
  });
  Model model;
  model.loaded_ = std::move(loaded);
  return model;
}

Video Model::generate(const Request& request, const OnStep& on_step, const Cancel& cancel) const {
  const Loaded& model = there(loaded_);
  enter_interpreter("");
  Video video;
  video.cancel_ = cancel;
  video.loaded_ = std::make_shared<Loaded>(model.turn);
  const auto calls = video.loaded_->calls = std::make_shared<Calls>(Calls{on_step, cancel, nullptr});
  on_turn(model, calls, [&] {
    const auto told = [calls](int done, int total, const py::args&) {
      in_host(*calls, place("step", done, total), [&] {
        if (calls->on_step) calls->on_step({done, total});
      });
    };
    const py::object made = py::module_::import("runtime").attr("generate")(
        model.object, request_of(request), py::arg("on_step") = py::cpp_function(told));
    video.loaded_->object = made;
    video.width_ = made.attr("width").cast<int>(), video.height_ = made.attr("height").cast<int>();
    video.num_frames_ = made.attr("num_frames").cast<int>(), video.fps_ = made.attr("fps").cast<double>();
  });
  return video;
}

void Video::each_frame(const OnFrame& on_frame) const {
  const Loaded& video = there(loaded_);
  on_turn(video, video.calls, [&] {
    const py::object contiguous = py::module_::import("numpy").attr("ascontiguousarray");
    const py::object frames = py::iter(video.object);
    int index = 0;
    while (auto next = py::reinterpret_steal<py::object>(PyIter_Next(frames.ptr()))) {
      const py::object kept = contiguous(next);
      const py::buffer_info view = py::reinterpret_borrow<py::buffer>(kept).request();
      const Frame frame{static_cast<const std::uint8_t*>(view.ptr), width_, height_, index, num_frames_};
      in_host(*video.calls, place("frame", ++index, num_frames_), [&] { on_frame(frame); });
    }
    if (PyErr_Occurred()) throw py::error_already_set();
  });
}

std::vector<std::uint8_t> Video::frames() const {
  std::vector<std::uint8_t> all(std::size_t(num_frames_) * height_ * width_ * 3);
  const std::size_t size = std::size_t(height_) * width_ * 3;
  each_frame([&](const Frame& frame) { std::memcpy(all.data() + frame.index * size, frame.pixels, size); });
  return all;
}

void Video::save(const std::string& path) const {
  const Loaded& video = there(loaded_);
  on_turn(video, video.calls, [&] {
    const auto told = [&](int done, int total) { in_host(*video.calls, place("frame", done, total), [] {}); };
    video.object.attr("save")(path, py::arg("on_frame") = py::cpp_function(told));
  });
}

std::string Video::receipt() const {
  const Loaded& video = there(loaded_);
  return on_turn(video, video.calls, [&] { return video.object.attr("receipt").attr("to_json")().cast<std::string>(); });
}

}  // namespace dit_runtime
