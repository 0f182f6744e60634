// Calls into CUDA whose errors are raised with CUDA's own text.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <stdexcept>
#include <string>
#include <utility>

namespace pke_fast {

inline void check_cuda(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // taken note of here: the next call must not report it again
    throw std::runtime_error(std::string("CUDA, ") + what + ": " + cudaGetErrorString(error) + " (" +
                             cudaGetErrorName(error) + ")");
}

// Puts a kernel on a stream, with `blocks` blocks (at least 1) in one row.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), std::size_t blocks, unsigned threads, cudaStream_t stream,
            Arguments&&... arguments) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(threads);
    config.stream = stream;
    check_cuda(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), name);
}

}  // namespace pke_fast
