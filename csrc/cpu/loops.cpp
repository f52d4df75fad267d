#include "loops.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

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

constexpr const char* levels[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx"};

#if defined(__x86_64__)
// Tiles of bfloat16: leaf 7, EDX bits 22 and 24; older compilers do not know the names. Linux saves the tiles, 8 KiB a
// thread, of a process that has asked for it, once.
bool cpu_has_amx() {
#if defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d >> 22 & 1) == 0 || (d >> 24 & 1) == 0) return false;
  constexpr int arch_req_xcomp_perm = 0x1023, xfeature_xtiledata = 18;
  return syscall(SYS_arch_prctl, arch_req_xcomp_perm, xfeature_xtiledata) == 0;
#else
  return false;
#endif
}
#endif

int supported_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512) return !__builtin_cpu_supports("avx512bf16") ? 2 : cpu_has_amx() ? 4 : 3;
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

bool has_avx2() { return level() >= 1; }

bool has_avx512() { return level() >= 2; }

bool has_avx512_bf16() { return level() >= 3; }

bool has_amx() { return level() >= 4; }

}  // namespace rlrr
