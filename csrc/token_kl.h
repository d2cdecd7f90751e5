// What the vector kernels of token_kl (token_kl_kernel.h) and the op around them share.
#pragma once

#include <cstdint>

#include "token_logprobs.h"

namespace fastpo {

// z = softcap(scale x) inverse_temperature.
struct KlHead {
  float scale;
  float softcap;  // 0: none
  float inverse_temperature;
};

struct KlRow {
  float kl, norm, ref_norm;
};

struct KlKernels {
  // K and both logsumexps of one row of n logits.
  KlRow (*divergence)(Type type, const void* x, const void* ref, int64_t n, const KlHead& head);
  // out = factor (p - q) dz/dx of one row; out has the type of x, and may be x.
  void (*slope)(Type type, const void* x, const void* ref, int64_t n, const KlHead& head, KlRow row, float factor,
                void* out);
};

}  // namespace fastpo
