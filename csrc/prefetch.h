// How functions that do nothing but prefetch are declared.
#pragma once

// GCC takes such a function for one without effect, and drops its calls if it has not inlined them
// before.
#define CZM_PREFETCHES __attribute__((always_inline)) inline
