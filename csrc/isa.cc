#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace tandem {

#if defined(__x86_64__)
namespace {

bool cpu_has_amx_bf16() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) != 0 && (d >> 24 & 1) != 0;
}

// Linux hands out the 8 KiB of tile registers per process, on request (arch_prctl(2)).
bool system_grants_tiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

namespace amx_bf16 {
extern const KernelTable kTable;
}
namespace avx512_bf16 {
extern const KernelTable kTable;
}
namespace avx512_vnni {
extern const KernelTable kTable;
}
namespace avx512 {
extern const KernelTable kTable;
}
namespace avx2 {
extern const KernelTable kTable;
}
#elif defined(__aarch64__)
namespace neon_bf16 {
extern const KernelTable kTable;
}
namespace neon {
extern const KernelTable kTable;
}
#endif
namespace portable {
extern const KernelTable kTable;
}

const std::vector<Isa>& isas() {
  static const std::vector<Isa> all = [] {
    std::vector<Isa> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const auto first_missing = [](std::initializer_list<std::pair<bool, const char*>> needs) {
      for (const auto& [has, name] : needs) {
        if (!has) return std::string(name);
      }
      return std::string();
    };
    // __builtin_cpu_supports also asks the operating system whether it saves the registers.
    const std::string no_avx512 = first_missing({{__builtin_cpu_supports("avx512f"), "avx512f"},
                                                 {__builtin_cpu_supports("avx512bw"), "avx512bw"},
                                                 {__builtin_cpu_supports("avx512cd"), "avx512cd"},
                                                 {__builtin_cpu_supports("avx512dq"), "avx512dq"},
                                                 {__builtin_cpu_supports("avx512vl"), "avx512vl"},
                                                 {__builtin_cpu_supports("fma"), "fma"},
                                                 {__builtin_cpu_supports("bmi2"), "bmi2"}});
    const bool has_vnni = __builtin_cpu_supports("avx512vnni"), has_bf16 = __builtin_cpu_supports("avx512bf16");
    const Isa vnni{&avx512_vnni::kTable, no_avx512.empty() && !has_vnni ? "avx512_vnni" : no_avx512};
    const Isa bf16{&avx512_bf16::kTable, vnni.missing.empty() && !has_bf16 ? "avx512_bf16" : vnni.missing};
    std::string no_amx = bf16.missing;
    if (no_amx.empty() && !cpu_has_amx_bf16()) no_amx = "amx_bf16";
    if (no_amx.empty() && !system_grants_tiles()) no_amx = "permission to use AMX tiles";
    found.push_back({&amx_bf16::kTable, no_amx});
    // Intel issues vdpbf16ps once in two cycles (Xeon 6: 1.68 G/s against 6.71 G/s multiply-adds), so that widening
    // bf16 by shifts and multiplying in float32 does twice the work in the same time. Zen 4 issues either once a cycle
    // (3.66 G/s): with vdpbf16ps a call was 1.15 times as fast, in L2.
    const bool slow_dot = __builtin_cpu_is("intel");
    if (!slow_dot) found.push_back(bf16);
    found.push_back(vnni);
    found.push_back({&avx512::kTable, no_avx512});
    if (slow_dot) found.push_back(bf16);
    found.push_back({&avx2::kTable, first_missing({{__builtin_cpu_supports("avx2"), "avx2"},
                                                   {__builtin_cpu_supports("f16c"), "f16c"},
                                                   {__builtin_cpu_supports("fma"), "fma"},
                                                   {__builtin_cpu_supports("bmi2"), "bmi2"}})});
#elif defined(__aarch64__)
    found.push_back({&neon_bf16::kTable, (getauxval(AT_HWCAP2) & HWCAP2_BF16) != 0 ? "" : "bf16"});
    found.push_back({&neon::kTable, ""});
#endif
    found.push_back({&portable::kTable, ""});
    return found;
  }();
  return all;
}

}  // namespace tandem
