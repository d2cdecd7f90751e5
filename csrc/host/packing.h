// Bins of items under a budget.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace fastpo {

// First-fit decreasing: bin number of each item. Items are taken longest first (ties by index) and put into the first
// bin with room; an item over the budget is the caller's error. O(n log n): the first bin with room is found in a
// tournament tree over the bins' free space.
std::vector<int64_t> first_fit_decreasing(std::span<const int64_t> lengths, int64_t budget);

}  // namespace fastpo
