// Products of small matrices, and what brings rows into the shape that they want. tree_attention_kernel.h includes it once
// for each instruction set, hence no include guard.

namespace fastpo::FASTPO_ISA {

constexpr int kRows = 6;                                   // rows of C in registers
constexpr int kVectors = FASTPO_SIMD_BITS == 512 ? 4 : 2;  // vectors of C in a row

FASTPO_INLINE int64_t rounded_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
FASTPO_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
FASTPO_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// An operand of which one element goes to all lanes: a[i row + t step].
struct Left {
  const float* data;
  int64_t row, step;
};
// An operand of vectors: b[t step + p panel] and the W - 1 behind it.
struct Right {
  const float* data;
  int64_t step, panel;
};

// c[i, p] = sum_t a[i, t] b[t, p], or += with ADD; R rows, P vectors. The sum is taken apart from what it is added to:
// a key that a thousand tokens see has fewer roundings at its full size.
template <int R, int P, bool ADD>
FASTPO_INLINE void multiply_tile(Left a, Right b, int64_t n, float* c, int64_t c_row) {
  Vf sum[R][P];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) sum[i][p] = set(0.f);
  }
  for (int64_t t = 0; t < n; ++t) {
    Vf right[P];
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) right[p] = load(b.data + t * b.step + p * b.panel);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const Vf left = set(a.data[i * a.row + t * a.step]);
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) sum[i][p] = fma(left, right[p], sum[i][p]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      float* const to = c + i * c_row + p * W;
      store(to, ADD ? load(to) + sum[i][p] : sum[i][p]);
    }
  }
}

template <int P, bool ADD>
static void multiply_panels(int64_t rows, Left a, Right b, int64_t n, float* c, int64_t c_row) {
  switch (rows) {
    case 1:
      return multiply_tile<1, P, ADD>(a, b, n, c, c_row);
    case 2:
      return multiply_tile<2, P, ADD>(a, b, n, c, c_row);
    case 3:
      return multiply_tile<3, P, ADD>(a, b, n, c, c_row);
    case 4:
      return multiply_tile<4, P, ADD>(a, b, n, c, c_row);
    case 5:
      return multiply_tile<5, P, ADD>(a, b, n, c, c_row);
    default:
      return multiply_tile<6, P, ADD>(a, b, n, c, c_row);
  }
}

// The same for 1 to kRows rows and any number of vectors.
template <bool ADD>
static void multiply(int64_t rows, int64_t vectors, Left a, Right b, int64_t n, float* c, int64_t c_row) {
  int64_t p = 0;
  const auto from = [&](int64_t at) { return Right{b.data + at * b.panel, b.step, b.panel}; };
  for (; p + kVectors <= vectors; p += kVectors) multiply_panels<kVectors, ADD>(rows, a, from(p), n, c + p * W, c_row);
  if (kVectors > 2 && p + 2 <= vectors) {
    multiply_panels<2, ADD>(rows, a, from(p), n, c + p * W, c_row);
    p += 2;
  }
  for (; p < vectors; ++p) multiply_panels<1, ADD>(rows, a, from(p), n, c + p * W, c_row);
}

FASTPO_INLINE float largest_lane(Vf x) {
#if FASTPO_SIMD_BITS == 512
  return _mm512_reduce_max_ps(x);
#else
  return reduce_max(x);
#endif
}

#define FASTPO_REPEAT(x) x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x
alignas(64) static const float kEdge[48] = {FASTPO_REPEAT(-__builtin_inff()), FASTPO_REPEAT(__builtin_inff()),
                                            FASTPO_REPEAT(-__builtin_inff())};
#undef FASTPO_REPEAT

// Lanes lo <= lane < hi of x, -inf (also in place of NaN) in the others.
FASTPO_INLINE Vf lanes_between(Vf x, int64_t lo, int64_t hi) {
  const Vf from = load(kEdge + 16 - least(W, most(0, lo))), to = load(kEdge + 32 - least(W, most(0, hi)));
  return min(x, min(from, to));
}

// factor x[size] as floats, 0 behind them up to a whole vector.
template <class T>
static void copy_as_float(const T* x, int64_t size, float factor, float* to) {
  int64_t d = 0;
  for (; d + W <= size; d += W) store(to + d, load(x + d) * set(factor));
  if (d < size) store(to + d, load_n(x + d, static_cast<int>(size - d), 0.f) * set(factor));
}
static void load_row(Type type, const char* x, int64_t size, float factor, float* to) {
  switch (type) {
    case Type::float32:
      return copy_as_float(reinterpret_cast<const float*>(x), size, factor, to);
    case Type::bfloat16:
      return copy_as_float(reinterpret_cast<const BFloat16*>(x), size, factor, to);
    default:
      return copy_as_float(reinterpret_cast<const Half*>(x), size, factor, to);
  }
}

template <class T>
static void copy_from_float(const float* x, int64_t size, float factor, T* to) {
  int64_t d = 0;
  for (; d + W <= size; d += W) store(to + d, load(x + d) * set(factor));
  if (d < size) store_n(to + d, load(x + d) * set(factor), static_cast<int>(size - d));
}
static void store_row(Type type, const float* x, int64_t size, float factor, char* to) {
  switch (type) {
    case Type::float32:
      return copy_from_float(x, size, factor, reinterpret_cast<float*>(to));
    case Type::bfloat16:
      return copy_from_float(x, size, factor, reinterpret_cast<BFloat16*>(to));
    default:
      return copy_from_float(x, size, factor, reinterpret_cast<Half*>(to));
  }
}

// Four numbers of each of W rows, as four vectors of W.
FASTPO_INLINE void transpose_quads(const float* rows, int64_t stride, float* to) {
#if FASTPO_SIMD_BITS >= 256
  Vf quad[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const auto of = [&](int row) { return _mm_loadu_ps(rows + (row + i) * stride); };
#if FASTPO_SIMD_BITS == 512
    quad[i] = _mm512_insertf32x4(_mm512_castps128_ps512(of(0)), of(4), 1);
    quad[i] = _mm512_insertf32x4(_mm512_insertf32x4(quad[i], of(8), 2), of(12), 3);
#else
    quad[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(of(0)), of(4), 1);
#endif
  }
#if FASTPO_SIMD_BITS == 512
#define FASTPO_VECTOR(op) _mm512_##op
#else
#define FASTPO_VECTOR(op) _mm256_##op
#endif
  const Vf low0 = FASTPO_VECTOR(unpacklo_ps)(quad[0], quad[1]), low1 = FASTPO_VECTOR(unpacklo_ps)(quad[2], quad[3]);
  const Vf high0 = FASTPO_VECTOR(unpackhi_ps)(quad[0], quad[1]), high1 = FASTPO_VECTOR(unpackhi_ps)(quad[2], quad[3]);
  store(to, FASTPO_VECTOR(shuffle_ps)(low0, low1, 0x44));
  store(to + W, FASTPO_VECTOR(shuffle_ps)(low0, low1, 0xee));
  store(to + 2 * W, FASTPO_VECTOR(shuffle_ps)(high0, high1, 0x44));
  store(to + 3 * W, FASTPO_VECTOR(shuffle_ps)(high0, high1, 0xee));
#undef FASTPO_VECTOR
#else
  for (int d = 0; d < 4; ++d) {
    for (int row = 0; row < W; ++row) to[d * W + row] = rows[row * stride + d];
  }
#endif
}

// Rows [slots, width] of a path, also as panels [slots / W, height, W]: ready for products with rows of Q. Slots
// [first, last) are new.
FASTPO_INLINE void to_panels(const float* rows, int64_t width, int64_t height, int64_t first, int64_t last,
                             float* panels) {
  for (int64_t slot = first / W * W; slot < last; slot += W) {
    for (int64_t d = 0; d < height; d += 4) {
      transpose_quads(rows + slot * width + d, width, panels + slot * height + d * W);
    }
  }
}

}  // namespace fastpo::FASTPO_ISA
