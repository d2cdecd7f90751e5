#include "packing.h"

#include <algorithm>
#include <bit>
#include <numeric>

namespace fastpo {

std::vector<int64_t> first_fit_decreasing(std::span<const int64_t> lengths, int64_t budget) {
  const size_t n = lengths.size();
  std::vector<int64_t> order(n), bins(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });

  // free_space[leaves + b] is what bin b has left; an inner node holds the larger of its children.
  const size_t leaves = std::bit_ceil(std::max<size_t>(n, 1));
  std::vector<int64_t> free_space(2 * leaves, budget);
  for (const int64_t item : order) {
    size_t node = 1;
    while (node < leaves) node = free_space[2 * node] >= lengths[item] ? 2 * node : 2 * node + 1;
    bins[item] = static_cast<int64_t>(node - leaves);
    free_space[node] -= lengths[item];
    for (node /= 2; node >= 1; node /= 2) free_space[node] = std::max(free_space[2 * node], free_space[2 * node + 1]);
  }
  return bins;
}

}  // namespace fastpo
