// Vector kernels of token_logprobs over a contiguous stretch of one row. Compiled once per instruction set, see simd_targets.h.

namespace fastpo::FASTPO_ISA {

// Softcaps x in place and returns dy / dx.
template <bool CAPPED>
FASTPO_INLINE Vf softcap(Vf& x, Vf cap) {
  if constexpr (!CAPPED) return set(1.f);
  const Vf t = tanh(x / cap);
  x = t * cap;
  return (set(1.f) - t) * (set(1.f) + t);
}

static void insert(float* top, int k, Vf x) {
  float lanes[W];
  store(lanes, x);
  for (float value : lanes) {
    if (!(value > top[k - 1])) continue;
    int at = k - 1;
    for (; at > 0 && value > top[at - 1]; --at) top[at] = top[at - 1];
    top[at] = value;
  }
}

// The largest of x[0:n], NaN passed over; with TOP, also inserts what is larger than the k-th largest so far.
template <class T, bool TOP>
FASTPO_INLINE float block_max(const T* x, int n, float* top, int k) {
  const float lowest = -__builtin_inff();
  Vf largest[4] = {set(lowest), set(lowest), set(lowest), set(lowest)};
  const auto visit = [&](Vf value, int lane) __attribute__((always_inline)) {
    largest[lane] = max(value, largest[lane]);
    if constexpr (TOP) {
      if (any_greater(value, set(top[k - 1]))) insert(top, k, value);
    }
  };
  int i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    for (int j = 0; j < 4; ++j) visit(load(x + i + j * W), j);
  }
  for (; i + W <= n; i += W) visit(load(x + i), 0);
  if (i < n) visit(load_n(x + i, n - i, lowest), 0);
  return reduce_max(max(max(largest[0], largest[1]), max(largest[2], largest[3])));
}

// Adds the exponentials of x[0:n] to the sums, whose max is at least theirs.
template <class T, bool CAPPED, bool MOMENTS>
FASTPO_INLINE void add_block(const T* x, int n, const RowScale& row, Vf cap, SoftmaxSums& sums) {
  // A block of nothing but -inf and NaN: any finite maximum makes 0 of the former and NaN of the latter.
  const Vf m = set(sums.max == -__builtin_inff() ? 0.f : sums.max);
  const Vf scale = set(row.inverse_temperature);
  Vf sum[4] = {}, sum_t[4] = {}, sum_squares[4] = {};
  const auto add = [&](Vf value, int lane, int count) __attribute__((always_inline)) {
    softcap<CAPPED>(value, cap);
    const Vf t = max(set(-104.f), (value - m) * scale);  // e^-104 is 0; t stays finite for t e^t
    Vf e = exp(t);
    if (count < W) e = first_n(e, count);
    sum[lane] = sum[lane] + e;
    if constexpr (MOMENTS) {
      sum_t[lane] = fma(t, e, sum_t[lane]);
      sum_squares[lane] = fma(e, e, sum_squares[lane]);
    }
  };
  int i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    for (int j = 0; j < 4; ++j) {
      __builtin_prefetch(x + i + j * W + kBlock);
      add(load(x + i + j * W), j, W);
    }
  }
  for (; i + W <= n; i += W) add(load(x + i), 0, W);
  if (i < n) add(load_n(x + i, n - i, 0.f), 0, n - i);
  sums.sum += reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
  if constexpr (MOMENTS) {
    sums.sum_t += reduce_add((sum_t[0] + sum_t[1]) + (sum_t[2] + sum_t[3]));
    sums.sum_squares += reduce_add((sum_squares[0] + sum_squares[1]) + (sum_squares[2] + sum_squares[3]));
  }
}

template <class T, bool CAPPED, bool MOMENTS>
static void softmax_sums(const void* logits, int64_t n, const RowScale& row, int k, SoftmaxSums& sums) {
  const Vf cap = set(row.softcap);
  for (int i = 0; i < k; ++i) sums.top[i] = -__builtin_inff();
  const T* x = static_cast<const T*>(logits);
  for (int64_t start = 0; start < n; start += kBlock) {
    const int size = static_cast<int>(n - start < kBlock ? n - start : kBlock);
    const float raw = k > 0 ? block_max<T, true>(x + start, size, sums.top, k) : block_max<T, false>(x + start, size, nullptr, 0);
    Vf largest = set(raw);
    softcap<CAPPED>(largest, cap);
    raise_max(sums, largest[0], row.inverse_temperature);
    add_block<T, CAPPED, MOMENTS>(x + start, size, row, cap, sums);
  }
}

// grad[0:n] = p (a + b log p + c p) / temperature * dy/dx. grad may be x. STREAM: past the caches.
template <class T, bool CAPPED, bool STATS, bool STREAM>
static void softmax_grad(const void* logits, int64_t n, const RowScale& row, const RowGrad& g, void* grad) {
  const T* x = static_cast<const T*>(logits);
  T* out = static_cast<T*>(grad);
  const Vf cap = set(row.softcap);
  const Vf m = set(g.max), log_sum = set(g.log_sum), scale = set(row.inverse_temperature);
  const Vf a = set(g.a * row.inverse_temperature), b = set(g.b * row.inverse_temperature);
  const Vf c = set(g.c * row.inverse_temperature);
  const auto gradient = [&](Vf value) __attribute__((always_inline)) {
    const Vf slope = softcap<CAPPED>(value, cap);
    const Vf log_p = max(set(-104.f), (value - m) * scale - log_sum);
    const Vf p = exp(log_p);
    Vf result = STATS ? p * fma(c, p, fma(b, log_p, a)) : p * a;
    if constexpr (CAPPED) result = result * slope;
    return result;
  };
  int64_t i = 0;
  if constexpr (STREAM) {
    const int64_t misaligned = reinterpret_cast<uintptr_t>(out) % 64 / sizeof(T);
    const int64_t head = misaligned == 0 ? 0 : 64 / sizeof(T) - misaligned;
    for (; i < head && i < n;) {
      const int count = static_cast<int>(head - i < n - i ? head - i : n - i);
      const int step = count < W ? count : W;
      store_n(out + i, gradient(load_n(x + i, step, 0.f)), step);
      i += step;
    }
  }
  for (; i + 4 * W <= n; i += 4 * W) {
    Vf values[4];
    for (int j = 0; j < 4; ++j) values[j] = gradient(load(x + i + j * W));
    for (int j = 0; j < 4; ++j) {
      if constexpr (STREAM) {
        stream(out + i + j * W, values[j]);
      } else {
        store(out + i + j * W, values[j]);
      }
    }
  }
  for (; i + W <= n; i += W) store(out + i, gradient(load(x + i)));
  if (i < n) store_n(out + i, gradient(load_n(x + i, static_cast<int>(n - i), 0.f)), static_cast<int>(n - i));
}

static float softcap_one(float x, float softcap_value) {
  Vf y = set(x);
  softcap<true>(y, set(softcap_value));
  return y[0];
}

static void exp_array(const float* x, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(out + i, exp(load(x + i)));
  if (i < n) store_n(out + i, exp(load_n(x + i, static_cast<int>(n - i), 0.f)), static_cast<int>(n - i));
}

template <class T>
static SumsKernel pick_sums(bool capped, bool moments) {
  if (capped) return moments ? softmax_sums<T, true, true> : softmax_sums<T, true, false>;
  return moments ? softmax_sums<T, false, true> : softmax_sums<T, false, false>;
}

template <class T, bool STREAM>
static GradKernel pick_grad(bool capped, bool stats) {
  if (capped) return stats ? softmax_grad<T, true, true, STREAM> : softmax_grad<T, true, false, STREAM>;
  return stats ? softmax_grad<T, false, true, STREAM> : softmax_grad<T, false, false, STREAM>;
}

static SumsKernel sums_kernel(Type type, bool capped, bool moments) {
  if (type == Type::float32) return pick_sums<float>(capped, moments);
  return type == Type::bfloat16 ? pick_sums<BFloat16>(capped, moments) : pick_sums<Half>(capped, moments);
}

static GradKernel grad_kernel(Type type, bool capped, bool stats, bool stream) {
  if (type == Type::float32) return stream ? pick_grad<float, true>(capped, stats) : pick_grad<float, false>(capped, stats);
  if (type == Type::bfloat16) {
    return stream ? pick_grad<BFloat16, true>(capped, stats) : pick_grad<BFloat16, false>(capped, stats);
  }
  return stream ? pick_grad<Half, true>(capped, stats) : pick_grad<Half, false>(capped, stats);
}

}  // namespace fastpo::FASTPO_ISA
