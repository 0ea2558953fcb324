// Which of the compiled instruction sets this processor can run.
#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace unishard {

namespace baseline {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

namespace {

struct List {
    const Kernels* entries[3];
    std::size_t count = 0;

    List() {
        entries[count++] = &baseline::kernels;
#if defined(__x86_64__)
        unsigned a = 0, b = 0, c = 0, d = 0;
        const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & (1u << 29)) != 0;
        // The builtin also asks whether the operating system saves the registers.
        if (!__builtin_cpu_supports("avx2") || !f16c) return;
        entries[count++] = &avx2::kernels;
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
            entries[count++] = &avx512::kernels;
        }
#endif
    }
};

}  // namespace

const Kernels* const* available(std::size_t* count) {
    static const List list;
    *count = list.count;
    return list.entries;
}

}  // namespace unishard
