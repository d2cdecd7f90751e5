// linear_token_logprobs on the CPU: implements the fastpo_c::linear_tile_* ops, whose arguments
// kernels/linear_token_logprobs/reference.py describes. The vector kernels are in linear_token_logprobs_kernel.h.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "huge_pages.h"
#include "linear_token_logprobs.h"
#include "parallel.h"
#include "tensors.h"
#define FASTPO_TARGET_INCLUDE "linear_token_logprobs_kernel.h"
#include "simd_targets.h"

namespace fastpo {
namespace {

using torch::stable::Tensor;

struct Kernels {
  decltype(&generic::transform_row) transform;
  decltype(&generic::exp_row_kernel) exp;
  decltype(&generic::gradient_row<false>) gradient, gradient_capped;
  decltype(&generic::narrow_row_kernel) narrow;
  decltype(&generic::scale_row) scale_row;
  decltype(&generic::add_scaled_dispatch) add_scaled;
};

#define FASTPO_KERNELS(isa)                                                                                       \
  Kernels {                                                                                                       \
    isa::transform_row, isa::exp_row_kernel, isa::gradient_row<false>, isa::gradient_row<true>,                   \
        isa::narrow_row_kernel, isa::scale_row, isa::add_scaled_dispatch                                          \
  }

Kernels kernels() { return FASTPO_PICK(FASTPO_KERNELS); }

TileHead tile_head(const std::optional<Tensor>& bias, double scale, double softcap) {
  return {bias ? data(*bias) : nullptr, static_cast<float>(scale), static_cast<float>(softcap)};
}

// Which of its labels a tile of vocabulary entries [start, start + width) holds.
struct Labels {
  const int64_t* starts;  // [R+1]
  const int64_t* labels;  // [E]
  int64_t start, width;

  Labels(const Tensor& starts, const Tensor& labels, int64_t start, int64_t width)
      : starts(data<int64_t>(starts)), labels(data<int64_t>(labels)), start(start), width(width) {}

  // visit(entry, column, whether the row's entry before has the same label) for the entries of a row in this tile.
  template <class F>
  void each(int64_t row, const F& visit) const {
    for (int64_t entry = starts[row]; entry < starts[row + 1]; ++entry) {
      const int64_t column = labels[entry] - start;
      if (column < 0 || column >= width) continue;
      visit(entry, column, entry > starts[row] && labels[entry - 1] == labels[entry]);
    }
  }

  // d [v], a row of the tile, becomes values at the labels.
  void put(int64_t row, const float* values, float* d) const {
    each(row, [&](int64_t entry, int64_t column, bool again) {
      d[column] = again ? d[column] + values[entry] : values[entry];
    });
  }
};

// Has the pages of memory that nobody wrote to yet made by all threads, each its own: threads that meet in one page wait
// for each other, which costs many times the writing itself.
void prefault_op(const Tensor tensor) {
  constexpr int64_t kPage = 4096, kTask = 2 << 20;
  volatile char* const start = data<char>(tensor);
  const int64_t bytes = tensor.numel() * static_cast<int64_t>(tensor.element_size());
  if (bytes < 2 * kTask) return;
  use_huge_pages(tensor.mutable_data_ptr(), bytes);
  for_each_task((bytes + kTask - 1) / kTask, bytes, [&](int64_t task) {
    for (int64_t at = task * kTask; at < std::min(bytes, (task + 1) * kTask); at += kPage) start[at] = start[at];
  });
}

// The sums of one row, and what they are relative to.
struct RowSums {
  float* largest;
  double* sums;  // e^t, t e^t and e^2t at a distance of stride
  int64_t stride;
  bool moments;

  // Raises the reference where e^t of y = to would need more headroom; returns what sums so far are multiplied with.
  float raise(float to, float inverse_temperature, float headroom) const {
    const float before = *largest;
    if (!((to - before) * inverse_temperature > headroom)) return 1;
    *largest = to;
    const double shift = before == -std::numeric_limits<float>::infinity()
        ? -1e4
        : std::max((static_cast<double>(before) - to) * inverse_temperature, -1e4);
    const double decay = std::exp(shift);
    if (moments) {
      sums[stride] = (sums[stride] + sums[0] * shift) * decay;
      sums[2 * stride] *= decay * decay;
    }
    sums[0] *= decay;
    return static_cast<float>(decay);
  }

  void add(const double* tile) const {
    for (int i = 0; i < (moments ? 3 : 1); ++i) sums[i * stride] += tile[i];
  }
};

void forward_op(const Tensor z, const std::optional<Tensor> out, const std::optional<Tensor> kept,
                const std::optional<Tensor> bias, const Tensor inverse_temperature, const Tensor starts, const Tensor labels,
                int64_t start, double logit_scale, double logit_softcap, double headroom, const Tensor largest,
                const Tensor sums, const Tensor decay, const Tensor picked, const std::optional<Tensor> top, bool moments) {
  const int64_t rows = z.size(0), width = z.size(1), stride = z.stride(0);
  STD_TORCH_CHECK(!out || data(*out) == data(z), "on the CPU the exponentials go over the logits");
  const TileHead head = tile_head(bias, logit_scale, logit_softcap);
  const Labels where(starts, labels, start, width);
  const Kernels kernel = kernels();
  const auto exp_row = kernel.exp(out.has_value(), head.softcap != 0, moments);
  const int k = top ? static_cast<int>(top->size(1)) : 0;
  const auto of_row = [&](int64_t row) {
    float* y = data(z) + row * stride;
    const float inverse = data(inverse_temperature)[row];
    const RowSums state{data(largest) + row, data<double>(sums) + row, sums.stride(0), moments};
    const float highest = kernel.transform(y, width, head, k > 0 ? data(*top) + row * top->stride(0) : nullptr, k);
    data(decay)[row] = state.raise(highest, inverse, static_cast<float>(headroom));
    where.each(row, [&](int64_t entry, int64_t column, bool) { data(picked)[entry] = y[column]; });
    // A row of nothing but -inf and NaN so far: any finite reference makes 0 of the former and NaN of the latter.
    const float m = *state.largest == -std::numeric_limits<float>::infinity() ? 0 : *state.largest;
    double tile[3] = {};
    exp_row(y, width, head, m, inverse, tile);
    state.add(tile);
    if (out) where.each(row, [&](int64_t, int64_t column, bool) { y[column] = 0; });
  };
  const auto narrow = kept ? kernel.narrow(type_of(*kept, "kept")) : nullptr;
  for_each_task(rows, rows * width, [&](int64_t row) {
    of_row(row);
    if (!kept) return;
    const int64_t place = row * kept->stride(0) * static_cast<int64_t>(kept->element_size());
    narrow(data(z) + row * stride, width, data<char>(*kept) + place);
  });
}

void gradient_op(const Tensor z, const Tensor out, const std::optional<Tensor> bias, const Tensor inverse_temperature,
                 const Tensor starts, const Tensor labels, int64_t start, double logit_scale, double logit_softcap,
                 const Tensor centre, const Tensor rest, const Tensor coefs, const Tensor values) {
  const int64_t rows = z.size(0), width = z.size(1), stride = z.stride(0);
  STD_TORCH_CHECK(data(out) == data(z) && out.stride(0) == stride, "on the CPU the gradient goes over the logits");
  const TileHead head = tile_head(bias, logit_scale, logit_softcap);
  const TileRows of{data(inverse_temperature), data(centre), data(rest), data(coefs), coefs.stride(0)};
  const Labels where(starts, labels, start, width);
  const Kernels kernel = kernels();
  const auto gradient = head.softcap == 0 ? kernel.gradient : kernel.gradient_capped;
  for_each_task(rows, rows * width, [&](int64_t row) {
    float* const d = data(z) + row * stride;
    gradient(d, width, head, of, row);
    where.put(row, data(values), d);
  });
}

void finish_op(const Tensor product, const Tensor factor, const Tensor starts, const Tensor labels, const Tensor weight,
               const Tensor values, const Tensor out) {
  const int64_t rows = product.size(0), size = product.size(1), stride = weight.stride(0);
  const Labels where(starts, labels, 0, weight.size(0));
  const Kernels kernel = kernels();
  const Type type = type_of(weight, "weight");
  const int64_t element = static_cast<int64_t>(type == Type::float32 ? 4 : 2);
  for_each_task(rows, rows * size, [&](int64_t row) {
    float* d = data(out) + row * out.stride(0);
    const float* source = data(product) + row * product.stride(0);
    // In place and unscaled, as for dweight, most rows have no entry either: nothing of them is to be read.
    if (source != d || data(factor)[row] != 1.f) kernel.scale_row(source, size, data(factor)[row], d);
    where.each(row, [&](int64_t entry, int64_t column, bool) {
      kernel.add_scaled(type, data<char>(weight) + column * stride * element, size, data(values)[entry], d);
    });
  });
}

}  // namespace
}  // namespace fastpo

STABLE_TORCH_LIBRARY_IMPL(fastpo_c, CPU, m) {
  m.impl("prefault", TORCH_BOX(&fastpo::prefault_op));
  m.impl("linear_tile_forward", TORCH_BOX(&fastpo::forward_op));
  m.impl("linear_tile_gradient", TORCH_BOX(&fastpo::gradient_op));
  m.impl("linear_tile_finish", TORCH_BOX(&fastpo::finish_op));
}
