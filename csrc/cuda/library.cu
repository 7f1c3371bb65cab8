// What the library says of itself.
#include "device.h"

#ifndef CF_ARCHITECTURES
#define CF_ARCHITECTURES "host"
#endif

extern "C" {

int cf_abi_version(void) { return CF_ABI_VERSION; }
const char* cf_cuda_architectures(void) { return CF_ARCHITECTURES; }

int cf_cuda_describe(int64_t ordinal, cf_cuda_device* device) {
    const cudaDeviceAttr attributes[] = {cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor,
                                         cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin};
    int values[4] = {};
    for (int i = 0; i < 4; ++i) {
        if (const cudaError_t error = cudaDeviceGetAttribute(&values[i], attributes[i], static_cast<int>(ordinal))) {
            cudaGetLastError();
            return CF_CUDA_ERROR + static_cast<int>(error);
        }
    }
    *device = {ordinal, values[0] * 10 + values[1], values[2], values[3]};
    return CF_OK;
}

const char* cf_cuda_error(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status - CF_CUDA_ERROR)); }
}
