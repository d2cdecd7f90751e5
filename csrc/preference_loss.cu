// preference_loss in CUDA: fastpo_c::preference_loss_forward, sequence_scores_forward and preference_loss_backward; schemas
// in op.py, meaning of the arguments in records.py.
//
// Three launches forward (sums of sequences, tuples, slopes of sequences), one backward, whatever the tuples share, and no
// host sync. Floor: 9 bytes a token forward (log-prob, reference, mask), 5 backward (mask, gradient); what follows the
// sums touches S and P elements only. kernels/preference_loss/triton_kernels.py is the same algorithm.
// Status: compiled for sm_80, sm_90 and sm_100 without spills, run in tests/emulated_cuda; not yet run on a GPU.

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "preference_loss_tuples.cuh"

namespace fastpo {
namespace {

using torch::headeronly::ScalarType;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kSearched = 16384;  // elements of the index up to which it is searched, not sorted
constexpr int64_t kTokensPerThread = 8;
constexpr int64_t kMinPart = 4096;  // tokens of a sequence, so that another block is worth it
constexpr int64_t kBlocksPerProcessor = 8;
constexpr int kJoinThreads = 128;

template <typename T = float>
const T* data(const OptionalTensor& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

template <typename T = float>
T* output(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type = ScalarType::Float) {
  return torch::stable::new_empty(like, {shape.begin(), shape.size()}, type);
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

unsigned blocks_for(int64_t count, int64_t each) {
  const int64_t blocks = ceil_div(count, each);
  STD_TORCH_CHECK(blocks < std::numeric_limits<int>::max(), "one launch takes 2^31 blocks, not ", blocks, ": split the batch");
  return static_cast<unsigned>(blocks);
}

Tokens tokens_of(const OptionalTensor& logps, const OptionalTensor& ref_logps, const OptionalTensor& cu_seqlens,
                 const OptionalTensor& mask, const OptionalTensor& weights, const OptionalTensor& kl,
                 const OptionalTensor& kl_weights, const OptionalTensor& nll_weights, const OptionalTensor& token_coefs,
                 int64_t num_sequences, int64_t phi, double ref_coef, double length_power) {
  if (logps) STD_TORCH_CHECK(logps->scalar_type() == ScalarType::Float, "logps should be float32 here");
  return {data(logps),
          data(ref_logps),
          data<int64_t>(cu_seqlens),
          data<uint8_t>(mask),
          data(weights),
          data(kl),
          data(kl_weights),
          data(nll_weights),
          data(token_coefs),
          logps ? logps->numel() : 0,
          num_sequences,
          static_cast<int>(phi),
          static_cast<float>(ref_coef),
          length_power};
}

// Whether four tokens can be loaded at once, at every multiple of four. Gradients are fresh, hence aligned.
bool aligned(const Tokens& t) {
  uintptr_t bits = reinterpret_cast<uintptr_t>(t.mask) % 4;
  for (const float* each : {t.logps, t.ref_logps, t.weights, t.kl, t.kl_weights, t.nll_weights, t.token_coefs}) {
    bits |= reinterpret_cast<uintptr_t>(each) % 16;
  }
  return bits == 0;
}

// Threads of a block and blocks of a sequence, by the mean length.
struct Shape {
  unsigned threads, blocks;
  int splits;

  Shape(const Tokens& tokens, const Tensor& like) {
    const int64_t mean = ceil_div(tokens.count, tokens.num_sequences);
    threads = 32;
    while (threads < kMaxThreads && threads * kTokensPerThread < mean) threads *= 2;
    const int64_t wanted = ceil_div(kBlocksPerProcessor * multiprocessors(like), tokens.num_sequences);
    splits = static_cast<int>(std::clamp<int64_t>(mean / kMinPart, 1, wanted));
    blocks = blocks_for(tokens.num_sequences * splits, 1);
  }
};

void launch_sums(const Tensor& like, const Tokens& tokens, const SequenceSums& out) {
  if (tokens.num_sequences == 0) return;
  const Shape shape(tokens, like);
  const cudaStream_t stream = current_stream(like);
  const bool vectors = aligned(tokens), plain = tokens.plain();
  const auto kernel = vectors ? (plain ? sums_kernel<4, true> : sums_kernel<4, false>)
                              : (plain ? sums_kernel<1, true> : sums_kernel<1, false>);
  if (shape.splits == 1) {
    kernel<<<shape.blocks, shape.threads, 0, stream>>>(tokens, out, 1, nullptr);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    return;
  }
  constexpr int64_t kFields = sizeof(Sums) / sizeof(double);
  const Tensor parts = empty(like, {int64_t{shape.blocks}, kFields}, ScalarType::Double);
  Sums* sums = reinterpret_cast<Sums*>(output<double>(parts));
  kernel<<<shape.blocks, shape.threads, 0, stream>>>(tokens, out, shape.splits, sums);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  join_kernel<<<blocks_for(tokens.num_sequences, kJoinThreads), kJoinThreads, 0, stream>>>(tokens, out, shape.splits, sums);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// values and order of a stable sort.
std::array<Tensor, 2> stable_sort(const Tensor& values) {
  std::array<StableIValue, 4> stack{torch::stable::detail::from(values), torch::stable::detail::from(std::optional<bool>(true)),
                                    torch::stable::detail::from(int64_t{0}), torch::stable::detail::from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

void launch_tuples(const Tensor& like, const Tuples& tuples, Sequences& sequences, const TupleOutputs& out,
                   const Tensor& index, float* score_grads, float* nll_grads, float* loss) {
  const cudaStream_t stream = current_stream(like);
  const int64_t num_entries = index.numel();
  const unsigned per_entry = blocks_for(num_entries, kTupleThreads), per_tuple = blocks_for(tuples.count, kTupleThreads);
  std::vector<Tensor> kept;  // until the launches that read them
  if (num_entries > kSearched) {
    const auto [sorted, order] = stable_sort(torch::stable::flatten(index));
    kept = {sorted, order};
    sequences.order = data<int64_t>(order);
    places_kernel<<<per_entry, kTupleThreads, 0, stream>>>(data<int64_t>(sorted), num_entries, tuples.num_sequences,
                                                           sequences.first, sequences.last);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  if (sequences.nll_tokens && tuples.count > 0 && tuples.num_sequences > 0) {
    count_kernel<<<per_entry, kTupleThreads, 0, stream>>>(tuples, sequences);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  if (tuples.count > 0) {
    tuples_kernel<<<per_tuple, kTupleThreads, 0, stream>>>(tuples, sequences, out);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  const unsigned per_sequence = blocks_for(tuples.num_sequences, kTupleThreads / 32);
  sequences_kernel<<<per_sequence + 1, kTupleThreads, 0, stream>>>(tuples, sequences, out, static_cast<int>(per_tuple),
                                                                   score_grads, nll_grads, loss);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Forward forward(OptionalTensor logps, OptionalTensor ref_logps, OptionalTensor cu_seqlens, OptionalTensor mask,
                OptionalTensor weights, OptionalTensor kl, OptionalTensor kl_weights, OptionalTensor nll_weights,
                OptionalTensor token_coefs, OptionalTensor scores, Tensor index, OptionalTensor tuple_weights,
                OptionalTensor margins, OptionalTensor params, OptionalTensor beta_scales, int64_t phi, double ref_coef,
                double length_power, int64_t score_map, double score_map_coef, std::vector<int64_t> links,
                std::vector<double> table, std::vector<double> nll, int64_t nll_normalizer, bool mean, double beta) {
  const Tensor& like = scores ? *scores : *logps;
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  const int64_t num_sequences = scores ? scores->numel() : cu_seqlens->numel() - 1;
  const int64_t num_tuples = index.size(0), members = index.size(1);
  STD_TORCH_CHECK(nll.size() <= kMaxMembers && links.size() <= kMaxTerms && table.size() <= kMaxTable,
                  "objective has too many members or terms for the cuda backend");
  Tuples tuples{num_tuples, num_sequences, static_cast<int>(members), static_cast<int>(links.size()), data<int64_t>(index),
                data(tuple_weights), data(margins), data(params), data(beta_scales), scores.has_value(), !nll.empty(), mean,
                static_cast<int>(score_map), static_cast<int>(nll_normalizer), static_cast<float>(score_map_coef),
                static_cast<float>(beta), {}, {}, {}};
  std::copy(links.begin(), links.end(), tuples.links);
  std::copy(table.begin(), table.end(), tuples.table);
  std::copy(nll.begin(), nll.end(), tuples.nll);

  const Tensor loss = empty(like, {}), losses = empty(like, {num_tuples});
  const Tensor out_scores = scores ? torch::stable::clone(*scores) : empty(like, {num_sequences});
  const Tensor out_logps = empty(like, {num_sequences}), lengths = empty(like, {num_sequences}, ScalarType::Long);
  const Tensor rewards = empty(like, {num_tuples, members}), out_nll = empty(like, {num_tuples, members});
  const Tensor score_grads = empty(like, {num_sequences}), nll_grads = empty(like, {num_sequences});
  const Tensor sums = empty(like, {2, num_sequences}, ScalarType::Double);
  const Tensor slopes = empty(like, {2, num_tuples, members}, ScalarType::Double);
  const Tensor partials = empty(like, {ceil_div(num_tuples, kTupleThreads)}, ScalarType::Double);
  const Tensor places = empty(like, {2 * num_sequences + 1}, ScalarType::Long);

  double* nll_sums = output<double>(sums);
  double* linear = token_coefs ? nll_sums + num_sequences : nullptr;
  int64_t* first = output<int64_t>(places);
  const bool by_batch = !nll.empty() && nll_normalizer == kBatch;
  auto* nll_tokens = by_batch ? reinterpret_cast<unsigned long long*>(first + 2 * num_sequences) : nullptr;
  const Tokens tokens = tokens_of(logps, ref_logps, cu_seqlens, mask, weights, kl, kl_weights, nll_weights, token_coefs,
                                  num_sequences, phi, ref_coef, length_power);
  launch_sums(like, tokens, {scores ? nullptr : output(out_scores), output(out_logps), nll_sums, linear,
                             output<int64_t>(lengths), first, first + num_sequences, index.numel(), nll_tokens});
  Sequences sequences{output(out_scores), output<int64_t>(lengths), nll_sums, linear, first, first + num_sequences, nullptr,
                      nll_tokens};
  double* score_slopes = output<double>(slopes);
  const TupleOutputs out{output(losses), output(rewards), output(out_nll), score_slopes, score_slopes + index.numel(),
                         output<double>(partials)};
  launch_tuples(like, tuples, sequences, out, index, output(score_grads), output(nll_grads), output(loss));
  return {loss, losses, out_scores, out_logps, lengths, rewards, out_nll, score_grads, nll_grads};
}

std::tuple<Tensor, Tensor> scores_forward(OptionalTensor logps, OptionalTensor ref_logps, OptionalTensor cu_seqlens,
                                          OptionalTensor mask, OptionalTensor weights, OptionalTensor kl,
                                          OptionalTensor kl_weights, OptionalTensor nll_weights,
                                          OptionalTensor token_coefs, int64_t phi, double ref_coef, double length_power) {
  const torch::stable::accelerator::DeviceGuard guard(logps->get_device_index());
  const int64_t num_sequences = cu_seqlens->numel() - 1;
  const Tensor scores = empty(*logps, {num_sequences}), lengths = empty(*logps, {num_sequences}, ScalarType::Long);
  const Tokens tokens = tokens_of(logps, ref_logps, cu_seqlens, mask, weights, kl, kl_weights, nll_weights, token_coefs,
                                  num_sequences, phi, ref_coef, length_power);
  launch_sums(*logps, tokens, {output(scores), nullptr, nullptr, nullptr, output<int64_t>(lengths), nullptr, nullptr, 0, nullptr});
  return {scores, lengths};
}

using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Backward backward(OptionalTensor grad, OptionalTensor score_grads, OptionalTensor nll_grads, OptionalTensor logps,
                  OptionalTensor ref_logps, OptionalTensor cu_seqlens, OptionalTensor mask, OptionalTensor weights,
                  OptionalTensor kl, OptionalTensor kl_weights, OptionalTensor nll_weights, OptionalTensor token_coefs,
                  Tensor lengths, int64_t phi, double ref_coef, double length_power, std::vector<bool> needs) {
  const torch::stable::accelerator::DeviceGuard guard(logps->get_device_index());
  const int64_t num_sequences = lengths.numel();
  const Tokens tokens = tokens_of(logps, ref_logps, cu_seqlens, mask, weights, kl, kl_weights, nll_weights, token_coefs,
                                  num_sequences, phi, ref_coef, length_power);
  constexpr int kGrads = 6;
  std::vector<Tensor> results;
  float* outputs[kGrads];
  for (int g = 0; g < kGrads; ++g) {
    results.push_back(empty(*logps, {needs[g] ? tokens.count : 0}));
    if (num_sequences == 0) torch::stable::zero_(results[g]);
    outputs[g] = needs[g] ? output(results[g]) : nullptr;
  }
  if (num_sequences > 0 && tokens.count > 0) {
    const Shape shape(tokens, *logps);
    const Slopes slopes{data(grad), data(score_grads), data(nll_grads), data<int64_t>(lengths)};
    const TokenGrads out{outputs[0], outputs[1], outputs[2], outputs[3], outputs[4], outputs[5]};
    const bool vectors = aligned(tokens);
    const bool plain = tokens.plain() && std::count(outputs + 1, outputs + kGrads, nullptr) == kGrads - 1;
    const auto kernel = vectors ? (plain ? backward_kernel<4, true> : backward_kernel<4, false>)
                                : (plain ? backward_kernel<1, true> : backward_kernel<1, false>);
    kernel<<<shape.blocks, shape.threads, 0, current_stream(*logps)>>>(tokens, slopes, out, shape.splits);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return {results[0], results[1], results[2], results[3], results[4], results[5]};
}

}  // namespace
}  // namespace fastpo

STABLE_TORCH_LIBRARY_IMPL(fastpo_c, CUDA, m) {
  m.impl("preference_loss_forward", TORCH_BOX(&fastpo::forward));
  m.impl("sequence_scores_forward", TORCH_BOX(&fastpo::scores_forward));
  m.impl("preference_loss_backward", TORCH_BOX(&fastpo::backward));
}
