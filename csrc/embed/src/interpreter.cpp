// A thread of ours starts the interpreter, waits, and ends it: Python wants both done by one thread, and which of the
// host's threads comes first or last is the host's own affair.
#include "interpreter.hpp"

#include <unistd.h>

#include <condition_variable>
#include <mutex>
#include <thread>

// What CPython 3.11 to 3.13 export beside their API: forgets where a former interpreter found its library. Else the next
// one looks there, whatever its configuration says.
extern "C" void _PyPathConfig_ClearGlobal(void) __attribute__((weak));

namespace dit_runtime {

namespace {

enum class Phase { none, running, over };

struct Interpreter {
  std::mutex lifecycle;  // held while it is started or ended
  Phase phase = Phase::none;
  std::string over;  // why it cannot start again in this process
  bool ours = false;  // else the host is a Python program itself
  std::string python;
  std::atomic<int> users{0};
  std::thread thread;

  std::mutex mutex;  // of what follows
  std::condition_variable changed;
  bool ready = false, stop = false;
  std::string failure;
};

// Never destroyed: a host may exit while it runs.
Interpreter& interpreter() {
  static auto* made = new Interpreter;
  return *made;
}

void expect(PyStatus status) {
  if (PyStatus_Exception(status)) throw std::runtime_error(status.err_msg ? status.err_msg : "no reason given");
}

void initialize(const std::string& python) {
  if (_PyPathConfig_ClearGlobal != nullptr) _PyPathConfig_ClearGlobal();  // an attempt before may have failed
  PyPreConfig before;
  PyPreConfig_InitIsolatedConfig(&before);
  before.utf8_mode = 1;  // whatever the host's locale is
  expect(Py_PreInitialize(&before));
  PyConfig config;
  PyConfig_InitIsolatedConfig(&config);  // no signal handlers, no PYTHON* variables, no user's packages
  expect(PyConfig_SetBytesString(&config, &config.program_name, python.c_str()));
  py::initialize_interpreter(&config, 0, nullptr, false);  // clears the config
}

void import_runtime(const std::string& python) {
  try {
    py::module_::import("runtime.__main__");
  } catch (py::error_already_set& error) {
    throw Refused("dit-runtime cannot be imported by " + python + " (" + error.what() +
                  "); install it there, or name the Python that has it");
  }
}

// The life of the interpreter's thread.
void live(Interpreter& self) {
  std::string failure;
  PyThreadState* state = nullptr;
  try {
    initialize(self.python);
    try {
      import_runtime(self.python);
      state = PyEval_SaveThread();
    } catch (const std::exception& error) {
      failure = error.what();
      py::finalize_interpreter();
    }
  } catch (const std::exception& error) {
    failure = "Python cannot start from " + self.python + ": " + error.what();
    self.over = "Python failed half-way through its start, which nothing can take back; start a new process";
  }
  std::unique_lock lock(self.mutex);
  self.failure = failure, self.ready = true;
  self.changed.notify_all();
  if (state == nullptr) return;
  self.changed.wait(lock, [&] { return self.stop; });
  PyEval_RestoreThread(state);
  py::finalize_interpreter();
}

void launch(Interpreter& self, const std::string& python) {
  self.python = python.empty() ? DIT_PYTHON : python;
  if (access(self.python.c_str(), X_OK) != 0) {
    throw Refused("there is no Python at " + self.python + "; name the one of the environment with dit-runtime in it");
  }
  self.ready = false;
  self.thread = std::thread(live, std::ref(self));
  {
    std::unique_lock lock(self.mutex);
    self.changed.wait(lock, [&] { return self.ready; });
  }
  if (!self.failure.empty()) {
    self.thread.join();
    if (!self.over.empty()) self.phase = Phase::over;
    throw Refused(self.failure);
  }
  self.ours = true;
}

}  // namespace

void enter_interpreter(const std::string& python) {
  auto& self = interpreter();
  std::lock_guard lock(self.lifecycle);
  if (self.phase == Phase::over) throw Error(self.over);
  if (self.phase == Phase::running && !python.empty() && python != self.python) {
    throw Refused("the interpreter already runs from " + self.python + "; there is one per process");
  }
  if (self.phase == Phase::none) {
    if (Py_IsInitialized()) {
      py::gil_scoped_acquire held;
      self.python = py::str(py::module_::import("sys").attr("executable"));
      import_runtime(self.python);
    } else {
      launch(self, python);
    }
    self.phase = Phase::running;
  }
  ++self.users;
}

void leave_interpreter() { --interpreter().users; }

void start(const std::string& python) {
  enter_interpreter(python);
  leave_interpreter();
}

void shutdown() {
  auto& self = interpreter();
  std::lock_guard lock(self.lifecycle);
  if (self.phase != Phase::running) return;
  if (const int users = self.users) {
    throw Refused(std::to_string(users) + " models or videos are still there; let go of them before shutdown()");
  }
  if (self.ours) {
    {
      std::lock_guard own(self.mutex);
      self.stop = true;
    }
    self.changed.notify_all();
    self.thread.join();
  }
  self.phase = Phase::over;
  self.over =
      "the interpreter was shut down and cannot start again in this process, because PyTorch and NumPy refuse to be "
      "loaded twice; keep it until the end, or start a new process";
}

void throw_told(py::error_already_set& error) {
  if (error.matches(py::module_::import("runtime").attr("Cancelled"))) {
    throw Cancelled(py::str(error.value()).cast<std::string>());
  }
  if (error.trace()) PyException_SetTraceback(error.value().ptr(), error.trace().ptr());
  const auto told = py::module_::import("runtime.__main__").attr("explain")(error.value()).cast<py::tuple>();
  if (told[0].cast<int>() == 2) throw Refused(told[1].cast<std::string>());
  throw Error(std::string(py::str(error.type().attr("__name__"))) + ": " + std::string(py::str(error.value())));
}

}  // namespace dit_runtime
