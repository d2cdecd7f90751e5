// Parts of a matrix product, each in the cache that it is meant for. Compiled once per instruction set, see
// simd_targets.h.
//
// The plan is Goto's (Goto and van de Geijn, Anatomy of high-performance matrix multiplication, ACM TOMS 2008): a tile of
// kTileRows x kTileColumns of the result stays in registers while the depth runs; its operands were packed before, in the
// order in which they are read:
//
//   left   panels of kTileRows rows: [panels, depth, kTileRows]
//   right  panels of kTileColumns columns: [panels, depth, kTileColumns]
//
// The left one is read where it lies if that is as fast. Edges are filled with zeros. Each element of the result is one sum
// over the depth in order, whoever computes it.

namespace fastpo::FASTPO_ISA {

// As many sums as leave registers for two vectors of the right operand and one element of the left one.
constexpr int kTileRows = FASTPO_SIMD_BITS == 512 ? 14 : FASTPO_SIMD_BITS == 256 ? 6 : 4;
constexpr int kTileVectors = 2;
constexpr int kTileColumns = kTileVectors * W;
constexpr int kSpill = (W - 1) / kTileRows;

// x[i] becomes lane i of the vectors: a W x W transposition.
#if FASTPO_SIMD_BITS == 512
FASTPO_INLINE Vf low_pairs(Vf a, Vf b) {
  return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}
FASTPO_INLINE Vf high_pairs(Vf a, Vf b) {
  return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}
FASTPO_INLINE void transpose(Vf (&x)[W]) {
  Vf t[W];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    x[i] = low_pairs(t[i], t[i + 2]);
    x[i + 1] = high_pairs(t[i], t[i + 2]);
    x[i + 2] = low_pairs(t[i + 1], t[i + 3]);
    x[i + 3] = high_pairs(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    const Vf even = _mm512_shuffle_f32x4(x[i], x[i + 4], 0x88), even2 = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0x88);
    const Vf odd = _mm512_shuffle_f32x4(x[i], x[i + 4], 0xdd), odd2 = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0xdd);
    t[i] = _mm512_shuffle_f32x4(even, even2, 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(odd, odd2, 0x88);
    t[i + 8] = _mm512_shuffle_f32x4(even, even2, 0xdd);
    t[i + 12] = _mm512_shuffle_f32x4(odd, odd2, 0xdd);
  }
  for (int i = 0; i < 16; ++i) x[i] = t[i];
}
#else
FASTPO_INLINE void transpose(Vf (&x)[W]) {
  float lanes[W][W];
  for (int i = 0; i < W; ++i) store(lanes[i], x[i]);
  for (int i = 0; i < W; ++i) {
    float column[W];
    for (int j = 0; j < W; ++j) column[j] = lanes[j][i];
    x[i] = load(column);
  }
}
#endif

constexpr int64_t kFar = 16;  // lines ahead that are fetched: no processor guesses them where each is in another page

template <class T>
FASTPO_INLINE Vf load_up_to(const T* p, int64_t count) {
  return count >= W ? load(p) : load_n(p, static_cast<int>(count), 0.f);
}

// Packs lines [count <= W, n] that lie stride apart, each with its elements side by side: their t-th elements go to
// to + t step, W of them, zeros behind the last line. Stores of a smaller step overlap: the next one puts it right.
template <class T>
FASTPO_INLINE void pack_across(const T* lines, int64_t stride, int count, int64_t n, float* to, int64_t step) {
  for (int64_t t = 0; t < n; t += W) {
    Vf block[W];
    for (int i = 0; i < W; ++i) block[i] = i < count ? load_up_to(lines + i * stride + t, n - t) : set(0.f);
    transpose(block);
    const int64_t width = n - t < W ? n - t : W;
    for (int64_t i = 0; i < width; ++i) store(to + (t + i) * step, block[i]);
  }
}

// Packs rows [rows, depth] of the left operand, which has so many (readable) from there on. Whole vectors are read and
// written where there are: of rows behind the last, and W - kTileRows floats behind the result.
template <class T>
static void pack_left_of(const T* a, int64_t row, int64_t column, int64_t rows, int64_t readable, int64_t depth,
                         float* to) {
  if (column == 1) {
    for (int64_t first = 0; first < rows; first += kTileRows) {
      const int count = static_cast<int>(rows - first < kTileRows ? rows - first : kTileRows);
      pack_across(a + first * row, row, count, depth, to + first * depth, kTileRows);
    }
    return;
  }
  // What is read lies side by side over all panels. A vector reaches into the next step of its panel, which then
  // overwrites that; the last step must not reach into the next panel.
  for (int64_t t = 0; t < depth; ++t) {
    const T* const line = a + t * column;
    for (int64_t first = 0; first < rows; first += kTileRows) {
      __builtin_prefetch(line + kFar * column + first);
      const Vf x = load_up_to(line + first, readable - first);
      float* const at = to + first * depth + t * kTileRows;
      if (t + kSpill < depth || first + kTileRows >= rows) {
        store(at, x);
      } else {
        store_n(at, x, kTileRows);
      }
    }
  }
}

// Packs columns [depth, columns] of the right operand into panels that lie panel floats apart.
template <class T>
static void pack_right_of(const T* b, int64_t row, int64_t column, int64_t columns, int64_t depth, float* to,
                          int64_t panel) {
  if (column != 1) {
    for (int64_t first = 0; first < columns; first += W) {
      const int count = static_cast<int>(columns - first < W ? columns - first : W);
      float* const at = to + first / kTileColumns * panel + first % kTileColumns;
      pack_across(b + first * column, column, count, depth, at, kTileColumns);
    }
  } else {
    for (int64_t t = 0; t < depth; ++t) {
      for (int64_t first = 0; first < columns; first += W) {
        float* const at = to + first / kTileColumns * panel + first % kTileColumns;
        __builtin_prefetch(b + (t + kFar) * row + first);
        store(at + t * kTileColumns, load_up_to(b + t * row + first, columns - first));
      }
    }
  }
  for (int64_t first = (columns + W - 1) / W * W; first % kTileColumns != 0; first += W) {
    float* const at = to + first / kTileColumns * panel + first % kTileColumns;
    for (int64_t t = 0; t < depth; ++t) store(at + t * kTileColumns, set(0.f));
  }
}

static void pack_left(const Matrix& a, int64_t rows, int64_t readable, int64_t depth, float* to) {
  switch (a.type) {
    case Type::float32:
      return pack_left_of(static_cast<const float*>(a.data), a.row, a.column, rows, readable, depth, to);
    case Type::bfloat16:
      return pack_left_of(static_cast<const BFloat16*>(a.data), a.row, a.column, rows, readable, depth, to);
    case Type::float16:
      return pack_left_of(static_cast<const Half*>(a.data), a.row, a.column, rows, readable, depth, to);
  }
}

static void pack_right(const Matrix& b, int64_t columns, int64_t depth, float* to, int64_t panel) {
  switch (b.type) {
    case Type::float32:
      return pack_right_of(static_cast<const float*>(b.data), b.row, b.column, columns, depth, to, panel);
    case Type::bfloat16:
      return pack_right_of(static_cast<const BFloat16*>(b.data), b.row, b.column, columns, depth, to, panel);
    case Type::float16:
      return pack_right_of(static_cast<const Half*>(b.data), b.row, b.column, columns, depth, to, panel);
  }
}

// Aligned to the vector. Without reading the line first; a locked instruction of the thread makes it seen by others.
FASTPO_INLINE void store_past_cache(float* p, Vf x) {
#if FASTPO_SIMD_BITS == 512
  _mm512_stream_ps(p, x);
#elif FASTPO_SIMD_BITS == 256
  _mm256_stream_ps(p, x);
#else
  store(p, x);
#endif
}

constexpr int64_t kAhead = 48;  // steps before its end at which a tile's place is brought into the cache

// One tile of the result, whole; left packed, or rows that lie left_row floats apart.
template <Into INTO, bool PACKED>
static void multiply_tile(const float* left, int64_t left_row, const float* right, int64_t depth, const Target& c) {
  Vf sum[kTileRows][kTileVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
    for (int p = 0; p < kTileVectors; ++p) sum[i][p] = set(0.f);
  }
  const auto multiply_add = [&](int64_t steps) __attribute__((always_inline)) {
    for (int64_t t = 0; t < steps; ++t, left += PACKED ? kTileRows : 1, right += kTileColumns) {
      Vf b[kTileVectors];
#pragma GCC unroll 4
      for (int p = 0; p < kTileVectors; ++p) {
        __builtin_prefetch(right + 8 * kTileColumns + p * W);
        b[p] = load(right + p * W);
      }
#pragma GCC unroll 16
      for (int i = 0; i < kTileRows; ++i) {
        const Vf a = set(left[PACKED ? i : i * left_row]);
#pragma GCC unroll 4
        for (int p = 0; p < kTileVectors; ++p) sum[i][p] = fma(a, b[p], sum[i][p]);
      }
    }
  };
  const int64_t last = depth < kAhead ? depth : kAhead;
  multiply_add(depth - last);
  for (int i = 0; i < kTileRows / 2 && INTO != Into::stream; ++i) {
    for (int p = 0; p < kTileVectors; ++p) __builtin_prefetch(c.data + i * c.row + p * W, 1);
  }
  multiply_add(last);
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; ++i) {
    float* const to = c.data + i * c.row;
#pragma GCC unroll 4
    for (int p = 0; p < kTileVectors; ++p) {
      Vf value = sum[i][p];
      if constexpr (INTO == Into::add) value = load(to + p * W) + value;
      if constexpr (INTO == Into::decayed) value = fma(load(to + p * W), set(c.decay[i]), value);
      INTO == Into::stream ? store_past_cache(to + p * W, value) : store(to + p * W, value);
    }
  }
}

FASTPO_INLINE float fma_of(float a, float b, float c) {
  float lanes[W];
  store(lanes, fma(set(a), set(b), set(c)));
  return lanes[0];
}

// One at the edge, [rows, columns]: by way of a whole one.
template <Into INTO, bool PACKED>
static void multiply_edge(const float* left, int64_t left_row, const float* right, int64_t depth, const Target& c,
                          int64_t rows, int64_t columns) {
  float tile[kTileRows * kTileColumns];
  multiply_tile<Into::write, PACKED>(left, left_row, right, depth, {tile, kTileColumns, nullptr, Into::write});
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      float& to = c.data[i * c.row + j];
      const float value = tile[i * kTileColumns + j];
      to = INTO == Into::add ? to + value : INTO == Into::decayed ? fma_of(to, c.decay[i], value) : value;
    }
  }
}

// Left [rows, depth] times packed right [depth, columns], whose panels lie right_panel floats apart.
template <Into INTO, bool PACKED>
static void multiply_block_of(const Left& left, const float* right, int64_t right_panel, int64_t depth, int64_t rows,
                              int64_t columns, const Target& c) {
  for (int64_t j = 0; j < columns; j += kTileColumns, right += right_panel) {
    for (int64_t i = 0; i < rows; i += kTileRows) {
      const float* const panel = left.data + i * (PACKED ? depth : left.row);
      if (rows - i >= kTileRows && columns - j >= kTileColumns) {
        multiply_tile<INTO, PACKED>(panel, left.row, right, depth, c.at(i, j));
        continue;
      }
      const int64_t height = rows - i < kTileRows ? rows - i : kTileRows;
      const int64_t width = columns - j < kTileColumns ? columns - j : kTileColumns;
      multiply_edge<INTO, PACKED>(panel, left.row, right, depth, c.at(i, j), height, width);
    }
  }
}

template <Into INTO>
static void multiply_block_into(const Left& left, const float* right, int64_t right_panel, int64_t depth, int64_t rows,
                                int64_t columns, const Target& c) {
  if (left.row == 0) return multiply_block_of<INTO, true>(left, right, right_panel, depth, rows, columns, c);
  multiply_block_of<INTO, false>(left, right, right_panel, depth, rows, columns, c);
}

static void multiply_block(const Left& left, const float* right, int64_t right_panel, int64_t depth, int64_t rows,
                           int64_t columns, const Target& c) {
  switch (c.into) {
    case Into::write:
      return multiply_block_into<Into::write>(left, right, right_panel, depth, rows, columns, c);
    case Into::stream:
      return multiply_block_into<Into::stream>(left, right, right_panel, depth, rows, columns, c);
    case Into::add:
      return multiply_block_into<Into::add>(left, right, right_panel, depth, rows, columns, c);
    case Into::decayed:
      return multiply_block_into<Into::decayed>(left, right, right_panel, depth, rows, columns, c);
  }
}

}  // namespace fastpo::FASTPO_ISA
