// The one Python interpreter of the process; what enters it, and how its exceptions become ours.
#pragma once

#include <pybind11/embed.h>

#include <string>
#include <utility>

#include "dit_runtime.hpp"

namespace dit_runtime {

namespace py = pybind11;

// Starts it where it does not run; each call is one user more, until `leave_interpreter`. Error says why it cannot.
void enter_interpreter(const std::string& python);
void leave_interpreter();

// Throws what a Python exception is in C++; the interpreter's lock is held.
[[noreturn]] void throw_told(py::error_already_set& error);

// Calls a function with the interpreter's lock held.
template <typename Function>
auto in_python(Function&& function) {
  py::gil_scoped_acquire lock;
  try {
    return std::forward<Function>(function)();
  } catch (py::error_already_set& error) {
    throw_told(error);
  }
}

}  // namespace dit_runtime
