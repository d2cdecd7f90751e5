// What the CUDA sources share: the current stream, and rows of 16-byte vectors in fp32 registers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>  // included by none of the others in torch 2.11
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

namespace fastpo {

using torch::stable::Tensor;

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline int multiprocessors(const Tensor& tensor) {
  int count = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, tensor.get_device_index()));
  return count;
}

constexpr unsigned kFullWarp = 0xffffffffu;

// 16 bytes of T: how many elements, and their way into fp32 registers and back (rounded to nearest).
template <typename T>
struct Vector;

template <>
struct Vector<float> {
  static constexpr int kSize = 4;
  static __device__ void unpack(const uint4& raw, float (&x)[kSize]) {
    x[0] = __uint_as_float(raw.x), x[1] = __uint_as_float(raw.y);
    x[2] = __uint_as_float(raw.z), x[3] = __uint_as_float(raw.w);
  }
  static __device__ uint4 pack(const float (&x)[kSize]) {
    return {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])};
  }
};

template <>
struct Vector<__nv_bfloat16> {
  static constexpr int kSize = 8;
  static __device__ void unpack(const uint4& raw, float (&x)[kSize]) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = __uint_as_float(words[i] << 16);
      x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
  static __device__ uint32_t pair(float low, float high) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
  }
  static __device__ uint4 pack(const float (&x)[kSize]) {
    return {pair(x[0], x[1]), pair(x[2], x[3]), pair(x[4], x[5]), pair(x[6], x[7])};
  }
};

template <>
struct Vector<__half> {
  static constexpr int kSize = 8;
  static __device__ void unpack(const uint4& raw, float (&x)[kSize]) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
      x[2 * i] = both.x;
      x[2 * i + 1] = both.y;
    }
  }
  static __device__ uint32_t pair(float low, float high) {
    const __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
  }
  static __device__ uint4 pack(const float (&x)[kSize]) {
    return {pair(x[0], x[1]), pair(x[2], x[3]), pair(x[4], x[5]), pair(x[6], x[7])};
  }
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

__device__ inline void store_rounded(float* out, float x) { *out = x; }
__device__ inline void store_rounded(__nv_bfloat16* out, float x) { *out = __float2bfloat16_rn(x); }
__device__ inline void store_rounded(__half* out, float x) { *out = __float2half_rn(x); }

// A row of any alignment as [head elements][vectors of 16 aligned bytes][tail elements]; head, tail < Vector<T>::kSize.
template <typename T>
struct Span {
  int head, vectors, tail;
  __device__ Span(const T* row, int size) {
    constexpr int kSize = Vector<T>::kSize;
    const int past = static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
    head = min(size, (kSize - past) % kSize);
    vectors = (size - head) / kSize;
    tail = size - head - vectors * kSize;
  }
  // Index of the i-th element that is in no vector, i < head + tail.
  __device__ int loose(int i) const { return i < head ? i : i + vectors * Vector<T>::kSize; }
};

// Rows of a [outer, inner, size] tensor with unit last stride, addressed by n = o * inner + i < 2^31.
struct Rows {
  void* data;
  int64_t stride_outer, stride_inner;
  unsigned inner;

  explicit Rows(const Tensor& tensor)
      : data(const_cast<void*>(tensor.const_data_ptr())),
        stride_outer(tensor.stride(0)),
        stride_inner(tensor.stride(1)),
        inner(static_cast<unsigned>(tensor.size(1))) {}

  template <typename T>
  __device__ T* row(unsigned n) const {
    return static_cast<T*>(data) + n / inner * stride_outer + n % inner * stride_inner;
  }
};

}  // namespace fastpo
