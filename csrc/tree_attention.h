// What the vector kernels of tree_attention (tree_attention_kernel.h) and the op around them share.
#pragma once

#include <cstdint>

#include "token_logprobs.h"

namespace fastpo {

// [N, heads, D] of some type, unit last stride; strides in bytes.
struct Heads {
  char* data = nullptr;
  int64_t token_stride = 0, head_stride = 0;

  char* at(int64_t token, int64_t head) const { return data + token * token_stride + head * head_stride; }
};

struct Attention {
  Heads q, k, v, out;
  Heads grad_out, grad_q;      // backward only
  float* logsumexp = nullptr;  // [Hq, N]
  float* delta = nullptr;      // [Hq, N], backward only: grad_out . out of each row
  float* grad_k = nullptr;     // [N, Hkv, D], backward only
  float* grad_v = nullptr;     // [N, Hkv, D]
  const float* sinks = nullptr;  // [Hq]
  const int32_t* depth = nullptr;  // [N]
  int64_t tokens = 0, kv_heads = 0, group = 0, size = 0;
  float scale = 1, softcap = 0;  // 0: none
  int64_t window = 0;            // 0: none
  int64_t slots = 0;             // depth of the deepest token + 1
  Type type = Type::float32;

  // A tile is that many tokens, times the query heads of a group in rows.
  int64_t tile_tokens() const { return group >= 48 ? 1 : 48 / group; }
  // The token of a row, from the tile's first on, and the head's place in its group.
  int64_t token(int64_t row) const { return group == 1 ? row : row / group; }
  int64_t member(int64_t row) const { return group == 1 ? 0 : row % group; }
};

// A piece of the preorder that one thread walks.
struct Chunk {
  int64_t first, last;  // tokens
  const int32_t* path;  // the ancestors of token first, from the root; depth[first] of them
  float* partial;       // [depth[first], 2, D] what this chunk adds to their dK and dV, for one head; backward only
};

// Pairs of tokens in the forward of one query head, for the record.
struct Pairs {
  int64_t visible = 0, computed = 0;
};

}  // namespace fastpo
