// Tasks over torch's threads, handed out as threads become free: one slow thread does not hold up the others.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include <torch/csrc/stable/ops.h>

namespace fastpo {

// f(i) for every i in [0, count), in any order. elements: the work in total; little work stays on the calling thread.
template <class F>
void for_each_task(int64_t count, int64_t elements, const F& f) {
  constexpr int64_t kWorthAThread = 16384;
  const int64_t threads = std::min<int64_t>({torch::stable::get_num_threads(), count, elements / kWorthAThread});
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) f(i);
    return;
  }
  const int64_t chunk = std::max<int64_t>(1, count / (threads * 16));
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t start; (start = next.fetch_add(chunk)) < count;) {
      for (int64_t i = start; i < std::min(start + chunk, count); ++i) f(i);
    }
  });
}

}  // namespace fastpo
