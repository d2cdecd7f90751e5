// token_logprobs in CUDA: fastpo_c::token_logprobs_forward and _backward, schemas and meaning in op.py and reference.py.
//
// Floor: the logits' bytes over the memory bandwidth, once forward, twice backward. At 2 bytes an element an H100 has 17
// issue slots per element and direction before arithmetic costs more than memory; the forward needs about 6, 9 with
// statistics, the backward about 6 for two transfers. What is left to do is to keep loads in flight: a thread
// issues kUnroll 16-byte loads before it uses the first, 64 bytes each of 1024 threads or more per multiprocessor,
// twice what bandwidth times latency asks for. Predicted: 90% of the bandwidth that a plain copy reaches.
// Status: compiled for sm_80, sm_90 and sm_100 without spills; tested in the emulator of tests/emulated_cuda; not yet run
// on a GPU.

#include <algorithm>
#include <limits>
#include <optional>

#include "token_logprobs_kernels.cuh"

namespace fastpo {
namespace {

Batch batch_of(const Tensor& logits, const Tensor& labels, const std::optional<Tensor>& temperatures, double temperature,
               double logit_softcap, int64_t ignore_index) {
  STD_TORCH_CHECK(logits.size(2) < std::numeric_limits<int>::max() / 2, "logits has a row of ", logits.size(2),
                  " elements; it should have fewer than 2^30");
  STD_TORCH_CHECK(labels.numel() <= std::numeric_limits<int>::max(), "logits has ", labels.numel(),
                  " rows; it should have fewer than 2^31");
  return {Rows(logits),
          static_cast<const int64_t*>(labels.const_data_ptr()),
          temperatures ? static_cast<const float*>(temperatures->const_data_ptr()) : nullptr,
          static_cast<float>(temperature),
          static_cast<float>(logit_softcap),
          logit_softcap == 0 ? 0 : static_cast<float>(1 / logit_softcap),
          ignore_index,
          labels.numel(),
          static_cast<int>(logits.size(2))};
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

float* output(const Tensor& tensor) {
  return tensor.numel() == 0 ? nullptr : static_cast<float*>(tensor.mutable_data_ptr());
}

template <typename T, bool STATS, bool TOPK>
void launch_forward(const Tensor& logits, const Batch& batch, const Outputs& out) {
  const int64_t tiles = ceil_div(batch.vocab, Vector<T>::kSize * kThreads * kUnroll);
  const int64_t wanted = ceil_div(kBlocksPerProcessor * multiprocessors(logits), batch.count);
  const int64_t tiles_each = ceil_div(tiles, std::min(wanted, tiles));
  const int part_vectors = static_cast<int>(tiles_each * kThreads * kUnroll);
  const unsigned splits = static_cast<unsigned>(ceil_div(tiles, tiles_each));
  const cudaStream_t stream = current_stream(logits);
  const dim3 grid(static_cast<unsigned>(batch.count), splits);
  if (splits == 1) {
    forward_kernel<T, STATS, TOPK><<<grid, kThreads, 0, stream>>>(batch, out, part_vectors, nullptr);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    return;
  }
  const int64_t shape[] = {batch.count, int64_t{splits}, kPartFloats<TOPK>};
  const Tensor parts = torch::stable::new_empty(logits, {shape, 3}, torch::headeronly::ScalarType::Float);
  float* data = static_cast<float*>(parts.mutable_data_ptr());
  forward_kernel<T, STATS, TOPK><<<grid, kThreads, 0, stream>>>(batch, out, part_vectors, data);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  const unsigned blocks = static_cast<unsigned>(ceil_div(batch.count, kJoinRows));
  join_kernel<T, STATS, TOPK><<<blocks, 32 * kJoinRows, 0, stream>>>(batch, out, static_cast<int>(splits), data);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T>
void forward_as(const Tensor& logits, const Batch& batch, const Outputs& out) {
  if (out.wants_top()) return launch_forward<T, true, true>(logits, batch, out);
  if (out.wants_stats()) return launch_forward<T, true, false>(logits, batch, out);
  launch_forward<T, false, false>(logits, batch, out);
}

template <typename T>
void backward_as(const Tensor& logits, const Batch& batch, const Tensor& grad_logits, const float* normalizer,
                 const float* grad_logps, const float* coefs) {
  const int64_t tile = int64_t{kThreads} * kBackwardUnroll * Vector<T>::kSize;
  const int64_t tiles = ceil_div(batch.vocab, tile);
  STD_TORCH_CHECK(batch.count * tiles <= std::numeric_limits<int>::max(), "logits has ", batch.count, " rows of ",
                  batch.vocab, " elements; one launch takes 2^31 tiles of ", tile, ": split the batch");
  const unsigned blocks = static_cast<unsigned>(batch.count * tiles);
  const auto kernel = coefs ? backward_kernel<T, true> : backward_kernel<T, false>;
  kernel<<<blocks, kThreads, 0, current_stream(logits)>>>(batch, Rows(grad_logits), static_cast<unsigned>(tiles),
                                                          normalizer, grad_logps, coefs);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Calls f with a null pointer of the logits' element type.
template <typename F>
void with_element_type(const Tensor& logits, const F& f) {
  switch (logits.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      return f(static_cast<float*>(nullptr));
    case torch::headeronly::ScalarType::BFloat16:
      return f(static_cast<__nv_bfloat16*>(nullptr));
    case torch::headeronly::ScalarType::Half:
      return f(static_cast<__half*>(nullptr));
    default:
      STD_TORCH_CHECK(false, "logits has a type without a CUDA kernel; it should be float32, bfloat16 or float16");
  }
}

void forward(const Tensor logits, const Tensor labels, const std::optional<Tensor> temperatures,
             const std::optional<Tensor> label_set, double temperature, double logit_softcap, int64_t ignore_index,
             int64_t topk, const Tensor logps, const Tensor normalizer, const Tensor logsumexp, const Tensor entropy,
             const Tensor sum_p2, const Tensor topk_mass, const Tensor topk_entropy, const Tensor label_set_prob) {
  if (labels.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const Batch batch = batch_of(logits, labels, temperatures, temperature, logit_softcap, ignore_index);
  STD_TORCH_CHECK(topk >= 1 && topk <= kMaxTopk, "topk is ", topk, "; it should be from 1 to ", kMaxTopk);
  float* max = output(normalizer);
  const Outputs out{output(logps),
                    max,
                    max + batch.count,
                    output(logsumexp),
                    output(entropy),
                    output(sum_p2),
                    output(topk_mass),
                    output(topk_entropy),
                    output(label_set_prob),
                    label_set ? static_cast<const int64_t*>(label_set->const_data_ptr()) : nullptr,
                    label_set ? static_cast<int>(label_set->numel()) : 0,
                    static_cast<int>(std::min<int64_t>(topk, batch.vocab))};
  with_element_type(logits, [&](auto* type) {
    forward_as<std::remove_pointer_t<decltype(type)>>(logits, batch, out);
  });
}

void backward(const Tensor logits, const Tensor labels, const std::optional<Tensor> temperatures, double temperature,
              double logit_softcap, int64_t ignore_index, const Tensor normalizer, const Tensor grad_logps,
              const std::optional<Tensor> coefs, const Tensor grad_logits) {
  if (labels.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const Batch batch = batch_of(logits, labels, temperatures, temperature, logit_softcap, ignore_index);
  const auto data = [](const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); };
  with_element_type(logits, [&](auto* type) {
    backward_as<std::remove_pointer_t<decltype(type)>>(logits, batch, grad_logits, data(normalizer), data(grad_logps),
                                                       coefs ? data(*coefs) : nullptr);
  });
}

}  // namespace
}  // namespace fastpo

STABLE_TORCH_LIBRARY_IMPL(fastpo_c, CUDA, m) {
  m.impl("token_logprobs_forward", TORCH_BOX(&fastpo::forward));
  m.impl("token_logprobs_backward", TORCH_BOX(&fastpo::backward));
}
