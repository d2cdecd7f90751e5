#include "tree.h"

#include <algorithm>
#include <limits>
#include <utility>

namespace fastpo {

SequenceNodes sequence_nodes(const Shape& tree, std::span<const int64_t> leaves, std::span<const int64_t> starts) {
  SequenceNodes out;
  out.cu_seqlens.reserve(leaves.size() + 1);
  out.cu_seqlens.push_back(0);
  for (size_t s = 0; s < leaves.size(); ++s) {
    out.cu_seqlens.push_back(out.cu_seqlens.back() + std::max<int64_t>(0, tree.depth[leaves[s]] + 1 - starts[s]));
  }
  out.nodes.resize(out.cu_seqlens.back());
  for (size_t s = 0; s < leaves.size(); ++s) {
    int64_t node = leaves[s];
    for (int64_t at = out.cu_seqlens[s + 1]; at > out.cu_seqlens[s]; node = tree.parent[node]) out.nodes[--at] = node;
  }
  return out;
}

std::vector<int64_t> trained_nodes(const Shape& tree, std::span<const int64_t> leaves, std::span<const int64_t> starts) {
  const size_t n = tree.parent.size();
  std::vector<int64_t> least(n, std::numeric_limits<int64_t>::max());  // start of the sequences through a node
  for (size_t s = 0; s < leaves.size(); ++s) least[leaves[s]] = std::min(least[leaves[s]], starts[s]);
  for (size_t i = n; i-- > 0;) {
    if (tree.parent[i] >= 0) least[tree.parent[i]] = std::min(least[tree.parent[i]], least[i]);
  }
  std::vector<int64_t> nodes;
  for (size_t i = 0; i < n; ++i) {
    if (least[i] <= tree.depth[i]) nodes.push_back(static_cast<int64_t>(i));
  }
  return nodes;
}

// A piece of the tips a..b holds tips[b] - tips[a] nodes and the path to tips[a]. Of that path, shared(a) nodes lie on
// the path to the tip before as well: what a cut there puts into two pieces.
std::vector<int64_t> cut(const Shape& tree, int64_t budget) {
  std::vector<int64_t> tips;
  for (size_t i = 0; i < tree.subtree_end.size(); ++i) {
    if (tree.subtree_end[i] == static_cast<int64_t>(i) + 1) tips.push_back(static_cast<int64_t>(i));
  }
  using Cost = std::pair<int64_t, int64_t>;  // nodes in two pieces, pieces
  const size_t n = tips.size();
  const auto path = [&](size_t a) { return tree.depth[tips[a]] + 1; };
  const auto shared = [&](size_t a) { return path(a) - (tips[a] - (a == 0 ? -1 : tips[a - 1])); };
  std::vector<Cost> best(n + 1, Cost{std::numeric_limits<int64_t>::max(), 0});  // of the first b tips
  std::vector<size_t> start(n + 1, 0);                                         // of the last piece of that cut
  best[0] = {0, 0};
  for (size_t b = 0; b < n; ++b) {
    for (size_t a = b + 1; a-- > 0 && tips[b] - tips[a] < budget;) {
      if (tips[b] - tips[a] + path(a) > budget) continue;
      const Cost cost{best[a].first + shared(a), best[a].second + 1};
      if (cost < best[b + 1]) best[b + 1] = cost, start[b + 1] = a;
    }
  }
  std::vector<int64_t> pieces;
  for (size_t b = n; b > 0; b = start[b]) {
    pieces.push_back(tips[b - 1] + 1);
    pieces.push_back(tips[start[b]]);
  }
  std::reverse(pieces.begin(), pieces.end());
  return pieces;
}

}  // namespace fastpo
