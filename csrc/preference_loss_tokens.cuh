// The kernels of preference_loss.cu that go over tokens: sums forward, gradients backward. A block has one sequence, or
// one of `splits` parts of it. Tokens are taken VEC = 4 at a time, in 16-byte loads and stores at multiples of 4 (VEC = 1
// where a pointer is not aligned): the first and the last four of a sequence may be its neighbours' in part.
// Per-token terms are fp32, their sums fp64. What is masked out may hold anything, and enters nothing.
#pragma once

#include "cuda_common.cuh"
#include "links.h"

namespace fastpo {

constexpr int kMaxThreads = 256;  // of a block

// The group Tokens of records.py with its settings. Pointers are null where the tensor is absent.
struct Tokens {
  const float* logps;  // [T]; null: no tokens at all
  const float* ref_logps;
  const int64_t* cu_seqlens;  // [S+1]
  const uint8_t* mask;
  const float* weights;
  const float* kl;
  const float* kl_weights;
  const float* nll_weights;
  const float* token_coefs;
  int64_t count;  // T
  int64_t num_sequences;
  int phi;
  float ref_coef;
  double length_power;

  // Whether nothing but log-probs, reference and mask counts.
  bool plain() const { return phi == 0 && !weights && !kl && !nll_weights && !token_coefs; }

  __device__ double scale(double length) const {
    if (length_power == 0 || length <= 1) return 1;
    return length_power == 1 ? 1 / length : pow(length, -length_power);
  }
};

struct SequenceSums {  // each [S]; null where not asked for
  float* scores;
  float* logps;
  double* nll;
  double* linear;
  int64_t* lengths;
  int64_t* first;  // set to the ends of an empty range: the tuples' kernel takes the minimum and the maximum
  int64_t* last;
  int64_t num_entries;  // larger than any place
  unsigned long long* nll_tokens;  // []; set to 0
};

// Tokens [start, end) of a sequence; within the tensor even where cu_seqlens is not.
struct Range {
  int64_t start, end;
  __device__ Range(const Tokens& tokens, int64_t sequence) {
    start = min(max(tokens.cu_seqlens[sequence], int64_t{0}), tokens.count);
    end = min(max(tokens.cu_seqlens[sequence + 1], start), tokens.count);
  }
};

// The part of [start, end) that is a block's: it begins at a multiple of VEC, at or before start.
template <int VEC>
struct Part {
  int64_t begin, end;
  __device__ Part(int64_t start, int64_t stop, int part, int splits) {
    const int64_t first = start - start % VEC;
    const int64_t size = ((stop - first + splits - 1) / splits + VEC - 1) / VEC * VEC;
    begin = first + part * size;
    end = min(begin + size, stop);
  }
};

// Bit i: whether token t + i is within [start, end) and masked in.
template <int VEC>
__device__ unsigned kept_tokens(const Tokens& tokens, int64_t t, int64_t start, int64_t end) {
  unsigned kept = 0;
  if (VEC == 4 && tokens.mask && t + VEC <= tokens.count) {
    const uint32_t word = __ldg(reinterpret_cast<const uint32_t*>(tokens.mask + t));
#pragma unroll
    for (int i = 0; i < VEC; ++i) kept |= ((word >> (8 * i)) & 0xffu) ? 1u << i : 0u;
  } else {
#pragma unroll
    for (int i = 0; i < VEC; ++i) kept |= t + i < tokens.count && (!tokens.mask || tokens.mask[t + i]) ? 1u << i : 0u;
  }
#pragma unroll
  for (int i = 0; i < VEC; ++i) {
    if (t + i < start || t + i >= end) kept &= ~(1u << i);
  }
  return kept;
}

// x[i] = values[t + i] where bit i of kept is set, else other. Nothing is loaded where none is.
template <int VEC>
__device__ void load_tokens(const float* values, int64_t t, int64_t count, unsigned kept, float other, float (&x)[VEC]) {
  if (VEC == 4 && kept && t + VEC <= count) {
    const float4 four = __ldg(reinterpret_cast<const float4*>(values + t));
    const float loaded[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int i = 0; i < VEC; ++i) x[i] = kept >> i & 1 ? loaded[i] : other;
    return;
  }
#pragma unroll
  for (int i = 0; i < VEC; ++i) x[i] = kept >> i & 1 ? values[t + i] : other;
}

// out[t + i] = kept ? x[i] : 0, for those t + i that are within [low, high).
template <int VEC>
__device__ void store_tokens(float* out, int64_t t, int64_t low, int64_t high, unsigned kept, const float (&x)[VEC]) {
  float y[VEC];
#pragma unroll
  for (int i = 0; i < VEC; ++i) y[i] = kept >> i & 1 ? x[i] : 0.f;
  if (VEC == 4 && t >= low && t + VEC <= high) {
    *reinterpret_cast<float4*>(out + t) = float4{y[0], y[1 % VEC], y[2 % VEC], y[3 % VEC]};
    return;
  }
#pragma unroll
  for (int i = 0; i < VEC; ++i) {
    if (t + i >= low && t + i < high) out[t + i] = y[i];
  }
}

__device__ inline double warp_sum(double x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullWarp, x, offset);
  return x;
}

// The sum over a block of whole warps, in a fixed order; for thread 0.
__device__ inline double block_sum(double x) {
  __shared__ double warps[kMaxThreads / 32];
  x = warp_sum(x);
  __syncthreads();  // of the previous sum
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0;
  for (unsigned w = 0; w < blockDim.x / 32; ++w) sum += warps[w];
  return sum;
}

struct Sums {
  double score = 0, logps = 0, nll = 0, linear = 0, count = 0;

  __device__ void reduce(bool plain) {
    score = block_sum(score);
    logps = block_sum(logps);
    count = block_sum(count);
    nll = plain ? logps : block_sum(nll);
    linear = plain ? 0 : block_sum(linear);
  }

  // One thread of the sequence's.
  __device__ void write(const Tokens& tokens, const SequenceSums& out, int64_t sequence) const {
    out.lengths[sequence] = static_cast<int64_t>(count);
    if (out.scores) out.scores[sequence] = static_cast<float>(score * tokens.scale(count));
    if (out.logps) out.logps[sequence] = static_cast<float>(logps);
    if (out.nll) out.nll[sequence] = nll;
    if (out.linear) out.linear[sequence] = linear;
  }
};

// w (phi(l) - rho r) + k K of VEC tokens.
template <int VEC, bool PLAIN>
__device__ void score_terms(const Tokens& tokens, int64_t t, unsigned kept, const float (&logps)[VEC], float (&terms)[VEC]) {
#pragma unroll
  for (int i = 0; i < VEC; ++i) terms[i] = PLAIN ? logps[i] : token_map_at(tokens.phi, logps[i]).value;
  float x[VEC];
  if (tokens.ref_logps) {
    load_tokens<VEC>(tokens.ref_logps, t, tokens.count, kept, 0.f, x);
#pragma unroll
    for (int i = 0; i < VEC; ++i) terms[i] -= tokens.ref_coef * x[i];
  }
  if (PLAIN) return;
  if (tokens.weights) {
    load_tokens<VEC>(tokens.weights, t, tokens.count, kept, 0.f, x);
#pragma unroll
    for (int i = 0; i < VEC; ++i) terms[i] *= x[i];
  }
  if (tokens.kl_weights) {
    float k[VEC];
    load_tokens<VEC>(tokens.kl, t, tokens.count, kept, 0.f, x);
    load_tokens<VEC>(tokens.kl_weights, t, tokens.count, kept, 0.f, k);
#pragma unroll
    for (int i = 0; i < VEC; ++i) terms[i] += k[i] * x[i];
  }
}

template <int VEC, bool PLAIN>
__device__ void add_tokens(const Tokens& tokens, bool scored, int64_t t, unsigned kept, Sums& sums) {
  float logps[VEC], x[VEC];
  load_tokens<VEC>(tokens.logps, t, tokens.count, kept, -1.f, logps);
  if (scored) {
    score_terms<VEC, PLAIN>(tokens, t, kept, logps, x);
#pragma unroll
    for (int i = 0; i < VEC; ++i) sums.score += kept >> i & 1 ? x[i] : 0.f;
  }
#pragma unroll
  for (int i = 0; i < VEC; ++i) sums.logps += kept >> i & 1 ? logps[i] : 0.f;
  if (PLAIN) return;
  if (tokens.nll_weights) load_tokens<VEC>(tokens.nll_weights, t, tokens.count, kept, 0.f, x);
#pragma unroll
  for (int i = 0; i < VEC; ++i) sums.nll += kept >> i & 1 ? logps[i] * (tokens.nll_weights ? x[i] : 1.f) : 0.f;
  if (!tokens.token_coefs) return;
  load_tokens<VEC>(tokens.token_coefs, t, tokens.count, kept, 0.f, x);
#pragma unroll
  for (int i = 0; i < VEC; ++i) sums.linear += kept >> i & 1 ? logps[i] * x[i] : 0.f;
}

// Grid: splits blocks per sequence. parts [S, splits] where there are several, for join_kernel.
template <int VEC, bool PLAIN>
__global__ __launch_bounds__(kMaxThreads) void sums_kernel(const Tokens tokens, const SequenceSums out, const int splits,
                                                           Sums* parts) {
  const int64_t sequence = blockIdx.x / splits;
  const int part = blockIdx.x % splits;
  Sums sums;
  if (tokens.logps) {
    const Range range(tokens, sequence);
    const Part<VEC> mine(range.start, range.end, part, splits);
    int64_t count = 0;
    for (int64_t t = mine.begin + threadIdx.x * VEC; t < mine.end; t += blockDim.x * VEC) {
      const unsigned kept = kept_tokens<VEC>(tokens, t, range.start, mine.end);
      add_tokens<VEC, PLAIN>(tokens, out.scores != nullptr, t, kept, sums);
      count += __popc(kept);
    }
    sums.count = static_cast<double>(count);
    sums.reduce(PLAIN);
  }
  if (threadIdx.x != 0) return;
  if (blockIdx.x == 0 && out.nll_tokens) *out.nll_tokens = 0;
  if (part == 0 && out.first) {
    out.first[sequence] = out.num_entries;
    out.last[sequence] = -1;
  }
  if (parts) {
    parts[blockIdx.x] = sums;
  } else {
    sums.write(tokens, out, sequence);
  }
}

// One thread per sequence adds its parts up in their order.
__global__ void join_kernel(const Tokens tokens, const SequenceSums out, const int splits, const Sums* parts) {
  const int64_t sequence = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (sequence >= tokens.num_sequences) return;
  Sums sums;
  for (int i = 0; i < splits; ++i) {
    const Sums& part = parts[sequence * splits + i];
    sums.score += part.score;
    sums.logps += part.logps;
    sums.nll += part.nll;
    sums.linear += part.linear;
    sums.count += part.count;
  }
  sums.write(tokens, out, sequence);
}

struct Slopes {
  const float* grad;  // [], upstream gradient, or null for 1
  const float* score;  // [S], or null for 0
  const float* nll;  // [S], or null for 0
  const int64_t* lengths;  // [S]
};

struct TokenGrads {  // each [T]; null where not asked for
  float* logps;
  float* weights;
  float* kl;
  float* kl_weights;
  float* nll_weights;
  float* token_coefs;
};

// out[t + i] = coef * values[t + i] over kept ones.
template <int VEC>
__device__ void store_product(float* out, float coef, const float* values, int64_t count, int64_t t, int64_t low,
                              int64_t high, unsigned kept) {
  float x[VEC];
  load_tokens<VEC>(values, t, count, kept, 0.f, x);
#pragma unroll
  for (int i = 0; i < VEC; ++i) x[i] *= coef;
  store_tokens<VEC>(out, t, low, high, kept, x);
}

template <int VEC>
__device__ void store_grads(const Tokens& tokens, const TokenGrads& out, float of_score, float of_nll, float upstream,
                            int64_t t, int64_t low, int64_t high, unsigned kept) {
  float logps[VEC], x[VEC], y[VEC];
  load_tokens<VEC>(tokens.logps, t, tokens.count, kept, -1.f, logps);
  if (out.logps) {
#pragma unroll
    for (int i = 0; i < VEC; ++i) x[i] = of_score * token_map_at(tokens.phi, logps[i]).slope;
    if (tokens.weights) {
      load_tokens<VEC>(tokens.weights, t, tokens.count, kept, 0.f, y);
#pragma unroll
      for (int i = 0; i < VEC; ++i) x[i] *= y[i];
    }
    if (tokens.nll_weights) load_tokens<VEC>(tokens.nll_weights, t, tokens.count, kept, 0.f, y);
#pragma unroll
    for (int i = 0; i < VEC; ++i) x[i] += tokens.nll_weights ? of_nll * y[i] : of_nll;
    if (tokens.token_coefs) {
      load_tokens<VEC>(tokens.token_coefs, t, tokens.count, kept, 0.f, y);
#pragma unroll
      for (int i = 0; i < VEC; ++i) x[i] += upstream * y[i];
    }
    store_tokens<VEC>(out.logps, t, low, high, kept, x);
  }
  if (out.weights) {
#pragma unroll
    for (int i = 0; i < VEC; ++i) x[i] = token_map_at(tokens.phi, logps[i]).value;
    if (tokens.ref_logps) {
      load_tokens<VEC>(tokens.ref_logps, t, tokens.count, kept, 0.f, y);
#pragma unroll
      for (int i = 0; i < VEC; ++i) x[i] -= tokens.ref_coef * y[i];
    }
#pragma unroll
    for (int i = 0; i < VEC; ++i) x[i] *= of_score;
    store_tokens<VEC>(out.weights, t, low, high, kept, x);
  }
  if (out.kl) store_product<VEC>(out.kl, of_score, tokens.kl_weights, tokens.count, t, low, high, kept);
  if (out.kl_weights) store_product<VEC>(out.kl_weights, of_score, tokens.kl, tokens.count, t, low, high, kept);
  if (out.nll_weights) store_product<VEC>(out.nll_weights, of_nll, tokens.logps, tokens.count, t, low, high, kept);
  if (out.token_coefs) store_product<VEC>(out.token_coefs, upstream, tokens.logps, tokens.count, t, low, high, kept);
}

// Grid as of sums_kernel. PLAIN: the gradient of the log-probs alone, one number per sequence.
template <int VEC, bool PLAIN>
__global__ __launch_bounds__(kMaxThreads) void backward_kernel(const Tokens tokens, const Slopes slopes,
                                                               const TokenGrads out, const int splits) {
  const int64_t sequence = blockIdx.x / splits;
  const Range range(tokens, sequence);
  // Tokens before the first sequence or behind the last get a gradient too: 0.
  const int64_t low = sequence == 0 ? 0 : range.start;
  const int64_t high = sequence == tokens.num_sequences - 1 ? tokens.count : range.end;
  const float upstream = slopes.grad ? *slopes.grad : 1.f;
  float of_score = 0, of_nll = 0;
  if (slopes.score) {
    const double length = static_cast<double>(slopes.lengths[sequence]);
    of_score = static_cast<float>(slopes.score[sequence] * tokens.scale(length)) * upstream;
  }
  if (slopes.nll) of_nll = slopes.nll[sequence] * upstream;

  const Part<VEC> mine(low, high, blockIdx.x % splits, splits);
  for (int64_t t = mine.begin + threadIdx.x * VEC; t < mine.end; t += blockDim.x * VEC) {
    const unsigned kept = kept_tokens<VEC>(tokens, t, range.start, range.end);
    if (PLAIN) {
      float x[VEC];
#pragma unroll
      for (int i = 0; i < VEC; ++i) x[i] = of_score + of_nll;
      store_tokens<VEC>(out.logps, t, low, mine.end, kept, x);
    } else {
      store_grads<VEC>(tokens, out, of_score, of_nll, upstream, t, low, mine.end, kept);
    }
  }
}

}  // namespace fastpo
