// Vectors of floats for one instruction set. simd_targets.h includes it once for each, hence no include guard; all is
// inlined and internal, so that no code of one instruction set can be linked into another's.
//
//   Vf               W floats: 16 (avx512), 8 (avx2) or 4 (generic: plain vector extensions, any processor)
//   load, store      float, bfloat16 or float16 in memory, any alignment; store rounds to nearest even, NaN stays NaN
//   load_n, store_n  the same for the first n < W elements
//   load2, store2    2 W elements in an order that suits the type, the same in both
//   exp              within 1.1 ulp where the result is normal; subnormal results within 2^-149 of the truth;
//                    exp(-inf) = 0, NaN stays NaN
//   exp_rate         exp(x rate) for rate.lowest <= x and x rate <= 40, or NaN: in fewer operations, within 1.3 ulp
//   tanh             within 2 ulp for |x| <= 20

#include <cstdint>
#include <cstring>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#define FASTPO_INLINE static inline __attribute__((always_inline))

namespace fastpo::FASTPO_ISA {

using BFloat16 = c10::BFloat16;
using Half = c10::Half;

#if FASTPO_SIMD_BITS == 512

constexpr int W = 16;
using Vf = __m512;
using Vi = __m512i;

FASTPO_INLINE Vf set(float x) { return _mm512_set1_ps(x); }
FASTPO_INLINE Vf load(const float* p) { return _mm512_loadu_ps(p); }
FASTPO_INLINE Vf load(const BFloat16* p) {
  const Vi wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
FASTPO_INLINE Vf load(const Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
// The bits of x, rounded to bfloat16 in their upper half. NaN, which arithmetic leaves quiet, stays as it is.
FASTPO_INLINE Vi rounded(Vf x) {
  const Vi bits = _mm512_castps_si512(x);
  const Vi odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const Vi half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  return _mm512_mask_add_epi32(bits, _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q), bits, half);
}
FASTPO_INLINE __m256i narrow(Vf x, const BFloat16*) {
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded(x), 16));
}
FASTPO_INLINE __m256i narrow(Vf x, const Half*) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
FASTPO_INLINE void store(float* p, Vf x) { _mm512_storeu_ps(p, x); }
template <class T>
FASTPO_INLINE void store(T* p, Vf x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x, p));
}
FASTPO_INLINE void load2(const BFloat16* p, Vf& even, Vf& odd) {
  const Vi both = _mm512_loadu_si512(p);
  even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
  odd = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}
FASTPO_INLINE void store2(BFloat16* p, Vf even, Vf odd) {
  const Vi low = _mm512_srli_epi32(rounded(even), 16);
  _mm512_storeu_si512(p, _mm512_mask_mov_epi16(low, 0xaaaaaaaa, rounded(odd)));
}
FASTPO_INLINE Vf fma(Vf a, Vf b, Vf c) { return _mm512_fmadd_ps(a, b, c); }
FASTPO_INLINE Vf max(Vf a, Vf b) { return _mm512_max_ps(a, b); }  // b where either is NaN
FASTPO_INLINE Vf min(Vf a, Vf b) { return _mm512_min_ps(a, b); }  // b where either is NaN
FASTPO_INLINE Vf round(Vf x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
FASTPO_INLINE Vf scale2(Vf x, Vf n) { return _mm512_scalef_ps(x, n); }  // x 2^n, n whole
FASTPO_INLINE uint32_t greater(Vf a, Vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }  // a bit per lane

#elif FASTPO_SIMD_BITS == 256

constexpr int W = 8;
using Vf = __m256;
using Vi = __m256i;

FASTPO_INLINE Vf set(float x) { return _mm256_set1_ps(x); }
FASTPO_INLINE Vf load(const float* p) { return _mm256_loadu_ps(p); }
FASTPO_INLINE Vf load(const BFloat16* p) {
  const Vi wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
FASTPO_INLINE Vf load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
FASTPO_INLINE Vi rounded(Vf x) {
  const Vi bits = _mm256_castps_si256(x);
  const Vi odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const Vi half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const Vi ordered = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_ORD_Q));
  return _mm256_add_epi32(bits, _mm256_and_si256(ordered, half));
}
FASTPO_INLINE __m128i narrow(Vf x, const BFloat16*) {
  const Vi upper = _mm256_srli_epi32(rounded(x), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
}
FASTPO_INLINE __m128i narrow(Vf x, const Half*) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
FASTPO_INLINE void store(float* p, Vf x) { _mm256_storeu_ps(p, x); }
template <class T>
FASTPO_INLINE void store(T* p, Vf x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(x, p));
}
FASTPO_INLINE void load2(const BFloat16* p, Vf& even, Vf& odd) {
  const Vi both = _mm256_loadu_si256(reinterpret_cast<const Vi*>(p));
  even = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
  odd = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
}
FASTPO_INLINE void store2(BFloat16* p, Vf even, Vf odd) {
  const Vi low = _mm256_srli_epi32(rounded(even), 16);
  _mm256_storeu_si256(reinterpret_cast<Vi*>(p), _mm256_blend_epi16(low, rounded(odd), 0xaa));
}
FASTPO_INLINE Vf fma(Vf a, Vf b, Vf c) { return _mm256_fmadd_ps(a, b, c); }
FASTPO_INLINE Vf max(Vf a, Vf b) { return _mm256_max_ps(a, b); }
FASTPO_INLINE Vf min(Vf a, Vf b) { return _mm256_min_ps(a, b); }
FASTPO_INLINE Vf round(Vf x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
FASTPO_INLINE uint32_t greater(Vf a, Vf b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)); }

#else

constexpr int W = 4;
typedef float Vf __attribute__((vector_size(16)));
typedef int32_t Vi __attribute__((vector_size(16)));

FASTPO_INLINE Vf set(float x) { return Vf{x, x, x, x}; }
FASTPO_INLINE Vf load(const float* p) {
  Vf x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
template <class T>
FASTPO_INLINE Vf load(const T* p) {
  return Vf{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]), static_cast<float>(p[3])};
}
FASTPO_INLINE void store(float* p, Vf x) { std::memcpy(p, &x, sizeof x); }
template <class T>
FASTPO_INLINE void store(T* p, Vf x) {
  for (int i = 0; i < W; ++i) p[i] = static_cast<T>(x[i]);
}
FASTPO_INLINE Vf fma(Vf a, Vf b, Vf c) { return a * b + c; }
FASTPO_INLINE Vf max(Vf a, Vf b) { return a > b ? a : b; }
FASTPO_INLINE Vf min(Vf a, Vf b) { return a < b ? a : b; }
FASTPO_INLINE Vf round(Vf x) { return (x + 12582912.f) - 12582912.f; }  // 1.5 * 2^23: no fraction bits are left
FASTPO_INLINE uint32_t greater(Vf a, Vf b) {
  const Vi bits = (a > b) & Vi{1, 2, 4, 8};
  return bits[0] | bits[1] | bits[2] | bits[3];
}

#endif

#if FASTPO_SIMD_BITS != 512
// x 2^n in two steps, for 2^n itself may be out of range. n is whole, from -252 to 254.
FASTPO_INLINE Vf scale2(Vf x, Vf n) {
  typedef int32_t Ints __attribute__((vector_size(4 * W)));
  const Ints whole = __builtin_convertvector(n, Ints);
  const Ints half = whole >> 1;
  const Ints first = (half + 127) << 23, second = (whole - half + 127) << 23;
  return x * reinterpret_cast<Vf>(first) * reinterpret_cast<Vf>(second);
}
#endif

template <class T>
FASTPO_INLINE void load2(const T* p, Vf& a, Vf& b) {
  a = load(p);
  b = load(p + W);
}
template <class T>
FASTPO_INLINE void store2(T* p, Vf a, Vf b) {
  store(p, a);
  store(p + W, b);
}

template <class T>
FASTPO_INLINE Vf load_n(const T* p, int n, float fill) {
  float x[W];
  for (int i = 0; i < W; ++i) x[i] = i < n ? static_cast<float>(p[i]) : fill;
  return load(x);
}

template <class T>
FASTPO_INLINE void store_n(T* p, Vf x, int n) {
  T narrowed[W];
  store(narrowed, x);
  std::memcpy(static_cast<void*>(p), narrowed, n * sizeof(T));
}

// The first n lanes of x; 0 in the others.
FASTPO_INLINE Vf first_n(Vf x, int n) {
  float lanes[W];
  store(lanes, x);
  for (int i = n; i < W; ++i) lanes[i] = 0.f;
  return load(lanes);
}

// The largest lane, or the sum of all. By halves, in registers: short rows and sequences feel the difference.
template <bool largest>
FASTPO_INLINE float reduce(Vf x) {
#if FASTPO_SIMD_BITS == 512
  const __m256 low = _mm512_castps512_ps256(x), high = _mm512_extractf32x8_ps(x, 1);
  const __m256 y = largest ? _mm256_max_ps(low, high) : _mm256_add_ps(low, high);
#elif FASTPO_SIMD_BITS == 256
  const __m256 y = x;
#endif
#if FASTPO_SIMD_BITS >= 256
  const __m128 first = _mm256_castps256_ps128(y), second = _mm256_extractf128_ps(y, 1);
  const __m128 z = largest ? _mm_max_ps(first, second) : _mm_add_ps(first, second);
#else
  const Vf z = x;
#endif
  if (!largest) return (z[0] + z[2]) + (z[1] + z[3]);
  const float even = z[0] > z[2] ? z[0] : z[2], odd = z[1] > z[3] ? z[1] : z[3];
  return even > odd ? even : odd;
}
FASTPO_INLINE float reduce_max(Vf x) { return reduce<true>(x); }  // none of them is NaN
FASTPO_INLINE float reduce_add(Vf x) { return reduce<false>(x); }

// exp(x) = 2^n e^r with n = round(x / ln 2) and |r| <= ln 2 / 2; e^r = 1 + r + r^2 q(r), q minimax of degree 4 (3e-9).
// ln 2 is split so that n times its first part is exact, with or without a fused multiply-add.
FASTPO_INLINE Vf exp(Vf x) {
  x = min(set(89.f), max(set(-104.f), x));
  const Vf n = round(x * set(1.44269504f));
  const Vf r = fma(n, set(2.12194440e-4f), fma(n, set(-0.693359375f), x));
  Vf q = set(1.3814540e-3f);
  q = fma(q, r, set(8.3687452e-3f));
  q = fma(q, r, set(4.1668391e-2f));
  q = fma(q, r, set(1.6666520e-1f));
  q = fma(q, r, set(4.9999993e-1f));
  return scale2(fma(q, r * r, r) + set(1.f), n);
}

// What exp_rate multiplies by: rate / ln 2 in two parts (rate itself for the generic one), and the x whose result is 0.
struct Rate {
  Vf high, low, lowest;
  explicit Rate(double rate) {
    const double scaled = FASTPO_SIMD_BITS == 128 ? rate : rate * 1.4426950408889634;
    high = set(static_cast<float>(scaled));
    low = set(static_cast<float>(scaled - static_cast<float>(scaled)));
    lowest = set(static_cast<float>(-104 / rate));
  }
};

// With u = x rate / ln 2 = i + j/K + r (K entries in a register, |r| <= 1/2K): 2^i 2^(j/K) 2^r; 2^r - 1 is a cubic.
// Adding 1.5 * 2^23 / K leaves i K + j in the low bits; the product in u - (i + j/K) is exact, fused as it is.
#if FASTPO_SIMD_BITS == 512

FASTPO_INLINE Vf exp_rate(Vf x, const Rate& rate) {
  const Vf table = _mm512_setr_ps(1.f, 1.0442737824f, 1.0905077327f, 1.1387886348f, 1.1892071150f, 1.2418578121f,
                                  1.2968395547f, 1.3542555469f, 1.4142135624f, 1.4768261459f, 1.5422108254f,
                                  1.6104903320f, 1.6817928305f, 1.7562521604f, 1.8340080864f, 1.9152065614f);
  const Vf shift = set(786432.f);
  const Vf shifted = fma(x, rate.high, shift);
  const Vf whole = shifted - shift;  // i + j/16
  const Vf r = fma(x, rate.low, _mm512_fmsub_ps(x, rate.high, whole));
  const Vf q = r * fma(fma(set(5.5502057e-2f), r, set(2.4023460e-1f)), r, set(6.9314718e-1f));
  const Vf power = _mm512_permutexvar_ps(_mm512_castps_si512(shifted), table);
  return _mm512_scalef_ps(fma(power, q, power), whole);
}

#elif FASTPO_SIMD_BITS == 256

FASTPO_INLINE Vf exp_rate(Vf x, const Rate& rate) {
  const Vf table = _mm256_setr_ps(1.f, 1.0905077327f, 1.1892071150f, 1.2968395547f, 1.4142135624f, 1.5422108254f,
                                  1.6817928305f, 1.8340080864f);
  const Vf shift = set(1572864.f + 127.f + 64.f);  // so that the bits above j are the exponent of 2^(i + 64)
  const Vf shifted = fma(x, rate.high, shift);
  const Vf whole = shifted - shift;  // i + j/8
  const Vf r = fma(x, rate.low, _mm256_fmsub_ps(x, rate.high, whole));
  const Vf q = r * fma(fma(set(5.5495903e-2f), r, set(2.4025889e-1f)), r, set(6.9314722e-1f));
  const Vi bits = _mm256_castps_si256(shifted);
  const Vf power = _mm256_permutevar8x32_ps(table, bits);
  const Vf scale = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_srli_epi32(bits, 3), 23));
  return fma(power, q, power) * scale * set(0x1p-64f);
}

#else

FASTPO_INLINE Vf leading_bits(Vf x) {
  return reinterpret_cast<Vf>(reinterpret_cast<Vi>(x) & static_cast<int32_t>(0xfffff000));
}

// Without a fused multiply-add the error of the product is found by splitting its factors (Dekker 1971).
FASTPO_INLINE Vf exp_rate(Vf x, const Rate& rate) {
  const Vf product = x * rate.high;
  const Vf x1 = leading_bits(x), x2 = x - x1, rate1 = leading_bits(rate.high), rate2 = rate.high - rate1;
  const Vf error = ((x1 * rate1 - product) + x1 * rate2 + x2 * rate1) + x2 * rate2 + x * rate.low;
  const Vf e = exp(product);
  return e + e * error;
}

#endif

// Below 1 an odd polynomial (minimax, 5e-9), elsewhere 1 - 2 / (e^2|x| + 1) with the sign of x. |x| <= 20, or NaN.
FASTPO_INLINE Vf tanh(Vf x) {
  const Vf size = max(x, -x);
  const Vf square = x * x;
  Vf q = set(-3.58451696e-4f);
  q = fma(q, square, set(2.30136359e-3f));
  q = fma(q, square, set(-7.94610515e-3f));
  q = fma(q, square, set(2.14866568e-2f));
  q = fma(q, square, set(-5.38798025e-2f));
  q = fma(q, square, set(1.33323446e-1f));
  q = fma(q, square, set(-3.33332954e-1f));
  const Vf near = fma(q * square, x, x);
  if (greater(size, set(1.f)) == 0) return near;
  const Vf far = set(1.f) - set(2.f) / (exp_rate(size, Rate(2)) + set(1.f));
  return size < set(1.f) ? near : (x < set(0.f) ? -far : far);
}

}  // namespace fastpo::FASTPO_ISA
