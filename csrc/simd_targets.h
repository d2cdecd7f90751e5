// Compiles FASTPO_TARGET_INCLUDE once for every instruction set of the processor family, each in a namespace of its own
// (fastpo::avx512, fastpo::avx2, fastpo::generic), without compiler flags: one binary runs everywhere. pick_isa() says
// which of them to call.
//
// What is included must not instantiate templates of the standard library or of torch: the linker keeps one copy of
// such a function, and it could keep the one that only the newest processors can run.
#pragma once

#include <cstdlib>
#include <cstring>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define FASTPO_X86 1
#include <immintrin.h>
#else
#define FASTPO_X86 0
#endif

#define FASTPO_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define FASTPO_BEGIN_TARGET(isa) FASTPO_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define FASTPO_END_TARGET FASTPO_PRAGMA(clang attribute pop)
#else
#define FASTPO_BEGIN_TARGET(isa) FASTPO_PRAGMA(GCC push_options) FASTPO_PRAGMA(GCC target(isa))
#define FASTPO_END_TARGET FASTPO_PRAGMA(GCC pop_options)
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12's own intrinsics: _mm512_undefined_ps and the like
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#if FASTPO_X86
#define FASTPO_ISA avx512
#define FASTPO_SIMD_BITS 512
FASTPO_BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#include "simd.h"
#include FASTPO_TARGET_INCLUDE
FASTPO_END_TARGET
#undef FASTPO_ISA
#undef FASTPO_SIMD_BITS

#define FASTPO_ISA avx2
#define FASTPO_SIMD_BITS 256
FASTPO_BEGIN_TARGET("avx2,fma,f16c")
#include "simd.h"
#include FASTPO_TARGET_INCLUDE
FASTPO_END_TARGET
#undef FASTPO_ISA
#undef FASTPO_SIMD_BITS
#endif

#define FASTPO_ISA generic
#define FASTPO_SIMD_BITS 128
#include "simd.h"
#include FASTPO_TARGET_INCLUDE
#undef FASTPO_ISA
#undef FASTPO_SIMD_BITS

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

namespace fastpo {

enum class Isa { avx512, avx2, generic };

inline bool supported(Isa isa) {
#if FASTPO_X86
  if (isa == Isa::avx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
  if (isa == Isa::avx2) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }
#endif
  return isa == Isa::generic;
}

// The widest that this processor has. FASTPO_CPU_ISA=avx512|avx2|generic forces one, for tests; fails where it cannot.
inline Isa pick_isa() {
  const char* forced = std::getenv("FASTPO_CPU_ISA");
  if (forced == nullptr || *forced == '\0') {
    static const Isa best = supported(Isa::avx512) ? Isa::avx512 : supported(Isa::avx2) ? Isa::avx2 : Isa::generic;
    return best;
  }
  const char* names[] = {"avx512", "avx2", "generic"};
  for (int i = 0; i < 3; ++i) {
    if (std::strcmp(forced, names[i]) != 0) continue;
    STD_TORCH_CHECK(supported(Isa(i)), "FASTPO_CPU_ISA is ", forced, "; this processor does not have it");
    return Isa(i);
  }
  STD_TORCH_CHECK(false, "FASTPO_CPU_ISA is ", forced, "; it should be avx512, avx2 or generic");
  return Isa::generic;
}

}  // namespace fastpo

// of(isa), isa being the namespace that this processor takes; ``of`` is a macro.
#if FASTPO_X86
#define FASTPO_PICK(of) \
  (pick_isa() == Isa::avx512 ? of(avx512) : pick_isa() == Isa::avx2 ? of(avx2) : of(generic))
#else
#define FASTPO_PICK(of) of(generic)
#endif
