// Vector kernels of token_logprobs over a contiguous stretch of one row, once per instruction set (simd_targets.h).

namespace fastpo::FASTPO_ISA {

struct Cap {
  Vf cap, inverse, limit;
  explicit Cap(float softcap) : cap(set(softcap)), inverse(set(1.f / softcap)), limit(set(20 * softcap)) {}
};

// Softcaps x in place and returns dy / dx. x / cap is a product and its correction: divisions are slow.
template <bool CAPPED>
FASTPO_INLINE Vf softcap(Vf& x, const Cap& cap) {
  if constexpr (!CAPPED) return set(1.f);
  x = min(cap.limit, max(-cap.limit, x));
  const Vf ratio = x * cap.inverse;
  const Vf t = tanh(fma(fma(-ratio, cap.cap, x), cap.inverse, ratio));
  x = t * cap.cap;
  return (set(1.f) - t) * (set(1.f) + t);
}

// Inserts the lanes of x that are named by bits, where they are larger than the k-th largest so far.
static void insert(Top& top, Vf x, uint32_t bits) {
  float lanes[W];
  store(lanes, x);
  for (; bits != 0; bits &= bits - 1) {
    const float value = lanes[__builtin_ctz(bits)];
    if (!(value > top.values[top.k - 1])) continue;
    int at = top.k - 1;
    for (; at > 0 && value > top.values[at - 1]; --at) top.values[at] = top.values[at - 1];
    top.values[at] = value;
  }
}

// The largest of x[0:n]; NaN are passed over.
template <class T>
FASTPO_INLINE float largest_of(const T* x, int64_t n) {
  Vf largest = set(-__builtin_inff());
  int64_t i = 0;
  for (; i + W <= n; i += W) largest = max(load(x + i), largest);
  if (i < n) largest = max(load_n(x + i, static_cast<int>(n - i), -__builtin_inff()), largest);
  return reduce_max(largest);
}

// Adds e^t of x[0:n], t = (y - reference) rate, to the sums; returns the largest x, by which the caller sees whether t
// stayed below 40. TOP also inserts what is larger than the k-th largest so far.
template <class T, bool CAPPED, bool MOMENTS, bool TOP>
FASTPO_INLINE float add_block(const T* x, int64_t n, float reference, float softcap_value, const Rate& rate, double scale,
                       Top& top, SoftmaxSums& sums) {
  const Vf m = set(reference);
  const Cap cap(softcap_value);
  Vf largest = set(-__builtin_inff()), kth = set(TOP ? top.values[top.k - 1] : 0.f);
  Vf sum[4] = {}, sum_d[4] = {}, sum_squares[4] = {};
  const auto add = [&](Vf value, int lane, int count) __attribute__((always_inline)) {
    softcap<CAPPED>(value, cap);
    const Vf d = max(rate.lowest, value - m);  // finite, for d e^t
    Vf e = exp_rate(d, rate);
    if (count < W) e = first_n(e, count);
    sum[lane] = sum[lane] + e;
    if constexpr (MOMENTS) {
      sum_d[lane] = fma(d, e, sum_d[lane]);
      sum_squares[lane] = fma(e, e, sum_squares[lane]);
    }
  };
  const auto insert_larger = [&](Vf value) __attribute__((always_inline)) {
    const uint32_t bits = greater(value, kth);
    if (bits == 0) return;
    insert(top, value, bits);
    kth = set(top.values[top.k - 1]);
  };
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    Vf v[4];
    load2(x + i, v[0], v[1]);
    load2(x + i + 2 * W, v[2], v[3]);
    const Vf among = max(max(v[0], v[1]), max(v[2], v[3]));
    largest = max(among, largest);
    if (TOP && greater(among, kth) != 0) {
      for (int j = 0; j < 4; ++j) insert_larger(v[j]);
    }
    for (int j = 0; j < 4; ++j) add(v[j], j, W);
  }
  for (; i < n; i += W) {
    const int count = static_cast<int>(n - i < W ? n - i : W);
    const Vf value = count == W ? load(x + i) : load_n(x + i, count, -__builtin_inff());
    largest = max(value, largest);
    if constexpr (TOP) insert_larger(value);
    add(value, 0, count);
  }
  sums.sum += reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
  if constexpr (MOMENTS) {
    sums.sum_t += scale * reduce_add((sum_d[0] + sum_d[1]) + (sum_d[2] + sum_d[3]));
    sums.sum_squares += reduce_add((sum_squares[0] + sum_squares[1]) + (sum_squares[2] + sum_squares[3]));
  }
  return reduce_max(largest);
}

template <bool CAPPED>
static float softcap_one(float x, float softcap_value) {
  Vf y = set(x);
  softcap<CAPPED>(y, Cap(softcap_value));
  return y[0];
}

// One read: the exponentials refer to the maximum of the first few columns. Where a block turns out to hold a logit so
// much larger that its e^t could overflow, the block is done again with that logit as the reference. To refer sum_t to a
// new maximum takes a difference that costs as many digits as the step is large: with it the steps stay small.
constexpr int64_t kGlance = 256;

// A short row: the glance sees all of it, and the sums are those of softmax_sums.
template <class T, bool CAPPED, bool MOMENTS>
FASTPO_INLINE void short_sums(const T* x, int64_t n, const RowScale& row, Top& top, SoftmaxSums& sums) {
  sums.max = softcap_one<CAPPED>(largest_of(x, n), row.softcap);
  const float reference = sums.max == -__builtin_inff() ? 0.f : sums.max;
  add_block<T, CAPPED, MOMENTS, false>(x, n, reference, row.softcap, Rate(row.rate), row.rate, top, sums);
}

template <class T, bool CAPPED, bool MOMENTS>
static void softmax_sums(const void* logits, int64_t n, const RowScale& row, Top& top, SoftmaxSums& sums) {
  constexpr int64_t kBlock = (MOMENTS ? 128 : 256) * W;  // columns summed in float before they go into a double
  constexpr float kHeadroom = MOMENTS ? 2 : 20;
  const Rate rate(row.rate);
  const T* x = static_cast<const T*>(logits);
  if (n <= kGlance && top.k == 0) return short_sums<T, CAPPED, MOMENTS>(x, n, row, top, sums);
  float largest = -__builtin_inff();
  const auto add = [&](const T* block, int64_t size, bool with_top) {
    // With nothing but -inf and NaN so far, any finite reference makes 0 of the former and NaN of the latter.
    const float reference = sums.max == -__builtin_inff() ? 0.f : sums.max;
    const auto add_with = with_top ? add_block<T, CAPPED, MOMENTS, true> : add_block<T, CAPPED, MOMENTS, false>;
    return add_with(block, size, reference, row.softcap, rate, row.rate, top, sums);
  };
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t size = n - start < kBlock ? n - start : kBlock;
    for (int64_t glance : {kGlance, kBlock}) {
      if (sums.max != -__builtin_inff()) break;
      sums.max = softcap_one<CAPPED>(largest_of(x + start, size < glance ? size : glance), row.softcap);
    }
    const SoftmaxSums before = sums;
    const float block_largest = add(x + start, size, top.k > 0);
    largest = block_largest > largest ? block_largest : largest;
    const float capped = softcap_one<CAPPED>(block_largest, row.softcap);
    if ((capped - sums.max) * row.rate > kHeadroom) {
      sums = before;
      raise_max(sums, capped, row.rate);
      add(x + start, size, false);
    }
  }
  raise_max(sums, softcap_one<CAPPED>(largest, row.softcap), row.rate);
}

// grad[0:n] = p (a + b log p + c p) dy/dx, or a e^t dy/dx without STATS. grad may be x.
template <class T, bool CAPPED, bool STATS>
static void softmax_grad(const void* logits, int64_t n, const RowScale& row, const RowGrad& g, void* grad) {
  const T* x = static_cast<const T*>(logits);
  T* out = static_cast<T*>(grad);
  const Cap cap(row.softcap);
  const Rate rate(row.rate);
  const Vf m = set(g.max), scale = set(static_cast<float>(row.rate)), log_sum = set(g.log_sum);
  const Vf inverse_sum = set(g.inverse_sum), a = set(g.a), b = set(g.b), c = set(g.c);
  const auto gradient = [&](Vf value) __attribute__((always_inline)) {
    const Vf slope = softcap<CAPPED>(value, cap);
    const Vf d = max(rate.lowest, value - m);
    Vf result = exp_rate(d, rate);
    if constexpr (STATS) {
      const Vf p = result * inverse_sum, log_p = fma(d, scale, -log_sum);
      result = p * fma(c, p, fma(b, log_p, a));
    } else {
      result = result * a;
    }
    if constexpr (CAPPED) result = result * slope;
    return result;
  };
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    Vf v[4];
    load2(x + i, v[0], v[1]);
    load2(x + i + 2 * W, v[2], v[3]);
    for (Vf& value : v) value = gradient(value);
    store2(out + i, v[0], v[1]);
    store2(out + i + 2 * W, v[2], v[3]);
  }
  for (; i + W <= n; i += W) store(out + i, gradient(load(x + i)));
  if (i < n) store_n(out + i, gradient(load_n(x + i, static_cast<int>(n - i), 0.f)), static_cast<int>(n - i));
}

// exp, exp_rate(x, 1) and tanh of a vector, for the test of their errors.
static void elementary(const float* x, float* out, int64_t n, int64_t which) {
  const Rate one(1);
  for (int64_t i = 0; i < n; i += W) {
    const int count = static_cast<int>(n - i < W ? n - i : W);
    const Vf v = load_n(x + i, count, 0.f);
    store_n(out + i, which == 0 ? exp(v) : which == 1 ? exp_rate(max(one.lowest, v), one) : tanh(v), count);
  }
}

template <class T>
static SumsKernel pick_sums(bool capped, bool moments) {
  if (capped) return moments ? softmax_sums<T, true, true> : softmax_sums<T, true, false>;
  return moments ? softmax_sums<T, false, true> : softmax_sums<T, false, false>;
}

template <class T>
static GradKernel pick_grad(bool capped, bool stats) {
  if (capped) return stats ? softmax_grad<T, true, true> : softmax_grad<T, true, false>;
  return stats ? softmax_grad<T, false, true> : softmax_grad<T, false, false>;
}

static SumsKernel sums_kernel(Type type, bool capped, bool moments) {
  if (type == Type::float32) return pick_sums<float>(capped, moments);
  return type == Type::bfloat16 ? pick_sums<BFloat16>(capped, moments) : pick_sums<Half>(capped, moments);
}

static GradKernel grad_kernel(Type type, bool capped, bool stats) {
  if (type == Type::float32) return pick_grad<float>(capped, stats);
  return type == Type::bfloat16 ? pick_grad<BFloat16>(capped, stats) : pick_grad<Half>(capped, stats);
}

}  // namespace fastpo::FASTPO_ISA
