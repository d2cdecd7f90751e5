// Vector kernels of linear_token_logprobs on one tile of logits. Compiled once per instruction set, see simd_targets.h.

namespace fastpo::FASTPO_ISA {

// y = softcap(scale (z + bias)) of W logits.
template <bool CAPPED>
struct Transform {
  Vf scale, cap, inverse_cap;
  explicit Transform(const TileHead& head)
      : scale(set(head.scale)), cap(set(head.softcap)), inverse_cap(set(CAPPED ? 1.f / head.softcap : 0.f)) {}
  inline __attribute__((always_inline)) Vf operator()(Vf z, Vf bias) const {
    const Vf x = (z + bias) * scale;
    return CAPPED ? tanh(x * inverse_cap) * cap : x;
  }
  // value times dy/dx, from y; dx/dz, the scale, is left to the row's factor.
  inline __attribute__((always_inline)) Vf sloped(Vf value, Vf y) const {
    if constexpr (!CAPPED) return value;
    const Vf t = y * inverse_cap;
    return value * ((set(1.f) - t) * (set(1.f) + t));
  }
};

// Calls visit(offset, lane, count) for every vector of n elements, lane being one of four in turn, count < W in the last
// where n is no multiple.
template <class F>
FASTPO_INLINE void each_vector(int64_t n, const F& visit) {
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    visit(i, 0, W);
    visit(i + W, 1, W);
    visit(i + 2 * W, 2, W);
    visit(i + 3 * W, 3, W);
  }
  for (; i + W <= n; i += W) visit(i, 0, W);
  if (i < n) visit(i, 0, static_cast<int>(n - i));
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

// Inserts the lanes of y that are named by bits, where they are larger than the k-th largest so far.
static void insert_largest(float* top, int k, Vf y, uint32_t bits) {
  float lanes[W];
  store(lanes, y);
  for (; bits != 0; bits &= bits - 1) {
    const float value = lanes[__builtin_ctz(bits)];
    if (!(value > top[k - 1])) continue;
    int at = k - 1;
    for (; at > 0 && value > top[at - 1]; --at) top[at] = top[at - 1];
    top[at] = value;
  }
}

// Makes y of z [n] in place.
template <bool CAPPED>
static void transform_with(float* z, int64_t n, const TileHead& head) {
  const Transform<CAPPED> transform(head);
  each_vector(n, [&](int64_t i, int, int count) __attribute__((always_inline)) {
    const Vf bias = head.bias == nullptr ? set(0.f) : load_some(head.bias + i, count, 0.f);
    store_some(z + i, transform(load_some(z + i, count, 0.f), bias), count);
  });
}

// The same, where there is anything to do, and the largest y, NaN passed over. top: the k largest so far, updated.
static float transform_row(float* z, int64_t n, const TileHead& head, float* top, int k) {
  if (head.softcap != 0.f) {
    transform_with<true>(z, n, head);
  } else if (head.scale != 1.f || head.bias != nullptr) {
    transform_with<false>(z, n, head);
  }
  Vf largest[4];
  for (Vf& part : largest) part = set(-__builtin_inff());
  each_vector(n, [&](int64_t i, int lane, int count) __attribute__((always_inline)) {
    largest[lane] = max(load_some(z + i, count, -__builtin_inff()), largest[lane]);
  });
  const float highest = reduce_max(max(max(largest[0], largest[1]), max(largest[2], largest[3])));
  if (k > 0 && highest > top[k - 1]) {
    Vf kth = set(top[k - 1]);
    each_vector(n, [&](int64_t i, int, int count) __attribute__((always_inline)) {
      const Vf y = load_some(z + i, count, -__builtin_inff());
      const uint32_t bits = greater(y, kth);
      if (bits == 0) return;
      insert_largest(top, k, y, bits);
      kth = set(top[k - 1]);
    });
  }
  return highest;
}

// Adds the sums of e^t over y [n], t = (y - m) inverse_temperature; with OUT, e^t dy/dx takes the place of y.
template <bool CAPPED, bool MOMENTS, bool OUT>
static void exp_row(float* y, int64_t n, const TileHead& head, float m, float inverse_temperature, double* sums) {
  const Transform<CAPPED> transform(head);
  const Vf largest = set(m), scale = set(inverse_temperature);
  Vf sum[4] = {}, sum_t[4] = {}, sum_squares[4] = {};
  each_vector(n, [&](int64_t i, int lane, int count) __attribute__((always_inline)) {
    const Vf value = load_some(y + i, count, 0.f);
    const Vf t = max(set(-104.f), (value - largest) * scale);  // e^-104 is 0; t stays finite for t e^t
    Vf e = exp(t);
    if (count < W) e = first_n(e, count);
    sum[lane] = sum[lane] + e;
    if constexpr (MOMENTS) {
      sum_t[lane] = fma(t, e, sum_t[lane]);
      sum_squares[lane] = fma(e, e, sum_squares[lane]);
    }
    if constexpr (OUT) store_some(y + i, transform.sloped(e, value), count);
  });
  sums[0] += reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
  if constexpr (MOMENTS) {
    sums[1] += reduce_add((sum_t[0] + sum_t[1]) + (sum_t[2] + sum_t[3]));
    sums[2] += reduce_add((sum_squares[0] + sum_squares[1]) + (sum_squares[2] + sum_squares[3]));
  }
}

using ExpRow = void (*)(float*, int64_t, const TileHead&, float, float, double*);

static ExpRow exp_row_kernel(bool out, bool capped, bool moments) {
  if (!out) return moments ? exp_row<false, true, false> : exp_row<false, false, false>;
  if (capped) return moments ? exp_row<true, true, true> : exp_row<true, false, true>;
  return moments ? exp_row<false, true, true> : exp_row<false, false, true>;
}

// dL/dz in place of z [n], logits of a row.
template <bool CAPPED>
static void gradient_row(float* z, int64_t n, const TileHead& head, const TileRows& rows, int64_t row) {
  const Transform<CAPPED> transform(head);
  const Vf inverse_temperature = set(rows.inverse_temperature[row]);
  const Vf centre = set(rows.centre[row]), rest = set(rows.rest[row]);
  const Vf a = set(rows.coefs[row]), b = set(rows.coefs[rows.stride + row]), c = set(rows.coefs[2 * rows.stride + row]);
  each_vector(n, [&](int64_t i, int, int count) __attribute__((always_inline)) {
    const Vf bias = head.bias == nullptr ? set(0.f) : load_some(head.bias + i, count, 0.f);
    const Vf y = transform(load_some(z + i, count, 0.f), bias);
    const Vf t = max(set(-1e4f), (y - centre) * inverse_temperature);  // t stays finite for p t
    const Vf p = exp(t - rest);
    const Vf polynomial = fma(c, p, fma(b, t, a));
    store_some(z + i, transform.sloped(inverse_temperature * transform.scale * p * polynomial, y), count);
  });
}

// out [n] = e, in a narrower type.
template <class T>
static void narrow_row(const float* e, int64_t n, void* out) {
  T* typed = static_cast<T*>(out);
  each_vector(n, [&](int64_t j, int, int count) __attribute__((always_inline)) {
    store_some(typed + j, load_some(e + j, count, 0.f), count);
  });
}

using NarrowRow = void (*)(const float*, int64_t, void*);

static NarrowRow narrow_row_kernel(Type type) {
  return type == Type::float32 ? narrow_row<float> : type == Type::bfloat16 ? narrow_row<BFloat16> : narrow_row<Half>;
}

// out = factor e, [n]; out may be e.
static void scale_row(const float* e, int64_t n, float factor, float* out) {
  const Vf times = set(factor);
  each_vector(n, [&](int64_t i, int, int count) __attribute__((always_inline)) {
    store_some(out + i, load_some(e + i, count, 0.f) * times, count);
  });
}

// out += value w, [n].
template <class T>
static void add_scaled(const void* w, int64_t n, float value, float* out) {
  const T* typed = static_cast<const T*>(w);
  const Vf times = set(value);
  each_vector(n, [&](int64_t i, int, int count) __attribute__((always_inline)) {
    store_some(out + i, fma(load_some(typed + i, count, 0.f), times, load_some(out + i, count, 0.f)), count);
  });
}

static void add_scaled_dispatch(Type type, const void* w, int64_t n, float value, float* out) {
  if (type == Type::float32) add_scaled<float>(w, n, value, out);
  if (type == Type::bfloat16) add_scaled<BFloat16>(w, n, value, out);
  if (type == Type::float16) add_scaled<Half>(w, n, value, out);
}

}  // namespace fastpo::FASTPO_ISA
