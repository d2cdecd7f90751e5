// The kernels of token_logprobs.cu: a row, or a part of one, per block; the parts' join; the backward.
#pragma once

#include "online_softmax.cuh"

namespace fastpo {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMinBlocks = 4;          // per multiprocessor, hence at most 64 registers
constexpr int kMinBackwardBlocks = 6;  // at most 40 registers: its blocks are short, and more of them overlap
constexpr int kUnroll = 4;         // 16-byte loads of a thread in flight
constexpr int kBackwardUnroll = 2;
constexpr int kMaxTopk = 16;
constexpr int kJoinRows = 4;        // rows, one warp each, of a block of the join kernel
constexpr int kBlocksPerProcessor = 8;

// What every kernel knows of the batch.
struct Batch {
  Rows logits;
  const int64_t* labels;      // [N]
  const float* temperatures;  // [N] or null
  float temperature;
  float softcap, inverse_softcap;  // 0: none
  int64_t ignore_index;
  int64_t count;  // N
  int vocab;

  __device__ float temperature_of(int64_t row) const { return temperatures ? temperatures[row] : temperature; }
  __device__ bool in_range(int64_t label) const { return label >= 0 && label < vocab; }
  __device__ float capped(float x) const { return softcap == 0 ? x : softcap * tanh_fast(x * inverse_softcap); }
};

struct Outputs {  // each [N]; null where not asked for
  float* logps;
  float* max;
  float* log_sum;
  float* logsumexp;
  float* entropy;
  float* sum_p2;
  float* topk_mass;
  float* topk_entropy;
  float* label_set_prob;
  const int64_t* label_set;  // [label_set_size] or null
  int label_set_size;
  int topk;

  bool wants_top() const { return topk_mass || topk_entropy; }
  bool wants_stats() const { return entropy || sum_p2 || wants_top(); }
};

// What a part of a row leaves for the join: its state, then its largest values.
constexpr int kState = OnlineSoftmax<true>::kFloats;
template <bool TOPK>
constexpr int kPartFloats = kState + (TOPK ? kMaxTopk : 0);

__device__ void put(float* out, int64_t row, float value) {
  if (out) out[row] = value;
}

__device__ void finish_ignored(const Outputs& out, int64_t row) {
  for (float* each : {out.logps, out.max, out.log_sum, out.logsumexp, out.entropy, out.sum_p2, out.topk_mass,
                      out.topk_entropy, out.label_set_prob}) {
    put(each, row, 0);
  }
}

// All lanes of one warp: every output of a row.
template <typename T, bool STATS, bool TOPK>
__device__ void finish(const Batch& batch, const Outputs& out, int64_t row, const OnlineSoftmax<STATS>& state,
                       const WarpTop& top, float temperature) {
  const int lane = threadIdx.x % 32;
  const float scale = kLog2e / temperature;
  const float log_sum = logf(state.s);
  const T* logits = batch.logits.row<const T>(row);
  if (lane == 0) {
    const int64_t label = batch.labels[row];
    const bool in_range = batch.in_range(label);
    const float y = batch.capped(to_float(logits[in_range ? label : 0]));
    out.logps[row] = in_range ? (y - state.m) / temperature - log_sum : NAN;
    out.max[row] = state.m;
    out.log_sum[row] = in_range ? log_sum : NAN;
    put(out.logsumexp, row, state.m / temperature + log_sum);
    if (STATS) {
      put(out.entropy, row, log_sum - kLn2 * state.t / state.s);
      put(out.sum_p2, row, state.q / (state.s * state.s));
    }
  }
  if (TOPK) {
    const float d = lane < out.topk ? (top.value - state.m) * scale : -INFINITY;
    const float p = exp2_fast(d) / state.s;
    const float mass = warp_sum(p);
    const float entropy = -warp_sum(p * (kLn2 * fmaxf(d, kNegligible) - log_sum));
    if (lane == 0) {
      put(out.topk_mass, row, mass);
      put(out.topk_entropy, row, entropy);
    }
  }
  if (out.label_set_prob) {
    float e = 0;
    for (int i = lane; i < out.label_set_size; i += 32) {
      const int64_t member = out.label_set[i];
      e += batch.in_range(member) ? exp2_fast((batch.capped(to_float(logits[member])) - state.m) * scale) : NAN;
    }
    e = warp_sum(e);
    if (lane == 0) out.label_set_prob[row] = e / state.s;
  }
}

// A thread's kUnroll vectors of a tile, loaded before the first is used. TOPK needs all lanes of a warp in each step.
template <typename T, bool STATS, bool TOPK, bool WHOLE>
__device__ void add_tile(const Batch& batch, const uint4* vectors, int begin, int end, float scale, int k,
                         OnlineSoftmax<STATS>& state, WarpTop& top) {
  constexpr int kSize = Vector<T>::kSize;
  uint4 raw[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int i = begin + u * kThreads + threadIdx.x;
    if (WHOLE || i < end) raw[u] = __ldcs(vectors + i);
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const bool mine = WHOLE || begin + u * kThreads + static_cast<int>(threadIdx.x) < end;
    if (!TOPK && !mine) continue;
    float y[kSize];
    Vector<T>::unpack(raw[u], y);
    if (batch.softcap != 0) {
#pragma unroll
      for (float& each : y) each = batch.capped(each);
    }
    if (!mine) {
#pragma unroll
      for (float& each : y) each = -INFINITY;
    }
    const float lane_top = largest(y);
    if (TOPK && __any_sync(kFullWarp, lane_top > top.threshold)) top.add(y, k);
    state.add(y, lane_top, scale);
  }
}

// Grid (N, parts): a block reads one row, or part blockIdx.y of its vectors; part 0 also reads what is in no vector.
template <typename T, bool STATS, bool TOPK>
__global__ __launch_bounds__(kThreads, kMinBlocks) void forward_kernel(const Batch batch, const Outputs out, const int part_vectors,
                                                           float* parts) {
  __shared__ float warp_states[kWarps][kState];
  __shared__ float warp_tops[TOPK ? kWarps : 1][32];
  const int64_t row = blockIdx.x;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (batch.labels[row] == batch.ignore_index) {
    if (!parts && threadIdx.x == 0) finish_ignored(out, row);
    return;
  }
  const float temperature = batch.temperature_of(row);
  const float scale = kLog2e / temperature;
  const T* logits = batch.logits.row<const T>(row);
  const Span<T> span(logits, batch.vocab);
  const uint4* vectors = reinterpret_cast<const uint4*>(logits + span.head);

  OnlineSoftmax<STATS> state;
  WarpTop top;
  if (blockIdx.y == 0 && warp == 0) {
    const bool mine = lane < span.head + span.tail;
    const float y[1] = {mine ? batch.capped(to_float(logits[span.loose(lane)])) : -INFINITY};
    if (TOPK) top.add(y[0], out.topk);
    state.add(y, y[0], scale);
  }
  int begin = blockIdx.y * part_vectors;
  const int end = min(span.vectors, begin + part_vectors);
  for (; begin + kThreads * kUnroll <= end; begin += kThreads * kUnroll) {
    add_tile<T, STATS, TOPK, true>(batch, vectors, begin, end, scale, out.topk, state, top);
  }
  if (begin < end) add_tile<T, STATS, TOPK, false>(batch, vectors, begin, end, scale, out.topk, state, top);

  state.merge_warp(scale);
  if (lane == 0) state.store(warp_states[warp]);
  if (TOPK) warp_tops[warp][lane] = top.value;
  __syncthreads();
  if (warp != 0) return;
  state = lane < kWarps ? OnlineSoftmax<STATS>::load(warp_states[lane]) : OnlineSoftmax<STATS>();
  state.merge_warp(scale);
  if (TOPK) {
    for (int other = 1; other < kWarps; ++other) top.add(lane < out.topk ? warp_tops[other][lane] : -INFINITY, out.topk);
  }
  if (!parts) return finish<T, STATS, TOPK>(batch, out, row, state, top, temperature);
  float* part = parts + (row * gridDim.y + blockIdx.y) * kPartFloats<TOPK>;
  if (lane == 0) state.store(part);
  if (TOPK && lane < kMaxTopk) part[kState + lane] = top.value;
}

// One warp joins the parts of one row, always in the same order.
template <typename T, bool STATS, bool TOPK>
__global__ void join_kernel(const Batch batch, const Outputs out, const int num_parts, const float* parts) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kJoinRows + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= batch.count) return;
  if (batch.labels[row] == batch.ignore_index) {
    if (lane == 0) finish_ignored(out, row);
    return;
  }
  const float temperature = batch.temperature_of(row);
  const float scale = kLog2e / temperature;
  const float* part = parts + row * num_parts * kPartFloats<TOPK>;
  OnlineSoftmax<STATS> state;
  for (int i = lane; i < num_parts; i += 32) {
    state.merge(OnlineSoftmax<STATS>::load(part + i * kPartFloats<TOPK>), scale);
  }
  state.merge_warp(scale);
  WarpTop top;
  if (TOPK) {
    for (int i = 0; i < num_parts; ++i) {
      const float* values = part + i * kPartFloats<TOPK> + kState;
      top.add(lane < out.topk ? values[lane] : -INFINITY, out.topk);
    }
  }
  finish<T, STATS, TOPK>(batch, out, row, state, top, temperature);
}

// dL/dx of one row. With COEFS: dL/dz_v = g 1[v = label] + p_v (a + b log p_v + c p_v), else a = -g and b = c = 0;
// then through the temperature and the softcap.
template <bool COEFS>
struct RowGradient {
  float max, log_sum, inverse_temperature, softcap, inverse_softcap, g, a, b, c;
  int64_t label;

  __device__ RowGradient(const Batch& batch, int64_t row, const float* normalizer, const float* grad_logps,
                         const float* coefs)
      : max(normalizer[row]),
        log_sum(normalizer[batch.count + row]),
        inverse_temperature(1 / batch.temperature_of(row)),
        softcap(batch.softcap),
        inverse_softcap(batch.inverse_softcap),
        g(grad_logps[row] * inverse_temperature),
        a(COEFS ? coefs[row] * inverse_temperature : -g),
        b(COEFS ? coefs[batch.count + row] * inverse_temperature : 0),
        c(COEFS ? coefs[2 * batch.count + row] * inverse_temperature : 0),
        label(batch.labels[row]) {}

  // In place for the SIZE elements from index ``first`` on.
  template <int SIZE>
  __device__ void operator()(float (&x)[SIZE], int first) const {
    float slope[SIZE];
    if (softcap != 0) {
#pragma unroll
      for (int i = 0; i < SIZE; ++i) {
        const float u = tanh_fast(x[i] * inverse_softcap);
        x[i] = softcap * u;
        slope[i] = 1 - u * u;
      }
    }
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      const float logp = fmaf(x[i] - max, inverse_temperature, -log_sum);
      const float p = exp2_fast(logp * kLog2e);
      x[i] = COEFS ? p * fmaf(c, p, fmaf(b, fmaxf(logp, kNegligible), a)) : a * p;
    }
    if (label >= first && label < first + SIZE) {
#pragma unroll
      for (int i = 0; i < SIZE; ++i) x[i] += label == first + i ? g : 0;
    }
    if (softcap != 0) {
#pragma unroll
      for (int i = 0; i < SIZE; ++i) x[i] *= slope[i];
    }
  }
};

// A block does kThreads * kUnroll vectors of one row; its first block also what is in no vector. ``grads`` may be the
// logits: each element is read and written by one thread, reads first, with loads that see earlier stores.
template <typename T, bool COEFS>
__global__ __launch_bounds__(kThreads, kMinBackwardBlocks) void backward_kernel(const Batch batch, const Rows grads, const unsigned tiles,
                                                            const float* normalizer, const float* grad_logps,
                                                            const float* coefs) {
  constexpr int kSize = Vector<T>::kSize;
  const int64_t row = blockIdx.x / tiles;
  const int tile = blockIdx.x % tiles;
  const bool kept = batch.labels[row] != batch.ignore_index;
  const T* logits = batch.logits.row<const T>(row);
  T* grad = grads.row<T>(row);
  const Span<T> span(logits, batch.vocab);
  const uint4* vectors = reinterpret_cast<const uint4*>(logits + span.head);
  uint4* grad_vectors = reinterpret_cast<uint4*>(grad + span.head);
  const bool aligned = reinterpret_cast<uintptr_t>(grad_vectors) % 16 == 0;
  const int begin = tile * kThreads * kBackwardUnroll + threadIdx.x;

  uint4 raw[kBackwardUnroll];
#pragma unroll
  for (int u = 0; u < kBackwardUnroll; ++u) {
    const int i = begin + u * kThreads;
    if (kept && i < span.vectors) raw[u] = __ldcs(vectors + i);
  }
  const RowGradient<COEFS> gradient(batch, row, normalizer, grad_logps, coefs);
#pragma unroll
  for (int u = 0; u < kBackwardUnroll; ++u) {
    const int i = begin + u * kThreads;
    if (i >= span.vectors) break;
    float x[kSize] = {};
    if (kept) {
      Vector<T>::unpack(raw[u], x);
      gradient(x, span.head + i * kSize);
    }
    if (aligned) {
      __stwb(grad_vectors + i, Vector<T>::pack(x));
      continue;
    }
#pragma unroll
    for (int j = 0; j < kSize; ++j) store_rounded(grad + span.head + i * kSize + j, x[j]);
  }
  if (tile != 0 || threadIdx.x >= span.head + span.tail) return;
  const int i = span.loose(threadIdx.x);
  float x[1] = {kept ? to_float(logits[i]) : 0};
  if (kept) gradient(x, i);
  store_rounded(grad + i, x[0]);
}

}  // namespace
}  // namespace fastpo
