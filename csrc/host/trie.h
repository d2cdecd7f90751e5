// A trie over token ids that grows by appending, and its preorder arrays. Integer work only; no torch.
#pragma once

#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

namespace fastpo {

// One entry per node, in preorder: a node's subtree is the range [i, subtree_end[i]).
struct Preorder {
  std::vector<int64_t> tokens;
  std::vector<int64_t> parent;       // -1 for a root
  std::vector<int64_t> depth;        // 0 for a root: the position of the token in every sequence through it
  std::vector<int64_t> subtree_end;
  std::vector<int64_t> position;     // insertion id -> preorder index
};

// Nodes are numbered as they are inserted. A node's first child lies in an array, so that walking an unbranched run
// costs one comparison a token; further children are found in one hash map keyed by (parent, token).
class Trie {
 public:
  // Adds a sequence below `from` (-1: a new or existing root) and returns the node of its last token, or `from` itself
  // if the sequence is empty.
  int64_t insert(std::span<const int64_t> tokens, int64_t from = -1);

  // insert() of tokens[cu_seqlens[s]:cu_seqlens[s+1]] for every s; returns the node of each one's last token.
  std::vector<int64_t> insert_all(std::span<const int64_t> tokens, std::span<const int64_t> cu_seqlens);

  int64_t size() const { return static_cast<int64_t>(tokens_.size()); }
  Preorder preorder() const;

 private:
  int64_t child(int64_t parent, int64_t token);
  int64_t add(int64_t parent, int64_t token);

  struct Edge {
    int64_t parent;
    int64_t token;
    bool operator==(const Edge&) const = default;
  };
  struct EdgeHash {
    size_t operator()(const Edge& edge) const;
  };

  std::vector<int64_t> tokens_, parents_, first_child_, last_child_, next_sibling_;
  int64_t first_root_ = -1, last_root_ = -1;
  std::unordered_map<Edge, int64_t, EdgeHash> edges_;  // every child but the first of its parent
};

}  // namespace fastpo
