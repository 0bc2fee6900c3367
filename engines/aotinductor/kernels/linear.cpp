// The C function that compiled programs call for fastvar::linear: oneDNN's linear layer, reached through torch.
//
// AOTInductor lowers that layer only for weights that it holds; ours are arguments.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/c/shim_cpu.h>

// x [M, K], weight [N, K], bias [N] -> out [M, N], behind the tanh GELU where `gelu` is not 0.
extern "C" AOTITorchError aoti_torch_cpu_linear(AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle bias,
                                                int32_t gelu, AtenTensorHandle* out) {
    const char* algorithm = gelu ? "tanh" : "";
    return aoti_torch_cpu__linear_pointwise(x, weight, &bias, gelu ? "gelu" : "none", nullptr, 0, &algorithm, out);
}
