// One pass over a row of logits in CUDA: the online softmax with its statistics, and the largest k values of a row.
#pragma once

#include "cuda_common.cuh"

namespace fastpo {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
// Stands in for an exponent of -inf where it is multiplied: 2^-10000 is 0, and 0 * -10000 is 0 where 0 * -inf is NaN.
constexpr float kNegligible = -10000.0f;

__device__ inline float exp2_fast(float x) {  // one MUFU, 2 ulp; below 2^-126 it is 0
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Within 2 ulp: Cephes' polynomial below 0.625, where 1 - 2 / (e^2x + 1) would cancel.
__device__ inline float tanh_fast(float x) {
  const float z = x * x;
  float p = fmaf(-5.70498872745e-3f, z, 2.06390887954e-2f);
  p = fmaf(p, z, -5.37397155531e-2f);
  p = fmaf(p, z, 1.33314422036e-1f);
  p = fmaf(p, z, -3.33332819422e-1f);
  const float far = 1 - __fdividef(2, exp2_fast(fabsf(x) * (2 * kLog2e)) + 1);
  return fabsf(x) < 0.625f ? fmaf(p * z, x, x) : copysignf(far, x);
}

template <int SIZE>
__device__ float largest(const float (&y)[SIZE]) {  // ignores NaN
  float top = y[0];
#pragma unroll
  for (int i = 1; i < SIZE; ++i) top = fmaxf(top, y[i]);
  return top;
}

// Of the y seen so far, with e = 2^d, d = (y - m) scale, scale = log2(e) / temperature:
// m = max y, s = sum e and, with STATS, t = sum e d and q = sum e^2. Nothing seen, or only -inf: m = -inf and zeros.
template <bool STATS>
struct OnlineSoftmax {
  float m = -INFINITY;
  float base = 0;  // what is subtracted: m, or 0 where m is -inf
  float s = 0, t = 0, q = 0;

  static constexpr int kFloats = 4;
  __device__ void store(float* to) const { to[0] = m, to[1] = s, to[2] = t, to[3] = q; }
  static __device__ OnlineSoftmax load(const float* from) {
    return {from[0], from[0] == -INFINITY ? 0 : from[0], from[1], from[2], from[3]};
  }

  // Moves the state to a larger maximum.
  __device__ void rebase(float top, float scale) {
    const float shift = fmaxf((m - top) * scale, kNegligible);
    const float decay = exp2_fast(shift);
    if (STATS) {
      t = decay * fmaf(s, shift, t);
      q *= decay * decay;
    }
    s *= decay;
    m = base = top;
  }

  template <int SIZE>
  __device__ void add(const float (&y)[SIZE], float top, float scale) {
    if (top > m) rebase(top, scale);  // rare once the row has got going
    float e[SIZE];
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      const float d = (y[i] - base) * scale;
      e[i] = exp2_fast(d);
      if (STATS) {
        t = fmaf(e[i], fmaxf(d, kNegligible), t);
        q = fmaf(e[i], e[i], q);
      }
    }
#pragma unroll
    for (int width = SIZE / 2; width > 0; width /= 2) {
#pragma unroll
      for (int i = 0; i < width; ++i) e[i] += e[i + width];
    }
    s += e[0];
  }

  __device__ void merge(OnlineSoftmax other, float scale) {
    const float top = fmaxf(m, other.m);
    if (top > m) rebase(top, scale);
    if (top > other.m) other.rebase(top, scale);
    s += other.s;
    t += other.t;
    q += other.q;
  }

  // Every lane ends with the state of the whole warp, its bits alike in all of them.
  __device__ void merge_warp(float scale) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      OnlineSoftmax other;
      other.m = __shfl_xor_sync(kFullWarp, m, offset);
      other.base = __shfl_xor_sync(kFullWarp, base, offset);
      other.s = __shfl_xor_sync(kFullWarp, s, offset);
      if (STATS) {
        other.t = __shfl_xor_sync(kFullWarp, t, offset);
        other.q = __shfl_xor_sync(kFullWarp, q, offset);
      }
      merge(other, scale);
    }
  }
};

// The 32 largest values that a warp has seen, of which only the first k are exact: lane i holds the i-th largest.
struct WarpTop {
  float value = -INFINITY;
  float threshold = -INFINITY;  // the k-th largest; all lanes alike

  // To be called by all lanes of a warp together, each with its candidates. Equal values count as often as they come.
  template <int SIZE>
  __device__ void add(float (&candidates)[SIZE], int k) {
#pragma unroll 1
    for (int i = 0; i < SIZE; ++i) {  // rotates the registers: unrolled, the code would outgrow the instruction cache
      add(candidates[0], k);
      const float first = candidates[0];
#pragma unroll
      for (int j = 1; j < SIZE; ++j) candidates[j - 1] = candidates[j];
      candidates[SIZE - 1] = first;
    }
  }

  __device__ void add(float candidate, int k) {
    const int lane = threadIdx.x % 32;
    unsigned waiting = __ballot_sync(kFullWarp, candidate > threshold);
    while (waiting != 0) {
      const float taken = __shfl_sync(kFullWarp, candidate, __ffs(waiting) - 1);
      waiting &= waiting - 1;
      if (!(taken > threshold)) continue;
      const int place = __popc(__ballot_sync(kFullWarp, value >= taken));
      const float above = __shfl_up_sync(kFullWarp, value, 1);
      if (lane >= place) value = lane == place ? taken : above;
      threshold = __shfl_sync(kFullWarp, value, k - 1);
    }
  }
};

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullWarp, x, offset);
  return x;
}

}  // namespace fastpo
