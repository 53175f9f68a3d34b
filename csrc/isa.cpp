#include "isa.hpp"

namespace fastffn {
namespace {

std::vector<Kernels> usable() {
    std::vector<Kernels> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
        if (__builtin_cpu_supports("avx512bf16"))
            found.push_back({"avx512_bf16", tree_kernels_avx512_bf16(), mlp_kernels_avx512()});
        found.push_back({"avx512", tree_kernels_avx512(), mlp_kernels_avx512()});
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        found.push_back({"avx2", tree_kernels_avx2(), mlp_kernels_avx2()});
    found.push_back({"sse2", tree_kernels_baseline(), mlp_kernels_baseline()});
#elif defined(__aarch64__)
    found.push_back({"neon", tree_kernels_baseline(), mlp_kernels_baseline()});
#else
    found.push_back({"portable", tree_kernels_baseline(), mlp_kernels_baseline()});
#endif
    return found;
}

const std::vector<Kernels>& table() {
    static const std::vector<Kernels> found = usable();
    return found;
}

}  // namespace

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const Kernels& kernels : table()) names.emplace_back(kernels.name);
    return names;
}

const Kernels* isa_kernels(int position) { return &table().at(static_cast<std::size_t>(position)); }

}  // namespace fastffn
