// Runs a package of AOTInductor without Python: run_package PACKAGE IN OUT B C H W.
// IN holds the batch and OUT gets what the model makes of it, float32 without a header.
// Link it with -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10.

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <vector>

int main(int argc, char** argv) {
  if (argc != 8) {
    return 2;
  }
  std::vector<int64_t> shape;
  for (int i = 4; i < argc; ++i) {
    shape.push_back(std::atoll(argv[i]));
  }
  c10::InferenceMode guard;
  at::Tensor images = at::empty(shape, at::kFloat);
  std::ifstream(argv[2], std::ios::binary)
      .read(static_cast<char*>(images.data_ptr()), images.nbytes());
  torch::inductor::AOTIModelPackageLoader loader(argv[1]);
  at::Tensor out = loader.run({images}).at(0).contiguous();
  std::ofstream(argv[3], std::ios::binary)
      .write(static_cast<const char*>(out.data_ptr()), out.nbytes());
}
