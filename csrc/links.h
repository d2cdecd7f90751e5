// The scalar functions of preference_loss, each with its slope: links psi(z), score maps f(S), token maps phi(l). For C++ and
// CUDA; kernels/preference_loss/links.py is the same table in PyTorch and says what each is. Codes are positions in
// fastpo/objectives.py. Everything is internal: a translation unit compiled for one instruction set keeps its own copy.
#pragma once

#include <math.h>

#if defined(__CUDACC__)
#define FASTPO_LINK __host__ __device__ static inline
#else
#define FASTPO_LINK static inline
#endif

namespace fastpo {

struct Curve {
  float value, slope;
};

// 1 - e^l is taken at l = -kNearest where l is nearer to 0: fp32 cannot tell e^l from 1 there. The slope is then 0.
constexpr float kNearest = 5.9604645e-8f;  // 2^-24
constexpr float kMaxExponent = 80.f;  // of the power map; likewise
constexpr float kLn2 = 0.69314718f;

// s(x), s(-x), -log s(x) and -log s(-x) from one exponential, of -|x|.
struct Logistic {
  float up, down, cost_up, cost_down;
};

FASTPO_LINK Logistic logistic(float x) {
  const float e = expf(-fabsf(x));
  const float large = 1.f / (1.f + e), small = e * large, tail = log1pf(e);
  return x >= 0.f ? Logistic{large, small, tail, tail + x} : Logistic{small, large, tail - x, tail};
}

FASTPO_LINK Curve soft_logistic_link(float z, float q) {
  const Logistic at = logistic(z);
  return {at.cost_up + (1.f - q) * z, (1.f - q) - at.down};
}

FASTPO_LINK Curve squared_link(float z, float target) {
  const float d = z - target;
  return {d * d, 2.f * d};
}

FASTPO_LINK Curve hinge_link(float z) {
  return z >= 1.f ? Curve{0.f, 0.f} : Curve{1.f - z, -1.f};
}

FASTPO_LINK Curve sigmoid_link(float z) {
  const Logistic at = logistic(z);
  return {at.down, -at.up * at.down};
}

FASTPO_LINK Curve exo_link(float z, float epsilon) {
  const Logistic at = logistic(z);
  const float log_p = log1pf(-epsilon), log_rest = logf(epsilon);
  const float value = -at.up * (at.cost_up + log_p) - at.down * (at.cost_down + log_rest);
  return {value, at.up * at.down * (z - log_p + log_rest)};
}

// (1-g) softplus(-z) + g e^-z with g = s(z / tau). g e^-z is one exponential: for z << 0 the factors are 0 and inf.
FASTPO_LINK Curve discopop_link(float z, float tau) {
  const Logistic at = logistic(z), blend = logistic(z / tau);
  const float tail = expf(-z - blend.cost_up);
  const float value = at.cost_up * blend.down + tail;
  const float moved = at.cost_up * blend.up * blend.down / tau;
  return {value, tail * (blend.down / tau - 1.f) - at.down * blend.down - moved};
}

FASTPO_LINK Curve link_at(int code, float z, float param) {
  switch (code) {
    case 0: return soft_logistic_link(z, param);
    case 1: return squared_link(z, param);
    case 2: return hinge_link(z);
    case 3: return sigmoid_link(z);
    case 4: return exo_link(z, param);
    case 5: return discopop_link(z, param);
    default: return {z, 1.f};
  }
}

// log(1 - e^l) for l < 0, in the form without cancellation on either side of -ln 2.
FASTPO_LINK Curve log1mexp(float l) {
  const bool nearest = l > -kNearest;
  const float x = nearest ? -kNearest : l;
  const float value = x > -kLn2 ? logf(-expm1f(x)) : log1pf(-expf(x));
  return {value, nearest ? 0.f : -1.f / expm1f(-x)};
}

// (e^{cS} - 1) / c
FASTPO_LINK Curve power_map(float score, float c) {
  const float x = c * score;
  if (x > kMaxExponent) return {expm1f(kMaxExponent) / c, 0.f};
  return {expm1f(x) / c, expf(x)};
}

FASTPO_LINK Curve js_map(float score) {
  const Logistic at = logistic(score);
  return {kLn2 - at.cost_up, at.down};
}

FASTPO_LINK Curve log_odds_map(float score) {
  const bool nearest = score > -kNearest;
  const float x = nearest ? -kNearest : score;
  return {x - log1mexp(x).value, nearest ? 0.f : -1.f / expm1f(x)};
}

FASTPO_LINK Curve score_map_at(int code, float score, float c) {
  switch (code) {
    case 1: return power_map(score, c);
    case 2: return js_map(score);
    case 3: return log_odds_map(score);
    default: return {score, 1.f};
  }
}

FASTPO_LINK Curve token_map_at(int code, float l) {
  return code == 1 ? log1mexp(l) : Curve{l, 1.f};
}

}  // namespace fastpo
