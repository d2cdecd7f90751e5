// What the CPU ops ask torch's tensors.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "token_logprobs.h"

namespace fastpo {

// The type of a tensor of logits, queries, ...; name is what an error calls it.
inline Type type_of(const torch::stable::Tensor& tensor, const char* name) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Type::float32;
    case ScalarType::BFloat16:
      return Type::bfloat16;
    default:
      STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Half, name, " should be float32, bfloat16 or float16");
      return Type::float16;
  }
}

template <class T = float>
T* data(const torch::stable::Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace fastpo
