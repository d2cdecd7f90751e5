// The kernels of preference_loss.cu that go over tokens: sums forward, gradients backward. A block has one sequence, or
// one of `splits` parts of it. Tokens are taken VEC = 4 at a time, in 16-byte loads and stores at multiples of 4 (VEC = 1
// where a pointer is not aligned): the first and the last four of a sequence may be its neighbours' in part. Only the few
// tokens behind the last multiple of 4 in the whole tensor are taken one by one.
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

// The vectors of VEC tokens, at multiples of VEC, that a block has of [start, stop); and for its first thread the tokens
// behind the last whole vector of the tensor.
template <int VEC>
struct Part {
  int64_t begin, end;  // of the vectors, which may reach over start and stop
  int64_t loose, loose_end;

  __device__ Part(int64_t start, int64_t stop, int64_t count, int part, int splits) {
    const int64_t first = start - start % VEC, whole = count - count % VEC;
    const int64_t size = ((stop - first + splits - 1) / splits + VEC - 1) / VEC * VEC;
    begin = first + part * size;
    const int64_t own_end = min(begin + size, stop);
    end = min(own_end, whole);
    loose = max(whole, begin);
    loose_end = threadIdx.x == 0 ? own_end : 0;
  }
};

// Bit i: whether token t + i is within [start, end) and masked in. mask: what mask_at loaded, 1 for each kept token.
template <int VEC>
__device__ unsigned kept_tokens(uint32_t mask, int64_t t, int64_t start, int64_t end) {
  unsigned kept = 0;
#pragma unroll
  for (int i = 0; i < VEC; ++i) {
    if ((mask >> (8 * i) & 0xffu) && t + i >= start && t + i < end) kept |= 1u << i;
  }
  return kept;
}

template <int VEC>
__device__ uint32_t mask_at(const uint8_t* mask, int64_t t) {
  if (!mask) return ~0u;
  return VEC == 4 ? __ldg(reinterpret_cast<const uint32_t*>(mask + t)) : mask[t];
}

// VEC values of consecutive tokens.
template <int VEC>
struct Values {
  float x[VEC];

  // From values, or nothing but ``other`` where no token is kept.
  __device__ void load(const float* values, int64_t t, bool kept, float other = 0) {
    if (VEC == 4) {
      float4 four{other, other, other, other};
      if (kept) four = __ldg(reinterpret_cast<const float4*>(values + t));
      x[0] = four.x, x[1 % VEC] = four.y, x[2 % VEC] = four.z, x[3 % VEC] = four.w;
    } else {
      x[0] = kept ? values[t] : other;
    }
  }

  // To out where t + i is within [low, high); 0 for a token that is not kept.
  __device__ void store(float* out, int64_t t, int64_t low, int64_t high, unsigned kept) const {
    float y[VEC];
#pragma unroll
    for (int i = 0; i < VEC; ++i) y[i] = kept >> i & 1 ? x[i] : 0.f;
    if (VEC == 4 && t >= low && t + VEC <= high) {
      // An assignment is split in four by the compiler, which sees what the other branch stores.
      __stwb(reinterpret_cast<float4*>(out + t), float4{y[0], y[1 % VEC], y[2 % VEC], y[3 % VEC]});
      return;
    }
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      if (t + i >= low && t + i < high) out[t + i] = y[i];
    }
  }
};

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

  __device__ void reduce(bool nll_is_logps, bool has_linear) {
    score = block_sum(score);
    logps = block_sum(logps);
    count = block_sum(count);
    nll = nll_is_logps ? logps : block_sum(nll);
    if (has_linear) linear = block_sum(linear);
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

// What is read of VEC tokens: all of it is under way before the first is used.
template <int VEC, bool PLAIN>
struct TokenValues {
  Values<VEC> logps, ref_logps, weights, kl, kl_weights, nll_weights, token_coefs;

  __device__ void load(const Tokens& tokens, bool scored, int64_t t, bool kept) {
    logps.load(tokens.logps, t, kept, -1.f);
    if (tokens.ref_logps) ref_logps.load(tokens.ref_logps, t, kept);
    if (PLAIN) return;
    if (scored && tokens.weights) weights.load(tokens.weights, t, kept);
    if (scored && tokens.kl_weights) kl.load(tokens.kl, t, kept);
    if (scored && tokens.kl_weights) kl_weights.load(tokens.kl_weights, t, kept);
    if (tokens.nll_weights) nll_weights.load(tokens.nll_weights, t, kept);
    if (tokens.token_coefs) token_coefs.load(tokens.token_coefs, t, kept);
  }

  // w (phi(l) - rho r) + k K
  __device__ float score(const Tokens& tokens, int i) const {
    float term = PLAIN ? logps.x[i] : token_map_at(tokens.phi, logps.x[i]).value;
    if (tokens.ref_logps) term -= tokens.ref_coef * ref_logps.x[i];
    if (!PLAIN && tokens.weights) term *= weights.x[i];
    if (!PLAIN && tokens.kl_weights) term += kl_weights.x[i] * kl.x[i];
    return term;
  }

  __device__ void add_to(Sums& sums, const Tokens& tokens, bool scored, unsigned kept) const {
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      const bool own = kept >> i & 1;
      if (scored) sums.score += own ? score(tokens, i) : 0.f;
      sums.logps += own ? logps.x[i] : 0.f;
      if (PLAIN) continue;
      if (tokens.nll_weights) sums.nll += own ? logps.x[i] * nll_weights.x[i] : 0.f;
      if (tokens.token_coefs) sums.linear += own ? logps.x[i] * token_coefs.x[i] : 0.f;
    }
  }
};

// Adds up UNROLL vectors of one thread, ``stride`` tokens apart.
template <int VEC, bool PLAIN, int UNROLL>
__device__ int add_vectors(const Tokens& tokens, bool scored, int64_t t, int64_t stride, int64_t start, int64_t end,
                           int64_t vectors_end, Sums& sums) {
  uint32_t masks[UNROLL];
  unsigned kept[UNROLL];
  TokenValues<VEC, PLAIN> values[UNROLL];
  int count = 0;
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) masks[u] = t + u * stride < vectors_end ? mask_at<VEC>(tokens.mask, t + u * stride) : 0;
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
    kept[u] = kept_tokens<VEC>(masks[u], t + u * stride, start, end);
    values[u].load(tokens, scored, t + u * stride, kept[u] != 0);
  }
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
    values[u].add_to(sums, tokens, scored, kept[u]);
    count += __popc(kept[u]);
  }
  return count;
}

// Grid: splits blocks per sequence. parts [S, splits] where there are several, for join_kernel.
template <int VEC, bool PLAIN>
__global__ __launch_bounds__(kMaxThreads) void sums_kernel(const Tokens tokens, const SequenceSums out, const int splits,
                                                           Sums* parts) {
  const int64_t sequence = blockIdx.x / splits;
  const int part = blockIdx.x % splits;
  Sums sums;
  if (tokens.logps) {
    constexpr int kUnroll = PLAIN ? 2 : 1;
    const Range range(tokens, sequence);
    const Part<VEC> mine(range.start, range.end, tokens.count, part, splits);
    const bool scored = out.scores != nullptr;
    const int64_t stride = blockDim.x * VEC;
    int64_t count = 0;
    for (int64_t t = mine.begin + threadIdx.x * VEC; t < mine.end; t += kUnroll * stride) {
      count += add_vectors<VEC, PLAIN, kUnroll>(tokens, scored, t, stride, range.start, range.end, mine.end, sums);
    }
#pragma unroll 1
    for (int64_t t = mine.loose; t < mine.loose_end; ++t) {
      count += add_vectors<1, PLAIN, 1>(tokens, scored, t, 0, range.start, range.end, mine.loose_end, sums);
    }
    sums.count = static_cast<double>(count);
    sums.reduce(PLAIN || !tokens.nll_weights, tokens.token_coefs != nullptr);
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

// The gradients of VEC tokens at t, to those of them that are within [low, high).
template <int VEC>
struct GradWriter {
  const Tokens& tokens;
  const TokenGrads& out;
  float of_score, of_nll, upstream;
  int64_t low, high;

  // coef * factors
  __device__ void product(float* grads, float coef, const float* factors, int64_t t, unsigned kept) const {
    Values<VEC> values;
    values.load(factors, t, kept != 0);
#pragma unroll
    for (float& x : values.x) x *= coef;
    values.store(grads, t, low, high, kept);
  }

  __device__ void logps(const Values<VEC>& own, int64_t t, unsigned kept) const {
    Values<VEC> weights, nll_weights, token_coefs, grad;
    if (tokens.weights) weights.load(tokens.weights, t, kept != 0);
    if (tokens.nll_weights) nll_weights.load(tokens.nll_weights, t, kept != 0);
    if (tokens.token_coefs) token_coefs.load(tokens.token_coefs, t, kept != 0);
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      float x = of_score;
      if (tokens.phi != 0) x *= token_map_at(tokens.phi, own.x[i]).slope;
      if (tokens.weights) x *= weights.x[i];
      x += tokens.nll_weights ? of_nll * nll_weights.x[i] : of_nll;
      if (tokens.token_coefs) x += upstream * token_coefs.x[i];
      grad.x[i] = x;
    }
    grad.store(out.logps, t, low, high, kept);
  }

  __device__ void weights(const Values<VEC>& own, int64_t t, unsigned kept) const {
    Values<VEC> ref_logps, grad;
    if (tokens.ref_logps) ref_logps.load(tokens.ref_logps, t, kept != 0);
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      float x = token_map_at(tokens.phi, own.x[i]).value;
      if (tokens.ref_logps) x -= tokens.ref_coef * ref_logps.x[i];
      grad.x[i] = of_score * x;
    }
    grad.store(out.weights, t, low, high, kept);
  }

  __device__ void all(int64_t t, unsigned kept) const {
    Values<VEC> own;
    if (out.weights || tokens.phi != 0) own.load(tokens.logps, t, kept != 0, -1.f);
    if (out.logps) logps(own, t, kept);
    if (out.weights) weights(own, t, kept);
    if (out.kl) product(out.kl, of_score, tokens.kl_weights, t, kept);
    if (out.kl_weights) product(out.kl_weights, of_score, tokens.kl, t, kept);
    if (out.nll_weights) product(out.nll_weights, of_nll, tokens.logps, t, kept);
    if (out.token_coefs) product(out.token_coefs, upstream, tokens.logps, t, kept);
  }

  // The gradient of the log-probs alone, where it is one number per sequence.
  __device__ void constant(int64_t t, unsigned kept) const {
    Values<VEC> grad;
#pragma unroll
    for (float& x : grad.x) x = of_score + of_nll;
    grad.store(out.logps, t, low, high, kept);
  }
};

// Grid as of sums_kernel. PLAIN: nothing but ``constant`` is to be done.
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

  const Part<VEC> mine(low, high, tokens.count, blockIdx.x % splits, splits);
  const GradWriter<VEC> write{tokens, out, of_score, of_nll, upstream, low, high};
#pragma unroll 2
  for (int64_t t = mine.begin + threadIdx.x * VEC; t < mine.end; t += blockDim.x * VEC) {
    const unsigned kept = kept_tokens<VEC>(mask_at<VEC>(tokens.mask, t), t, range.start, range.end);
    PLAIN ? write.constant(t, kept) : write.all(t, kept);
  }
  const GradWriter<1> write_loose{tokens, out, of_score, of_nll, upstream, low, high};
#pragma unroll 1
  for (int64_t t = mine.loose; t < mine.loose_end; ++t) {
    const unsigned kept = kept_tokens<1>(mask_at<1>(tokens.mask, t), t, range.start, range.end);
    PLAIN ? write_loose.constant(t, kept) : write_loose.all(t, kept);
  }
}

}  // namespace fastpo
