// Run-time choice of the instruction set.
#include <cstring>

#include "cpu/isa/isa.h"

#if defined(SK_HAVE_AMX)
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace sk {

#define SK_DECLARE(isa) const IsaKernels* isa_table_##isa();
#ifdef SK_HAVE_AMX
SK_DECLARE(amx)
#endif
#ifdef SK_HAVE_AVX512BF16
SK_DECLARE(avx512bf16)
#endif
#ifdef SK_HAVE_AVX512
SK_DECLARE(avx512)
#endif
#ifdef SK_HAVE_AVX2
SK_DECLARE(avx2)
#endif
#ifdef SK_HAVE_NEON
SK_DECLARE(neon)
#endif
SK_DECLARE(generic)

namespace {

#ifdef SK_HAVE_AMX
// The kernel lends a process the registers when it asks; not asking costs every thread 8 KB less to save.
bool has_amx() {
  constexpr unsigned kTile = 1u << 24, kBf16 = 1u << 22;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTile) == 0 || (d & kBf16) == 0) return false;
#ifdef __linux__
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}
#endif

struct Table {
  const IsaKernels* found[7] = {};
  const char* names[7] = {};
  int n = 0;

  void add(const IsaKernels* k) {
    found[n] = k;
    names[n++] = k->name;
  }
  Table() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#ifdef SK_HAVE_AVX512
    if (avx512) add(isa_table_avx512());
#endif
#ifdef SK_HAVE_AVX512BF16
    if (avx512 && __builtin_cpu_supports("avx512bf16")) add(isa_table_avx512bf16());
#endif
#ifdef SK_HAVE_AMX
    if (avx512 && has_amx()) add(isa_table_amx());
#endif
#ifdef SK_HAVE_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
      add(isa_table_avx2());
#endif
#endif
#ifdef SK_HAVE_NEON
    add(isa_table_neon());
#endif
    add(isa_table_generic());
  }
};

const Table& table() {
  static const Table t;
  return t;
}

}  // namespace

const IsaKernels* find_isa(const char* name) {
  for (int i = 0; i < table().n; ++i)
    if (!std::strcmp(table().names[i], name)) return table().found[i];
  return nullptr;
}

const IsaKernels* best_isa() { return table().found[0]; }
const char* const* isa_names() { return table().names; }

}  // namespace sk
