// The kernels as a library that Python loads.
#include "cuda_on_cpu.h"
#include "kernels.cu"

namespace {
template <class Parameters>
int start(void (*kernel)(Parameters), const unsigned* grid, const unsigned* shape, const void* bytes, unsigned size) {
    if (size != sizeof(Parameters)) return -1;
    Parameters parameters;
    std::memcpy(&parameters, bytes, size);
    cpu::launch(kernel, {grid[0], grid[1], grid[2]}, {shape[0], shape[1], shape[2]}, parameters);
    return 0;
}
}  // namespace

// 0, or −1 when the parameters have another size, or −2 for an unknown kernel.
extern "C" int launch(const char* name, const unsigned* grid, const unsigned* shape, const void* bytes, unsigned size) {
    if (!std::strcmp(name, "stpm_preprocess")) return start(stpm_preprocess, grid, shape, bytes, size);
    if (!std::strcmp(name, "stpm_match")) return start(stpm_match, grid, shape, bytes, size);
    if (!std::strcmp(name, "stpm_combine")) return start(stpm_combine, grid, shape, bytes, size);
    return -2;
}
