// preference_loss on the CPU: implements fastpo_c::preference_loss_forward, sequence_scores_forward and
// preference_loss_backward, whose arguments kernels/preference_loss/records.py describes. Sequences and threads; tuples
// are in preference_loss_tuples.h, the vector kernels in preference_loss_kernel.h, the link functions in links.h.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "huge_pages.h"
#include "parallel.h"
#include "preference_loss.h"
#include "preference_loss_tuples.h"
#define FASTPO_TARGET_INCLUDE "preference_loss_kernel.h"
#include "simd_targets.h"

namespace fastpo {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kPhiTokens = 512;  // of which phi is computed at a time
constexpr int64_t kTupleWork = 2;  // what a member of a tuple costs, in tokens
constexpr int64_t kStretch = 64;  // sequences that a thread takes at a time
constexpr int64_t kThreadTokens = 16384;  // fewer are not worth a thread

#define FASTPO_KERNELS(isa) isa::preference_kernels()

PreferenceKernels kernels() { return FASTPO_PICK(FASTPO_KERNELS); }

template <class T>
const T* data(const OptionalTensor& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

template <class T = float>
T* output(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// The group Tokens of records.py, with its TokenSettings.
struct Tokens {
  TokenSlice all;
  const int64_t* cu_seqlens = nullptr;  // null: no tokens at all
  int64_t num_tokens = 0, num_sequences = 0;
  int64_t phi;  // code of the token map
  float ref_coef;
  double length_power;

  Tokens(const OptionalTensor& logps, const OptionalTensor& ref_logps, const OptionalTensor& cu,
         const OptionalTensor& mask, const OptionalTensor& weights, const OptionalTensor& kl,
         const OptionalTensor& kl_weights, const OptionalTensor& nll_weights, const OptionalTensor& token_coefs,
         int64_t phi, double ref_coef, double length_power)
      : all{data<float>(logps), data<float>(logps), data<float>(ref_logps), data<float>(weights), data<float>(kl),
            data<float>(kl_weights), data<float>(nll_weights), data<float>(token_coefs), data<bool>(mask)},
        phi(phi),
        ref_coef(static_cast<float>(ref_coef)),
        length_power(length_power) {
    if (!logps) return;
    STD_TORCH_CHECK(logps->scalar_type() == ScalarType::Float, "logps should be float32 here");
    cu_seqlens = data<int64_t>(cu);
    num_tokens = logps->numel();
    num_sequences = cu->numel() - 1;
    bool rising = cu_seqlens[0] == 0 && cu_seqlens[num_sequences] == num_tokens;
    for (int64_t i = 0; i < num_sequences; ++i) rising &= cu_seqlens[i] <= cu_seqlens[i + 1];
    STD_TORCH_CHECK(rising, "segments.cu_seqlens should rise from 0 to the number of tokens, ", num_tokens);
  }

  // Whether a token's slope by its log-prob is that of its sequence.
  bool constant_slope() const { return phi == 0 && !all.weights && !all.nll_weights && !all.token_coefs; }

  TokenSlice slice(int64_t start) const {
    const auto at = [start](auto* p) { return p ? p + start : nullptr; };
    return {at(all.logps), at(all.phi), at(all.ref_logps), at(all.weights), at(all.kl), at(all.kl_weights),
            at(all.nll_weights), at(all.token_coefs), at(all.mask)};
  }

  double scale(int64_t count) const {
    if (length_power == 0 || count == 0) return 1;
    return length_power == 1 ? 1.0 / static_cast<double>(count) : std::pow(static_cast<double>(count), -length_power);
  }
};

// phi(l) and its slope over one slice; masked-out tokens may be anything.
struct Phi {
  float value[kPhiTokens], slope[kPhiTokens];

  void compute(const float* logps, int64_t n, int64_t code) {
    for (int64_t t = 0; t < n; ++t) {
      const Curve at = token_map_at(static_cast<int>(code), logps[t]);
      value[t] = at.value;
      slope[t] = at.slope;
    }
  }
};

// The sums of sequences [first, end), at most kStretch of them.
void sum_stretch(const Tokens& tokens, const PreferenceKernels& run, int64_t first, int64_t end, TokenSums* sums) {
  if (tokens.phi == 0) run.add(tokens.all, tokens.cu_seqlens + first, end - first, tokens.ref_coef, sums);
  for (int64_t i = first; i < end; ++i, ++sums) {
    const int64_t stop = tokens.cu_seqlens[i + 1];
    for (int64_t start = tokens.cu_seqlens[i]; tokens.phi != 0 && start < stop; start += kPhiTokens) {
      const int64_t n = std::min(kPhiTokens, stop - start), all[] = {0, n};
      TokenSlice slice = tokens.slice(start);
      Phi phi;
      phi.compute(slice.logps, n, tokens.phi);
      slice.phi = phi.value;
      run.add(slice, all, 1, tokens.ref_coef, sums);
    }
    sums->score *= tokens.scale(sums->count);
  }
}

// The sequences that a thread begins with.
struct alignas(64) Share {
  std::atomic<int64_t> next;
  int64_t end;
};

// f(first, end) for stretches of at most kStretch sequences, until all are done. Each thread begins with its own share
// of the tokens, the same in every call, for its cache may still hold them; then it helps the others.
template <class F>
void for_sequences(const Tokens& tokens, const F& f) {
  const int64_t count = tokens.num_sequences, most = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t threads = std::max<int64_t>(1, std::min({most, count, tokens.num_tokens / kThreadTokens}));
  std::vector<Share> shares(threads);
  const int64_t* cu = tokens.cu_seqlens;
  int64_t begin = 0;
  for (int64_t i = 0; i < threads; ++i) {
    const int64_t until = tokens.num_tokens * (i + 1) / threads;
    const int64_t end = i + 1 == threads ? count : std::upper_bound(cu + begin, cu + count, until) - cu;
    shares[i].next = begin;
    begin = shares[i].end = end;
  }
  const auto help = [&](int64_t own) {
    for (int64_t i = 0; i < threads; ++i) {
      Share& share = shares[(own + i) % threads];
      for (int64_t first; (first = share.next.fetch_add(kStretch)) < share.end;) {
        f(first, std::min(first + kStretch, share.end));
      }
    }
  };
  if (threads == 1) return help(0);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t) { help(first); });
}

Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type = ScalarType::Float) {
  return torch::stable::new_empty(like, std::vector<int64_t>(shape), type);
}

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The outputs of the forward, Outputs of records.py.
struct Results {
  Tensor of_loss, of_losses, of_scores, of_logps, of_lengths, of_rewards, of_nll, of_score_grads, of_nll_grads;
  float *loss, *losses, *scores, *logps;
  int64_t* lengths;
  float *rewards, *nll, *score_grads, *nll_grads;

  Results(const Tensor& like, int64_t s, int64_t p, int64_t k)
      : of_loss(empty(like, {})),
        of_losses(empty(like, {p})),
        of_scores(empty(like, {s})),
        of_logps(empty(like, {s})),
        of_lengths(empty(like, {s}, ScalarType::Long)),
        of_rewards(empty(like, {p, k})),
        of_nll(empty(like, {p, k})),
        of_score_grads(empty(like, {s})),
        of_nll_grads(empty(like, {s})),
        loss(output(of_loss)),
        losses(output(of_losses)),
        scores(output(of_scores)),
        logps(output(of_logps)),
        lengths(output<int64_t>(of_lengths)),
        rewards(output(of_rewards)),
        nll(output(of_nll)),
        score_grads(output(of_score_grads)),
        nll_grads(output(of_nll_grads)) {}

  Forward tensors() const {
    return {of_loss, of_losses, of_scores, of_logps, of_lengths, of_rewards, of_nll, of_score_grads, of_nll_grads};
  }
};

// finish(i, sums) for every sequence; returns sum v l over all of them.
template <class F>
double sum_sequences(const Tokens& tokens, int64_t num_sequences, const F& finish) {
  if (!tokens.cu_seqlens) {
    for (int64_t i = 0; i < num_sequences; ++i) finish(i, TokenSums{});
    return 0;
  }
  const PreferenceKernels run = kernels();
  std::vector<double> linear(tokens.all.token_coefs ? num_sequences : 0);
  for_sequences(tokens, [&](int64_t first, int64_t end) {
    TokenSums sums[kStretch];
    sum_stretch(tokens, run, first, end, sums);
    for (int64_t i = first; i < end; ++i) {
      finish(i, sums[i - first]);
      if (!linear.empty()) linear[i] = sums[i - first].linear;
    }
  });
  double total = 0;
  for (const double x : linear) total += x;
  return total;
}

// Fills what is per tuple, and the slopes; returns the sum of losses.
double sum_tuples(const Tuples& tuples, const Sequences& sequences, float beta, const Results& out) {
  const double batch = batch_tokens(tuples, sequences.lengths);
  const int64_t elements = tuples.count * tuples.members;
  const auto score_grads = std::make_unique_for_overwrite<double[]>(elements);
  const auto nll_grads = std::make_unique_for_overwrite<double[]>(tuples.nll.empty() ? 0 : elements);
  const auto losses_of = tuples.members == 2 ? tuple_losses<2> : tuple_losses<0>;
  const LogisticKernel logistic = kernels().logistic;
  for_each_task((tuples.count + kTupleBlock - 1) / kTupleBlock, elements * kTupleWork, [&](int64_t task) {
    const int64_t p = task * kTupleBlock, n = std::min(kTupleBlock, tuples.count - p), first = p * tuples.members;
    double *own_scores = score_grads.get() + first, *own_nll = nll_grads.get() + (tuples.nll.empty() ? 0 : first);
    losses_of(tuples, sequences, p, n, batch, logistic, out.losses + p, own_scores, own_nll);
    for (int64_t at = first; at < first + n * tuples.members; ++at) {
      const int64_t i = tuples.index[at];
      const int64_t length = i < 0 ? 0 : sequences.lengths[i];
      out.rewards[at] = i < 0 ? 0.f : beta * out.scores[i];
      out.nll[at] = length == 0 ? 0.f : -sequences.nll[i] / static_cast<float>(length);
    }
  });
  sum_over_tuples(tuples, score_grads.get(), sequences.count, out.score_grads);
  if (tuples.nll.empty()) {
    std::fill_n(out.nll_grads, sequences.count, 0.f);
  } else {
    sum_over_tuples(tuples, nll_grads.get(), sequences.count, out.nll_grads);
  }
  double total = 0;
  for (int64_t p = 0; p < tuples.count; ++p) total += out.losses[p];
  return total;
}

Forward preference_loss_forward(
    OptionalTensor logps, OptionalTensor ref_logps, OptionalTensor cu_seqlens, OptionalTensor mask,
    OptionalTensor weights, OptionalTensor kl, OptionalTensor kl_weights, OptionalTensor nll_weights,
    OptionalTensor token_coefs, OptionalTensor scores, Tensor index, OptionalTensor tuple_weights,
    OptionalTensor margins, OptionalTensor params, OptionalTensor beta_scales, int64_t phi, double ref_coef,
    double length_power, int64_t score_map, double score_map_coef, std::vector<int64_t> links,
    std::vector<double> table, std::vector<double> nll, int64_t nll_normalizer, bool mean, double beta) {
  const Tokens tokens(logps, ref_logps, cu_seqlens, mask, weights, kl, kl_weights, nll_weights, token_coefs, phi,
                      ref_coef, length_power);
  const int64_t num_sequences = scores ? scores->numel() : tokens.num_sequences;
  const int64_t num_tuples = index.size(0), members = index.size(1);
  const double factor = mean && num_tuples > 0 ? 1.0 / static_cast<double>(num_tuples) : 1;
  const Tuples tuples{num_tuples, members, static_cast<int64_t>(links.size()), data<int64_t>(index),
                      data<float>(tuple_weights), data<float>(margins), data<float>(params), data<float>(beta_scales),
                      links.data(), table, nll, nll_normalizer, factor};
  STD_TORCH_CHECK(index_in_range(tuples, num_sequences), "pairs.index should lie in [-1, number of sequences)");

  Results out(scores ? *scores : *logps, num_sequences, num_tuples, members);
  const auto mapped = std::make_unique_for_overwrite<CurveOf<double>[]>(num_sequences);
  const auto nll_sums = std::make_unique_for_overwrite<float[]>(num_sequences);
  const float* given = data<float>(scores);
  const auto finish = [&](int64_t i, const TokenSums& sums) {
    out.scores[i] = given ? given[i] : static_cast<float>(sums.score);
    out.logps[i] = static_cast<float>(sums.logps);
    out.lengths[i] = sums.count;
    nll_sums[i] = static_cast<float>(sums.nll);
    mapped[i] = {0, 0};
    if (!given && sums.count == 0) return;
    mapped[i] = score_map_at<double>(static_cast<int>(score_map), out.scores[i], score_map_coef);
  };
  const double linear = sum_sequences(tokens, num_sequences, finish);
  const Sequences sequences{num_sequences, mapped.get(), nll_sums.get(), out.lengths};
  const double total = sum_tuples(tuples, sequences, static_cast<float>(beta), out);
  *out.loss = static_cast<float>((mean && num_tuples > 0 ? total / static_cast<double>(num_tuples) : total) + linear);
  return out.tensors();
}

std::tuple<Tensor, Tensor> sequence_scores_forward(
    OptionalTensor logps, OptionalTensor ref_logps, OptionalTensor cu_seqlens, OptionalTensor mask,
    OptionalTensor weights, OptionalTensor kl, OptionalTensor kl_weights, OptionalTensor nll_weights,
    OptionalTensor token_coefs, int64_t phi, double ref_coef, double length_power) {
  const Tokens tokens(logps, ref_logps, cu_seqlens, mask, weights, kl, kl_weights, nll_weights, token_coefs, phi,
                      ref_coef, length_power);
  Tensor scores = empty(*logps, {tokens.num_sequences});
  Tensor lengths = empty(*logps, {tokens.num_sequences}, ScalarType::Long);
  const PreferenceKernels run = kernels();
  float* scores_out = output(scores);
  int64_t* lengths_out = output<int64_t>(lengths);
  for_sequences(tokens, [&](int64_t first, int64_t end) {
    TokenSums sums[kStretch];
    sum_stretch(tokens, run, first, end, sums);
    for (int64_t i = first; i < end; ++i) {
      scores_out[i] = static_cast<float>(sums[i - first].score);
      lengths_out[i] = sums[i - first].count;
    }
  });
  return {scores, lengths};
}

// Order of TokenGrads in records.py.
enum Grad { kLogps, kWeights, kKl, kKlWeights, kNllWeights, kTokenCoefs, kGrads };

// The gradients of tokens [start, start + n) of a sequence. score, nll: its slopes times the upstream gradient.
void write_grads(const Tokens& tokens, const PreferenceKernels& run, int64_t start, int64_t n, float score, float nll,
                 float upstream, float* const (&grads)[kGrads]) {
  TokenSlice t = tokens.slice(start);
  Phi phi;
  const float* phi_slope = nullptr;
  if (tokens.phi != 0) {
    phi.compute(t.logps, n, tokens.phi);
    t.phi = phi.value;
    phi_slope = phi.slope;
    if (t.weights) run.multiply(phi.slope, t.weights, n, phi.slope);
  }
  const auto out = [&](Grad g) { return grads[g] + start; };
  if (grads[kLogps]) {
    const float* weighted = phi_slope ? phi_slope : t.weights;
    const Product linear{t.token_coefs ? upstream : 0.f, t.token_coefs};
    run.combine({{score, weighted}, {nll, t.nll_weights}, linear}, t.mask, n, out(kLogps));
  }
  if (grads[kWeights]) run.difference(score, t.phi, t.ref_logps, tokens.ref_coef, t.mask, n, out(kWeights));
  if (grads[kKl]) run.difference(score, t.kl_weights, nullptr, 0.f, t.mask, n, out(kKl));
  if (grads[kKlWeights]) run.difference(score, t.kl, nullptr, 0.f, t.mask, n, out(kKlWeights));
  if (grads[kNllWeights]) run.difference(nll, t.logps, nullptr, 0.f, t.mask, n, out(kNllWeights));
  if (grads[kTokenCoefs]) run.difference(upstream, t.logps, nullptr, 0.f, t.mask, n, out(kTokenCoefs));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> preference_loss_backward(
    OptionalTensor grad, OptionalTensor score_grads, OptionalTensor nll_grads, OptionalTensor logps,
    OptionalTensor ref_logps, OptionalTensor cu_seqlens, OptionalTensor mask, OptionalTensor weights, OptionalTensor kl,
    OptionalTensor kl_weights, OptionalTensor nll_weights, OptionalTensor token_coefs, Tensor lengths, int64_t phi,
    double ref_coef, double length_power, std::vector<bool> needs) {
  const Tokens tokens(logps, ref_logps, cu_seqlens, mask, weights, kl, kl_weights, nll_weights, token_coefs, phi,
                      ref_coef, length_power);
  const float upstream = grad ? *data<float>(grad) : 1.f;
  const float *of_scores = data<float>(score_grads), *of_nll = data<float>(nll_grads);
  const int64_t* counts = data<int64_t>(lengths);
  std::vector<Tensor> results;
  float* outputs[kGrads];
  for (int g = 0; g < kGrads; ++g) {
    results.push_back(empty(*logps, {needs[g] ? tokens.num_tokens : 0}));
    outputs[g] = needs[g] ? output(results[g]) : nullptr;
    if (needs[g]) use_huge_pages(outputs[g], tokens.num_tokens * sizeof(float));
  }
  const PreferenceKernels run = kernels();
  const bool only_logps = needs[kLogps] && std::count(needs.begin(), needs.end(), true) == 1;
  const bool constant = only_logps && tokens.constant_slope();
  const auto write = [&](int64_t i) {
    const float score = of_scores ? static_cast<float>(of_scores[i] * tokens.scale(counts[i])) * upstream : 0.f;
    const float nll = of_nll ? of_nll[i] * upstream : 0.f;
    const int64_t first = tokens.cu_seqlens[i], end = tokens.cu_seqlens[i + 1];
    if (constant) {
      run.fill(score + nll, tokens.all.mask ? tokens.all.mask + first : nullptr, end - first, outputs[kLogps] + first);
      return;
    }
    const int64_t step = tokens.phi == 0 ? end : kPhiTokens;
    for (int64_t start = first; start < end; start += step) {
      write_grads(tokens, run, start, std::min(step, end - start), score, nll, upstream, outputs);
    }
  };
  for_sequences(tokens, [&](int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i) write(i);
  });
  return {results[0], results[1], results[2], results[3], results[4], results[5]};
}

// The vectors' logistic, for the test of its errors.
void logistic_op(const Tensor x, const Tensor out) {
  const int64_t n = x.numel();
  double* parts = output<double>(out);
  kernels().logistic(static_cast<const double*>(x.const_data_ptr()), n, parts, parts + n, parts + 2 * n, parts + 3 * n);
}

}  // namespace
}  // namespace fastpo

STABLE_TORCH_LIBRARY_IMPL(fastpo_c, CPU, m) {
  m.impl("preference_loss_forward", TORCH_BOX(&fastpo::preference_loss_forward));
  m.impl("sequence_scores_forward", TORCH_BOX(&fastpo::sequence_scores_forward));
  m.impl("preference_loss_backward", TORCH_BOX(&fastpo::preference_loss_backward));
  m.impl("logistic", TORCH_BOX(&fastpo::logistic_op));
}
