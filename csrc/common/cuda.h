// The CUDA device and stream that torch works on. Compiled with USE_CUDA, without which shim.h has no streams.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "common/tensor.h"

namespace efe {

// Makes the device of a tensor the current one while this lives.
class CudaDevice {
public:
    explicit CudaDevice(const Tensor& tensor) {
        int32_t index;
        check(aoti_torch_get_device_index(tensor.handle(), &index));
        check(aoti_torch_create_device_guard(index, &guard_));
    }
    CudaDevice(const CudaDevice&) = delete;
    CudaDevice& operator=(const CudaDevice&) = delete;
    ~CudaDevice() { aoti_torch_delete_device_guard(guard_); }

private:
    DeviceGuardHandle guard_;
};

// Of the current device.
inline cudaStream_t current_stream() {
    void* stream;
    check(aoti_torch_get_current_cuda_stream(-1, &stream));
    return static_cast<cudaStream_t>(stream);
}

inline void check_launch() {
    const cudaError_t error = cudaGetLastError();
    STD_TORCH_CHECK(error == cudaSuccess, "efe: a CUDA kernel was not launched: ", cudaGetErrorString(error), ".");
}

}  // namespace efe
