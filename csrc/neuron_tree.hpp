// What the kernels of conditional neuron trees are given; see src/fastffn/ops/neuron_tree/README.md.
//
// T tokens, P trees of L levels and N = 2^L - 1 nodes, widths D in and O out. All arrays are row-major and dense, except
// that rows of x may be further apart; none need be aligned.
#pragma once

#include <cstdint>

namespace fastffn {

enum class Dtype : int { float32, bfloat16, float16 };

struct TreeForward {
    const void* x;      // [T, D]
    const void* w_in;   // [P, N, D]
    const void* b_in;   // [P, N], or null
    const void* w_out;  // [P, N, O]
    const float* in_scale;   // [P, N]: what a row of w_in is to be multiplied by; null unless weights are int8
    const float* out_scale;  // [P, N]
    void* y;            // [T, O]
    float* scores;      // [P, T, L], or null where no gradient is asked
    std::int64_t* last; // [P, T], or null
    std::int64_t tokens, trees, levels, d_in, d_out, x_stride;
    int activation;
    int threads;
};

struct TreeBackward {
    const void* gradient;  // [T, O]
    const void* x;
    const void* w_in;
    const void* w_out;
    const float* scores;
    const std::int64_t* last;
    void* d_x;     // [T, D], or null; the other three likewise
    void* d_w_in;  // [P, N, D]
    void* d_b_in;  // [P, N]
    void* d_w_out; // [P, N, O]
    std::int64_t tokens, trees, levels, d_in, d_out, x_stride;
    int activation;
    bool straight_through;
    int threads;
};

struct TreeKernels {
    void (*forward[3])(const TreeForward&);    // by Dtype
    void (*forward_int8[3])(const TreeForward&);  // weights int8, b_in float, x and y by Dtype
    void (*backward[3])(const TreeBackward&);
};

// One table for each instruction set that was compiled; null where it was not.
const TreeKernels* tree_kernels_avx512_bf16();
const TreeKernels* tree_kernels_avx512();
const TreeKernels* tree_kernels_avx2();
const TreeKernels* tree_kernels_baseline();

}  // namespace fastffn
