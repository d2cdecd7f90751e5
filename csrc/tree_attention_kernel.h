// Vector kernels of tree_attention: a walk over a piece of the preorder with the current root path on a stack, so that
// what a token sees lies in consecutive slots 0 .. depth. Compiled once per instruction set, see simd_targets.h.

#include "tree_attention_products.h"

namespace fastpo::FASTPO_ISA {

constexpr int64_t kBlock = 256;           // slots that a tile of scores spans
constexpr int64_t kStride = kBlock + 16;  // of its rows: not a power of two, which would share cache sets

// Which slots [lo, hi) of a block that begins at slot b0 and has n a token of some depth sees.
struct Seen {
  int64_t lo, hi;
  static inline __attribute__((always_inline)) Seen of(const Attention& a, int64_t depth, int64_t b0, int64_t n) {
    const int64_t lo = a.window != 0 ? most(0, depth - a.window + 1 - b0) : 0;
    return {lo, most(0, least(n, depth + 1 - b0))};
  }
};

// Rows of a tile that see the slots of a block: tokens [first, last), and the block [b0, b1), b0 at a whole vector.
struct Region {
  const Attention& a;
  int64_t tile, first, last, b0, b1;

  int64_t rows() const { return (last - first) * a.group; }
  int64_t first_row() const { return (first - tile) * a.group; }
  int64_t depth(int64_t row) const { return a.depth[first + a.token(row)]; }
  Seen seen(int64_t row) const { return Seen::of(a, depth(row), b0, b1 - b0); }
  // Of kRows rows from row on: how many, and the columns that any of them sees.
  int64_t count(int64_t row) const { return least(kRows, rows() - row); }
  int64_t columns(int64_t row) const { return seen(row + count(row) - 1).hi; }
};

template <class Body>
static void blocks(Body& body, const Attention& a, int64_t tile, int64_t first, int64_t last, int64_t s0, int64_t s1) {
  for (int64_t b0 = s0; b0 < s1; b0 += kBlock) body.block(Region{a, tile, first, last, b0, least(s1, b0 + kBlock)});
}

FASTPO_INLINE int64_t first_slot(const Attention& a, int64_t depth) {
  return a.window != 0 ? most(0, depth - a.window + 1) / W * W : 0;
}

// Tokens [t, last) in tiles. All tokens of a tile share the slots below the lowest branch in it: those come first, all
// rows at once. Then each run of a chain takes its place on the stack and sees the slots from there on.
template <class Body>
static void walk(Body& body, const Attention& a, const Chunk& chunk) {
  const int32_t* const depth = a.depth;
  for (int64_t tile = chunk.first; tile < chunk.last;) {
    const int64_t last = least(chunk.last, tile + a.tile_tokens());
    int64_t common = depth[tile], lowest = depth[tile];
    for (int64_t t = tile + 1; t < last; ++t) {
      if (depth[t] != depth[t - 1] + 1) common = least(common, depth[t]);
      lowest = least(lowest, depth[t]);
    }
    common = common / W * W;
    body.begin(tile, last);
    blocks(body, a, tile, tile, last, first_slot(a, lowest), common);
    for (int64_t run = tile; run < last;) {
      int64_t end = run + 1;
      while (end < last && depth[end] == depth[end - 1] + 1) ++end;
      body.push(run, end);
      blocks(body, a, tile, run, end, most(common, first_slot(a, depth[run])), depth[end - 1] + 1);
      run = end;
    }
    body.end(tile, last);
    tile = last;
  }
}

struct Counter {
  Pairs pairs;
  void begin(int64_t, int64_t) {}
  void push(int64_t, int64_t) {}
  void end(int64_t, int64_t) {}
  void block(const Region& at) {
    for (int64_t row = 0; row < at.rows(); row += kRows) {
      pairs.computed += at.count(row) * rounded_up(at.columns(row), W);
      for (int64_t i = row; i < row + at.count(row); ++i) pairs.visible += most(0, at.seen(i).hi - at.seen(i).lo);
    }
  }
};

static Pairs count_pairs(const Attention& a, const Chunk& chunk) {
  Counter counter;
  walk(counter, a, chunk);
  return counter.pairs;
}

// Where pieces of a thread's memory lie; sizes in floats.
struct Arena {
  float* next;
  float* take(int64_t floats) {
    float* const piece = next;
    next += rounded_up(floats, 16);
    return piece;
  }
};

struct Forward {
  const Attention& a;
  int64_t head, width, height;  // D up to a whole vector, and to a multiple of 4
  float *k_panels, *k_rows, *v_rows, *q, *scores, *out, *largest, *sums;

  Forward(const Attention& a, int64_t head, Arena arena)
      : a(a), head(head), width(rounded_up(a.size, W)), height(rounded_up(a.size, 4)) {
    const int64_t slots = rounded_up(a.slots, W), rows = a.tile_tokens() * a.group;
    k_panels = arena.take(slots * height);
    k_rows = arena.take(slots * width);
    v_rows = arena.take(slots * width);
    q = arena.take(rows * width);
    scores = arena.take(rows * kStride);
    out = arena.take(rows * width);
    largest = arena.take(rows);
    sums = arena.take(rows);
  }

  static int64_t floats(const Attention& a) {
    const int64_t slots = rounded_up(a.slots, W), rows = a.tile_tokens() * a.group, width = rounded_up(a.size, W);
    return 3 * slots * width + rows * (2 * width + kStride + 2) + 16 * 8;
  }

  void load_slot(int64_t token, int64_t slot) {
    load_row(a.type, a.k.at(token, head), a.size, 1.f, k_rows + slot * width);
    load_row(a.type, a.v.at(token, head), a.size, 1.f, v_rows + slot * width);
  }
  void start(const Chunk& chunk) {
    const int64_t slots = a.depth[chunk.first];
    for (int64_t slot = 0; slot < slots; ++slot) load_slot(chunk.path[slot], slot);
    to_panels(k_rows, width, height, 0, slots, k_panels);
  }
  void push(int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) load_slot(t, a.depth[t]);
    to_panels(k_rows, width, height, a.depth[first], a.depth[last - 1] + 1, k_panels);
  }

  void begin(int64_t first, int64_t last) {
    for (int64_t row = 0; row < (last - first) * a.group; ++row) {
      const int64_t of = head * a.group + a.member(row);
      load_row(a.type, a.q.at(first + a.token(row), of), a.size, a.scale, q + row * width);
      largest[row] = a.sinks != nullptr ? a.sinks[of] : -__builtin_inff();
      sums[row] = a.sinks != nullptr ? 1.f : 0.f;
      for (int64_t d = 0; d < width; d += W) store(out + row * width + d, set(0.f));
    }
  }

  void block(const Region& at) {
    const int64_t from = at.first_row();
    for (int64_t row = 0; row < at.rows(); row += kRows) {
      const int64_t count = at.count(row), columns = at.columns(row);
      float* const s = scores + (from + row) * kStride;
      const Left rows{q + (from + row) * width, width, 1};
      const Right keys{k_panels + at.b0 * height, W, height * W};
      multiply<false>(count, rounded_up(columns, W) / W, rows, keys, a.size, s, kStride);
      for (int64_t i = 0; i < count; ++i) {
        if (a.softcap != 0.f) {
          soften<true>(from + row + i, at.seen(row + i), columns);
        } else {
          soften<false>(from + row + i, at.seen(row + i), columns);
        }
      }
      const Right values{v_rows + at.b0 * width, width, W};
      multiply<true>(count, width / W, Left{s, kStride, 1}, values, columns, out + (from + row) * width, width);
    }
  }

  // exp(score - largest so far) in place of the scores of a row, and what goes with it.
  template <bool CAPPED>
  void soften(int64_t row, Seen seen, int64_t columns) {
    float* const s = scores + row * kStride;
    const Vf cap = set(a.softcap), inverse_cap = set(CAPPED ? 1.f / a.softcap : 0.f);
    Vf top = set(-__builtin_inff());
    for (int64_t j = 0; j < columns; j += W) {
      Vf x = load(s + j);
      if constexpr (CAPPED) x = cap * tanh(max(set(-20.f), min(set(20.f), x * inverse_cap)));
      if (j < seen.lo || j + W > seen.hi) x = lanes_between(x, seen.lo - j, seen.hi - j);
      if (CAPPED || j < seen.lo || j + W > seen.hi) store(s + j, x);
      top = max(x, top);
    }
    const float before = largest[row], found = largest_lane(top);
    const float m = found > before ? found : before;
    const float reference = m == -__builtin_inff() ? 0.f : m;
    const Rate rate(1);
    Vf sum = set(0.f);
    for (int64_t j = 0; j < columns; j += W) {
      const Vf e = exp_rate(max(rate.lowest, load(s + j) - set(reference)), rate);
      store(s + j, e);
      sum = sum + e;
    }
    float total = reduce_add(sum);
    if (m != before) {
      float decay[W];
      store(decay, exp_rate(max(rate.lowest, set(before - reference)), rate));
      sums[row] *= decay[0];
      for (int64_t d = 0; d < width; d += W) store(out + row * width + d, load(out + row * width + d) * set(decay[0]));
      largest[row] = m;
    }
    sums[row] += total;
  }

  void end(int64_t first, int64_t last) {
    for (int64_t row = 0; row < (last - first) * a.group; ++row) {
      const int64_t of = head * a.group + a.member(row), token = first + a.token(row);
      store_row(a.type, out + row * width, a.size, 1.f / sums[row], a.out.at(token, of));
      a.logsumexp[of * a.tokens + token] = largest[row] + __builtin_logf(sums[row]);
    }
  }
};

static void forward_chunk(const Attention& a, int64_t head, const Chunk& chunk, float* memory) {
  Forward body(a, head, Arena{memory});
  body.start(chunk);
  walk(body, a, chunk);
}

struct Backward {
  const Attention& a;
  const Chunk& chunk;
  int64_t head, width, height, filled = 0;  // slots in use
  int32_t* node;                    // [slots] whose they are
  float *k_panels, *v_panels, *k_rows, *v_rows, *grad_k, *grad_v;
  float *q, *g, *p, *ds, *grad_q, *logsumexp, *delta;

  Backward(const Attention& a, const Chunk& chunk, int64_t head, Arena arena)
      : a(a), chunk(chunk), head(head), width(rounded_up(a.size, W)), height(rounded_up(a.size, 4)) {
    const int64_t slots = rounded_up(a.slots, W), rows = a.tile_tokens() * a.group;
    node = reinterpret_cast<int32_t*>(arena.take(slots));
    k_panels = arena.take(slots * height);
    v_panels = arena.take(slots * height);
    k_rows = arena.take(slots * width);
    v_rows = arena.take(slots * width);
    grad_k = arena.take(slots * width);
    grad_v = arena.take(slots * width);
    q = arena.take(rows * width);
    g = arena.take(rows * width);
    grad_q = arena.take(rows * width);
    p = arena.take(rows * kStride);
    ds = arena.take(rows * kStride);
    logsumexp = arena.take(rows);
    delta = arena.take(rows);
  }

  static int64_t floats(const Attention& a) {
    const int64_t slots = rounded_up(a.slots, W), rows = a.tile_tokens() * a.group, width = rounded_up(a.size, W);
    return slots * (6 * width + 1) + rows * (3 * width + 2 * kStride + 2) + 16 * 14;
  }

  void load_slot(int64_t token, int64_t slot) {
    node[slot] = static_cast<int32_t>(token);
    load_row(a.type, a.k.at(token, head), a.size, 1.f, k_rows + slot * width);
    load_row(a.type, a.v.at(token, head), a.size, 1.f, v_rows + slot * width);
    for (int64_t d = 0; d < width; d += W) {
      store(grad_k + slot * width + d, set(0.f));
      store(grad_v + slot * width + d, set(0.f));
    }
  }
  void fill(int64_t first, int64_t last) {
    to_panels(k_rows, width, height, first, last, k_panels);
    to_panels(v_rows, width, height, first, last, v_panels);
    filled = last;
  }
  void start() {
    const int64_t slots = a.depth[chunk.first];
    for (int64_t slot = 0; slot < slots; ++slot) load_slot(chunk.path[slot], slot);
    fill(0, slots);
  }
  void push(int64_t first, int64_t last) {
    flush(a.depth[first]);
    for (int64_t t = first; t < last; ++t) load_slot(t, a.depth[t]);
    fill(a.depth[first], a.depth[last - 1] + 1);
  }

  // The gradients of the slots from here on are complete, as far as this chunk goes.
  void flush(int64_t from) {
    for (int64_t slot = from; slot < filled; ++slot) {
      const int64_t token = node[slot], at = (token * a.kv_heads + head) * a.size;
      const bool own = token >= chunk.first;
      float* const to_k = own ? a.grad_k + at : chunk.partial + slot * 2 * a.size;
      float* const to_v = own ? a.grad_v + at : chunk.partial + (slot * 2 + 1) * a.size;
      copy_from_float(grad_k + slot * width, a.size, 1.f, to_k);
      copy_from_float(grad_v + slot * width, a.size, 1.f, to_v);
    }
    filled = least(filled, from);
  }

  void begin(int64_t first, int64_t last) {
    for (int64_t row = 0; row < (last - first) * a.group; ++row) {
      const int64_t of = head * a.group + a.member(row), token = first + a.token(row);
      load_row(a.type, a.q.at(token, of), a.size, a.scale, q + row * width);
      load_row(a.type, a.grad_out.at(token, of), a.size, 1.f, g + row * width);
      load_row(a.type, a.out.at(token, of), a.size, 1.f, grad_q + row * width);
      Vf sum = set(0.f);
      for (int64_t d = 0; d < width; d += W) {
        sum = fma(load(g + row * width + d), load(grad_q + row * width + d), sum);
        store(grad_q + row * width + d, set(0.f));
      }
      delta[row] = a.delta[of * a.tokens + token] = reduce_add(sum);
      logsumexp[row] = a.logsumexp[of * a.tokens + token];
    }
  }

  void block(const Region& at) {
    const int64_t from = at.first_row(), slots = at.b1 - at.b0;
    const Right keys{k_panels + at.b0 * height, W, height * W}, values{v_panels + at.b0 * height, W, height * W};
    for (int64_t row = 0; row < at.rows(); row += kRows) {
      const int64_t count = at.count(row), columns = at.columns(row), vectors = rounded_up(columns, W) / W;
      const int64_t r = from + row;
      multiply<false>(count, vectors, Left{q + r * width, width, 1}, keys, a.size, p + r * kStride, kStride);
      multiply<false>(count, vectors, Left{g + r * width, width, 1}, values, a.size, ds + r * kStride, kStride);
      for (int64_t i = 0; i < count; ++i) {
        if (a.softcap != 0.f) {
          slopes<true>(r + i, at.seen(row + i), vectors * W, slots);
        } else {
          slopes<false>(r + i, at.seen(row + i), vectors * W, slots);
        }
      }
      const Right rows_of_k{k_rows + at.b0 * width, width, W};
      const Left by_row{ds + r * kStride, kStride, 1};
      multiply<true>(count, width / W, by_row, rows_of_k, columns, grad_q + r * width, width);
    }
    int64_t row = 0;  // the first that sees the slot
    for (int64_t slot = 0; slot < slots; slot += kRows) {
      while (at.columns(row) <= slot) row += kRows;
      const int64_t r = from + row, count = least(kRows, slots - slot), rows = at.rows() - row;
      float* const to_k = grad_k + (at.b0 + slot) * width;
      float* const to_v = grad_v + (at.b0 + slot) * width;
      const Left of_ds{ds + r * kStride + slot, 1, kStride}, of_p{p + r * kStride + slot, 1, kStride};
      multiply<true>(count, width / W, of_ds, Right{q + r * width, width, W}, rows, to_k, width);
      multiply<true>(count, width / W, of_p, Right{g + r * width, width, W}, rows, to_v, width);
    }
  }

  // Probabilities in place of scores, d loss / d scores in place of d loss / d probabilities; 0 in the kRows columns
  // behind those of this row, which the products by column read too.
  template <bool CAPPED>
  void slopes(int64_t row, Seen seen, int64_t columns, int64_t slots) {
    float *const s = p + row * kStride, *const d = ds + row * kStride;
    const Vf cap = set(a.softcap), inverse_cap = set(CAPPED ? 1.f / a.softcap : 0.f);
    const Vf centre = set(logsumexp[row]), mean = set(delta[row]);
    const Rate rate(1);
    for (int64_t j = 0; j < columns; j += W) {
      Vf x = load(s + j), slope = set(1.f);
      if constexpr (CAPPED) {
        const Vf t = tanh(max(set(-20.f), min(set(20.f), x * inverse_cap)));
        slope = (set(1.f) - t) * (set(1.f) + t);
        x = cap * t;
      }
      if (j < seen.lo || j + W > seen.hi) x = lanes_between(x, seen.lo - j, seen.hi - j);
      const Vf e = exp_rate(max(rate.lowest, x - centre), rate);
      store(s + j, e);
      store(d + j, e * (load(d + j) - mean) * slope);
    }
    const int64_t padded = least(rounded_up(slots, W), columns + rounded_up(kRows, W));
    for (int64_t j = columns; j < padded; j += W) {
      store(s + j, set(0.f));
      store(d + j, set(0.f));
    }
  }

  void end(int64_t first, int64_t last) {
    for (int64_t row = 0; row < (last - first) * a.group; ++row) {
      const int64_t of = head * a.group + a.member(row), token = first + a.token(row);
      store_row(a.type, grad_q + row * width, a.size, a.scale, a.grad_q.at(token, of));
    }
  }
};

static void backward_chunk(const Attention& a, int64_t head, const Chunk& chunk, float* memory) {
  Backward body(a, chunk, head, Arena{memory});
  body.start();
  walk(body, a, chunk);
  body.flush(0);
}

static int64_t forward_floats(const Attention& a) { return Forward::floats(a); }
static int64_t backward_floats(const Attention& a) { return Backward::floats(a); }

}  // namespace fastpo::FASTPO_ISA
