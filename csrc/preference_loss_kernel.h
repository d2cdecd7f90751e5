// Vector kernels of preference_loss over tokens of one sequence. Compiled once per instruction set, see simd_targets.h.
// Masked-out tokens may hold anything, NaN too: they are selected away, never multiplied by 0.

#define FASTPO_MEMBER __attribute__((always_inline))

#include "preference_loss_logistic.h"

namespace fastpo::FASTPO_ISA {

// Which of W tokens count.
#if FASTPO_SIMD_BITS == 512
using Chosen = __mmask16;
FASTPO_INLINE Chosen chosen(const bool* mask) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(mask));
  return _mm_test_epi8_mask(bytes, bytes);
}
FASTPO_INLINE Vf keep(Chosen c, Vf x) { return _mm512_maskz_mov_ps(c, x); }
FASTPO_INLINE int count(Chosen c) { return __builtin_popcount(c); }
#elif FASTPO_SIMD_BITS == 256
using Chosen = Vf;  // all ones or all zeros
FASTPO_INLINE Chosen chosen(const bool* mask) {
  const Vi wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(mask)));
  return _mm256_castsi256_ps(_mm256_cmpgt_epi32(wide, _mm256_setzero_si256()));
}
FASTPO_INLINE Vf keep(Chosen c, Vf x) { return _mm256_and_ps(c, x); }
FASTPO_INLINE int count(Chosen c) { return __builtin_popcount(_mm256_movemask_ps(c)); }
#else
using Chosen = Vi;
FASTPO_INLINE Chosen chosen(const bool* mask) { return -Vi{mask[0], mask[1], mask[2], mask[3]}; }
FASTPO_INLINE Vf keep(Chosen c, Vf x) { return reinterpret_cast<Vf>(c & reinterpret_cast<Vi>(x)); }
FASTPO_INLINE int count(Chosen c) { return -(c[0] + c[1] + c[2] + c[3]); }
#endif

// W sums in fp64, as two vectors.
struct Sum {
  Vd first = {}, second = {};
  FASTPO_MEMBER void add(Vf x) {
    first = first + low(x);
    second = second + high(x);
  }
  FASTPO_MEMBER double total() const { return reduce_add(first + second); }
};

// The first n < W of a mask, and no more. No mask: the first n.
FASTPO_INLINE Chosen chosen_n(const bool* mask, int n) {
  bool lanes[W];
  for (int i = 0; i < W; ++i) lanes[i] = i < n && (mask == nullptr || mask[i]);
  return chosen(lanes);
}

// step(i, W) for each full vector of n tokens, at i; then step(i, rest) for the rest, if any.
template <class Step>
FASTPO_INLINE void for_vectors(int64_t n, const Step& step) {
  int64_t i = 0;
  for (; i + W <= n; i += W) step(i, W);
  if (i < n) step(i, static_cast<int>(n - i));
}

FASTPO_INLINE Vf read(const float* p, int size) { return size == W ? load(p) : load_n(p, size, 0.f); }

FASTPO_INLINE void write(float* p, Vf x, int size) {
  if (size == W) {
    store(p, x);
  } else {
    store_n(p, x, size);
  }
}

template <bool MASKED>
FASTPO_INLINE Vf select(Vf x, const bool* mask, int size) {
  if constexpr (!MASKED) return x;
  return keep(size == W ? chosen(mask) : chosen_n(mask, size), x);
}

constexpr int kAhead = 512;  // tokens to prefetch: several streams of unlike pace, the hardware does not keep up alone

// Sums of l - rho r (REF) and of l. Four vectors are added up in fp32, all further sums are in fp64.
template <bool MASKED, bool REF>
FASTPO_INLINE void add_plain(const TokenSlice& t, int64_t first, int64_t n, float ref_coef, TokenSums& sums) {
  constexpr int kUnroll = 4;
  const Vf rho = set(ref_coef);
  const float *l_first = t.logps + first, *r_first = REF ? t.ref_logps + first : nullptr;
  const bool* mask = MASKED ? t.mask + first : nullptr;
  Sum logps, score;
  int64_t counted = 0;
  // The log-probs and ratios of `size` tokens at i, 0 where masked out or past the end.
  const auto take = [&](int64_t i, int size, Vf& l, Vf& ratio) __attribute__((always_inline)) {
    l = read(l_first + i, size);
    ratio = REF ? l - rho * read(r_first + i, size) : l;
    if (!MASKED) return;
    const Chosen c = size == W ? chosen(mask + i) : chosen_n(mask + i, size);
    l = keep(c, l);
    ratio = keep(c, ratio);
    counted += count(c);
  };
  int64_t i = 0;
  for (; i + kUnroll * W <= n; i += kUnroll * W) {
    for (int j = 0; j < kUnroll * W; j += 16) {
      __builtin_prefetch(l_first + i + j + kAhead);
      if (REF) __builtin_prefetch(r_first + i + j + kAhead);
    }
    if (MASKED) __builtin_prefetch(mask + i + kAhead);
    Vf l[kUnroll], ratio[kUnroll];
    for (int j = 0; j < kUnroll; ++j) take(i + j * W, W, l[j], ratio[j]);
    logps.add((l[0] + l[1]) + (l[2] + l[3]));
    if (REF) score.add((ratio[0] + ratio[1]) + (ratio[2] + ratio[3]));
  }
  for (; i < n; i += W) {
    Vf l, ratio;
    take(i, static_cast<int>(n - i < W ? n - i : W), l, ratio);
    logps.add(l);
    if (REF) score.add(ratio);
  }
  const double total = logps.total();
  sums.logps += total;
  sums.nll += total;
  sums.score += REF ? score.total() : total;
  sums.count += MASKED ? counted : n;
}

// The same with weights, KL and so on, each present or not.
FASTPO_INLINE void add_general(const TokenSlice& t, int64_t first, int64_t n, float ref_coef, TokenSums& sums) {
  const Vf rho = set(ref_coef);
  Sum score, logps, nll, linear;
  int64_t counted = 0;
  for_vectors(n, [&](int64_t at, int size) __attribute__((always_inline)) {
    const int64_t i = first + at;
    const float* streams[] = {t.logps, t.ref_logps, t.weights, t.kl, t.kl_weights, t.nll_weights, t.token_coefs};
    for (const float* stream : streams) {
      if (stream) __builtin_prefetch(stream + i + kAhead);
    }
    if (t.mask) __builtin_prefetch(t.mask + i + kAhead);
    const bool* mask = t.mask ? t.mask + i : nullptr;
    const Chosen c = mask && size == W ? chosen(mask) : chosen_n(mask, size);
    const Vf l = keep(c, read(t.logps + i, size));
    Vf x = keep(c, read(t.phi + i, size));
    if (t.ref_logps) x = x - rho * keep(c, read(t.ref_logps + i, size));
    if (t.weights) x = x * keep(c, read(t.weights + i, size));
    if (t.kl) x = x + keep(c, read(t.kl + i, size)) * keep(c, read(t.kl_weights + i, size));
    score.add(x);
    logps.add(l);
    nll.add(t.nll_weights ? l * keep(c, read(t.nll_weights + i, size)) : l);
    if (t.token_coefs) linear.add(l * keep(c, read(t.token_coefs + i, size)));
    counted += count(c);
  });
  sums.score += score.total();
  sums.logps += logps.total();
  sums.nll += nll.total();
  sums.linear += linear.total();
  sums.count += counted;
}

using AddOne = void(const TokenSlice& tokens, int64_t first, int64_t n, float ref_coef, TokenSums& sums);

template <AddOne ADD>
FASTPO_INLINE void add_each(const TokenSlice& t, const int64_t* cu, int64_t n, float ref_coef, TokenSums* sums) {
  for (int64_t i = 0; i < n; ++i) ADD(t, cu[i], cu[i + 1] - cu[i], ref_coef, sums[i]);
}

static void add_tokens(const TokenSlice& t, const int64_t* cu_seqlens, int64_t n, float ref_coef, TokenSums* sums) {
  if (!t.plain()) return add_each<add_general>(t, cu_seqlens, n, ref_coef, sums);
  if (t.mask && t.ref_logps) return add_each<add_plain<true, true>>(t, cu_seqlens, n, ref_coef, sums);
  if (t.mask) return add_each<add_plain<true, false>>(t, cu_seqlens, n, ref_coef, sums);
  if (t.ref_logps) return add_each<add_plain<false, true>>(t, cu_seqlens, n, ref_coef, sums);
  add_each<add_plain<false, false>>(t, cu_seqlens, n, ref_coef, sums);
}

static void fill_tokens(float value, const bool* mask, int64_t n, float* out) {
  const Vf x = set(value);
  if (mask == nullptr) {
    for_vectors(n, [&](int64_t i, int size) __attribute__((always_inline)) { write(out + i, x, size); });
    return;
  }
  for_vectors(n, [&](int64_t i, int size) __attribute__((always_inline)) {
    write(out + i, select<true>(x, mask + i, size), size);
  });
}

static void combine_tokens(const Product (&products)[3], const bool* mask, int64_t n, float* out) {
  for_vectors(n, [&](int64_t i, int size) __attribute__((always_inline)) {
    Vf sum = {};
    for (const Product& p : products) sum = sum + (p.factor ? set(p.coef) * read(p.factor + i, size) : set(p.coef));
    write(out + i, mask ? select<true>(sum, mask + i, size) : sum, size);
  });
}

static void difference_tokens(float coef, const float* a, const float* b, float b_coef, const bool* mask, int64_t n,
                              float* out) {
  if (a == nullptr) return fill_tokens(0.f, nullptr, n, out);
  for_vectors(n, [&](int64_t i, int size) __attribute__((always_inline)) {
    Vf x = read(a + i, size);
    if (b) x = x - set(b_coef) * read(b + i, size);
    x = set(coef) * x;
    write(out + i, mask ? select<true>(x, mask + i, size) : x, size);
  });
}

static void multiply_tokens(const float* a, const float* b, int64_t n, float* out) {
  for_vectors(n, [&](int64_t i, int size) __attribute__((always_inline)) {
    write(out + i, read(a + i, size) * read(b + i, size), size);
  });
}

static PreferenceKernels preference_kernels() {
  return {add_tokens, fill_tokens, combine_tokens, difference_tokens, multiply_tokens, logistic_of};
}

}  // namespace fastpo::FASTPO_ISA

#undef FASTPO_MEMBER
