// The scalar functions of preference_loss, each with its slope: links psi(z), score maps f(S), token maps phi(l),
// for C++ and CUDA. kernels/preference_loss/links.py is the same table in PyTorch and says what each is; codes are
// positions in fastpo/objectives/core.py. T is float or double: links and score maps, one per tuple or sequence, can
// afford double.
#pragma once

#include <math.h>

#if defined(__CUDACC__)
#define FASTPO_HOST_DEVICE __host__ __device__
#else
#define FASTPO_HOST_DEVICE
#endif
#define FASTPO_LINK template <class T> FASTPO_HOST_DEVICE inline

namespace fastpo {

template <class T>
struct CurveOf {
  T value, slope;
};
using Curve = CurveOf<float>;

// 1 - e^l is taken at l = -kNearest where l is nearer to 0: fp32 cannot tell e^l from 1 there. The slope is then 0.
constexpr float kNearest = 0x1p-24f;
constexpr float kMaxExponent = 80.f;  // of the power map; likewise
constexpr double kLn2 = 0.69314718055994531;

// s(x), s(-x), -log s(x) and -log s(-x) from one exponential, of -|x|.
template <class T>
struct Logistic {
  T up, down, cost_up, cost_down;
};

FASTPO_LINK Logistic<T> logistic(T x) {
  const T e = exp(-fabs(x));
  const T large = 1 / (1 + e), small = e * large, tail = log1p(e);
  return x >= 0 ? Logistic<T>{large, small, tail, tail + x} : Logistic<T>{small, large, tail - x, tail};
}

FASTPO_HOST_DEVICE inline bool takes_logistic(int code) { return code == 0 || (code >= 3 && code <= 5); }

FASTPO_LINK CurveOf<T> soft_logistic_link(T z, T q, const Logistic<T>& at) {
  return {at.cost_up + (1 - q) * z, (1 - q) - at.down};
}

FASTPO_LINK CurveOf<T> squared_link(T z, T target) {
  const T d = z - target;
  return {d * d, 2 * d};
}

FASTPO_LINK CurveOf<T> hinge_link(T z) {
  return z >= 1 ? CurveOf<T>{0, 0} : CurveOf<T>{1 - z, -1};
}

FASTPO_LINK CurveOf<T> sigmoid_link(const Logistic<T>& at) { return {at.down, -at.up * at.down}; }

FASTPO_LINK CurveOf<T> exo_link(T z, T epsilon, const Logistic<T>& at) {
  const T log_p = log1p(-epsilon), log_rest = log(epsilon);
  const T value = -at.up * (at.cost_up + log_p) - at.down * (at.cost_down + log_rest);
  return {value, at.up * at.down * (z - log_p + log_rest)};
}

// (1-g) softplus(-z) + g e^-z with g = s(z / tau). g e^-z is one exponential: for z << 0 the factors are 0 and inf.
FASTPO_LINK CurveOf<T> discopop_link(T z, T tau, const Logistic<T>& at) {
  const Logistic<T> blend = logistic(z / tau);
  const T tail = exp(-z - blend.cost_up);
  const T value = at.cost_up * blend.down + tail;
  const T moved = at.cost_up * blend.up * blend.down / tau;
  return {value, tail * (blend.down / tau - 1) - at.down * blend.down - moved};
}

// at: the logistic of z, where takes_logistic(code).
FASTPO_LINK CurveOf<T> link_at(int code, T z, T param, const Logistic<T>& at) {
  switch (code) {
    case 0: return soft_logistic_link(z, param, at);
    case 1: return squared_link(z, param);
    case 2: return hinge_link(z);
    case 3: return sigmoid_link(at);
    case 4: return exo_link(z, param, at);
    case 5: return discopop_link(z, param, at);
    default: return {z, 1};
  }
}

FASTPO_LINK CurveOf<T> link_at(int code, T z, T param) {
  return link_at(code, z, param, takes_logistic(code) ? logistic(z) : Logistic<T>{});
}

// log(1 - e^l) for l < 0, in the form without cancellation on either side of -ln 2.
FASTPO_LINK CurveOf<T> log1mexp(T l) {
  const bool nearest = l > T(-kNearest);
  const T x = nearest ? T(-kNearest) : l;
  const T value = x > T(-kLn2) ? log(-expm1(x)) : log1p(-exp(x));
  return {value, nearest ? 0 : -1 / expm1(-x)};
}

// (e^{cS} - 1) / c
FASTPO_LINK CurveOf<T> power_map(T score, T c) {
  const T x = c * score;
  if (x > T(kMaxExponent)) return {expm1(T(kMaxExponent)) / c, 0};
  return {expm1(x) / c, exp(x)};
}

FASTPO_LINK CurveOf<T> js_map(T score) {
  const Logistic<T> at = logistic(score);
  return {T(kLn2) - at.cost_up, at.down};
}

FASTPO_LINK CurveOf<T> log_odds_map(T score) {
  const bool nearest = score > T(-kNearest);
  const T x = nearest ? T(-kNearest) : score;
  return {x - log1mexp(x).value, nearest ? 0 : -1 / expm1(x)};
}

FASTPO_LINK CurveOf<T> score_map_at(int code, T score, T c) {
  switch (code) {
    case 1: return power_map(score, c);
    case 2: return js_map(score);
    case 3: return log_odds_map(score);
    default: return {score, 1};
  }
}

FASTPO_LINK CurveOf<T> token_map_at(int code, T l) {
  return code == 1 ? log1mexp(l) : CurveOf<T>{l, 1};
}

}  // namespace fastpo
