#include "globe/isa.hpp"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "variant.hpp"

#if defined(GLOBE_HAVE_AVX2)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace globe {
namespace detail {

// Defined by variant.cpp, compiled for each instruction set that the compiler has.
namespace baseline {
extern const Variant table;
}
#if defined(GLOBE_HAVE_AVX2)
namespace avx2 {
extern const Variant table;
}
#endif
#if defined(GLOBE_HAVE_AVX512)
namespace avx512 {
extern const Variant table;
}
#endif
#if defined(GLOBE_HAVE_AVX512_VNNI)
namespace avx512_vnni {
extern const Variant table;
}
#endif
#if defined(GLOBE_HAVE_AVX512_BF16)
namespace avx512_bf16 {
extern const Variant table;
}
#endif
#if defined(GLOBE_HAVE_NEON_BF16)
namespace neon_bf16 {
extern const Variant table;
}
#endif

namespace {

#if defined(GLOBE_HAVE_AVX2)
bool has_avx2() {
    unsigned a = 0, b = 0, c = 0, d = 0;  // Clang's __builtin_cpu_supports knows no "f16c"
    const bool f16c = __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
    return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
#endif
#if defined(GLOBE_HAVE_NEON_BF16)
bool has_neon_bf16() {
#if defined(__linux__)
    constexpr unsigned long bf16 = 1UL << 14;  // HWCAP2_BF16
    return (getauxval(AT_HWCAP2) & bf16) != 0;
#elif defined(__APPLE__)
    int found = 0;
    std::size_t size = sizeof found;
    return sysctlbyname("hw.optional.arm.FEAT_BF16", &found, &size, nullptr, 0) == 0 && found != 0;
#else
    return false;
#endif
}
#endif

std::vector<const Variant*> runnable() {
    std::vector<const Variant*> found{&baseline::table};
#if defined(GLOBE_HAVE_AVX2)
    const bool avx2 = has_avx2();
    if (avx2) found.push_back(&avx2::table);
#endif
#if defined(GLOBE_HAVE_AVX512)
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512) found.push_back(&avx512::table);
#endif
#if defined(GLOBE_HAVE_AVX512_VNNI)
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    if (vnni) found.push_back(&avx512_vnni::table);
#endif
#if defined(GLOBE_HAVE_AVX512_BF16)
    if (vnni && __builtin_cpu_supports("avx512bf16")) found.push_back(&avx512_bf16::table);
#endif
#if defined(GLOBE_HAVE_NEON_BF16)
    if (has_neon_bf16()) found.push_back(&neon_bf16::table);
#endif
    return found;
}

const Variant& find(const std::string& name, const char* argument) {
    std::string known;
    for (const Variant* candidate : runnable()) {
        if (name == candidate->name) return *candidate;
        known += (known.empty() ? "" : ", ") + std::string(candidate->name);
    }
    throw std::invalid_argument(std::string(argument) + ": found '" + name + "'; expected one of " + known +
                                ", which this build has and this machine runs");
}

const Variant& pick() {
    const char* wanted = std::getenv("GLOBE_ISA");
    return wanted != nullptr && *wanted != '\0' ? find(wanted, "GLOBE_ISA") : *runnable().back();
}

std::atomic<const Variant*> chosen{nullptr};

}  // namespace

const Variant& variant() {
    const Variant* found = chosen.load(std::memory_order_acquire);
    if (found == nullptr) {
        found = &pick();
        chosen.store(found, std::memory_order_release);
    }
    return *found;
}

}  // namespace detail

std::vector<std::string> runnable_isas() {
    std::vector<std::string> names;
    for (const detail::Variant* candidate : detail::runnable()) names.emplace_back(candidate->name);
    return names;
}

std::string active_isa() {
    return detail::variant().name;
}

void use_isa(const std::string& name) {
    detail::chosen.store(&detail::find(name, "isa"), std::memory_order_release);
}

}  // namespace globe
