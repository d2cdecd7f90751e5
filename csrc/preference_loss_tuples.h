// The tuples of preference_loss on the CPU: link terms, NLL terms, and their slopes in each sequence's sums.
#pragma once

#include <cstdint>
#include <vector>

#include "links.h"

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

// The loss of tuple p before the reduction. score_grads, nll_grads [K] become d loss / d S and d loss / d (sum u l).
// MEMBERS: how many a tuple has, where that is known when compiling; 0: t.members.
template <int64_t MEMBERS>
float tuple_loss(const Tuples& t, const Sequences& s, int64_t p, double batch, double* score_grads,
                 double* nll_grads) {
  const int64_t members = MEMBERS == 0 ? t.members : MEMBERS;
  const int64_t* own = t.index + p * members;
  const double omega = t.weights ? t.weights[p] : 1, beta_scale = t.beta_scales ? t.beta_scales[p] : 1;
  double loss = 0;
  for (int64_t k = 0; k < members; ++k) score_grads[k] = 0;
  for (int64_t j = 0; j < t.terms; ++j) {
    const double* coefs = t.table.data() + j * (members + 5);
    const double* rest = coefs + members;
    const double scale = rest[0] * beta_scale, margin = rest[1], margin_coef = rest[2];
    const double param = rest[3], weight = rest[4];
    double sum = 0;
    bool here = false;
    for (int64_t k = 0; k < members; ++k) {
      if (own[k] < 0 || coefs[k] == 0) continue;
      here = true;
      sum += coefs[k] * s.mapped[own[k]].value;
    }
    if (!here) continue;
    double z = scale * sum - margin;
    if (t.margins && margin_coef != 0) z -= margin_coef * t.margins[p];
    const double own_param = t.params ? t.params[p * t.terms + j] : param;
    const CurveOf<double> at = link_at(static_cast<int>(t.links[j]), z, own_param);
    loss += weight * at.value;
    const double slope = weight * at.slope * omega * t.factor * scale;
    for (int64_t k = 0; k < members; ++k) score_grads[k] += slope * coefs[k];
  }
  for (int64_t k = 0; k < members; ++k) score_grads[k] *= own[k] < 0 ? 0 : s.mapped[own[k]].slope;
  for (int64_t k = 0; k < members && !t.nll.empty(); ++k) {
    const double nll = own[k] < 0 || t.nll[k] == 0 ? 0 : nll_factor(t, k, s.lengths[own[k]], batch);
    if (nll != 0) loss += nll * s.nll[own[k]];
    nll_grads[k] = nll * omega * t.factor;
  }
  return static_cast<float>(omega * loss);
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
