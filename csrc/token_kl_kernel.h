// Vector kernels of token_kl over one row of two models' logits. Compiled once per instruction set, see simd_targets.h.

namespace fastpo::FASTPO_ISA {

constexpr int64_t kKlBlock = 2048;  // elements of both rows stay in the first cache between a block's passes

// z of W logits.
template <bool CAPPED>
struct KlTransform {
  Vf factor, cap, inverse_cap;
  explicit KlTransform(const KlHead& head)
      : factor(set(CAPPED ? head.inverse_temperature : head.scale * head.inverse_temperature)),
        cap(set(CAPPED ? head.softcap : 0.f)),
        inverse_cap(set(CAPPED ? head.scale / head.softcap : 0.f)) {}
  // The tanh of the softcap, 0 where there is none.
  inline __attribute__((always_inline)) Vf bent(Vf x) const {
    if constexpr (!CAPPED) return set(0.f);
    return tanh(min(set(20.f), max(set(-20.f), x * inverse_cap)));
  }
  inline __attribute__((always_inline)) Vf operator()(Vf x) const { return CAPPED ? bent(x) * cap * factor : x * factor; }
};

template <class F>
FASTPO_INLINE void kl_vectors(int64_t begin, int64_t end, const F& visit) {
  int64_t i = begin;
  for (; i + W <= end; i += W) visit(i, W);
  if (i < end) visit(i, static_cast<int>(end - i));
}

template <class T>
FASTPO_INLINE Vf kl_load(const T* p, int count) {
  return count == W ? load(p) : load_n(p, count, 0.f);
}

// The logsumexp of z over n logits, online by blocks.
template <class T, bool CAPPED>
static double kl_logsumexp(const T* x, int64_t n, const KlHead& head) {
  const KlTransform<CAPPED> transform(head);
  const float low = -__builtin_inff();
  float largest = low;
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kKlBlock) {
    const int64_t end = begin + kKlBlock < n ? begin + kKlBlock : n;
    Vf top = set(low);
    kl_vectors(begin, end, [&](int64_t i, int count) __attribute__((always_inline)) {
      if (count < W) return;
      top = max(transform(load(x + i)), top);
    });
    float block = reduce_max(top);
    for (int64_t i = end - (end - begin) % W; i < end; ++i) {  // the last of a row
      float lanes[W];
      store(lanes, transform(load_n(x + i, 1, 0.f)));
      block = lanes[0] > block ? lanes[0] : block;
    }
    if (block > largest) {
      total *= __builtin_exp(static_cast<double>(largest == low ? -1e4f : largest - block));
      largest = block;
    }
    const Vf m = set(largest == low ? 0.f : largest);
    Vf sum = set(0.f);
    kl_vectors(begin, end, [&](int64_t i, int count) __attribute__((always_inline)) {
      const Vf e = exp(transform(kl_load(x + i, count)) - m);
      sum = sum + (count < W ? first_n(e, count) : e);
    });
    total += reduce_add(sum);
  }
  return (largest == low ? 0.f : largest) + __builtin_log(total);
}

// A logsumexp in two parts: its rounding to fp32 would scale all of q.
struct KlNorm {
  float value;
  Vf high, low;
  explicit KlNorm(double norm)
      : value(static_cast<float>(norm)), high(set(value)), low(set(static_cast<float>(norm - value))) {}
  inline __attribute__((always_inline)) Vf below(Vf z) const { return (z - high) - low; }
};

// d + e^-d - 1: its series where it cancels, to 2e-9 of itself.
FASTPO_INLINE Vf kl_excess(Vf d) {
  const Vf t = -d;
  Vf p = set(1.f / 39916800.f);
  p = fma(p, t, set(1.f / 3628800.f));
  p = fma(p, t, set(1.f / 362880.f));
  p = fma(p, t, set(1.f / 40320.f));
  p = fma(p, t, set(1.f / 5040.f));
  p = fma(p, t, set(1.f / 720.f));
  p = fma(p, t, set(1.f / 120.f));
  p = fma(p, t, set(1.f / 24.f));
  p = fma(p, t, set(1.f / 6.f));
  p = fma(p, t, set(0.5f));
  const Vf near = p * d * d, size = max(d, t);
  if (greater(size, set(1.f)) == 0) return near;
  const Vf far = d + (exp(t) - set(1.f));
  return size > set(1.f) ? far : near;
}

template <class T, bool CAPPED>
static KlRow kl_divergence(const T* x, const T* ref, int64_t n, const KlHead& head) {
  const KlTransform<CAPPED> transform(head);
  const KlNorm norm(kl_logsumexp<T, CAPPED>(x, n, head)), ref_norm(kl_logsumexp<T, CAPPED>(ref, n, head));
  const Vf smallest = set(-87.f);
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kKlBlock) {
    const int64_t end = begin + kKlBlock < n ? begin + kKlBlock : n;
    Vf sum = set(0.f);
    kl_vectors(begin, end, [&](int64_t i, int count) __attribute__((always_inline)) {
      const Vf logp = norm.below(transform(kl_load(x + i, count)));
      const Vf logq = ref_norm.below(transform(kl_load(ref + i, count)));
      Vf term = exp(logq) * kl_excess(logq - logp);
      // Where q is 0 in this type, what is left of the term is p.
      if (greater(smallest, logq) != 0) term = logq < smallest ? exp(logp) : term;
      sum = sum + (count < W ? first_n(term, count) : term);
    });
    total += reduce_add(sum);
  }
  return {static_cast<float>(total), norm.value, ref_norm.value};
}

template <class T, bool CAPPED>
static void kl_slope(const T* x, const T* ref, int64_t n, const KlHead& head, KlRow row, float factor, T* out) {
  const KlTransform<CAPPED> transform(head);
  const Vf norm = set(row.norm), ref_norm = set(row.ref_norm);
  const Vf coef = set(factor * head.scale * head.inverse_temperature);
  kl_vectors(0, n, [&](int64_t i, int count) __attribute__((always_inline)) {
    const Vf own = kl_load(x + i, count);
    const Vf p = exp(transform(own) - norm), q = exp(transform(kl_load(ref + i, count)) - ref_norm);
    Vf slope = (p - q) * coef;
    if constexpr (CAPPED) {
      const Vf t = transform.bent(own);
      slope = slope * ((set(1.f) - t) * (set(1.f) + t));
    }
    if (count == W) {
      store(out + i, slope);
    } else {
      store_n(out + i, slope, count);
    }
  });
}

template <class T>
static KlRow kl_divergence_of(const void* x, const void* ref, int64_t n, const KlHead& head) {
  const T *own = static_cast<const T*>(x), *other = static_cast<const T*>(ref);
  return head.softcap == 0.f ? kl_divergence<T, false>(own, other, n, head) : kl_divergence<T, true>(own, other, n, head);
}

template <class T>
static void kl_slope_of(const void* x, const void* ref, int64_t n, const KlHead& head, KlRow row, float factor, void* out) {
  const T *own = static_cast<const T*>(x), *other = static_cast<const T*>(ref);
  if (head.softcap == 0.f) return kl_slope<T, false>(own, other, n, head, row, factor, static_cast<T*>(out));
  kl_slope<T, true>(own, other, n, head, row, factor, static_cast<T*>(out));
}

static KlRow kl_divergence_row(Type type, const void* x, const void* ref, int64_t n, const KlHead& head) {
  if (type == Type::float32) return kl_divergence_of<float>(x, ref, n, head);
  return type == Type::bfloat16 ? kl_divergence_of<BFloat16>(x, ref, n, head) : kl_divergence_of<Half>(x, ref, n, head);
}

static void kl_slope_row(Type type, const void* x, const void* ref, int64_t n, const KlHead& head, KlRow row,
                         float factor, void* out) {
  if (type == Type::float32) return kl_slope_of<float>(x, ref, n, head, row, factor, out);
  if (type == Type::bfloat16) return kl_slope_of<BFloat16>(x, ref, n, head, row, factor, out);
  kl_slope_of<Half>(x, ref, n, head, row, factor, out);
}

static KlKernels kl_kernels() { return {kl_divergence_row, kl_slope_row}; }

}  // namespace fastpo::FASTPO_ISA
