// fastpo_c::gemm, the matrix product of the fused LM head on the CPU: out = ab, out + ab or decay out + ab, from operands
// of 32 or 16 bits in either order, to float32, in place. The vector kernels are in gemm_kernel.h.
//
// The right operand is packed by all threads, up to kRightFloats of it, for all of them; then blocks of rows are handed
// out, whose left operand a thread packs for itself, kLeftDepth deep. The result does not depend on the number of threads.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <optional>
#include <thread>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "gemm.h"
#include "tensors.h"
#define FASTPO_TARGET_INCLUDE "gemm_kernel.h"
#include "simd_targets.h"

namespace fastpo {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kLeftDepth = 2048, kLeftPanels = 4;  // of the left: 450 KiB, which stay in the second-level cache
constexpr int64_t kRightDepth = 4096;                  // most of the right that is packed at once: 8 MiB, in the
constexpr int64_t kRightFloats = 1 << 21;              // last-level cache that the threads share

struct Kernels {
  int64_t rows, columns;  // of a tile in registers
  decltype(&generic::pack_left) pack_left;
  decltype(&generic::pack_right) pack_right;
  decltype(&generic::multiply_block) multiply;
};

#define FASTPO_KERNELS(isa) \
  Kernels { isa::kTileRows, isa::kTileColumns, isa::pack_left, isa::pack_right, isa::multiply_block }

Kernels kernels() { return FASTPO_PICK(FASTPO_KERNELS); }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory that a thread keeps between calls: fresh pages for every product would cost as much as packing.
struct Scratch {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> memory;
  int64_t size = 0;

  float* of(int64_t floats) {
    if (floats > size) {
      memory.reset();
      size = ceil_div(floats, 1024) * 1024;
      memory.reset(static_cast<float*>(std::aligned_alloc(64, size * sizeof(float))));
      STD_TORCH_CHECK(memory != nullptr, "no memory for ", size, " packed floats");
    }
    return memory.get();
  }
};

Matrix matrix(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.stride(0) == 1 || tensor.stride(1) == 1, name, " should have a stride of 1");
  return {type_of(tensor, name), tensor.mutable_data_ptr(), tensor.stride(0), tensor.stride(1)};
}

// A range of panels out of count that are dealt out evenly to parts.
struct Range {
  int64_t first, count;
  Range(int64_t panels, int64_t parts, int64_t part)
      : first(panels * part / parts), count(panels * (part + 1) / parts - first) {}
};

// How panels of rows of a result are handed out: in blocks of at most kLeftPanels, as many for each thread; where there
// are few, columns are split too.
struct Blocks {
  int64_t row_panels, column_panels, by_row, by_column;

  Blocks(int64_t rows, int64_t columns, const Kernels& kernel)
      : row_panels(ceil_div(rows, kernel.rows)), column_panels(ceil_div(columns, kernel.columns)) {
    const int64_t threads = torch::stable::get_num_threads();
    by_row = std::min(row_panels, ceil_div(ceil_div(row_panels, kLeftPanels), threads) * threads);
    by_column = std::min(column_panels, ceil_div(threads, by_row));
  }
};

// Runs first(i) for i < firsts by all threads and, when all of that is done, second(i) for i < seconds: threads are woken
// once. Who has nothing left to begin waits for those who have: they run.
template <class First, class Second>
void in_two_phases(int64_t firsts, const First& first, int64_t seconds, const Second& second, int64_t operations) {
  constexpr int64_t kWorthAThread = 1 << 18;
  const int64_t threads = std::min<int64_t>({torch::stable::get_num_threads(), seconds, operations / kWorthAThread});
  std::atomic<int64_t> begun{0}, done{0}, next{0};
  const auto run = [&](int64_t, int64_t) {
    for (int64_t i; (i = begun.fetch_add(1)) < firsts;) {
      first(i);
      done.fetch_add(1);
    }
    while (done.load() < firsts) std::this_thread::yield();
    for (int64_t i; (i = next.fetch_add(1)) < seconds;) second(i);
  };
  if (threads <= 1) return run(0, 1);
  torch::stable::parallel_for(0, threads, 1, run);
}

// Whether the left operand need not be packed: its rows are read as fast unless their lines compete for the same places of
// the first-level cache, being whole pages apart.
bool readable_in_place(const Matrix& a) {
  constexpr int64_t kPage = 4096 / sizeof(float);
  return a.type == Type::float32 && a.column == 1 && a.row > 0 && a.row % kPage != 0;
}

// c (+)= a b with b [depth, columns] small enough to be packed at once.
void multiply(const Matrix& a, const Matrix& b, int64_t rows, int64_t depth, int64_t columns, const Target& c,
              const Kernels& kernel) {
  constexpr int64_t kPackedDepth = 256, kPackedPanels = 8;
  thread_local Scratch shared;
  const Blocks blocks(rows, columns, kernel);
  const int64_t right_panel = depth * kernel.columns;
  float* const right = shared.of(blocks.column_panels * right_panel);
  const int64_t depths = ceil_div(depth, kPackedDepth), groups = ceil_div(blocks.column_panels, kPackedPanels);
  const auto pack = [&](int64_t task) {
    const int64_t t = task / groups * kPackedDepth, panel = task % groups * kPackedPanels, j = panel * kernel.columns;
    kernel.pack_right(b.at(t, j), std::min(kPackedPanels * kernel.columns, columns - j), std::min(kPackedDepth, depth - t),
                      right + panel * right_panel + t * kernel.columns, right_panel);
  };
  const int64_t step = ceil_div(depth, ceil_div(depth, kLeftDepth));
  const auto compute = [&](int64_t task) {
    thread_local Scratch own;
    const Range of_rows(blocks.row_panels, blocks.by_row, task / blocks.by_column);
    const Range of_columns(blocks.column_panels, blocks.by_column, task % blocks.by_column);
    const int64_t i = of_rows.first * kernel.rows, j = of_columns.first * kernel.columns;
    const int64_t height = std::min(of_rows.count * kernel.rows, rows - i);
    const int64_t width = std::min(of_columns.count * kernel.columns, columns - j);
    float* const left = own.of(of_rows.count * kernel.rows * step + 64);
    Target to = c.at(i, j);
    for (int64_t t = 0; t < depth; t += step) {
      const int64_t deep = std::min(step, depth - t);
      const float* const panels = right + of_columns.first * right_panel + t * kernel.columns;
      const int64_t in_place = readable_in_place(a) ? height / kernel.rows * kernel.rows : 0;
      if (in_place > 0) {
        const Left rows_of{static_cast<const float*>(a.at(i, t).data), a.row};
        kernel.multiply(rows_of, panels, right_panel, deep, in_place, width, to);
      }
      if (in_place < height) {
        kernel.pack_left(a.at(i + in_place, t), height - in_place, rows - i - in_place, deep, left);
        kernel.multiply({left, 0}, panels, right_panel, deep, height - in_place, width, to.at(in_place, 0));
      }
      to.into = Into::add;
    }
  };
  in_two_phases(depths * groups, pack, blocks.by_row * blocks.by_column, compute, rows * columns * depth);
}

// Whether whole vectors of the result may go past the cache: aligned, and not read again by a further step of the depth.
bool streamable(const Target& c, int64_t depth) {
  constexpr int64_t kLine = 64;
  return depth <= kLeftDepth && reinterpret_cast<uintptr_t>(c.data) % kLine == 0 && c.row * sizeof(float) % kLine == 0;
}

void gemm_op(const Tensor a, const Tensor b, const Tensor out, const std::optional<Tensor> decay, bool add,
             bool past_cache) {
  const int64_t rows = a.size(0), depth = a.size(1), columns = b.size(1);
  STD_TORCH_CHECK(b.size(0) == depth && out.size(0) == rows && out.size(1) == columns, "a [M, K], b [K, N], out [M, N]");
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::Float && (columns == 1 || out.stride(1) == 1),
                  "out should be float32 with contiguous rows");
  if (rows == 0 || columns == 0) return;
  STD_TORCH_CHECK(depth > 0, "K should be at least 1");
  const Kernels kernel = kernels();
  const Matrix left = matrix(a, "a"), right = matrix(b, "b");
  const float* factors = decay ? static_cast<const float*>(decay->mutable_data_ptr()) : nullptr;
  const Into into = decay ? Into::decayed : add ? Into::add : Into::write;
  Target whole{static_cast<float*>(out.mutable_data_ptr()), out.stride(0), factors, into};
  if (into == Into::write && past_cache && streamable(whole, depth)) whole.into = Into::stream;
  const int64_t deep = ceil_div(depth, ceil_div(depth, kRightDepth));
  const int64_t wide = std::max(kernel.columns, kRightFloats / deep / kernel.columns * kernel.columns);
  for (int64_t j = 0; j < columns; j += wide) {
    Target c = whole.at(0, j);
    for (int64_t t = 0; t < depth; t += deep) {
      multiply(left.at(0, t), right.at(t, j), rows, std::min(deep, depth - t), std::min(wide, columns - j), c, kernel);
      c.into = Into::add;
    }
  }
}

}  // namespace
}  // namespace fastpo

STABLE_TORCH_LIBRARY_IMPL(fastpo_c, CPU, m) { m.impl("gemm", TORCH_BOX(&fastpo::gemm_op)); }
