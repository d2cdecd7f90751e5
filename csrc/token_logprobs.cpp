// token_logprobs on the CPU: implements fastpo_c::token_logprobs_forward and _backward, whose arguments
// kernels/token_logprobs/reference.py describes. Rows, labels and threads; token_logprobs_kernel.h has the vectors.
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "huge_pages.h"
#include "parallel.h"
#include "tensors.h"
#include "token_logprobs.h"
#define FASTPO_TARGET_INCLUDE "token_logprobs_kernel.h"
#include "simd_targets.h"

namespace fastpo {
namespace {

using torch::stable::Tensor;

constexpr int64_t kThreadWork = 4;  // elements here cost a fourth of those that for_each_task counts
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Kernels {
  SumsKernel (*sums)(Type, bool capped, bool moments);
  GradKernel (*grad)(Type, bool capped, bool stats);
  float (*softcap)(float x, float cap);
  void (*elementary)(const float* x, float* out, int64_t n, int64_t which);
};

#define FASTPO_KERNELS(isa) \
  Kernels { isa::sums_kernel, isa::grad_kernel, isa::softcap_one<true>, isa::elementary }

Kernels kernels() { return FASTPO_PICK(FASTPO_KERNELS); }

float as_float(const char* element, Type type) {
  if (type == Type::float32) return *reinterpret_cast<const float*>(element);
  if (type == Type::bfloat16) return static_cast<float>(*reinterpret_cast<const c10::BFloat16*>(element));
  return static_cast<float>(*reinterpret_cast<const c10::Half*>(element));
}

void put(char* element, Type type, float value) {
  if (type == Type::float32) *reinterpret_cast<float*>(element) = value;
  if (type == Type::bfloat16) *reinterpret_cast<c10::BFloat16*>(element) = static_cast<c10::BFloat16>(value);
  if (type == Type::float16) *reinterpret_cast<c10::Half*>(element) = static_cast<c10::Half>(value);
}

float* output(const Tensor& tensor) {
  return tensor.numel() == 0 ? nullptr : static_cast<float*>(tensor.mutable_data_ptr());
}

// [B, T, V] with a unit last stride, as N = B T rows.
struct Rows {
  char* data;
  int64_t inner, outer_stride, inner_stride;  // T; strides in bytes

  explicit Rows(const Tensor& tensor)
      : data(static_cast<char*>(tensor.mutable_data_ptr())),
        inner(tensor.size(1)),
        outer_stride(tensor.stride(0) * static_cast<int64_t>(tensor.element_size())),
        inner_stride(tensor.stride(1) * static_cast<int64_t>(tensor.element_size())) {
    STD_TORCH_CHECK(tensor.size(2) == 1 || tensor.stride(2) == 1, "rows should have a unit last stride");
  }
  char* operator[](int64_t row) const {
    if (row < inner) return data + row * inner_stride;  // all of them where B is 1: divisions are slow
    return data + row / inner * outer_stride + row % inner * inner_stride;
  }
};

// What forward and backward know of their input.
struct Input {
  Rows rows;
  Type type;
  int64_t width;  // of an element, in bytes
  int64_t count, vocab;
  const int64_t* labels;  // [N]
  const float* temperatures;  // [N] or null
  double scalar_temperature;
  float softcap;
  int64_t ignore_index;
  Kernels kernels;

  Input(const Tensor& logits, const Tensor& labels, const std::optional<Tensor>& temperatures, double temperature,
        double softcap, int64_t ignore_index)
      : rows(logits),
        type(type_of(logits, "logits")),
        width(static_cast<int64_t>(logits.element_size())),
        count(labels.numel()),
        vocab(logits.size(2)),
        labels(static_cast<const int64_t*>(labels.const_data_ptr())),
        temperatures(temperatures ? static_cast<const float*>(temperatures->const_data_ptr()) : nullptr),
        scalar_temperature(temperature),
        softcap(static_cast<float>(softcap)),
        ignore_index(ignore_index),
        kernels(fastpo::kernels()) {}

  bool label_in_range(int64_t row) const { return labels[row] >= 0 && labels[row] < vocab; }
  double temperature(int64_t row) const { return temperatures == nullptr ? scalar_temperature : temperatures[row]; }
  RowScale scale(int64_t row) const { return {softcap, 1 / temperature(row)}; }
  float softcapped(float x) const { return softcap == 0 ? x : kernels.softcap(x, softcap); }
  float softcapped(int64_t row, int64_t column) const { return softcapped(as_float(rows[row] + column * width, type)); }
  int64_t segments() const { return (vocab + kSegment - 1) / kSegment; }
  int64_t segment_size(int64_t segment) const { return std::min(kSegment, vocab - segment * kSegment); }

  bool ignored(int64_t row) const { return labels[row] == ignore_index; }

  // Rows that are not ignored, and those that are: each kind is spread evenly over the threads.
  std::vector<int64_t> rows_where(bool is_ignored) const {
    std::vector<int64_t> chosen;
    chosen.reserve(count);
    for (int64_t row = 0; row < count; ++row) {
      if (ignored(row) == is_ignored) chosen.push_back(row);
    }
    return chosen;
  }
};

struct Outputs {
  float *logps, *max, *log_sum;
  float *logsumexp, *entropy, *sum_p2, *topk_mass, *topk_entropy, *label_set_prob;  // null: not asked for
  std::vector<int64_t> label_set;

  void zero(int64_t row) const {
    for (float* column : {logps, max, log_sum, logsumexp, entropy, sum_p2, topk_mass, topk_entropy, label_set_prob}) {
      if (column != nullptr) column[row] = 0;
    }
  }
};

void merge(Top& top, const Top& other) {
  float both[2 * kMaxTopk];
  std::merge(top.values, top.values + top.k, other.values, other.values + top.k, both, std::greater<float>());
  std::copy(both, both + top.k, top.values);
}

void merge(SoftmaxSums& sums, SoftmaxSums other, double rate) {
  const float max = std::max(sums.max, other.max);
  raise_max(sums, max, rate);
  raise_max(other, max, rate);
  sums.sum += other.sum;
  sums.sum_t += other.sum_t;
  sums.sum_squares += other.sum_squares;
}

void finish_row(const Input& input, int64_t row, const SoftmaxSums& sums, const Top& top, const Outputs& out) {
  const double temperature = input.temperature(row);
  const bool masked_out = sums.max == -std::numeric_limits<float>::infinity();  // no token is possible: NaN, as torch
  const double log_sum = masked_out ? kNaN : std::log(sums.sum);
  const auto log_prob = [&](float y) { return (static_cast<double>(y) - sums.max) / temperature - log_sum; };
  const bool in_range = input.label_in_range(row);
  out.max[row] = sums.max;
  out.log_sum[row] = in_range ? static_cast<float>(log_sum) : kNaN;
  out.logps[row] = in_range ? static_cast<float>(log_prob(input.softcapped(row, input.labels[row]))) : kNaN;
  if (out.logsumexp) out.logsumexp[row] = static_cast<float>(sums.max / temperature + log_sum);
  if (out.entropy) out.entropy[row] = static_cast<float>(log_sum - sums.sum_t / sums.sum);
  if (out.sum_p2) out.sum_p2[row] = static_cast<float>(sums.sum_squares / (sums.sum * sums.sum));
  if (top.k > 0) {
    double mass = 0, entropy = 0;
    for (int i = 0; i < top.k; ++i) {
      const double logp = log_prob(input.softcapped(top.values[i])), p = std::exp(logp);
      mass += p;
      entropy -= p == 0 ? 0 : p * logp;
    }
    if (out.topk_mass) out.topk_mass[row] = static_cast<float>(mass);
    if (out.topk_entropy) out.topk_entropy[row] = static_cast<float>(entropy);
  }
  if (out.label_set_prob) {
    double mass = 0;
    for (const int64_t id : out.label_set) {
      mass += id >= 0 && id < input.vocab ? std::exp(log_prob(input.softcapped(row, id))) : kNaN;
    }
    out.label_set_prob[row] = static_cast<float>(mass);
  }
}

void forward(const Input& input, int k, const Outputs& out) {
  const bool moments = out.entropy != nullptr || out.sum_p2 != nullptr;
  const SumsKernel kernel = input.kernels.sums(input.type, input.softcap != 0, moments);
  const int64_t segments = input.segments();
  const auto segment_sums = [&](int64_t row, int64_t segment, Top& top) {
    SoftmaxSums sums;
    const char* start = input.rows[row] + segment * kSegment * input.width;
    kernel(start, input.segment_size(segment), input.scale(row), top, sums);
    return sums;
  };
  if (segments == 1) {
    for_each_task(input.count, input.count * input.vocab / kThreadWork, [&](int64_t row) {
      if (input.ignored(row)) return out.zero(row);
      Top top(k);
      finish_row(input, row, segment_sums(row, 0, top), top, out);
    });
    return;
  }
  for (const int64_t row : input.rows_where(true)) out.zero(row);
  const std::vector<int64_t> kept = input.rows_where(false);
  const int64_t rows = static_cast<int64_t>(kept.size()), elements = rows * input.vocab / kThreadWork;
  if (rows >= 4 * static_cast<int64_t>(torch::stable::get_num_threads())) {
    for_each_task(rows, elements, [&](int64_t i) {
      Top top(k);
      SoftmaxSums sums = segment_sums(kept[i], 0, top);
      for (int64_t segment = 1; segment < segments; ++segment) {
        merge(sums, segment_sums(kept[i], segment, top), input.scale(kept[i]).rate);
      }
      finish_row(input, kept[i], sums, top, out);
    });
    return;
  }
  // Few rows: a task is a segment. The same sums are merged in the same order.
  std::vector<SoftmaxSums> parts(rows * segments);
  std::vector<Top> tops(rows * segments, Top(k));
  for_each_task(rows * segments, elements, [&](int64_t i) {
    parts[i] = segment_sums(kept[i / segments], i % segments, tops[i]);
  });
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t first = i * segments;
    for (int64_t other = first + 1; other < first + segments; ++other) {
      merge(parts[first], parts[other], input.scale(kept[i]).rate);
      merge(tops[first], tops[other]);
    }
    finish_row(input, kept[i], parts[first], tops[first], out);
  }
}

// A row's part of the gradient, g and coefs as reference.py's backward has them.
struct RowBackward {
  double max, log_sum, temperature;
  double g, a, b, c;

  // At the label, in double: near p = 1 the two terms of it all but cancel.
  float at_label(const Input& input, float x) const {
    const double logp = (input.softcapped(x) - max) / temperature - log_sum, p = std::exp(logp);
    const double rest = logp < -1 ? p - 1 : std::expm1(logp);  // p - 1; only near p = 1 does it cancel
    double grad = -g * rest + p * (a + g + c * p) + (p == 0 ? 0 : b * p * logp);
    if (input.softcap != 0) {
      const double t = std::tanh(static_cast<double>(x) / input.softcap);
      grad *= (1 - t) * (1 + t);
    }
    return static_cast<float>(grad / temperature);
  }
  RowGrad elsewhere(bool stats) const {
    const double inverse_sum = std::exp(-log_sum), factor = stats ? 1 : inverse_sum;
    const auto scaled = [&](double x) { return static_cast<float>(x * factor / temperature); };
    return {static_cast<float>(max), static_cast<float>(log_sum), static_cast<float>(inverse_sum),
            scaled(a),               scaled(b),                   scaled(c)};
  }
};

void backward(const Input& input, const float* normalizer, const float* grad_logps, const float* coefs,
              const Rows& grads) {
  const int64_t n = input.count, segments = input.segments();
  const GradKernel kernel = input.kernels.grad(input.type, input.softcap != 0, coefs != nullptr);
  const auto segment_grad = [&](int64_t row, int64_t segment) {
    const double g = grad_logps[row];
    RowBackward back{normalizer[row], normalizer[n + row], input.temperature(row), g, -g, 0, 0};
    if (coefs != nullptr) back.a = coefs[row], back.b = coefs[n + row], back.c = coefs[2 * n + row];
    const int64_t start = segment * kSegment * input.width, label = input.labels[row] * input.width;
    const char* x = input.rows[row];
    char* grad = grads[row];
    const bool has_label = input.label_in_range(row) && input.labels[row] / kSegment == segment;
    const float at_label = has_label ? as_float(x + label, input.type) : 0;  // before an in-place kernel overwrites it
    kernel(x + start, input.segment_size(segment), input.scale(row), back.elsewhere(coefs != nullptr), grad + start);
    if (has_label) put(grad + label, input.type, back.at_label(input, at_label));
  };
  if (segments == 1) {
    for_each_task(n, n * input.vocab / kThreadWork, [&](int64_t row) {
      if (!input.ignored(row)) return segment_grad(row, 0);
      std::memset(grads[row], 0, input.vocab * input.width);
    });
    return;
  }
  const std::vector<int64_t> ignored = input.rows_where(true), kept = input.rows_where(false);
  const int64_t zeros = static_cast<int64_t>(ignored.size());
  for_each_task(zeros, zeros * input.vocab, [&](int64_t i) {
    std::memset(grads[ignored[i]], 0, input.vocab * input.width);
  });
  const int64_t tasks = static_cast<int64_t>(kept.size()) * segments;
  for_each_task(tasks, static_cast<int64_t>(kept.size()) * input.vocab / kThreadWork, [&](int64_t i) {
    segment_grad(kept[i / segments], i % segments);
  });
}

void forward_op(const Tensor logits, const Tensor labels, const std::optional<Tensor> temperatures,
                const std::optional<Tensor> label_set, double temperature, double logit_softcap, int64_t ignore_index,
                int64_t topk, const Tensor logps, const Tensor normalizer, const Tensor logsumexp, const Tensor entropy,
                const Tensor sum_p2, const Tensor topk_mass, const Tensor topk_entropy, const Tensor label_set_prob) {
  if (labels.numel() == 0) return;
  const Input input(logits, labels, temperatures, temperature, logit_softcap, ignore_index);
  float* max = output(normalizer);
  Outputs out{output(logps),     max,
              max + input.count, output(logsumexp),
              output(entropy),   output(sum_p2),
              output(topk_mass), output(topk_entropy),
              output(label_set_prob), {}};
  if (label_set) {
    const int64_t* ids = static_cast<const int64_t*>(label_set->const_data_ptr());
    out.label_set.assign(ids, ids + label_set->numel());
  }
  const bool top = out.topk_mass != nullptr || out.topk_entropy != nullptr;
  forward(input, top ? static_cast<int>(std::min(topk, input.vocab)) : 0, out);
}

void backward_op(const Tensor logits, const Tensor labels, const std::optional<Tensor> temperatures, double temperature,
                 double logit_softcap, int64_t ignore_index, const Tensor normalizer, const Tensor grad_logps,
                 const std::optional<Tensor> coefs, const Tensor grad_logits) {
  if (labels.numel() == 0) return;
  const Input input(logits, labels, temperatures, temperature, logit_softcap, ignore_index);
  const Rows grads(grad_logits);
  const bool in_place = grads.data == input.rows.data;
  const int64_t bytes = grad_logits.numel() * input.width;
  if (!in_place) use_huge_pages(grads.data, bytes);
  backward(input, static_cast<const float*>(normalizer.const_data_ptr()),
           static_cast<const float*>(grad_logps.const_data_ptr()),
           coefs ? static_cast<const float*>(coefs->const_data_ptr()) : nullptr, grads);
}

// Whether every label is ignore_index or below vocab.
bool labels_in_range_op(const Tensor labels, int64_t ignore_index, int64_t vocab) {
  const int64_t* values = static_cast<const int64_t*>(labels.const_data_ptr());
  bool fine = true;
  for (int64_t i = 0, n = labels.numel(); i < n; ++i) {
    fine &= (values[i] == ignore_index) | ((values[i] >= 0) & (values[i] < vocab));
  }
  return fine;
}

// The elementary functions of simd.h, [n] float32, for the test of their errors.
void elementary_op(const Tensor x, const Tensor out, int64_t which) {
  kernels().elementary(static_cast<const float*>(x.const_data_ptr()), static_cast<float*>(out.mutable_data_ptr()),
                       x.numel(), which);
}

}  // namespace
}  // namespace fastpo

STABLE_TORCH_LIBRARY_IMPL(fastpo_c, CPU, m) {
  m.impl("token_logprobs_forward", TORCH_BOX(&fastpo::forward_op));
  m.impl("token_logprobs_backward", TORCH_BOX(&fastpo::backward_op));
  m.impl("labels_in_range", TORCH_BOX(&fastpo::labels_in_range_op));
  m.impl("elementary", TORCH_BOX(&fastpo::elementary_op));
}
