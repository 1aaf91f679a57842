// A float32 weight kept in two halves: the parameter, bfloat16 or float16, which is the weight rounded,
// and an int16, how far apart the bits of the two are. A weight that is more than that from its
// parameter (a tie that rounded down, or a float16 below 2^-17) loses what does not fit. A parameter
// that was set from outside keeps the remainder it had; on a zero, whose bits have none below, it must
// not borrow from the sign.
#pragma once

#include <cstdint>
#include <cstring>

#include "arithmetic.h"

namespace czm {
inline namespace CZM_ARCH {

CZM_INLINE float add_remainder(float param, int16_t remainder) {
  if (param == 0 && remainder < 0) return param;
  uint32_t bits;
  std::memcpy(&bits, &param, sizeof bits);
  bits += uint32_t(int32_t(remainder));
  std::memcpy(&param, &bits, sizeof bits);
  return param;
}

CZM_INLINE int16_t remainder_of(float weight, float param) {
  uint32_t weight_bits, param_bits;
  std::memcpy(&weight_bits, &weight, sizeof weight_bits);
  std::memcpy(&param_bits, &param, sizeof param_bits);
  const int32_t apart = int32_t(weight_bits - param_bits);
  return int16_t(apart > INT16_MAX ? INT16_MAX : apart < INT16_MIN ? INT16_MIN : apart);
}

}  // namespace CZM_ARCH
}  // namespace czm
