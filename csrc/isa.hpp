// Which instruction sets this machine runs, chosen when the program runs.
#pragma once

#include <string>
#include <vector>

#include "grouped_mlp.hpp"
#include "neuron_tree.hpp"

namespace fastffn {

struct Kernels {
    const char* name;
    const TreeKernels* tree;
    const MlpKernels* mlp;
};

// Names of the instruction sets that were compiled and that this machine has, the fastest first.
std::vector<std::string> instruction_sets();

// The kernels of the one at that position.
const Kernels* isa_kernels(int position);

}  // namespace fastffn
