// What the kernels of grouped MLPs are given; see src/fastffn/ops/grouped_mlp/README.md.
//
// T tokens, E MLPs of D inputs, H hidden neurons and O outputs. All arrays are row-major and dense, except that rows of
// x may be further apart; none need be aligned.
#pragma once

#include <cstdint>

namespace fastffn {

struct MlpForward {
    const void* x;              // [T, D]
    const std::int64_t* index;  // [T]; a number that is no MLP's gives zeros
    const void* up_weight;      // [E, H, D]
    const void* up_bias;        // [E, H], or null
    const void* down_weight;    // [E, O, H]
    const void* down_bias;      // [E, O], or null
    const void* gate_weight;    // [E, H, D], or null
    const void* gate_bias;      // [E, H], or null
    const void* up_scale;       // [E, H]; with int8 weights only: each row's numbers are multiplied by its scale
    const void* down_scale;     // [E, O]
    const void* gate_scale;     // [E, H]
    void* y;                    // [T, O]
    std::int64_t* order;        // [T], or null where no gradient is asked; so the next three
    std::int32_t* ends;         // [E]
    void* up;                   // [T, H], in the order of `order`
    void* gate;                 // [T, H]; null also where there is no gate
    std::int64_t tokens, mlps, d_in, hidden, d_out, x_stride;
    int activation;
    int threads;
};

struct MlpBackward {
    const void* gradient;  // [T, O]
    const void* x;
    const void* up_weight;
    const void* down_weight;
    const void* gate_weight;
    const std::int64_t* order;
    const std::int32_t* ends;
    const void* up;
    const void* gate;
    void* d_x;            // [T, D], or null; so the other six
    void* d_up_weight;    // [E, H, D]
    void* d_up_bias;      // [E, H]
    void* d_down_weight;  // [E, O, H]
    void* d_down_bias;    // [E, O]
    void* d_gate_weight;  // [E, H, D]
    void* d_gate_bias;    // [E, H]
    std::int64_t tokens, mlps, d_in, hidden, d_out, x_stride;
    int activation;
    int threads;
};

struct MlpKernels {
    void (*forward[3])(const MlpForward&);  // by Dtype
    void (*forward_int8[3])(const MlpForward&);
    void (*backward[3])(const MlpBackward&);
};

// One table for each instruction set that was compiled; null where it was not.
const MlpKernels* mlp_kernels_avx512();
const MlpKernels* mlp_kernels_avx2();
const MlpKernels* mlp_kernels_baseline();

}  // namespace fastffn
