// The instruction sets of this CPU, and the passes and loops for them.
#include "passes.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <string>

#include "loops.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace rlrr {
namespace {

enum Level { has_baseline, has_avx2, has_avx512, has_avx512_bf16, has_amx };
constexpr const char* names[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx"};

#if defined(__x86_64__)
// Whether the CPU has tiles of bfloat16 (leaf 7, EDX bits 22 and 24: older compilers do not know their names) and Linux
// lets this process use them: it saves 8 KiB of tiles for each thread of a process that has asked for it once.
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
  if (avx512) return !__builtin_cpu_supports("avx512bf16") ? has_avx512 : cpu_has_amx() ? has_amx : has_avx512_bf16;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return has_avx2;
#endif
  return has_baseline;
}

int level() {
  static const int chosen = [] {
    const int supported = supported_level();
    const char* wanted = std::getenv("RLRR_CPU_CAPABILITY");
    if (wanted == nullptr) return supported;
    const auto found = std::find(std::begin(names), std::end(names), std::string(wanted));
    // backends/cpu.py raises an error for an unknown name
    return found == std::end(names) ? supported : std::min(supported, int(found - std::begin(names)));
  }();
  return chosen;
}

}  // namespace

const char* capability() { return names[level()]; }

const Loops& loops() {
#if defined(__x86_64__)
  if (level() >= has_avx512) return avx512::table;
  if (level() >= has_avx2) return avx2::table;
#endif
  return baseline::table;
}

const Passes& passes_for([[maybe_unused]] Dtype dtype) {
#if defined(__x86_64__)
  if (dtype == Dtype::float32 && level() >= has_avx2) {
    return level() >= has_avx512 ? packed::avx512_float32 : packed::avx2_float32;
  }
  if (dtype == Dtype::bfloat16 && level() >= has_avx2) {
    if (level() >= has_amx) return packed::amx_bfloat16;
    if (level() >= has_avx512_bf16) return packed::avx512_bfloat16_pairs;
    return level() >= has_avx512 ? packed::avx512_bfloat16 : packed::avx2_bfloat16;
  }
#endif
  return blas_passes;
}

}  // namespace rlrr
