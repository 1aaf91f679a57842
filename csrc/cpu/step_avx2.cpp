#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define CZM_ARCH avx2
#define CZM_VECTOR_BYTES 32
#define CZM_HAS_FMA
#include "step_kernel.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
