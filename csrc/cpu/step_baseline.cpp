#define CZM_ARCH baseline
#define CZM_VECTOR_BYTES 16
#if defined(__aarch64__)
#define CZM_HAS_FMA
#endif
#include "step_kernel.h"
