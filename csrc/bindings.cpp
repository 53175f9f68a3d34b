// The Python module `fastffn._cpu`: the only file that knows nanobind. Tensors come as addresses, which costs less a
// call than any exchange protocol; fastffn.ops checks shapes, dtypes and devices before.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "grouped_mlp.hpp"
#include "isa.hpp"
#include "neuron_tree.hpp"
#include "threads.hpp"

namespace nb = nanobind;
using Address = std::uintptr_t;

namespace {

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

void tree_forward(int isa, int dtype, int activation, Address x, Address w_in, Address b_in, Address w_out,
                  Address in_scale, Address out_scale, Address y, Address scores, Address last, std::int64_t tokens,
                  std::int64_t trees, std::int64_t levels, std::int64_t d_in, std::int64_t d_out, std::int64_t x_stride,
                  int threads) {
    const fastffn::TreeForward args{at<const void>(x), at<const void>(w_in), at<const void>(b_in), at<const void>(w_out),
                                    at<const float>(in_scale), at<const float>(out_scale), at<void>(y),
                                    at<float>(scores), at<std::int64_t>(last), tokens, trees, levels, d_in, d_out,
                                    x_stride, activation, threads};
    nb::gil_scoped_release released;
    const fastffn::TreeKernels& kernels = *fastffn::isa_kernels(isa)->tree;
    (in_scale ? kernels.forward_int8 : kernels.forward)[dtype](args);
}

void tree_backward(int isa, int dtype, int activation, bool straight_through, Address gradient, Address x, Address w_in,
                   Address w_out, Address scores, Address last, Address d_x, Address d_w_in, Address d_b_in,
                   Address d_w_out, std::int64_t tokens, std::int64_t trees, std::int64_t levels, std::int64_t d_in,
                   std::int64_t d_out, std::int64_t x_stride, int threads) {
    const fastffn::TreeBackward args{at<const void>(gradient), at<const void>(x), at<const void>(w_in),
                                     at<const void>(w_out), at<const float>(scores), at<const std::int64_t>(last),
                                     at<void>(d_x), at<void>(d_w_in), at<void>(d_b_in), at<void>(d_w_out), tokens,
                                     trees, levels, d_in, d_out, x_stride, activation, straight_through, threads};
    nb::gil_scoped_release released;
    fastffn::isa_kernels(isa)->tree->backward[dtype](args);
}

void mlp_forward(int isa, int dtype, int activation, Address x, Address index, Address up_weight, Address up_bias,
                 Address down_weight, Address down_bias, Address gate_weight, Address gate_bias, Address up_scale,
                 Address down_scale, Address gate_scale, Address y, Address order, Address ends, Address up,
                 Address gate, std::int64_t tokens, std::int64_t mlps, std::int64_t d_in, std::int64_t hidden,
                 std::int64_t d_out, std::int64_t x_stride, int threads) {
    const fastffn::MlpForward args{at<const void>(x), at<const std::int64_t>(index), at<const void>(up_weight),
                                   at<const void>(up_bias), at<const void>(down_weight), at<const void>(down_bias),
                                   at<const void>(gate_weight), at<const void>(gate_bias), at<const void>(up_scale),
                                   at<const void>(down_scale), at<const void>(gate_scale), at<void>(y),
                                   at<std::int64_t>(order), at<std::int32_t>(ends), at<void>(up), at<void>(gate),
                                   tokens, mlps, d_in, hidden, d_out, x_stride, activation, threads};
    nb::gil_scoped_release released;
    const fastffn::MlpKernels& kernels = *fastffn::isa_kernels(isa)->mlp;
    (up_scale ? kernels.forward_int8 : kernels.forward)[dtype](args);
}

void mlp_backward(int isa, int dtype, int activation, Address gradient, Address x, Address up_weight,
                  Address down_weight, Address gate_weight, Address order, Address ends, Address up, Address gate,
                  Address d_x, Address d_up_weight, Address d_up_bias, Address d_down_weight, Address d_down_bias,
                  Address d_gate_weight, Address d_gate_bias, std::int64_t tokens, std::int64_t mlps, std::int64_t d_in,
                  std::int64_t hidden, std::int64_t d_out, std::int64_t x_stride, int threads) {
    const fastffn::MlpBackward args{at<const void>(gradient), at<const void>(x), at<const void>(up_weight),
                                    at<const void>(down_weight), at<const void>(gate_weight),
                                    at<const std::int64_t>(order), at<const std::int32_t>(ends), at<const void>(up),
                                    at<const void>(gate), at<void>(d_x), at<void>(d_up_weight), at<void>(d_up_bias),
                                    at<void>(d_down_weight), at<void>(d_down_bias), at<void>(d_gate_weight),
                                    at<void>(d_gate_bias), tokens, mlps, d_in, hidden, d_out, x_stride, activation,
                                    threads};
    nb::gil_scoped_release released;
    fastffn::isa_kernels(isa)->mlp->backward[dtype](args);
}

}  // namespace

NB_MODULE(_cpu, m) {
    m.doc() = "Kernels on raw pointers; use fastffn.ops.";
    m.def("instruction_sets", &fastffn::instruction_sets, "Names of those this machine runs, the fastest first.");
    m.def("prefer_large_pages",
          [](Address memory, std::size_t bytes) { fastffn::prefer_large_pages(at<void>(memory), bytes); });
    m.def("tree_forward", &tree_forward);
    m.def("tree_backward", &tree_backward);
    m.def("mlp_forward", &mlp_forward);
    m.def("mlp_backward", &mlp_backward);
}
