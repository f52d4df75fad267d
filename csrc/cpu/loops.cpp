#include "loops.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <string>

namespace rlrr {

namespace baseline {
extern const Loops table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Loops table;
}
namespace avx512 {
extern const Loops table;
}
#endif

namespace {

constexpr const char* levels[] = {"baseline", "avx2", "avx512", "avx512_bf16"};

int supported_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512) return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

int level() {
  static const int chosen = [] {
    const int supported = supported_level();
    const char* wanted = std::getenv("RLRR_CPU_CAPABILITY");
    if (wanted == nullptr) return supported;
    const auto found = std::find(std::begin(levels), std::end(levels), std::string(wanted));
    // an unknown name is refused where there is a user to tell, in backends/cpu.py
    return found == std::end(levels) ? supported : std::min(supported, int(found - std::begin(levels)));
  }();
  return chosen;
}

}  // namespace

const Loops& loops() {
#if defined(__x86_64__)
  if (level() >= 2) return avx512::table;
  if (level() >= 1) return avx2::table;
#endif
  return baseline::table;
}

const char* capability() { return levels[level()]; }

bool has_avx512() { return level() >= 2; }

bool has_avx512_bf16() { return level() >= 3; }

bool has_amx() {
#if defined(__x86_64__)
  return level() >= 3 && __builtin_cpu_supports("amx-bf16");
#else
  return false;
#endif
}

}  // namespace rlrr
