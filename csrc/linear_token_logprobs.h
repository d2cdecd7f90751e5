// What the vector kernels of linear_token_logprobs (linear_token_logprobs_kernel.h) and the op around them share.
#pragma once

#include <cstdint>

#include "token_logprobs.h"

namespace fastpo {

// How y = softcap(scale (z + bias)) comes from the GEMM's output z.
struct TileHead {
  const float* bias;  // [v] of the tile; null: none
  float scale;
  float softcap;  // 0: none
};

// What the gradient of a tile knows of its rows, [R] each.
struct TileRows {
  const float* inverse_temperature;
  const float* centre;
  const float* rest;
  const float* coefs;  // a; b and c follow at a distance of stride each
  int64_t stride;
};

}  // namespace fastpo
