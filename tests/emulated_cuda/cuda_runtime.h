// Runs CUDA kernels on one CPU thread: enough of CUDA for csrc/*.cu, which __init__.py turns into C++.
//
// Every thread of a block is a fiber. A warp intrinsic or __syncthreads() yields until all threads of the warp or block have
// arrived, so that code whose lanes do not arrive together fails here with "deadlock" where a GPU would do anything.
// Blocks run one after the other. Nothing is checked about memory spaces, races or speed.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float2 {
  float x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace emulator {

struct Barrier {
  int arrived = 0;
  unsigned generation = 0;
};

struct Fiber {
  ucontext_t context;
  uint3 index;
  bool done = false;
  std::unique_ptr<char[]> stack = std::make_unique<char[]>(kStack);
  static constexpr size_t kStack = 256 * 1024;
};

struct Warp {
  Barrier barrier;
  uint64_t slots[32];
};

// The block that runs. One at a time.
struct Block {
  dim3 grid, size;
  uint3 index;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barrier;
  int live = 0;
  bool progress = false;
  Fiber* current = nullptr;
  ucontext_t scheduler;
  std::function<void()> body;
  std::exception_ptr error;

  void yield() { swapcontext(&current->context, &scheduler); }

  void release(Barrier& barrier) {
    barrier.arrived = 0;
    ++barrier.generation;
    progress = true;
  }

  void wait(Barrier& barrier, int count) {
    const unsigned generation = barrier.generation;
    if (++barrier.arrived == count) return release(barrier);
    while (barrier.generation == generation) yield();
  }

  Warp& warp() { return warps[current->index.x / 32]; }

  // Every lane of the warp gives a value and gets all of them.
  template <typename F>
  auto exchange(uint64_t value, const F& read) {
    Warp& mine = warp();
    mine.slots[current->index.x % 32] = value;
    wait(mine.barrier, 32);
    const auto result = read(mine.slots);
    wait(mine.barrier, 32);
    return result;
  }

  void run();
};

inline Block block;

inline void run_fiber() {
  try {
    block.body();
  } catch (...) {
    block.error = std::current_exception();
  }
  block.current->done = true;
  --block.live;
  block.progress = true;
  block.yield();
}

inline void Block::run() {
  const unsigned threads = size.x;
  if (fibers.size() < threads) fibers.resize(threads);
  warps.assign((threads + 31) / 32, {});
  barrier = {};
  live = static_cast<int>(threads);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.index = {i, 0, 0};
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = Fiber::kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
  }
  while (live > 0) {
    progress = false;
    for (unsigned i = 0; i < threads; ++i) {
      current = &fibers[i];
      if (!current->done) swapcontext(&scheduler, &current->context);
    }
    if (error) std::rethrow_exception(std::exchange(error, nullptr));
    if (live > 0 && barrier.arrived == live) release(barrier);  // threads that have returned are not waited for
    if (!progress) throw std::runtime_error("deadlock: not all threads of a warp or block arrive");
  }
}

template <typename... Params>
struct Launch {
  void (*kernel)(Params...);
  dim3 grid, size;

  template <typename... Args>
  void operator()(const Args&... args) const {
    block.grid = grid;
    block.size = size;
    block.body = [&] { kernel(args...); };
    for (unsigned z = 0; z < grid.z; ++z) {
      for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) {
          block.index = {x, y, z};
          block.run();
        }
      }
    }
  }
};

// kernel<<<grid, size, shared, stream>>>(...)
template <typename... Params>
Launch<Params...> launch(void (*kernel)(Params...), dim3 grid, dim3 size, size_t = 0, void* = nullptr) {
  if (size.y != 1 || size.z != 1) throw std::runtime_error("the emulator knows blocks of one dimension only");
  if (grid.y > 65535 || grid.z > 65535) throw std::runtime_error("grid.y and grid.z may be 65535 at most");
  return {kernel, grid, size};
}

template <typename T>
T shuffle(T value, int from) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = block.exchange(bits, [from](const uint64_t* slots) { return slots[from]; });
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline int lane() { return block.current->index.x % 32; }

inline unsigned ballot(bool yes) {
  return block.exchange(yes, [](const uint64_t* slots) {
    unsigned mask = 0;
    for (int i = 0; i < 32; ++i) mask |= static_cast<unsigned>(slots[i]) << i;
    return mask;
  });
}

}  // namespace emulator

#define threadIdx (emulator::block.current->index)
#define blockIdx (emulator::block.index)
#define gridDim (emulator::block.grid)
#define blockDim (emulator::block.size)

inline void __syncthreads() { emulator::block.wait(emulator::block.barrier, emulator::block.live); }
inline void __syncwarp(unsigned = 0xffffffffu) { emulator::ballot(true); }
inline unsigned __ballot_sync(unsigned, bool yes) { return emulator::ballot(yes); }
inline bool __any_sync(unsigned, bool yes) { return emulator::ballot(yes) != 0; }
inline bool __all_sync(unsigned, bool yes) { return emulator::ballot(yes) == 0xffffffffu; }
template <typename T>
T __shfl_sync(unsigned, T value, int from) {
  return emulator::shuffle(value, from % 32);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulator::shuffle(value, emulator::lane() ^ mask);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int delta) {
  const int from = emulator::lane() - delta;
  return emulator::shuffle(value, from < 0 ? emulator::lane() : from);
}
template <typename T>
T __shfl_down_sync(unsigned, T value, int delta) {
  const int from = emulator::lane() + delta;
  return emulator::shuffle(value, from > 31 ? emulator::lane() : from);
}

// Blocks and threads run one at a time.
template <typename T>
T atomicAdd(T* at, T value) {
  return std::exchange(*at, *at + value);
}
template <typename T>
T atomicMin(T* at, T value) {
  return std::exchange(*at, std::min(*at, value));
}
template <typename T>
T atomicMax(T* at, T value) {
  return std::exchange(*at, std::max(*at, value));
}

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline float __fdividef(float a, float b) { return a / b; }

// Loads and stores with a cache policy: a GPU traps where the address is not a multiple of the size.
template <typename T>
T* aligned(T* at) {
  if (reinterpret_cast<uintptr_t>(at) % sizeof(T) != 0) throw std::runtime_error("a misaligned vector access");
  return at;
}
template <typename T>
T __ldcs(const T* at) {
  return *aligned(at);
}
template <typename T>
T __ldg(const T* at) {
  return *aligned(at);
}
template <typename T>
void __stwb(T* at, T value) {
  *aligned(at) = value;
}
template <typename T>
void __stcs(T* at, T value) {
  *aligned(at) = value;
}
using std::max;
using std::min;

using __nv_bfloat16 = c10::BFloat16;
using __half = c10::Half;
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct __half2 {
  __half x, y;
};
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline float __half2float(__half x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline float2 __half22float2(__half2 x) { return {x.x, x.y}; }

using cudaStream_t = void*;
using cudaError_t = int;
constexpr int cudaDevAttrMultiProcessorCount = 16;
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
  *value = 1;
  return 0;
}
inline cudaError_t cudaGetLastError() { return 0; }
