// path_sum and subtree_sum on the CPU: implements the fastpo_c::tree_path_sum and tree_subtree_sum ops. One walk over the
// preorder with one fp64 sum per depth: nothing is ever subtracted.
#include <algorithm>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "parallel.h"
#include "user_error.h"

namespace fastpo {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kColumns = 64;  // that one task sums side by side

struct Tree {
  int64_t root, end;  // its nodes
  int64_t levels;     // its greatest depth and one
};

// The trees of a forest by its depths in preorder, which are checked.
std::vector<Tree> trees_of(const int64_t* depth, int64_t num_nodes) {
  std::vector<Tree> trees;
  int64_t previous = -1, deepest = -1;
  bool good = true;
  for (int64_t i = 0; i < num_nodes; ++i) {
    good &= depth[i] >= 0 && depth[i] <= previous + 1;
    previous = depth[i];
    if (previous == 0) {
      if (!trees.empty()) trees.back().end = i, trees.back().levels = deepest + 1;
      trees.push_back({i, num_nodes, 0});
      deepest = 0;
    }
    deepest = std::max(deepest, previous);
  }
  if (!good) user_error("tree.depth is of no forest in preorder: it should start at 0 and rise by at most 1");
  if (!trees.empty()) trees.back().levels = deepest + 1;
  return trees;
}

// [N, K] of any strides.
template <class T>
struct Matrix {
  T* data;
  int64_t row_stride, column_stride;
  T& at(int64_t row, int64_t column) const { return data[row * row_stride + column * column_stride]; }
};

template <class T>
struct Columns {
  Matrix<const T> in;
  Matrix<T> out;
  const int64_t* depth;
  int64_t first, count;  // columns first:first+count
};

// sums [levels, count]: at each depth, of the path down to the last node seen there. The node before is the parent of
// most: `last` holds its sum, so that the additions of a chain wait for each other and not for memory.
template <class T, int64_t kCount>
void path_walk(const Columns<T>& of, const Tree& tree, double* sums) {
  const int64_t count = kCount ? kCount : of.count;
  double last[kCount ? kCount : kColumns] = {};
  for (int64_t i = tree.root, above = -1; i < tree.end; above = of.depth[i++]) {
    double* level = sums + of.depth[i] * count;
    const bool is_child = of.depth[i] == above + 1;
    for (int64_t c = 0; c < count; ++c) {
      if (!is_child) last[c] = level[c - count];
      last[c] += static_cast<double>(of.in.at(i, of.first + c));
      level[c] = last[c];
      of.out.at(i, of.first + c) = static_cast<T>(last[c]);
    }
  }
}

// Backwards. sums [levels, count]: at each depth, of the subtrees since their parent was last met; `last` is the sum of
// the subtree of the node behind, which is not in them yet.
template <class T, int64_t kCount>
void subtree_walk(const Columns<T>& of, const Tree& tree, double* sums) {
  const int64_t count = kCount ? kCount : of.count;
  double last[kCount ? kCount : kColumns] = {};
  for (int64_t i = tree.end - 1, behind = 0; i >= tree.root; behind = of.depth[i--]) {
    const bool is_parent = of.depth[i] + 1 == behind;
    double* level = sums + behind * count;
    for (int64_t c = 0; c < count; ++c) {
      const double value = static_cast<double>(of.in.at(i, of.first + c));
      const double below = level[c];
      level[c] = is_parent ? 0 : below + last[c];
      last[c] = is_parent ? (value + below) + last[c] : value;
      of.out.at(i, of.first + c) = static_cast<T>(last[c]);
    }
  }
}

template <class T, bool kPath>
void scan(const Tensor& values, const Tensor& depth, const Tensor& out) {
  const int64_t rows = values.size(0), columns = values.size(1);
  const auto* levels = static_cast<const int64_t*>(depth.const_data_ptr());
  const std::vector<Tree> trees = trees_of(levels, rows);
  const Matrix<const T> in{static_cast<const T*>(values.const_data_ptr()), values.stride(0), values.stride(1)};
  const Matrix<T> result{static_cast<T*>(out.mutable_data_ptr()), columns, 1};
  const int64_t parts = (columns + kColumns - 1) / kColumns;
  const auto one = kPath ? path_walk<T, 1> : subtree_walk<T, 1>, many = kPath ? path_walk<T, 0> : subtree_walk<T, 0>;
  for_each_task(static_cast<int64_t>(trees.size()) * parts, rows * columns, [&](int64_t task) {
    thread_local std::vector<double> sums;
    const Tree& tree = trees[task / parts];
    const int64_t first = task % parts * kColumns;
    const Columns<T> part{in, result, levels, first, std::min(kColumns, columns - first)};
    sums.assign(tree.levels * part.count, 0.0);
    (part.count == 1 ? one : many)(part, tree, sums.data());
  });
}

template <bool kPath>
Tensor scan_op(const Tensor values, const Tensor /*parent*/, const Tensor depth, const Tensor /*subtree_end*/) {
  STD_TORCH_CHECK(values.dim() == 2 && depth.numel() == values.size(0), "values should be [N, K], tree.depth [N]");
  STD_TORCH_CHECK(depth.scalar_type() == ScalarType::Long && depth.is_contiguous(), "tree.depth should be int64, contiguous");
  const Tensor out = torch::stable::new_empty(values, std::vector<int64_t>{values.size(0), values.size(1)});
  switch (values.scalar_type()) {
    case ScalarType::Float:
      scan<float, kPath>(values, depth, out);
      break;
    case ScalarType::Double:
      scan<double, kPath>(values, depth, out);
      break;
    case ScalarType::BFloat16:
      scan<c10::BFloat16, kPath>(values, depth, out);
      break;
    case ScalarType::Half:
      scan<c10::Half, kPath>(values, depth, out);
      break;
    default:
      STD_TORCH_CHECK(false, "values should be float32, bfloat16, float16 or float64");
  }
  return out;
}

}  // namespace
}  // namespace fastpo

STABLE_TORCH_LIBRARY_IMPL(fastpo_c, CPU, m) {
  m.impl("tree_path_sum", TORCH_BOX(&fastpo::scan_op<true>));
  m.impl("tree_subtree_sum", TORCH_BOX(&fastpo::scan_op<false>));
}
