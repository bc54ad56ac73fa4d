// What a pass works on. Shapes: B batch, H heads, N tokens, D head dim, K hash bits, M anchors.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace ecoformer {

enum class Type { kFloat, kBFloat16, kHalf };

// Rows [B, H, N, D] somewhere in memory; strides count elements.
struct Rows {
  void* data;
  Type type;
  int64_t strides[4];
  int64_t dim;

  template <class T>
  T* at(int64_t image, int64_t head, int64_t token) const {
    return static_cast<T*>(data) + image * strides[0] + head * strides[1] + token * strides[2];
  }
};

struct Problem {
  int64_t num_images, num_heads, num_tokens, num_bits, num_anchors;
  bool is_normalized;
  Rows q, v;
  const float* anchors;      // [H, M, D]
  const float* weight;       // [H, K, M]
  const float* kernel_mean;  // [H, M]
  const bool* key_mask;      // [B, N] or null: true where a token counts
  float* sums;               // [B, H, K + 1, Dv + 1], zeros where a forward begins
  float* scale;              // [B, H]
  const float* norms;        // [B, H, N]; null until a group is narrow
  // Of a forward.
  Rows out;
  // Of a backward. ``unfinished`` is a float32 place for ``grad_q``, or that itself.
  Rows grad, grad_q, grad_v, unfinished;
};

// Of squares of about 1 that cancel nothing is left below this mean squared distance.
constexpr float kNarrowScale = -0.5f * 64;
constexpr float kMinNorm = 1e-12f;

// Runs a pass over some groups, heads of images by number. Rows are moved to the center of the
// anchors where ``is_moved``, which needs norms.
using Run = void(const Problem&, bool is_backward, bool is_moved, const std::vector<int64_t>&);

namespace baseline {
Run run;
}
#if defined(__x86_64__) || defined(_M_X64)
#define ECOFORMER_X86 1
namespace avx2 {
Run run;
}
namespace avx512 {
Run run;
}
#endif

// Runs tasks on PyTorch's threads, each of which takes the next one when it is free.
// A worker is one of num_threads().
using Task = void (*)(void* context, int64_t worker, int64_t index);
void run_tasks(int64_t num_tasks, Task task, void* context);
int64_t num_threads();

template <class F>
void run_tasks(int64_t num_tasks, F&& f) {
  run_tasks(
      num_tasks,
      [](void* context, int64_t worker, int64_t i) { (*static_cast<F*>(context))(worker, i); },
      &f);
}

// Numbers at the boundary of a line of the cache, not set.
template <class T>
class Array {
 public:
  Array() = default;
  explicit Array(int64_t size, bool is_zero = false)
      : data_(static_cast<T*>(::operator new(size * sizeof(T), std::align_val_t(64)))) {
    if (is_zero) std::memset(data_.get(), 0, size * sizeof(T));
  }
  operator T*() const { return data_.get(); }

 private:
  struct Delete {
    void operator()(T* data) const { ::operator delete(data, std::align_val_t(64)); }
  };
  std::unique_ptr<T, Delete> data_;
};

// How the K bits of a code are cut into digits. A digit is a number of a bucket, and of a row of a
// table; wide ones spare additions, but buckets should stay in the first cache.
struct Digits {
  std::vector<int> begin;   // first bit
  std::vector<int> width;   // bits
  std::vector<int> offset;  // first row in the table of all
  int num_rows = 0;

  Digits(int64_t num_bits, int64_t row_floats) {
    int widest = 7;
    while (widest > 4 && count_rows(num_bits, widest) * row_floats * 4 > kMaxBytes) --widest;
    // A digit lies in one word of 32 bits.
    for (int64_t word = 0; word < num_bits; word += 32) {
      const int64_t bits = std::min<int64_t>(32, num_bits - word);
      const int64_t count = (bits + widest - 1) / widest;
      for (int64_t i = 0; i < count; ++i) {
        begin.push_back(word + bits * i / count);
        width.push_back(bits * (i + 1) / count - bits * i / count);
        offset.push_back(num_rows);
        num_rows += 1 << width.back();
      }
    }
  }
  int count() const { return begin.size(); }

 private:
  static constexpr int64_t kMaxBytes = 20 * 1024;
  static int64_t count_rows(int64_t num_bits, int width) {
    const int64_t count = (num_bits + width - 1) / width;
    const int64_t narrow = num_bits / count, num_wide = num_bits % count;
    return num_wide * (int64_t(2) << narrow) + (count - num_wide) * (int64_t(1) << narrow);
  }
};

}  // namespace ecoformer
