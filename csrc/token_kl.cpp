// token_kl on the CPU: implements fastpo_c::token_kl_divergence and token_kl_slope, the functions of one tile that
// kernels/token_kl/reference.py describes. The vector kernels are in token_kl_kernel.h.
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "huge_pages.h"
#include "parallel.h"
#include "tensors.h"
#include "token_kl.h"
#define FASTPO_TARGET_INCLUDE "token_kl_kernel.h"
#include "simd_targets.h"

namespace fastpo {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#define FASTPO_KERNELS(isa) isa::kl_kernels()

KlKernels kernels() { return FASTPO_PICK(FASTPO_KERNELS); }

// Two matrices [R, V] of one type with unit last strides.
struct Models {
  Type type;
  int64_t rows, width, element;
  const char *x, *ref;
  int64_t x_stride, ref_stride;  // bytes

  Models(const Tensor& x, const Tensor& ref)
      : type(type_of(x, "logits")),
        rows(x.size(0)),
        width(x.size(1)),
        element(static_cast<int64_t>(x.element_size())),
        x(static_cast<const char*>(x.const_data_ptr())),
        ref(static_cast<const char*>(ref.const_data_ptr())),
        x_stride(x.stride(0) * element),
        ref_stride(ref.stride(0) * element) {
    STD_TORCH_CHECK(x.scalar_type() == ref.scalar_type(), "both logits should have one type here");
  }
};

KlHead head_of(double temperature, double scale, double softcap) {
  return {static_cast<float>(scale), static_cast<float>(softcap), static_cast<float>(1 / temperature)};
}

std::tuple<Tensor, Tensor> token_kl_divergence(Tensor x, Tensor ref, double temperature, double scale, double softcap) {
  const Models of(x, ref);
  const KlHead head = head_of(temperature, scale, softcap);
  const Tensor kl = torch::stable::new_empty(x, std::vector<int64_t>{of.rows}, ScalarType::Float);
  const Tensor norms = torch::stable::new_empty(x, std::vector<int64_t>{2, of.rows}, ScalarType::Float);
  float *kl_out = static_cast<float*>(kl.mutable_data_ptr()), *norms_out = static_cast<float*>(norms.mutable_data_ptr());
  const KlKernels run = kernels();
  for_each_task(of.rows, of.rows * of.width, [&](int64_t i) {
    const KlRow row = run.divergence(of.type, of.x + i * of.x_stride, of.ref + i * of.ref_stride, of.width, head);
    kl_out[i] = row.kl;
    norms_out[i] = row.norm;
    norms_out[of.rows + i] = row.ref_norm;
  });
  return {kl, norms};
}

void token_kl_slope(Tensor x, Tensor ref, Tensor norms, std::optional<Tensor> factor, double temperature, double scale,
                    double softcap, Tensor out) {
  const Models of(x, ref);
  const KlHead head = head_of(temperature, scale, softcap);
  const float* own = static_cast<const float*>(norms.const_data_ptr());
  const float* factors = factor ? static_cast<const float*>(factor->const_data_ptr()) : nullptr;
  char* const target = static_cast<char*>(out.mutable_data_ptr());
  const int64_t stride = out.stride(0) * of.element;
  use_huge_pages(target, of.rows * stride);
  const KlKernels run = kernels();
  for_each_task(of.rows, of.rows * of.width, [&](int64_t i) {
    run.slope(of.type, of.x + i * of.x_stride, of.ref + i * of.ref_stride, of.width, head,
              {0.f, own[i], own[of.rows + i]}, factors ? factors[i] : 1.f, target + i * stride);
  });
}

}  // namespace
}  // namespace fastpo

STABLE_TORCH_LIBRARY_IMPL(fastpo_c, CPU, m) {
  m.impl("token_kl_divergence", TORCH_BOX(&fastpo::token_kl_divergence));
  m.impl("token_kl_slope", TORCH_BOX(&fastpo::token_kl_slope));
}
