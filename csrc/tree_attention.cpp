// tree_attention on the CPU: implements the fastpo_c::tree_attention_* ops. Checks the tree, cuts the preorder into
// chunks and hands them to threads; tree_attention_kernel.h has the vectors.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "parallel.h"
#include "tensors.h"
#include "tree_attention.h"
#include "user_error.h"
#define FASTPO_TARGET_INCLUDE "tree_attention_kernel.h"
#include "simd_targets.h"

namespace fastpo {
namespace {

using torch::stable::Tensor;

struct Kernels {
  decltype(&generic::forward_chunk) forward;
  decltype(&generic::backward_chunk) backward;
  decltype(&generic::forward_floats) forward_floats, backward_floats;
  decltype(&generic::count_pairs) count;
};

#define FASTPO_KERNELS(isa) \
  Kernels { isa::forward_chunk, isa::backward_chunk, isa::forward_floats, isa::backward_floats, isa::count_pairs }

Kernels kernels() { return FASTPO_PICK(FASTPO_KERNELS); }

Heads heads(const Tensor& tensor) {
  const int64_t element = static_cast<int64_t>(tensor.element_size());
  return {data<char>(tensor), tensor.stride(0) * element, tensor.stride(1) * element};
}

Attention attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& logsumexp,
                    const std::optional<Tensor>& sinks, const Tensor& depth, double scale, double softcap,
                    int64_t window) {
  Attention a;
  a.q = heads(q);
  a.k = heads(k);
  a.v = heads(v);
  a.out = heads(out);
  a.logsumexp = data(logsumexp);
  a.sinks = sinks ? data(*sinks) : nullptr;
  a.depth = data<int32_t>(depth);
  a.tokens = q.size(0);
  a.kv_heads = k.size(1);
  a.group = q.size(1) / k.size(1);
  a.size = q.size(2);
  a.scale = static_cast<float>(scale);
  a.softcap = static_cast<float>(softcap);
  a.window = window;
  a.type = type_of(q, "q");
  return a;
}

// A forest in preorder: each token at most one below the one before it.
void check_tree(const Attention& a, const int32_t* subtree_end) {
  std::vector<int32_t> path;
  for (int64_t i = 0; i < a.tokens; ++i) {
    const int64_t depth = a.depth[i];
    if (depth < 0 || depth > static_cast<int64_t>(path.size())) {
      user_error("tree.depth has ", depth, " at node ", i, "; it should be from 0 to ", path.size(),
                 ", one below the node before it at most");
    }
    for (; static_cast<int64_t>(path.size()) > depth; path.pop_back()) {
      if (subtree_end[path.back()] != i) {
        user_error("tree.subtree_end has ", subtree_end[path.back()], " at node ", path.back(), "; it should be ", i,
                   ", where the depth falls to its own again");
      }
    }
    path.push_back(static_cast<int32_t>(i));
  }
  for (const int32_t node : path) {
    if (subtree_end[node] != a.tokens) {
      user_error("tree.subtree_end has ", subtree_end[node], " at node ", node, "; it should be ", a.tokens,
                 ", where the forest ends");
    }
  }
}

// How the walk is divided. It depends on the tree and the heads only: no result depends on the number of threads.
struct Plan {
  std::vector<Chunk> chunks;
  std::vector<int32_t> paths;
  std::unique_ptr<float[]> partials;  // backward: [Hkv, floats of all chunks], written before it is read
  int64_t floats = 0, work = 0;

  Plan(Attention& a, bool backward) {
    constexpr int64_t kTasks = 32, kLeast = 1 << 18;  // tasks wanted; scores that are worth one
    const auto cost = [&](int64_t i) {
      const int64_t seen = a.depth[i] + 1;
      return ((a.window != 0 ? std::min(seen, a.window) : seen) + 16) * a.group;
    };
    for (int64_t i = 0; i < a.tokens; ++i) {
      work += cost(i);
      a.slots = std::max<int64_t>(a.slots, a.depth[i] + 1);
    }
    const int64_t count = std::max<int64_t>(1, std::min((kTasks + a.kv_heads - 1) / a.kv_heads, work / kLeast));
    std::vector<int32_t> path;
    std::vector<int64_t> offsets;
    const int64_t tile = a.tile_tokens();
    int64_t done = 0;
    for (int64_t first = 0; first < a.tokens; first += tile) {
      if (done * count >= work * static_cast<int64_t>(chunks.size())) {
        path.resize(a.depth[first]);
        if (!chunks.empty()) chunks.back().last = first;
        chunks.push_back({first, a.tokens, nullptr, nullptr});
        offsets.push_back(static_cast<int64_t>(paths.size()));
        paths.insert(paths.end(), path.begin(), path.end());
      }
      for (int64_t i = first; i < std::min(a.tokens, first + tile); ++i) {
        done += cost(i);
        path.resize(a.depth[i]);
        path.push_back(static_cast<int32_t>(i));
      }
    }
    floats = static_cast<int64_t>(paths.size()) * 2 * a.size;
    if (backward) partials.reset(new float[floats * a.kv_heads]);
    for (size_t c = 0; c < chunks.size(); ++c) {
      chunks[c].path = paths.data() + offsets[c];
      chunks[c].partial = partials.get() + offsets[c] * 2 * a.size;
    }
  }

  // f(head, chunk) for all of them, on any thread.
  template <class F>
  void run(const Attention& a, const F& f) const {
    const int64_t count = static_cast<int64_t>(chunks.size());
    for_each_task(a.kv_heads * count, a.kv_heads * work * a.size, [&](int64_t task) {
      Chunk chunk = chunks[task % count];
      const int64_t head = task / count;
      if (partials) chunk.partial += head * floats;
      f(head, chunk);
    });
  }
};

// Zeroed floats at a cache line.
struct Memory {
  float* data;
  explicit Memory(int64_t floats) {
    const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64;
    data = static_cast<float*>(std::aligned_alloc(64, bytes));
    if (data == nullptr) throw std::bad_alloc();
    std::memset(data, 0, bytes);
  }
  ~Memory() { std::free(data); }
  Memory(const Memory&) = delete;
};

void forward_op(const Tensor q, const Tensor k, const Tensor v, const Tensor subtree_end, const Tensor depth,
                const std::optional<Tensor> sinks, double scale, double softcap, int64_t window, const Tensor out,
                const Tensor logsumexp) {
  Attention a = attention(q, k, v, out, logsumexp, sinks, depth, scale, softcap, window);
  check_tree(a, data<int32_t>(subtree_end));
  const Plan plan(a, false);
  const Kernels kernel = kernels();
  plan.run(a, [&](int64_t head, const Chunk& chunk) {
    const Memory memory(kernel.forward_floats(a));
    kernel.forward(a, head, chunk, memory.data);
  });
}

// What the chunks behind a token's own have found for it, in their order.
void add_partials(const Attention& a, const Plan& plan) {
  for_each_task(a.kv_heads, a.kv_heads * plan.floats, [&](int64_t head) {
    for (const Chunk& chunk : plan.chunks) {
      const float* partial = chunk.partial + head * plan.floats;
      for (int64_t slot = 0; slot < a.depth[chunk.first]; ++slot) {
        const int64_t at = (chunk.path[slot] * a.kv_heads + head) * a.size;
        for (int64_t d = 0; d < a.size; ++d) a.grad_k[at + d] += partial[slot * 2 * a.size + d];
        for (int64_t d = 0; d < a.size; ++d) a.grad_v[at + d] += partial[(slot * 2 + 1) * a.size + d];
      }
    }
  });
}

void backward_op(const Tensor grad_out, const Tensor q, const Tensor k, const Tensor v, const Tensor out,
                 const Tensor logsumexp, const Tensor depth, double scale, double softcap, int64_t window,
                 const Tensor grad_q, const Tensor grad_k, const Tensor grad_v, const Tensor delta) {
  Attention a = attention(q, k, v, out, logsumexp, std::nullopt, depth, scale, softcap, window);
  a.grad_out = heads(grad_out);
  a.grad_q = heads(grad_q);
  a.grad_k = data(grad_k);
  a.grad_v = data(grad_v);
  a.delta = data(delta);
  const Plan plan(a, true);
  const Kernels kernel = kernels();
  plan.run(a, [&](int64_t head, const Chunk& chunk) {
    const Memory memory(kernel.backward_floats(a));
    kernel.backward(a, head, chunk, memory.data);
  });
  add_partials(a, plan);
}

// Pairs that the forward of one head of keys sees, and those that it computes.
std::tuple<int64_t, int64_t> pairs_op(const Tensor depth, int64_t group, int64_t window) {
  Attention a;
  a.depth = data<int32_t>(depth);
  a.tokens = depth.size(0);
  a.group = group;
  a.window = window;
  const Pairs pairs = kernels().count(a, Chunk{0, a.tokens, nullptr, nullptr});
  return {pairs.visible, pairs.computed};
}

}  // namespace
}  // namespace fastpo

STABLE_TORCH_LIBRARY_IMPL(fastpo_c, CPU, m) {
  m.impl("tree_attention_forward", TORCH_BOX(&fastpo::forward_op));
  m.impl("tree_attention_backward", TORCH_BOX(&fastpo::backward_op));
  m.impl("tree_attention_pairs", TORCH_BOX(&fastpo::pairs_op));
}
