// The operators ``ecoformer_native::forward`` and ``ecoformer_native::backward`` for the CPU.
//
// PyTorch's stable interface alone: little to compile, and what was compiled serves later versions.

#include <array>
#include <cstdlib>
#include <optional>
#include <string>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "problem.h"

namespace ecoformer {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The widest vectors that the processor has, or that PyTorch's ATEN_CPU_CAPABILITY leaves.
Run* choose_run() {
#if ECOFORMER_X86
  const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
  const auto is_allowed = [limit](const char* name, const char* wider) {
    return !limit || !std::strcmp(limit, name) || !std::strcmp(limit, wider);
  };
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      is_allowed("avx512", "avx512"))
    return avx512::run;
  if (has_avx2 && is_allowed("avx2", "avx512")) return avx2::run;
#endif
  return baseline::run;
}

// The name that ATEN_CPU_CAPABILITY has for them.
std::string vectors() {
  Run* const run = choose_run();
#if ECOFORMER_X86
  if (run == avx512::run) return "avx512";
  if (run == avx2::run) return "avx2";
#endif
  return run == baseline::run ? "default" : "";
}

int64_t num_digits(int64_t num_bits, int64_t head_dim) {
  return Digits(num_bits, head_dim).count();
}

struct Queue {
  std::atomic<int64_t> next;
  int64_t size;
  Task task;
  void* context;
};

void work(int64_t worker, int64_t, void* context) {
  Queue& queue = *static_cast<Queue*>(context);
  for (int64_t i; (i = queue.next.fetch_add(1, std::memory_order_relaxed)) < queue.size;)
    queue.task(queue.context, worker, i);
}

Rows rows_of(const Tensor& x) {
  Rows rows{x.data_ptr(), Type::kFloat, {}, x.size(3)};
  if (x.scalar_type() == ScalarType::BFloat16) rows.type = Type::kBFloat16;
  if (x.scalar_type() == ScalarType::Half) rows.type = Type::kHalf;
  for (int i = 0; i < 4; ++i) rows.strides[i] = x.stride(i);
  return rows;
}

// Rows [B, H, N, D] whose heads lie together in each token.
Tensor empty_rows(const Tensor& like, ScalarType type) {
  const std::array<int64_t, 4> sizes = {like.size(0), like.size(2), like.size(1), like.size(3)};
  return torch::stable::transpose(torch::stable::new_empty(like, sizes, type), 1, 2);
}

Tensor zeros(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_zeros(
      like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()),
      ScalarType::Float);
}

void require(bool condition, const char* message) { STD_TORCH_CHECK(condition, message); }

struct Inputs {
  Tensor q, v, anchors, weight, kernel_mean;
  std::optional<Tensor> key_mask;

  Inputs(const Tensor& q, const Tensor& v, const Tensor& anchors, const Tensor& weight,
         const Tensor& kernel_mean, const std::optional<Tensor>& key_mask)
      : q(q),
        v(v),
        anchors(torch::stable::contiguous(anchors)),
        weight(torch::stable::contiguous(weight)),
        kernel_mean(torch::stable::contiguous(kernel_mean)) {
    require(q.dim() == 4 && v.dim() == 4, "rows are [B, H, N, D]");
    for (int i = 0; i < 3; ++i) require(q.size(i) == v.size(i), "q and v differ in B, H or N");
    const int64_t H = q.size(1), M = weight.size(2);
    require(weight.dim() == 3 && weight.size(0) == H && weight.size(1) >= 1 && weight.size(1) <= 64,
            "weight is [H, K, M], K from 1 to 64");
    require(anchors.dim() == 3 && anchors.size(0) == H && anchors.size(1) == M &&
                anchors.size(2) == q.size(3),
            "anchors are [H, M, D]");
    require(kernel_mean.dim() == 2 && kernel_mean.size(0) == H && kernel_mean.size(1) == M,
            "kernel_mean is [H, M]");
    for (const Tensor& x : {anchors, weight, kernel_mean})
      require(x.scalar_type() == ScalarType::Float, "hash functions are float32");
    for (const Tensor& x : {q, v})
      require(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16 ||
                  x.scalar_type() == ScalarType::Half,
              "rows are float32, bfloat16 or float16");
    if (key_mask) {
      require(key_mask->dim() == 2 && key_mask->size(0) == q.size(0) &&
                  key_mask->size(1) == q.size(2) && key_mask->scalar_type() == ScalarType::Bool,
              "key_mask is [B, N], bool");
      this->key_mask = torch::stable::contiguous(*key_mask);
    }
  }

  Problem problem(const Tensor& sums, const Tensor& scale, bool is_normalized) const {
    Problem p{};
    p.num_images = q.size(0);
    p.num_heads = q.size(1);
    p.num_tokens = q.size(2);
    p.num_bits = weight.size(1);
    p.num_anchors = weight.size(2);
    p.is_normalized = is_normalized;
    p.q = rows_of(q);
    p.v = rows_of(v);
    p.anchors = static_cast<const float*>(anchors.data_ptr());
    p.weight = static_cast<const float*>(weight.data_ptr());
    p.kernel_mean = static_cast<const float*>(kernel_mean.data_ptr());
    p.key_mask = key_mask ? static_cast<const bool*>(key_mask->data_ptr()) : nullptr;
    p.sums = static_cast<float*>(sums.data_ptr());
    p.scale = static_cast<float*>(scale.data_ptr());
    return p;
  }
};

// Norms [B, H, N] of rows with the bits of PyTorch's, which anchors were made with.
Tensor measure_norms(const Tensor& q) {
  const Tensor rows = torch::stable::contiguous(torch::stable::to(q, ScalarType::Float));
  const std::optional<std::vector<int64_t>> dims = std::vector<int64_t>{3};
  using torch::stable::detail::from;
  // The operator with a Scalar in it, which the stable interface has no way to pass.
  std::array<StableIValue, 5> stack = {from(rows), from(std::nullopt), from(dims), from(false),
                                       from(std::nullopt)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linalg_norm", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Run groups, and then the narrow ones among them, whose rows are moved to the center of the
// anchors.
void run(Problem& p, const Inputs& inputs, bool is_backward) {
  static Run* const run_groups = choose_run();
  const int64_t size = p.num_tokens ? p.num_images * p.num_heads : 0;
  std::vector<int64_t> wide, narrow;
  for (int64_t i = 0; i < size; ++i)
    (is_backward && p.scale[i] < kNarrowScale ? narrow : wide).push_back(i);
  if (!wide.empty()) run_groups(p, is_backward, false, wide);
  if (!is_backward)
    for (int64_t i = 0; i < size; ++i)
      if (p.scale[i] < kNarrowScale) narrow.push_back(i);
  if (narrow.empty()) return;
  const Tensor norms = measure_norms(inputs.q);
  p.norms = static_cast<const float*>(norms.data_ptr());
  run_groups(p, is_backward, true, narrow);
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& q, const Tensor& v, const Tensor& anchors,
                                           const Tensor& weight, const Tensor& kernel_mean,
                                           const std::optional<Tensor>& key_mask,
                                           bool is_normalized) {
  const Inputs inputs(q, v, anchors, weight, kernel_mean, key_mask);
  Tensor out = empty_rows(v, v.scalar_type());
  if (key_mask) torch::stable::zero_(out);
  const Tensor sums = zeros(q, {q.size(0), q.size(1), weight.size(1) + 1, v.size(3) + 1});
  const Tensor scale = zeros(q, {q.size(0), q.size(1)});
  Problem p = inputs.problem(sums, scale, is_normalized);
  p.out = rows_of(out);
  run(p, inputs, false);
  return {out, sums, scale};
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& q, const Tensor& v,
                                    const Tensor& anchors, const Tensor& weight,
                                    const Tensor& kernel_mean,
                                    const std::optional<Tensor>& key_mask, const Tensor& sums,
                                    const Tensor& scale, bool is_normalized) {
  const Inputs inputs(q, v, anchors, weight, kernel_mean, key_mask);
  const Tensor own_sums = torch::stable::contiguous(sums), own_scale = torch::stable::contiguous(scale);
  Tensor grad_q = empty_rows(q, q.scalar_type()), grad_v = empty_rows(v, v.scalar_type());
  if (key_mask) {
    torch::stable::zero_(grad_q);
    torch::stable::zero_(grad_v);
  }
  const bool is_float = q.scalar_type() == ScalarType::Float;
  const Tensor unfinished = is_float ? grad_q : empty_rows(q, ScalarType::Float);
  Problem p = inputs.problem(own_sums, own_scale, is_normalized);
  p.grad = rows_of(grad);
  p.grad_q = rows_of(grad_q);
  p.grad_v = rows_of(grad_v);
  p.unfinished = rows_of(unfinished);
  run(p, inputs, true);
  return {grad_q, grad_v};
}

}  // namespace

void run_tasks(int64_t num_tasks, Task task, void* context) {
  Queue queue{{0}, num_tasks, task, context};
  const int64_t num_workers = std::min(num_tasks, num_threads());
  if (num_workers <= 1) return work(0, 1, &queue);
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, num_workers, 1, work, &queue));
}

int64_t num_threads() { return torch::stable::get_num_threads(); }

}  // namespace ecoformer

STABLE_TORCH_LIBRARY(ecoformer_native, m) {
  m.def("vectors() -> str");
  m.def("num_digits(int num_bits, int head_dim) -> int");
  m.def(
      "forward(Tensor q, Tensor v, Tensor anchors, Tensor weight, Tensor kernel_mean, "
      "Tensor? key_mask, bool is_normalized) -> (Tensor, Tensor, Tensor)");
  m.def(
      "backward(Tensor grad, Tensor q, Tensor v, Tensor anchors, Tensor weight, "
      "Tensor kernel_mean, Tensor? key_mask, Tensor sums, Tensor scale, bool is_normalized) "
      "-> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(ecoformer_native, CompositeExplicitAutograd, m) {
  m.impl("vectors", TORCH_BOX(&ecoformer::vectors));
  m.impl("num_digits", TORCH_BOX(&ecoformer::num_digits));
}

STABLE_TORCH_LIBRARY_IMPL(ecoformer_native, CPU, m) {
  m.impl("forward", TORCH_BOX(&ecoformer::forward));
  m.impl("backward", TORCH_BOX(&ecoformer::backward));
}
