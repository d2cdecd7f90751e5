#include "trie.h"

namespace fastpo {

size_t Trie::EdgeHash::operator()(const Edge& edge) const {
  uint64_t h = static_cast<uint64_t>(edge.parent) * 0x9E3779B97F4A7C15ull ^ static_cast<uint64_t>(edge.token);
  h ^= h >> 31;
  return static_cast<size_t>(h * 0xD6E8FEB86659FD93ull);
}

int64_t Trie::insert(std::span<const int64_t> tokens, int64_t from) {
  int64_t node = from;
  for (const int64_t token : tokens) {
    const int64_t found = child(node, token);
    node = found >= 0 ? found : add(node, token);
  }
  return node;
}

std::vector<int64_t> Trie::insert_all(std::span<const int64_t> tokens, std::span<const int64_t> cu_seqlens) {
  std::vector<int64_t> last;
  last.reserve(cu_seqlens.size() - 1);
  for (size_t s = 0; s + 1 < cu_seqlens.size(); ++s) {
    last.push_back(insert(tokens.subspan(cu_seqlens[s], cu_seqlens[s + 1] - cu_seqlens[s])));
  }
  return last;
}

int64_t Trie::child(int64_t parent, int64_t token) {
  const int64_t first = parent < 0 ? first_root_ : first_child_[parent];
  if (first < 0 || tokens_[first] == token) return first;
  if (next_sibling_[first] < 0) return -1;
  const auto found = edges_.find({parent, token});
  return found == edges_.end() ? -1 : found->second;
}

int64_t Trie::add(int64_t parent, int64_t token) {
  const int64_t node = size();
  tokens_.push_back(token);
  parents_.push_back(parent);
  first_child_.push_back(-1);
  last_child_.push_back(-1);
  next_sibling_.push_back(-1);
  int64_t& first = parent < 0 ? first_root_ : first_child_[parent];
  int64_t& last = parent < 0 ? last_root_ : last_child_[parent];
  if (first < 0) {
    first = node;
  } else {
    next_sibling_[last] = node;
    edges_.emplace(Edge{parent, token}, node);
  }
  last = node;
  return node;
}

// Depth first without a stack: down to the first child, else on to the next sibling, else up; a node's subtree ends
// where the walk leaves it upwards or sidewards.
Preorder Trie::preorder() const {
  const int64_t n = size();
  Preorder out;
  out.tokens.reserve(n);
  out.parent.reserve(n);
  out.depth.reserve(n);
  out.subtree_end.assign(n, 0);
  out.position.assign(n, -1);
  int64_t node = first_root_;
  int64_t depth = 0;
  while (node >= 0) {
    const int64_t parent = parents_[node];
    out.position[node] = static_cast<int64_t>(out.tokens.size());
    out.tokens.push_back(tokens_[node]);
    out.parent.push_back(parent < 0 ? -1 : out.position[parent]);
    out.depth.push_back(depth);
    if (first_child_[node] >= 0) {
      node = first_child_[node];
      ++depth;
      continue;
    }
    while (node >= 0) {
      out.subtree_end[out.position[node]] = static_cast<int64_t>(out.tokens.size());
      if (next_sibling_[node] >= 0) break;
      node = parents_[node];
      --depth;
    }
    if (node >= 0) node = next_sibling_[node];
  }
  return out;
}

}  // namespace fastpo
