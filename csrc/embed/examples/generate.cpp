// Makes a video of a prompt: generate "PROMPT" [OUTPUT] [SEED] [MODEL]
//
// OUTPUT is a name such as ball.mp4, or ball.rgb for the bare frames, 8-bit RGB [frames, height, width, 3].
#include <cstdio>
#include <fstream>
#include <string>

#include "dit_runtime.hpp"

int main(int count, char** given) {
  const auto argument = [&](int place, const char* usual) { return std::string(place < count ? given[place] : usual); };
  const std::string output = argument(2, "video.mp4");
  try {
    dit_runtime::Request request;
    request.prompt = argument(1, "a red ball rolls left over green grass");
    request.seed = std::stoull(argument(3, "7"));
    const auto model = dit_runtime::Model::load(argument(4, "demo"));
    const auto video = model.generate(request, [](const dit_runtime::Step& step) {
      std::fprintf(stderr, "\rstep %d of %d", step.done, step.total);
    });
    std::fprintf(stderr, "\n");
    if (output.size() > 4 && output.substr(output.size() - 4) == ".rgb") {
      std::ofstream file(output, std::ios::binary);
      video.each_frame([&](const dit_runtime::Frame& frame) {
        file.write(reinterpret_cast<const char*>(frame.pixels), std::streamsize(frame.width) * frame.height * 3);
      });
    } else {
      video.save(output);
    }
    std::printf("%s: %d frames, %dx%d, %g fps\n", output.c_str(), video.num_frames(), video.width(), video.height(),
                video.fps());
  } catch (const dit_runtime::Refused& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
