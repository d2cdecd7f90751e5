// path_sum and subtree_sum on CUDA: implements the fastpo_c::tree_path_sum and tree_subtree_sum ops. What a walk over the
// forest adds at every step, its prefix sums, and the sums of nodes out of them; kernels/tree_scan/README.md derives it.
// Steps lie as [K, M]: M = 2 N for paths (a node is entered and left), N for subtrees.
#include "cuda_common.cuh"

namespace fastpo {
namespace {

using torch::headeronly::ScalarType;

constexpr int kThreads = 256;
constexpr int kItems = 4;                    // steps of a thread, side by side
constexpr int64_t kSteps = kThreads * kItems;  // of a block

struct Forest {
  const int64_t *depth, *subtree_end;  // [N]
  int64_t nodes, columns;
};

__device__ inline double widened(double x) { return x; }
template <typename T>
__device__ double widened(T x) {
  return to_float(x);
}
__device__ inline void store_sum(double* out, double x) { *out = x; }
template <typename T>
__device__ void store_sum(T* out, double x) {
  store_rounded(out, static_cast<float>(x));
}

// A thread for each value: columns lie side by side in `values`.
template <typename T, bool kPath>
__global__ void place_kernel(Forest forest, const T* values, int64_t row_stride, int64_t column_stride, double* steps) {
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at >= forest.nodes * forest.columns) return;
  const int64_t node = at / forest.columns, column = at % forest.columns;
  const double value = widened(values[node * row_stride + column * column_stride]);
  if (kPath) {
    const int64_t depth = forest.depth[node];
    steps += column * forest.nodes * 2;
    steps[2 * node - depth] = value;
    steps[2 * forest.subtree_end[node] - depth - 1] = -value;
  } else {
    steps[column * forest.nodes + node] = value;
  }
}

// A sum as it is rounded, and the sum of what rounding lost.
struct Sum {
  double total, lost;
};

// Knuth's two-sum: what rounding a + b loses, exactly.
__device__ Sum operator+(const Sum& a, const Sum& b) {
  const double total = a.total + b.total, part = total - a.total;
  return {total, ((a.total - (total - part)) + (b.total - part)) + (a.lost + b.lost)};
}

// The sum of `value` over the threads up to this one; `sums` has a place for each warp.
__device__ Sum block_prefix(Sum value, Sum* sums) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int delta = 1; delta < 32; delta *= 2) {
    const Sum other{__shfl_up_sync(kFullWarp, value.total, delta), __shfl_up_sync(kFullWarp, value.lost, delta)};
    if (lane >= delta) value = other + value;
  }
  if (lane == 31) sums[warp] = value;
  __syncthreads();
  Sum before{};
  for (int w = 0; w < warp; ++w) before = before + sums[w];
  return before + value;
}

// sums[k, b] = the sum of a block's steps
__global__ void blocks_kernel(const double* steps, Sum* sums, int64_t num_steps, int64_t num_blocks) {
  __shared__ Sum warps[kThreads / 32];
  const int64_t column = blockIdx.x / num_blocks, block = blockIdx.x % num_blocks;
  Sum sum{};
  for (int i = 0; i < kItems; ++i) {
    const int64_t at = block * kSteps + threadIdx.x * kItems + i;
    if (at < num_steps) sum = sum + Sum{steps[column * num_steps + at]};
  }
  sum = block_prefix(sum, warps);
  if (threadIdx.x == kThreads - 1) sums[blockIdx.x] = sum;
}

// prefix[t] = the sum of the steps up to t
__global__ void prefix_kernel(const double* steps, const Sum* sums, Sum* prefix, int64_t num_steps, int64_t num_blocks) {
  __shared__ Sum warps[kThreads / 32], earlier[kThreads / 32], before;
  const int64_t column = blockIdx.x / num_blocks, block = blockIdx.x % num_blocks;
  Sum mine{};
  for (int64_t b = threadIdx.x; b < block; b += kThreads) mine = mine + sums[column * num_blocks + b];
  mine = block_prefix(mine, earlier);
  if (threadIdx.x == kThreads - 1) before = mine;
  Sum upto[kItems];  // of this thread's steps
  for (int i = 0; i < kItems; ++i) {
    const int64_t at = block * kSteps + threadIdx.x * kItems + i;
    const Sum step{at < num_steps ? steps[column * num_steps + at] : 0};
    upto[i] = i == 0 ? step : upto[i - 1] + step;
  }
  const Sum own = upto[kItems - 1], all = block_prefix(own, warps);
  __syncthreads();
  const Sum start = before + (all + Sum{-own.total, -own.lost});
  for (int i = 0; i < kItems; ++i) {
    const int64_t at = block * kSteps + threadIdx.x * kItems + i;
    if (at < num_steps) prefix[column * num_steps + at] = start + upto[i];
  }
}

template <typename T, bool kPath>
__global__ void take_kernel(Forest forest, const Sum* prefix, T* out) {
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at >= forest.nodes * forest.columns) return;
  const int64_t node = at / forest.columns, column = at % forest.columns;
  Sum sum{};
  if (kPath) {
    sum = prefix[column * forest.nodes * 2 + 2 * node - forest.depth[node]];
  } else {
    prefix += column * forest.nodes;
    const Sum before = node == 0 ? Sum{} : prefix[node - 1];
    sum = prefix[forest.subtree_end[node] - 1] + Sum{-before.total, -before.lost};
  }
  store_sum(out + at, sum.total + sum.lost);
}

unsigned blocks_for(int64_t count) {
  const int64_t blocks = (count + kThreads - 1) / kThreads;
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31), "values has ", count, " elements; it should have below 2^31 * ", kThreads);
  return static_cast<unsigned>(blocks);
}

template <typename T, bool kPath>
void scan(const Forest& forest, const Tensor& values, const Tensor& out) {
  const int64_t num_steps = kPath ? 2 * forest.nodes : forest.nodes;
  const int64_t num_blocks = (num_steps + kSteps - 1) / kSteps;
  const auto doubles = [&](int64_t count) {
    return torch::stable::new_empty(values, std::vector<int64_t>{forest.columns * count}, ScalarType::Double);
  };
  const Tensor step_memory = doubles(num_steps), prefix_memory = doubles(2 * num_steps), sum_memory = doubles(2 * num_blocks);
  auto* steps = static_cast<double*>(step_memory.mutable_data_ptr());
  auto* prefix = static_cast<Sum*>(prefix_memory.mutable_data_ptr());
  auto* sums = static_cast<Sum*>(sum_memory.mutable_data_ptr());
  const auto* in = static_cast<const T*>(values.const_data_ptr());
  auto* result = static_cast<T*>(out.mutable_data_ptr());
  const unsigned by_value = blocks_for(forest.nodes * forest.columns);
  const unsigned by_step = blocks_for(forest.columns * num_blocks * kThreads);
  const cudaStream_t stream = current_stream(values);
  const int64_t row_stride = values.stride(0), column_stride = values.stride(1);
  const auto place = place_kernel<T, kPath>;
  place<<<by_value, kThreads, 0, stream>>>(forest, in, row_stride, column_stride, steps);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  blocks_kernel<<<by_step, kThreads, 0, stream>>>(steps, sums, num_steps, num_blocks);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  prefix_kernel<<<by_step, kThreads, 0, stream>>>(steps, sums, prefix, num_steps, num_blocks);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  const auto take = take_kernel<T, kPath>;
  take<<<by_value, kThreads, 0, stream>>>(forest, prefix, result);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <bool kPath>
Tensor scan_op(const Tensor values, const Tensor /*parent*/, const Tensor depth, const Tensor subtree_end) {
  const torch::stable::accelerator::DeviceGuard guard(values.get_device_index());
  const int64_t nodes = values.size(0), columns = values.size(1);
  const Tensor out = torch::stable::new_empty(values, std::vector<int64_t>{nodes, columns});
  if (nodes == 0 || columns == 0) return out;
  STD_TORCH_CHECK(depth.is_contiguous() && subtree_end.is_contiguous(), "depth and subtree_end should be contiguous");
  const Forest forest{static_cast<const int64_t*>(depth.const_data_ptr()),
                      static_cast<const int64_t*>(subtree_end.const_data_ptr()), nodes, columns};
  switch (values.scalar_type()) {
    case ScalarType::Float:
      scan<float, kPath>(forest, values, out);
      break;
    case ScalarType::Double:
      scan<double, kPath>(forest, values, out);
      break;
    case ScalarType::BFloat16:
      scan<__nv_bfloat16, kPath>(forest, values, out);
      break;
    case ScalarType::Half:
      scan<__half, kPath>(forest, values, out);
      break;
    default:
      STD_TORCH_CHECK(false, "values should be float32, bfloat16, float16 or float64");
  }
  return out;
}

}  // namespace
}  // namespace fastpo

STABLE_TORCH_LIBRARY_IMPL(fastpo_c, CUDA, m) {
  m.impl("tree_path_sum", TORCH_BOX(&fastpo::scan_op<true>));
  m.impl("tree_subtree_sum", TORCH_BOX(&fastpo::scan_op<false>));
}
