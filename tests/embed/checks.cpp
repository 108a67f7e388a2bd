// What a C++ host may do to the library, rightly and wrongly. Prints one line per finding, "name: what"; the Python test
// says what it must be. BARE_HOME is of a Python without dit-runtime. With a number as its argument: so many requests,
// and the memory before and after the last half.
#include <csignal>
#include <clocale>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <future>
#include <string>
#include <thread>

#include "dit_runtime.hpp"

using namespace dit_runtime;

namespace {

struct HostError {
  int code;
};

void say(const std::string& name, const std::string& what) {
  std::printf("%s: %s\n", name.c_str(), what.c_str());
  std::fflush(stdout);
}

// Says which of our exceptions a call throws.
template <typename Function>
void trying(const std::string& name, Function&& function) {
  try {
    function();
    say(name, "nothing was thrown");
  } catch (const Cancelled& error) {
    say(name, std::string("Cancelled ") + error.what());
  } catch (const Refused& error) {
    say(name, std::string("Refused ") + error.what());
  } catch (const Error& error) {
    say(name, std::string("Error ") + error.what());
  } catch (const HostError& error) {
    say(name, "HostError " + std::to_string(error.code));
  }
}

Request small(std::uint64_t seed = 7) {
  Request request;
  request.prompt = "a red ball";
  request.width = 64, request.height = 64, request.num_frames = 5, request.steps = 2, request.seed = seed;
  return request;
}

void mistakes(const Model& model) {
  trying("missing model", [] { Model::load("no-such-model"); });
  trying("device", [] { Model::load("demo", {"tpu"}); });
  trying("other python", [] { start("/usr/bin/other"); });
  trying("size", [&] {
    Request request = small();
    request.width = 63;
    model.generate(request);
  });
  trying("more", [&] {
    Request request = small();
    request.more = R"({"colour": "red"})";
    model.generate(request);
  });
  trying("no object", [&] {
    Request request = small();
    request.more = "{";
    model.generate(request);
  });
  trying("empty", [] { Model().generate(small()); });
  trying("unwritable", [&] { model.generate(small()).save("/no/such/folder/a.mp4"); });
}

void interruptions(const Model& model) {
  trying("cancel in a step", [&] {
    Cancel cancel;
    model.generate(small(), [&](const Step& step) { if (step.done == 1) cancel(); }, cancel);
  });
  trying("cancel from a thread", [&] {
    Cancel cancel;
    std::promise<void> begun;
    std::thread other([&] { begun.get_future().wait(); cancel(); });
    Request request = small();
    request.steps = 5000;
    try {
      model.generate(request, [&](const Step& step) { if (step.done == 1) begun.set_value(); }, cancel);
    } catch (const Cancelled&) {
      other.join();
      throw Cancelled("long before its end");
    }
    other.join();
  });
  trying("exception in a step", [&] { model.generate(small(), [](const Step&) { throw HostError{5}; }); });
  trying("exception at a frame", [&] {
    model.generate(small()).each_frame([](const Frame& frame) { if (frame.index == 1) throw HostError{6}; });
  });
  trying("cancel at a frame", [&] {
    Cancel cancel;
    const auto video = model.generate(small(), {}, cancel);
    video.each_frame([&](const Frame& frame) { if (frame.index == 2) cancel(); });
  });
}

// Each callback waits for a request of the other thread: that ends only if the interpreter is free during callbacks.
void threads(const Model& one) {
  const Model other = Model::load("demo");
  const auto alone = one.generate(small()).frames();
  const auto unlike = one.generate(small(8)).frames();
  say("seeds", alone == unlike ? "equal" : "differ");
  std::promise<void> first, second;
  const auto work = [&](const Model& model, std::promise<void>& mine, std::promise<void>& theirs) {
    return model.generate(small(), [&](const Step& step) {
      if (step.done != 1) return;
      mine.set_value();
      theirs.get_future().wait();
    }).frames();
  };
  auto there = std::async(std::launch::async, [&] { return work(other, second, first); });
  const bool here = work(one, first, second) == alone;
  say("two models at once", here && there.get() == alone ? "the same frames" : "other frames");
  std::vector<std::future<bool>> turns;
  for (int i = 0; i < 4; ++i) {
    turns.push_back(std::async(std::launch::async, [&] { return one.generate(small()).frames() == alone; }));
  }
  bool same = true;
  for (auto& turn : turns) same = turn.get() && same;
  say("one model, four threads", same ? "the same frames" : "other frames");
  std::size_t nested = 0;
  one.generate(small(), [&](const Step& step) { if (step.done == 1) nested = one.generate(small()).frames().size(); });
  say("a request in a step", std::to_string(nested));
}

std::string receipt_has(const Model& model) {
  const auto video = model.generate(small());
  video.frames();
  const auto receipt = video.receipt();
  return receipt.find("\"decode\"") != std::string::npos && receipt.front() == '{' ? "whole" : receipt;
}

long resident() {
  std::ifstream file("/proc/self/statm");
  long size = 0, pages = 0;
  file >> size >> pages;
  return pages * 4096;
}

void leak(const Model& model, int count) {
  Request request = small();
  request.num_frames = 1, request.steps = 1;
  long half = 0;
  for (int i = 0; i < count; ++i) {
    request.seed = i;
    model.generate(request).frames();
    if (i + 1 == count / 2) half = resident();
  }
  say("bytes grown over the last half", std::to_string(resident() - half));
}

void on_signal(int) {}

}  // namespace

int main(int count, char** given) {
  std::signal(SIGINT, on_signal);
  trying("no python", [] { start("/no/such/python"); });
  const std::string bare = std::getenv("BARE_HOME");
  trying("python without us", [&] { start(bare + "/bin/python"); });
  std::filesystem::remove(bare + "/lib");  // nobody looks there any more
  {
    const Model model = Model::load("demo");
    say("SIGINT", std::signal(SIGINT, on_signal) == on_signal ? "the host's" : "changed");
    say("SIGPIPE", std::signal(SIGPIPE, SIG_DFL) == SIG_DFL ? "the host's" : "changed");
    say("locale", std::setlocale(LC_ALL, nullptr));
    if (count > 1) {
      leak(model, std::stoi(given[1]));
    } else {
      mistakes(model);
      interruptions(model);
      threads(model);
      say("receipt", receipt_has(model));
      trying("early shutdown", [] { shutdown(); });
    }
  }
  trying("shutdown", [] { shutdown(); });
  trying("shutdown again", [] { shutdown(); });
  trying("after shutdown", [] { Model::load("demo"); });
}
