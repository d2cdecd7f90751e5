// Vectors of doubles and the logistic of them, for the links: part of preference_loss_kernel.h, per instruction set.

namespace fastpo::FASTPO_ISA {

// VD = W / 2 doubles.
constexpr int VD = W / 2;
typedef int64_t Vl __attribute__((vector_size(8 * VD)));

#if FASTPO_SIMD_BITS == 512
using Vd = __m512d;
FASTPO_INLINE Vd low(Vf x) { return _mm512_cvtps_pd(_mm512_castps512_ps256(x)); }
FASTPO_INLINE Vd high(Vf x) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)); }
FASTPO_INLINE double reduce_add(Vd x) {
  const __m256d y = _mm512_castpd512_pd256(x) + _mm512_extractf64x4_pd(x, 1);
  const __m128d z = _mm256_castpd256_pd128(y) + _mm256_extractf128_pd(y, 1);
  return z[0] + z[1];
}
FASTPO_INLINE Vd set(double x) { return _mm512_set1_pd(x); }
FASTPO_INLINE Vd fma(Vd a, Vd b, Vd c) { return _mm512_fmadd_pd(a, b, c); }
#elif FASTPO_SIMD_BITS == 256
using Vd = __m256d;
FASTPO_INLINE Vd low(Vf x) { return _mm256_cvtps_pd(_mm256_castps256_ps128(x)); }
FASTPO_INLINE Vd high(Vf x) { return _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)); }
FASTPO_INLINE double reduce_add(Vd x) {
  const __m128d z = _mm256_castpd256_pd128(x) + _mm256_extractf128_pd(x, 1);
  return z[0] + z[1];
}
FASTPO_INLINE Vd set(double x) { return _mm256_set1_pd(x); }
FASTPO_INLINE Vd fma(Vd a, Vd b, Vd c) { return _mm256_fmadd_pd(a, b, c); }
#else
typedef double Vd __attribute__((vector_size(16)));
FASTPO_INLINE Vd low(Vf x) { return Vd{x[0], x[1]}; }
FASTPO_INLINE Vd high(Vf x) { return Vd{x[2], x[3]}; }
FASTPO_INLINE double reduce_add(Vd x) { return x[0] + x[1]; }
FASTPO_INLINE Vd set(double x) { return Vd{x, x}; }
FASTPO_INLINE Vd fma(Vd a, Vd b, Vd c) { return a * b + c; }
#endif

// c[0] x^(N-1) + ... + c[N-1]
template <int N>
FASTPO_INLINE Vd polynomial(Vd x, const double (&c)[N]) {
  Vd sum = set(c[0]);
  for (int i = 1; i < N; ++i) sum = fma(sum, x, set(c[i]));
  return sum;
}

// exp(x) for -708 <= x <= 0, or NaN: 2^n e^r with n = round(x / ln 2); e^r = 1 + r + r^2 q(r), q minimax (1.4e-18).
// The first part of ln 2 ends in zeros, so that its product with n is exact without a fused multiply-add too.
FASTPO_INLINE Vd exp_negative(Vd x) {
  constexpr double q[] = {
      2.0914707069612355e-09, 2.510524515390137e-08, 2.7557273594799413e-07, 2.755725533255441e-06,
      2.480158732558584e-05, 0.00019841269874873975, 0.0013888888888883737, 0.00833333333332612,
      0.04166666666666667, 0.1666666666666667, 0.5};
  const Vd shift = set(0x1.8p52);  // leaves n in the low bits
  const Vd shifted = fma(x, set(1.4426950408889634), shift);
  const Vd n = shifted - shift;
  const Vd r = fma(n, set(-1.90821492927058770e-10), fma(n, set(-6.93147180369123816e-1), x));
  const Vd power = reinterpret_cast<Vd>((reinterpret_cast<Vl>(shifted) << 52) + reinterpret_cast<Vl>(set(1.)));
  const Vd rest = fma(polynomial(r, q), r * r, r);
  return fma(rest, power, power);
}

// log(1 + x) for 0 <= x <= 1, or NaN: 2 atanh(s) with s = x / (2 + x) and atanh(s) = s + s^3 q(s^2), q minimax (1e-18).
FASTPO_INLINE Vd log1p_unit(Vd x) {
  constexpr double q[] = {
      0.07815288900461426, 0.03746071897775383, 0.05422589197440007, 0.05867139530651599,
      0.06667589315724629, 0.07692271982430275, 0.09090909948981357, 0.11111111099118386, 0.1428571428580005,
      0.19999999999999762, 0.3333333333333333};
  const Vd s = x / (set(2.) + x), square = s * s;
  const Vd twice = s + s;
  return fma(twice * square, polynomial(square, q), twice);
}

// logistic() of links.h, of n doubles; reads and writes up to the next multiple of VD.
static void logistic_of(const double* x, int64_t n, double* up, double* down, double* cost_up, double* cost_down) {
  const auto put = [](double* to, Vd value) __attribute__((always_inline)) {
    __builtin_memcpy(to, &value, sizeof value);
  };
  for (int64_t i = 0; i < n; i += VD) {
    Vd v;
    __builtin_memcpy(&v, x + i, sizeof v);
    const auto positive = v >= set(0.);
    Vd size = positive ? -v : v;
    size = size < set(-708.) ? set(-708.) : size;  // NaN stays
    const Vd e = exp_negative(size);
    const Vd large = set(1.) / (set(1.) + e), small = e * large, tail = log1p_unit(e);
    put(up + i, positive ? large : small);
    put(down + i, positive ? small : large);
    put(cost_up + i, positive ? tail : tail - v);
    put(cost_down + i, positive ? tail + v : tail);
  }
}

}  // namespace fastpo::FASTPO_ISA
