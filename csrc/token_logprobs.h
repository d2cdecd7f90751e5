// What the vector kernels of token_logprobs (token_logprobs_kernel.h) and the op around them share.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace fastpo {

constexpr int kMaxTopk = 16;
constexpr int64_t kSegment = 16384;  // columns of one task. Sums are grouped by it: no result depends on threads

// Softmax sums over some columns of a row, relative to the largest logit among them. y = softcapped logits.
struct SoftmaxSums {
  float max = -std::numeric_limits<float>::infinity();  // m = max y
  double sum = 0;  // sum e^t with t = (y - m) / temperature
  double sum_t = 0;  // sum t e^t
  double sum_squares = 0;  // sum e^2t
};

// The k largest logits so far, before the softcap, descending; -inf where there are fewer.
struct Top {
  int k = 0;
  float values[kMaxTopk];

  explicit Top(int size = 0) : k(size) {
    for (float& value : values) value = -std::numeric_limits<float>::infinity();
  }
};

// Makes max the largest so far and refers the sums to it. exp(-inf) = 0: sums that were empty stay empty (or NaN).
inline void raise_max(SoftmaxSums& sums, float max, double rate) {
  if (!(max > sums.max)) return;
  if (sums.max != -std::numeric_limits<float>::infinity()) {
    const double shift = (static_cast<double>(max) - sums.max) * rate;
    const double scale = std::exp(-shift);
    sums.sum_t = scale == 0 ? 0 * sums.sum : scale * (sums.sum_t - shift * sums.sum);
    sums.sum *= scale;
    sums.sum_squares *= scale * scale;
  }
  sums.max = max;
}

struct RowScale {
  float softcap;  // 0: none
  double rate;  // 1 / temperature
};

// dL/dz_v = p_v (a + b log p_v + c p_v) of a row, without the label's own term. a, b and c are divided by the
// temperature; without statistics a is divided by the sum of the exponentials as well, and dL/dz_v = a e^t.
struct RowGrad {
  float max, log_sum, inverse_sum;
  float a, b, c;
};

enum class Type { float32, bfloat16, float16 };

using SumsKernel = void (*)(const void* logits, int64_t n, const RowScale&, Top&, SoftmaxSums&);
using GradKernel = void (*)(const void* logits, int64_t n, const RowScale&, const RowGrad&, void* grad);

}  // namespace fastpo
