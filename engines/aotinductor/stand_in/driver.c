// libcuda.so.1 of a GPU that is not there: what compiled programs and Triton call.
#include <cuda.h>

#include "gpu.h"

#define OK CUDA_SUCCESS

static void *handle(void) { return (void *)64; }

EXPORT CUresult cuInit(unsigned flags) { return OK; }
EXPORT CUresult cuDriverGetVersion(int *version) { *version = CUDA_VERSION; return OK; }
EXPORT CUresult cuGetErrorString(CUresult e, const char **text) { *text = "an error of a GPU that is not there"; return OK; }
EXPORT CUresult cuGetErrorName(CUresult e, const char **text) { *text = "stand-in"; return OK; }

EXPORT CUresult cuDeviceGet(CUdevice *device, int number) { *device = number; return OK; }
EXPORT CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    switch (attribute) {
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = gpu()->major; break;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = gpu()->minor; break;
        case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = gpu()->processors; break;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = gpu()->shared_block; break;
        case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
        case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
        default: *value = 1024;
    }
    return OK;
}
EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { *context = handle(); return OK; }
EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    *flags = 0;
    *active = 1;
    return OK;
}
EXPORT CUresult cuCtxGetCurrent(CUcontext *context) { *context = handle(); return OK; }
EXPORT CUresult cuCtxSetCurrent(CUcontext context) { return OK; }
EXPORT CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 1 << 20; return OK; }
EXPORT CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return OK; }
EXPORT CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr memory) {
    if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *(CUdeviceptr *)data = memory;
    return OK;
}

EXPORT CUresult cuModuleLoad(CUmodule *module, const char *path) { *module = handle(); return OK; }
EXPORT CUresult cuModuleLoadData(CUmodule *module, const void *image) { *module = handle(); return OK; }
EXPORT CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned n, CUjit_option *o, void **values) {
    *module = handle();
    return OK;
}
EXPORT CUresult cuModuleGetFunction(CUfunction *f, CUmodule module, const char *name) { *f = handle(); return OK; }
EXPORT CUresult cuModuleUnload(CUmodule module) { return OK; }
EXPORT CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction f) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : attribute == CU_FUNC_ATTRIBUTE_NUM_REGS ? 32 : 0;
    return OK;
}
EXPORT CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute attribute, int value) { return OK; }
EXPORT CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache config) { return OK; }
EXPORT CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction f, const CUlaunchConfig *c) { *count = 4; return OK; }
EXPORT CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                               unsigned bz, unsigned shared, CUstream stream, void **parameters, void **extra) {
    stand_in_launched();
    return OK;
}
EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction f, void **parameters, void **extra) {
    stand_in_launched();
    return OK;
}
EXPORT CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                       const cuuint64_t *size, const cuuint64_t *stride, const cuuint32_t *box,
                                       const cuuint32_t *step, CUtensorMapInterleave interleave,
                                       CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                       CUtensorMapFloatOOBfill fill) {
    return OK;
}
