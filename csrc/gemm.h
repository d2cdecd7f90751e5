// What the vector kernels of the matrix product (gemm_kernel.h) and the op around them (gemm.cpp) share.
#pragma once

#include <cstdint>

#include "token_logprobs.h"

namespace fastpo {

// A matrix of float32, bfloat16 or float16, one of whose strides is 1.
struct Matrix {
  Type type;
  const void* data;
  int64_t row, column;  // strides, in elements

  Matrix at(int64_t i, int64_t j) const {
    const int64_t size = type == Type::float32 ? 4 : 2;
    return {type, static_cast<const char*>(data) + (i * row + j * column) * size, row, column};
  }
};

// Rows of the left operand as they are multiplied: packed (row 0), or whole tiles of them where they lie.
struct Left {
  const float* data;
  int64_t row;  // stride
};

// What a product is written to: c = ab, the same past the cache, c += ab, or c = decay c + ab.
enum class Into { write, stream, add, decayed };

struct Target {
  float* data;
  int64_t row;         // stride; elements of a row lie side by side
  const float* decay;  // of each row, for Into::decayed
  Into into;

  Target at(int64_t i, int64_t j) const { return {data + i * row + j, row, decay + (decay == nullptr ? 0 : i), into}; }
};

}  // namespace fastpo
