// Compiles a loop once per instruction set and runs the widest that this CPU has, so that one wheel serves every CPU.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <string_view>

#include "common/inline.h"

namespace efe {

enum class Capability { baseline, avx2, avx512 };

#if defined(__x86_64__) && defined(__GNUC__)
// The best that this CPU has, or less where ATEN_CPU_CAPABILITY=default|avx2|avx512 asks torch for it.
inline Capability cpu_capability() {
    static const Capability capability = [] {
        const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        const Capability found = has_avx512 ? Capability::avx512 : has_avx2 ? Capability::avx2 : Capability::baseline;
        const char* const wish = std::getenv("ATEN_CPU_CAPABILITY");
        if (wish == nullptr) return found;
        const std::string_view name(wish);
        const Capability most = name == "default" ? Capability::baseline : name == "avx2" ? Capability::avx2 : found;
        return std::min(found, most);
    }();
    return capability;
}

template <class Body>
__attribute__((target("avx2,fma,f16c"))) void run_avx2(const Body& body) {
    body();
}

template <class Body>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512"))) void run_avx512(
    const Body& body) {
    body();
}
#endif

// body: a lambda marked EFE_SIMD_BODY whose loops the compiler vectorises; the functions that they call are EFE_INLINE.
#define EFE_SIMD_BODY __attribute__((always_inline))

// Before a loop whose iterations touch different elements, which the compiler cannot know of pointers.
#define EFE_INDEPENDENT _Pragma("GCC ivdep")

template <class Body>
void vectorized(const Body& body) {
#if defined(__x86_64__) && defined(__GNUC__)
    switch (cpu_capability()) {
        case Capability::avx512:
            return run_avx512(body);
        case Capability::avx2:
            return run_avx2(body);
        case Capability::baseline:
            break;
    }
#endif
    body();
}

}  // namespace efe
