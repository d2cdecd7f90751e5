// Vector kernels of linear_token_logprobs on one tile of logits. Compiled once per instruction set, see simd_targets.h.

namespace fastpo::FASTPO_ISA {

// y = softcap(scale (z + bias)) of W logits.
struct Transform {
  Vf scale, cap, inverse_cap;
  bool capped, plain;
  explicit Transform(const TileHead& head)
      : scale(set(head.scale)),
        cap(set(head.softcap)),
        inverse_cap(set(head.softcap != 0.f ? 1.f / head.softcap : 0.f)),
        capped(head.softcap != 0.f),
        plain(head.softcap == 0.f && head.scale == 1.f && head.bias == nullptr) {}
  inline __attribute__((always_inline)) Vf operator()(Vf z, Vf bias) const {
    const Vf x = (z + bias) * scale;
    return capped ? tanh(x * inverse_cap) * cap : x;
  }
  // dy/dx from y.
  inline __attribute__((always_inline)) Vf slope(Vf y) const {
    const Vf t = y * inverse_cap;
    return (set(1.f) - t) * (set(1.f) + t);
  }
};

// Calls visit(offset, count) for every vector of n elements, count < W in the last where n is no multiple.
template <class F>
FASTPO_INLINE void each_vector(int64_t n, const F& visit) {
  int64_t i = 0;
  for (; i + W <= n; i += W) visit(i, W);
  if (i < n) visit(i, static_cast<int>(n - i));
}

template <class T>
FASTPO_INLINE Vf load_some(const T* p, int count, float fill) {
  return count == W ? load(p) : load_n(p, count, fill);
}
template <class T>
FASTPO_INLINE void store_some(T* p, Vf x, int count) {
  if (count == W) {
    store(p, x);
  } else {
    store_n(p, x, count);
  }
}

static void insert_largest(float* top, int k, Vf y) {
  float lanes[W];
  store(lanes, y);
  for (float value : lanes) {
    if (!(value > top[k - 1])) continue;
    int at = k - 1;
    for (; at > 0 && value > top[at - 1]; --at) top[at] = top[at - 1];
    top[at] = value;
  }
}

// Makes y of z [n] in place and returns the largest, NaN passed over.
static float transform_row(float* z, int64_t n, const TileHead& head, float* top, int k) {
  const Transform transform(head);
  Vf largest[4];
  for (Vf& part : largest) part = set(-__builtin_inff());
  each_vector(n, [&](int64_t i, int count) __attribute__((always_inline)) {
    Vf y = load_some(z + i, count, -__builtin_inff());
    if (!transform.plain) {
      y = transform(y, head.bias == nullptr ? set(0.f) : load_some(head.bias + i, count, 0.f));
      store_some(z + i, y, count);
      if (count < W) y = load_n(z + i, count, -__builtin_inff());
    }
    largest[i / W % 4] = max(y, largest[i / W % 4]);
    if (k > 0 && greater(y, set(top[k - 1])) != 0) insert_largest(top, k, y);
  });
  return reduce_max(max(max(largest[0], largest[1]), max(largest[2], largest[3])));
}

// Adds the sums of e^t over y [n], t = (y - m) inverse_temperature, and writes e^t dy/dx to out unless that is null.
template <class T, bool MOMENTS>
FASTPO_INLINE void exp_row(const float* y, int64_t n, const TileHead& head, float m, float inverse_temperature, T* out,
                           double* sums) {
  const Transform transform(head);
  const Vf largest = set(m), scale = set(inverse_temperature);
  Vf sum[4] = {}, sum_t[4] = {}, sum_squares[4] = {};
  each_vector(n, [&](int64_t i, int count) __attribute__((always_inline)) {
    const int lane = static_cast<int>(i / W % 4);
    const Vf value = load_some(y + i, count, 0.f);
    const Vf t = max(set(-104.f), (value - largest) * scale);  // e^-104 is 0; t stays finite for t e^t
    Vf e = exp(t);
    if (count < W) e = first_n(e, count);
    sum[lane] = sum[lane] + e;
    if constexpr (MOMENTS) {
      sum_t[lane] = fma(t, e, sum_t[lane]);
      sum_squares[lane] = fma(e, e, sum_squares[lane]);
    }
    if (out != nullptr) store_some(out + i, transform.capped ? e * transform.slope(value) : e, count);
  });
  sums[0] += reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
  if constexpr (MOMENTS) {
    sums[1] += reduce_add((sum_t[0] + sum_t[1]) + (sum_t[2] + sum_t[3]));
    sums[2] += reduce_add((sum_squares[0] + sum_squares[1]) + (sum_squares[2] + sum_squares[3]));
  }
}

template <class T>
static void exp_row_of(const float* y, int64_t n, const TileHead& head, float m, float inverse_temperature, void* out,
                       double* sums, bool moments) {
  T* typed = static_cast<T*>(out);
  if (moments) {
    exp_row<T, true>(y, n, head, m, inverse_temperature, typed, sums);
  } else {
    exp_row<T, false>(y, n, head, m, inverse_temperature, typed, sums);
  }
}

static void exp_row_dispatch(const float* y, int64_t n, const TileHead& head, float m, float inverse_temperature, Type type,
                             void* out, double* sums, bool moments) {
  if (type == Type::float32) exp_row_of<float>(y, n, head, m, inverse_temperature, out, sums, moments);
  if (type == Type::bfloat16) exp_row_of<BFloat16>(y, n, head, m, inverse_temperature, out, sums, moments);
  if (type == Type::float16) exp_row_of<Half>(y, n, head, m, inverse_temperature, out, sums, moments);
}

// dL/dz in place of z [n]. Along a row (BY_ROW) bias changes from element to element and the row's numbers do not; along a
// column of the tile it is the other way round.
template <bool BY_ROW>
static void gradient_line(float* z, int64_t n, const TileHead& head, const TileRows& rows, int64_t at) {
  const Transform transform(head);
  const auto of_row = [&](const float* column, int64_t i, int count) __attribute__((always_inline)) {
    return BY_ROW ? set(column[at]) : load_some(column + i, count, 0.f);
  };
  each_vector(n, [&](int64_t i, int count) __attribute__((always_inline)) {
    Vf bias = set(0.f);
    if (head.bias != nullptr) bias = BY_ROW ? load_some(head.bias + i, count, 0.f) : set(head.bias[at]);
    const Vf y = transform(load_some(z + i, count, 0.f), bias);
    const Vf inverse_temperature = of_row(rows.inverse_temperature, i, count);
    // t stays finite for p t.
    const Vf t = max(set(-1e4f), (y - of_row(rows.largest, i, count)) * inverse_temperature);
    const Vf p = exp(t - of_row(rows.log_sum, i, count));
    Vf slope = inverse_temperature * transform.scale;
    if (transform.capped) slope = slope * transform.slope(y);
    const Vf b = of_row(rows.coefs + rows.stride, i, count), c = of_row(rows.coefs + 2 * rows.stride, i, count);
    const Vf polynomial = fma(c, p, fma(b, t, of_row(rows.coefs, i, count)));
    store_some(z + i, slope * p * polynomial, count);
  });
}

// out = factor e, along a row.
template <class T>
static void scale_row(const void* e, int64_t n, float factor, float* out) {
  const T* typed = static_cast<const T*>(e);
  const Vf times = set(factor);
  each_vector(n, [&](int64_t i, int count) __attribute__((always_inline)) {
    store_some(out + i, load_some(typed + i, count, 0.f) * times, count);
  });
}

// The same for BLOCK rows at once into the columns of out: out[j * out_stride + i] = factor[i] e[i * stride + j].
template <class T>
static void scale_transposed(const void* e, int64_t stride, int64_t rows, int64_t n, const float* factor, float* out,
                             int64_t out_stride) {
  constexpr int64_t kBlock = 16;
  const T* typed = static_cast<const T*>(e);
  for (int64_t j = 0; j < n; j += kBlock) {
    const int64_t width = n - j < kBlock ? n - j : kBlock;
    float block[kBlock][kBlock] = {};
    for (int64_t i = 0; i < rows; ++i) {
      const Vf times = set(factor[i]);
      for (int64_t v = 0; v < width; v += W) {
        const int count = static_cast<int>(width - v < W ? width - v : W);
        store(&block[i][v], load_some(typed + i * stride + j + v, count, 0.f) * times);
      }
    }
    for (int64_t v = 0; v < width; ++v) {
      for (int64_t i = 0; i < rows; ++i) out[(j + v) * out_stride + i] = block[i][v];
    }
  }
}

static void scale_row_dispatch(Type type, const void* e, int64_t n, float factor, float* out) {
  if (type == Type::float32) scale_row<float>(e, n, factor, out);
  if (type == Type::bfloat16) scale_row<BFloat16>(e, n, factor, out);
  if (type == Type::float16) scale_row<Half>(e, n, factor, out);
}

static void scale_transposed_dispatch(Type type, const void* e, int64_t stride, int64_t rows, int64_t n, const float* factor,
                                      float* out, int64_t out_stride) {
  if (type == Type::float32) scale_transposed<float>(e, stride, rows, n, factor, out, out_stride);
  if (type == Type::bfloat16) scale_transposed<BFloat16>(e, stride, rows, n, factor, out, out_stride);
  if (type == Type::float16) scale_transposed<Half>(e, stride, rows, n, factor, out, out_stride);
}

// out += value w, [n].
template <class T>
static void add_scaled(const void* w, int64_t n, float value, float* out) {
  const T* typed = static_cast<const T*>(w);
  const Vf times = set(value);
  each_vector(n, [&](int64_t i, int count) __attribute__((always_inline)) {
    store_some(out + i, fma(load_some(typed + i, count, 0.f), times, load_some(out + i, count, 0.f)), count);
  });
}

static void add_scaled_dispatch(Type type, const void* w, int64_t n, float value, float* out) {
  if (type == Type::float32) add_scaled<float>(w, n, value, out);
  if (type == Type::bfloat16) add_scaled<BFloat16>(w, n, value, out);
  if (type == Type::float16) add_scaled<Half>(w, n, value, out);
}

}  // namespace fastpo::FASTPO_ISA
