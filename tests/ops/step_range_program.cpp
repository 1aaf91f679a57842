// Runs the baseline kernel over a memory image from stdin and writes the image to stdout: a way to
// test it in an emulator that has no Python. Addresses in the tables are offsets into the image.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "descriptors.h"
#include "update_rule.h"

namespace czm {
namespace baseline {
void step_range(const TensorDescriptor* descriptors, const int64_t* grads, int64_t descriptor_count,
                const GroupDescriptor* groups, double inverse_scale, int64_t begin, int64_t end);
}
}  // namespace czm

struct Header {
  int64_t descriptors, groups, work, image_bytes;
};

template <class T> std::vector<T> read(int64_t count) {
  std::vector<T> values(count);
  if (std::fread(values.data(), sizeof(T), count, stdin) != size_t(count)) std::exit(1);
  return values;
}

int main() {
  using czm::TensorDescriptor;
  const Header header = read<Header>(1)[0];
  std::vector<TensorDescriptor> descriptors = read<TensorDescriptor>(header.descriptors);
  std::vector<int64_t> grads = read<int64_t>(header.descriptors);
  const std::vector<czm::GroupDescriptor> groups = read<czm::GroupDescriptor>(header.groups);
  std::vector<char> image = read<char>(header.image_bytes);
  const auto relocate = [&](int64_t& address) {
    if (address) address += reinterpret_cast<int64_t>(image.data());
  };
  for (int64_t& grad : grads) relocate(grad);
  for (TensorDescriptor& descriptor : descriptors) {
    for (int64_t TensorDescriptor::*address : {&TensorDescriptor::param,
#define CZM_MEMBER(name) &TensorDescriptor::name,
                                               CZM_STATES(CZM_MEMBER)
#undef CZM_MEMBER
         })
      relocate(descriptor.*address);
  }
  czm::baseline::step_range(descriptors.data(), grads.data(), header.descriptors, groups.data(), 1.0, 0,
                            header.work);
  return std::fwrite(image.data(), 1, image.size(), stdout) == image.size() ? 0 : 1;
}
