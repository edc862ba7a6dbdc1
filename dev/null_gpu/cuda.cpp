// libcuda (the driver) of the null GPU: what Triton and torch call directly. Kernels are counted by their names.
#include <cuda.h>
#include <sys/mman.h>
#include <cstring>
#include <string>
#include <dlfcn.h>
#include <cstdio>
#undef cuDeviceTotalMem
#define API extern "C" __attribute__((visibility("default")))
extern "C" int nullgpu_attribute(int);
extern "C" int nullgpu_num_devices();
extern "C" void nullgpu_launch(const char*, void*);
extern "C" int nullgpu_use(int device, long bytes);
extern "C" void nullgpu_map(void* address, size_t size, int device);
extern "C" void nullgpu_unmap(void* address, size_t size);
struct Fn {
  std::string name;
};
API CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
API CUresult cuDriverGetVersion(int* v) {
  *v = 13000;
  return CUDA_SUCCESS;
}
API CUresult cuDeviceGet(CUdevice* d, int i) {
  *d = i;
  return CUDA_SUCCESS;
}
API CUresult cuDeviceGetCount(int* n) {
  *n = nullgpu_num_devices();
  return CUDA_SUCCESS;
}
API CUresult cuDeviceGetAttribute(int* v, CUdevice_attribute a, CUdevice) {
  *v = nullgpu_attribute(a);
  return CUDA_SUCCESS;
}
API CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* f, int* a) {
  *f = 0;
  *a = 1;
  return CUDA_SUCCESS;
}
API CUresult cuDevicePrimaryCtxRetain(CUcontext* c, CUdevice) {
  *c = (CUcontext)8;
  return CUDA_SUCCESS;
}
API CUresult cuCtxGetCurrent(CUcontext* c) {
  *c = (CUcontext)8;
  return CUDA_SUCCESS;
}
API CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
API CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
API CUresult cuCtxGetLimit(size_t* v, CUlimit) {
  *v = 0;
  return CUDA_SUCCESS;
}
API CUresult cuGetErrorString(CUresult, const char** s) {
  *s = "null";
  return CUDA_SUCCESS;
}
API CUresult cuModuleLoad(CUmodule* m, const char*) {
  *m = (CUmodule)8;
  return CUDA_SUCCESS;
}
API CUresult cuModuleLoadData(CUmodule* m, const void*) {
  *m = (CUmodule)8;
  return CUDA_SUCCESS;
}
API CUresult cuModuleLoadDataEx(CUmodule* m, const void*, unsigned, CUjit_option*, void**) {
  *m = (CUmodule)8;
  return CUDA_SUCCESS;
}
API CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
API CUresult cuModuleGetFunction(CUfunction* f, CUmodule, const char* n) {
  *f = (CUfunction) new Fn{n};
  return CUDA_SUCCESS;
}
API CUresult cuFuncGetAttribute(int* v, CUfunction_attribute a, CUfunction) {
  *v = a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : a == CU_FUNC_ATTRIBUTE_NUM_REGS ? 64 : 0;
  return CUDA_SUCCESS;
}
API CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
API CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
API CUresult cuLaunchKernel(CUfunction f, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                            CUstream s, void**, void**) {
  nullgpu_launch(((Fn*)f)->name.c_str(), s);
  return CUDA_SUCCESS;
}
API CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction f, void**, void**) {
  nullgpu_launch(((Fn*)f)->name.c_str(), c->hStream);
  return CUDA_SUCCESS;
}
API CUresult cuLaunchCooperativeKernel(CUfunction f, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                                       unsigned, CUstream s, void**) {
  nullgpu_launch(((Fn*)f)->name.c_str(), s);
  return CUDA_SUCCESS;
}
API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n, CUfunction, int, size_t) {
  *n = 2;
  return CUDA_SUCCESS;
}
API CUresult cuOccupancyMaxActiveClusters(int* n, CUfunction, const CUlaunchConfig*) {
  *n = 2;
  return CUDA_SUCCESS;
}
API CUresult cuPointerGetAttribute(void* v, CUpointer_attribute a, CUdeviceptr p) {
  if (a == CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
    *(CUdeviceptr*)v = p;
  else if (a == CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL)
    *(int*)v = 0;
  else
    *(unsigned long long*)v = 0;
  return CUDA_SUCCESS;
}
API CUresult cuPointerGetAttributes(unsigned n, CUpointer_attribute* a, void** v, CUdeviceptr p) {
  for (unsigned i = 0; i < n; i++) cuPointerGetAttribute(v[i], a[i], p);
  return CUDA_SUCCESS;
}
API CUresult cuTensorMapEncodeTiled(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                    const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                    CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  return CUDA_SUCCESS;
}
API CUresult cuLinkCreate_v2(unsigned, CUjit_option*, void**, CUlinkState*) { return CUDA_SUCCESS; }
API CUresult cuLinkAddData_v2(CUlinkState, CUjitInputType, void*, size_t, const char*, unsigned, CUjit_option*,
                              void**) {
  return CUDA_SUCCESS;
}
API CUresult cuLinkComplete(CUlinkState, void**, size_t*) { return CUDA_SUCCESS; }

// ---- virtual memory, for torch's expandable segments ----

struct Memory {
  size_t size;
  int device;
};
API CUresult cuMemGetAllocationGranularity(size_t* size, const CUmemAllocationProp*, CUmemAllocationGranularity_flags) {
  *size = 2 << 20;
  return CUDA_SUCCESS;
}
API CUresult cuMemAddressReserve(CUdeviceptr* address, size_t size, size_t, CUdeviceptr, unsigned long long) {
  void* p = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  *address = (CUdeviceptr)p;
  return p == MAP_FAILED ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}
API CUresult cuMemAddressFree(CUdeviceptr address, size_t size) {
  munmap((void*)address, size);
  return CUDA_SUCCESS;
}
API CUresult cuMemCreate(CUmemGenericAllocationHandle* handle, size_t size, const CUmemAllocationProp* properties,
                         unsigned long long) {
  int device = properties->location.id;
  if (!nullgpu_use(device, size)) return CUDA_ERROR_OUT_OF_MEMORY;
  *handle = (CUmemGenericAllocationHandle) new Memory{size, device};
  return CUDA_SUCCESS;
}
API CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
  Memory* memory = (Memory*)handle;
  nullgpu_use(memory->device, -(long)memory->size);
  delete memory;
  return CUDA_SUCCESS;
}
API CUresult cuMemMap(CUdeviceptr address, size_t size, size_t, CUmemGenericAllocationHandle handle,
                      unsigned long long) {
  nullgpu_map((void*)address, size, ((Memory*)handle)->device);
  return CUDA_SUCCESS;
}
API CUresult cuMemUnmap(CUdeviceptr address, size_t size) {
  nullgpu_unmap((void*)address, size);
  return CUDA_SUCCESS;
}
API CUresult cuMemSetAccess(CUdeviceptr, size_t, const CUmemAccessDesc*, size_t) { return CUDA_SUCCESS; }
