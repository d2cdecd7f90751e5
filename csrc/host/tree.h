// What is asked of a forest in preorder: the nodes of its sequences, and where to cut it. Integer work only; no torch.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace fastpo {

// The arrays of fastpo.types.TokenTree that tell its shape, [N] each.
struct Shape {
  std::span<const int64_t> parent, depth, subtree_end;
};

struct SequenceNodes {
  std::vector<int64_t> nodes;       // [T], a sequence's counted nodes in order, one sequence behind the other
  std::vector<int64_t> cu_seqlens;  // [S+1]
};

// The nodes from depth starts[s] down to leaves[s], for every sequence s. O(T).
SequenceNodes sequence_nodes(const Shape& tree, std::span<const int64_t> leaves, std::span<const int64_t> starts);

// The nodes that some sequence counts, ascending: those no shallower than the least start below them. O(N + S).
std::vector<int64_t> trained_nodes(const Shape& tree, std::span<const int64_t> leaves, std::span<const int64_t> starts);

// Pieces of at most `budget` nodes, two numbers each: (first, end) stands for the path to the childless node `first`
// and the nodes first:end. Every node is in a piece, and the fewest possible nodes are in several; of such cuts, one of
// the fewest pieces. Only runs of neighbouring childless nodes make pieces. A path longer than the budget is the
// caller's error. O(tips * min(tips, budget)), tips being the childless nodes.
std::vector<int64_t> cut(const Shape& tree, int64_t budget);

}  // namespace fastpo
