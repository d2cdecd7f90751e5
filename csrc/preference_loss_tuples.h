// The tuples of preference_loss on the CPU: link terms, NLL terms, and their slopes in each sequence's sums.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "links.h"
#include "preference_loss.h"

namespace fastpo {

enum NllNormalizer { kSequence, kBatch, kNone };  // positions in objectives.NLL_NORMALIZERS

// The groups Tuples and TupleSettings of records.py.
struct Tuples {
  int64_t count, members, terms;
  const int64_t* index;  // [P, K]
  const float *weights, *margins, *params, *beta_scales;
  const int64_t* links;  // [J]
  std::vector<double> table, nll;  // [J, K+5], [K] or empty
  int64_t nll_normalizer;
  double factor;  // of the reduction: 1 / P, or 1
};

// What the tuples need of each sequence.
struct Sequences {
  int64_t count;
  const CurveOf<double>* mapped;  // f(S), f'(S)
  const float* nll;  // sum u l
  const int64_t* lengths;
};

// The mean number of NLL tokens of a tuple.
inline double batch_tokens(const Tuples& t, const int64_t* lengths) {
  if (t.nll.empty() || t.nll_normalizer != kBatch || t.count == 0) return 0;
  int64_t total = 0;
  for (int64_t at = 0; at < t.count * t.members; ++at) {
    if (t.nll[at % t.members] != 0 && t.index[at] >= 0) total += lengths[t.index[at]];
  }
  return static_cast<double>(total) / static_cast<double>(t.count);
}

// -nll_k / N of a member whose sequence has n tokens; 0 for an empty one.
inline double nll_factor(const Tuples& t, int64_t k, int64_t n, double batch) {
  const double size = t.nll_normalizer == kNone ? 1 : t.nll_normalizer == kBatch ? batch : static_cast<double>(n);
  return size > 0 ? -t.nll[k] / size : 0;
}

constexpr int64_t kTupleBlock = 128;  // tuples whose links are taken together

// The logistic of each of n <= kTupleBlock numbers, by the vectors of preference_loss_logistic.h.
struct LogisticBlock {
  double up[kTupleBlock], down[kTupleBlock], cost_up[kTupleBlock], cost_down[kTupleBlock];

  Logistic<double> operator[](int64_t i) const { return {up[i], down[i], cost_up[i], cost_down[i]}; }
};

// The losses of n <= kTupleBlock tuples before the reduction. score_grads, nll_grads [n, K] become d loss / d S and
// d loss / d (sum u l). MEMBERS: how many a tuple has, where that is known when compiling; 0: t.members.
template <int64_t MEMBERS>
void tuple_losses(const Tuples& t, const Sequences& s, int64_t first, int64_t n, double batch, LogisticKernel logistic,
                  float* losses, double* score_grads, double* nll_grads) {
  const int64_t members = MEMBERS == 0 ? t.members : MEMBERS;
  const int64_t* index = t.index + first * members;
  double sums[kTupleBlock] = {}, z[kTupleBlock] = {};
  bool here[kTupleBlock];
  LogisticBlock at;
  std::fill_n(score_grads, n * members, 0.);
  for (int64_t j = 0; j < t.terms; ++j) {
    const double* coefs = t.table.data() + j * (members + 5);
    const double* rest = coefs + members;
    const double margin = rest[1], margin_coef = rest[2], param = rest[3], weight = rest[4];
    const int link = static_cast<int>(t.links[j]);
    const auto scale_of = [&](int64_t p) { return t.beta_scales ? rest[0] * t.beta_scales[first + p] : rest[0]; };
    for (int64_t p = 0; p < n; ++p) {
      const int64_t* own = index + p * members;
      double sum = 0;
      here[p] = false;
      for (int64_t k = 0; k < members; ++k) {
        if (own[k] < 0 || coefs[k] == 0) continue;
        here[p] = true;
        sum += coefs[k] * s.mapped[own[k]].value;
      }
      z[p] = scale_of(p) * sum - margin;
      if (t.margins && margin_coef != 0) z[p] -= margin_coef * t.margins[first + p];
    }
    if (takes_logistic(link)) logistic(z, n, at.up, at.down, at.cost_up, at.cost_down);
    for (int64_t p = 0; p < n; ++p) {
      if (!here[p]) continue;
      const double own_param = t.params ? t.params[(first + p) * t.terms + j] : param;
      const CurveOf<double> curve = link_at(link, z[p], own_param, takes_logistic(link) ? at[p] : Logistic<double>{});
      sums[p] += weight * curve.value;
      const double omega = t.weights ? t.weights[first + p] : 1;
      const double slope = weight * curve.slope * omega * t.factor * scale_of(p);
      for (int64_t k = 0; k < members; ++k) score_grads[p * members + k] += slope * coefs[k];
    }
  }
  for (int64_t p = 0; p < n; ++p) {
    const double omega = t.weights ? t.weights[first + p] : 1;
    for (int64_t k = 0; k < members; ++k) {
      const int64_t own = index[p * members + k], at_k = p * members + k;
      score_grads[at_k] *= own < 0 ? 0 : s.mapped[own].slope;
      if (t.nll.empty()) continue;
      const double nll = own < 0 || t.nll[k] == 0 ? 0 : nll_factor(t, k, s.lengths[own], batch);
      if (nll != 0) sums[p] += nll * s.nll[own];
      nll_grads[at_k] = nll * omega * t.factor;
    }
    losses[p] = static_cast<float>(omega * sums[p]);
  }
}

// out[i] = what by_member [P, K] has for sequence i, added up in the order of the tuples: no result depends on threads.
inline void sum_over_tuples(const Tuples& t, const double* by_member, int64_t num_sequences, float* out) {
  std::vector<double> sums(num_sequences);
  for (int64_t at = 0; at < t.count * t.members; ++at) {
    if (t.index[at] >= 0) sums[t.index[at]] += by_member[at];
  }
  for (int64_t i = 0; i < num_sequences; ++i) out[i] = static_cast<float>(sums[i]);
}

inline bool index_in_range(const Tuples& t, int64_t num_sequences) {
  bool inside = true;
  for (int64_t at = 0; at < t.count * t.members; ++at) inside &= t.index[at] >= -1 && t.index[at] < num_sequences;
  return inside;
}

}  // namespace fastpo
