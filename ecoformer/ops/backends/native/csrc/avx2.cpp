// AVX2 with FMA.
//
// By pragmas, not by flags of the compiler: what the standard library has inline must stay fit for
// every processor.
#include "problem.h"

#if ECOFORMER_X86
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define W 8
#define MAX_GROUP 6

namespace ecoformer::avx2 {
#include "kernels.h"
}

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
