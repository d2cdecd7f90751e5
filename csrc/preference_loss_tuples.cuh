// The kernels of preference_loss.cu that go over tuples: losses and their slopes. All in fp64: there is little of it, and
// it is what every token's gradient is multiplied with.
#pragma once

#include "preference_loss_tokens.cuh"

namespace fastpo {

constexpr int kTupleThreads = 128;
// Of an objective, as op.py says; it is an argument of kernels, which may be 4 KB.
constexpr int kMaxMembers = 32, kMaxTerms = 32, kMaxTable = 512;

enum NllNormalizer { kSequence, kBatch, kNone };  // positions in objectives.NLL_NORMALIZERS

// The groups Tuples and TupleSettings of records.py. An argument of kernels, hence the arrays.
struct Tuples {
  int64_t count, num_sequences;
  int members, terms;
  const int64_t* index;  // [P, K]
  const float *weights, *margins, *params, *beta_scales;  // [P], params [P, J]; null where absent
  bool given, has_nll, mean;
  int score_map, nll_normalizer;
  float score_map_coef, beta;
  int links[kMaxTerms];
  float table[kMaxTable];  // [J, K+5]: coefs, scale, margin, margin_coef, param, weight
  float nll[kMaxMembers];

  __device__ int64_t entries() const { return count * members; }
  __device__ double factor() const { return mean && count > 0 ? 1.0 / static_cast<double>(count) : 1.0; }
  __device__ bool inside(int64_t i) const { return i >= 0 && i < num_sequences; }
};

struct Sequences {  // each [S]
  const float* scores;
  const int64_t* lengths;
  const double* nll;  // sum u l
  const double* linear;  // sum v l, or null
  int64_t* first;  // the first and the last place of a sequence in ``index``, or in ``order``
  int64_t* last;
  const int64_t* order;  // [P K], sorts ``index`` stably; null: it is searched
  unsigned long long* nll_tokens;  // [] tokens of members with an NLL, or null where nobody asks
};

struct TupleOutputs {
  float* losses;  // [P]
  float* rewards;  // [P, K]
  float* nll;  // [P, K]
  double* score_slopes;  // [P, K] d loss / d f(S) of each member by its tuple
  double* nll_slopes;  // [P, K] d loss / d (sum u l); null without NLL
  double* partials;  // [blocks] sums of losses
};

// f(S) of sequence i and its slope: 0 for an empty one, NaN for one that does not exist.
__device__ inline CurveOf<double> mapped_score(const Tuples& tuples, const Sequences& sequences, int64_t i) {
  if (!tuples.inside(i)) return {NAN, NAN};
  if (!tuples.given && sequences.lengths[i] == 0) return {0, 0};
  return score_map_at<double>(tuples.score_map, sequences.scores[i], tuples.score_map_coef);
}

// Tokens of the members with an NLL, a thread per member. Sums of integers: their order does not matter.
__global__ __launch_bounds__(kTupleThreads) void count_kernel(const __grid_constant__ Tuples tuples, const Sequences sequences) {
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * kTupleThreads + threadIdx.x;
  double count = 0;  // of a block: exact
  if (entry < tuples.entries()) {
    const int64_t i = tuples.index[entry];
    if (tuples.nll[entry % tuples.members] != 0 && tuples.inside(i)) count = static_cast<double>(sequences.lengths[i]);
  }
  count = block_sum(count);
  if (threadIdx.x == 0) atomicAdd(sequences.nll_tokens, static_cast<unsigned long long>(count));
}

// Adds the link terms of tuple p to loss, and writes the slopes of its members, before omega and the reduction.
__device__ inline void link_terms(const Tuples& tuples, const Sequences& sequences, int64_t p, double* slopes, double& loss) {
  const int members = tuples.members;
  const int64_t* own = tuples.index + p * members;
  const float beta_scale = tuples.beta_scales ? tuples.beta_scales[p] : 1.f;
  for (int k = 0; k < members; ++k) slopes[k] = 0;
  for (int j = 0; j < tuples.terms; ++j) {
    const float* coefs = tuples.table + j * (members + 5);
    const float* rest = coefs + members;
    const double scale = static_cast<double>(rest[0]) * beta_scale;
    double sum = 0;
    bool here = false;
    for (int k = 0; k < members; ++k) {
      if (own[k] == -1 || coefs[k] == 0) continue;
      here = true;
      sum += coefs[k] * mapped_score(tuples, sequences, own[k]).value;
    }
    if (!here) continue;
    double z = scale * sum - rest[1];
    if (tuples.margins && rest[2] != 0) z -= static_cast<double>(rest[2]) * tuples.margins[p];
    const float param = tuples.params ? tuples.params[p * tuples.terms + j] : rest[3];
    const CurveOf<double> at = link_at<double>(tuples.links[j], z, param);
    loss += rest[4] * at.value;
    const double slope = rest[4] * at.slope * scale;
    for (int k = 0; k < members; ++k) {
      if (coefs[k] != 0) slopes[k] += slope * coefs[k];
    }
  }
}

// -nll_k / N of one member, 0 for an empty one.
__device__ inline double nll_factor(const Tuples& tuples, const Sequences& sequences, int k, int64_t i) {
  double size = 1;
  if (tuples.nll_normalizer == kSequence && tuples.inside(i)) size = static_cast<double>(sequences.lengths[i]);
  if (tuples.nll_normalizer == kBatch) size = static_cast<double>(*sequences.nll_tokens) / static_cast<double>(tuples.count);
  return size > 0 ? -tuples.nll[k] / size : 0;
}

// One thread per tuple, of 128 registers at most: with fewer, fp64's functions spill.
__global__ __launch_bounds__(kTupleThreads, 4) void tuples_kernel(const __grid_constant__ Tuples tuples,
                                                               const Sequences sequences, const TupleOutputs out) {
  const int64_t p = static_cast<int64_t>(blockIdx.x) * kTupleThreads + threadIdx.x;
  double loss = 0;
  if (p < tuples.count) {
    const int64_t entry = p * tuples.members;
    const double omega = tuples.weights ? tuples.weights[p] : 1.f;
    const double outer = omega * tuples.factor();
    link_terms(tuples, sequences, p, out.score_slopes + entry, loss);
    for (int k = 0; k < tuples.members; ++k) {
      const int64_t i = tuples.index[entry + k];
      const bool absent = i == -1, inside = tuples.inside(i);
      const double nll_sum = inside ? sequences.nll[i] : NAN;
      const int64_t length = inside ? sequences.lengths[i] : 1;
      out.score_slopes[entry + k] *= outer;
      out.rewards[entry + k] = absent ? 0.f : tuples.beta * (inside ? sequences.scores[i] : NAN);
      out.nll[entry + k] = absent || length == 0 ? 0.f : static_cast<float>(-nll_sum / static_cast<double>(length));
      if (tuples.has_nll) {
        const double factor = absent || tuples.nll[k] == 0 ? 0 : nll_factor(tuples, sequences, k, i);
        if (factor != 0) loss += factor * nll_sum;
        out.nll_slopes[entry + k] = factor * outer;
      }
      if (!sequences.order && inside) {
        atomicMin(reinterpret_cast<long long*>(sequences.first + i), static_cast<long long>(entry + k));
        atomicMax(reinterpret_cast<long long*>(sequences.last + i), static_cast<long long>(entry + k));
      }
    }
    loss *= omega;
    out.losses[p] = static_cast<float>(loss);
  }
  loss = block_sum(loss);
  if (threadIdx.x == 0) out.partials[blockIdx.x] = loss;
}

// One thread per place in the sorted index: where its sequence begins and ends there.
__global__ __launch_bounds__(kTupleThreads) void places_kernel(const int64_t* sorted, const int64_t num_entries,
                                                               const int64_t num_sequences, int64_t* first, int64_t* last) {
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kTupleThreads + threadIdx.x;
  if (place >= num_entries) return;
  const int64_t i = sorted[place];
  if (i < 0 || i >= num_sequences) return;
  if (place == 0 || sorted[place - 1] != i) first[i] = place;
  if (place == num_entries - 1 || sorted[place + 1] != i) last[i] = place;
}

__device__ inline double block_total(const double* values, int64_t count) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kTupleThreads) sum += values[i];
  return block_sum(sum);
}

// A warp per sequence adds its slopes up in the order of the tuples, from its first place to its last. One block more
// adds up the losses.
__global__ __launch_bounds__(kTupleThreads) void sequences_kernel(const __grid_constant__ Tuples tuples,
                                                                  const Sequences sequences, const TupleOutputs out,
                                                                  const int num_partials, float* score_grads,
                                                                  float* nll_grads, float* loss) {
  if (blockIdx.x == gridDim.x - 1) {
    double total = block_total(out.partials, num_partials);
    if (tuples.mean && tuples.count > 0) total /= static_cast<double>(tuples.count);
    if (sequences.linear) total += block_total(sequences.linear, tuples.num_sequences);
    if (threadIdx.x == 0) *loss = static_cast<float>(total);
    return;
  }
  const int64_t i = static_cast<int64_t>(blockIdx.x) * (kTupleThreads / 32) + threadIdx.x / 32;
  if (i >= tuples.num_sequences) return;
  const int lane = threadIdx.x % 32;
  double score_grad = 0, nll_grad = 0;
  const int64_t last = sequences.last[i];
  for (int64_t place = sequences.first[i] + lane; place <= last; place += 32) {
    const int64_t entry = sequences.order ? sequences.order[place] : place;
    if (tuples.index[entry] != i) continue;
    score_grad += out.score_slopes[entry];
    if (tuples.has_nll) nll_grad += out.nll_slopes[entry];
  }
  score_grad = warp_sum(score_grad);
  nll_grad = warp_sum(nll_grad);
  if (lane != 0) return;
  score_grads[i] = static_cast<float>(score_grad * mapped_score(tuples, sequences, i).slope);
  nll_grads[i] = static_cast<float>(nll_grad);
}

}  // namespace fastpo
