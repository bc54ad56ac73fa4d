// AVX-512, as servers have it since 2017 and AMD since 2022.
//
// By pragmas, not by flags of the compiler: what the standard library has inline must stay fit for
// every processor.
#include "problem.h"

#if ECOFORMER_X86
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif

#define W 16
#define MAX_GROUP 8

namespace ecoformer::avx512 {
#include "kernels.h"
}

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
