// What the vector kernels of preference_loss (preference_loss_kernel.h) and preference_loss.cpp around them share.
#pragma once

#include <cstdint>

namespace fastpo {

// Per-token arrays, null where absent. phi is phi(l), which is logps for the identity.
struct TokenSlice {
  const float* logps;
  const float* phi;
  const float* ref_logps;
  const float* weights;
  const float* kl;
  const float* kl_weights;
  const float* nll_weights;
  const float* token_coefs;
  const bool* mask;

  // Whether anything but log-probs, reference and mask counts.
  bool plain() const { return phi == logps && !weights && !kl && !nll_weights && !token_coefs; }
};

// Sums over masked-in tokens.
struct TokenSums {
  double score = 0;  // w (phi - rho r) + k K
  double logps = 0;  // l
  double nll = 0;  // u l
  double linear = 0;  // v l
  int64_t count = 0;
};

// coef * factor, the factor per token; null for 1.
struct Product {
  float coef;
  const float* factor;
};

// s(x), s(-x), -log s(x) and -log s(-x) of n doubles, each within 3 ulp; below e^-708 = 3.3e-308 it is that.
using LogisticKernel = void (*)(const double* x, int64_t n, double* up, double* down, double* cost_up,
                                double* cost_down);

// What the vector kernels do; all but add for n tokens of one sequence. 0 is written where the mask is false.
//   add         adds tokens [cu_seqlens[i], cu_seqlens[i + 1]) to sums[i], for n sequences
//   fill        out = value
//   combine     out = sum of the products
//   difference  out = coef (a - b_coef b), b may be null; 0 where a is
//   multiply    out = a b
//   logistic    of n doubles, not tokens
struct PreferenceKernels {
  void (*add)(const TokenSlice& tokens, const int64_t* cu_seqlens, int64_t n, float ref_coef, TokenSums* sums);
  void (*fill)(float value, const bool* mask, int64_t n, float* out);
  void (*combine)(const Product (&products)[3], const bool* mask, int64_t n, float* out);
  void (*difference)(float coef, const float* a, const float* b, float b_coef, const bool* mask, int64_t n, float* out);
  void (*multiply)(const float* a, const float* b, int64_t n, float* out);
  LogisticKernel logistic;
};

}  // namespace fastpo
