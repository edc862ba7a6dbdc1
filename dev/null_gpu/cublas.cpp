// libcublas of the null GPU: matrix products are counted as launches with their sizes, everything else does nothing.
// build.sh adds the functions that torch and its libraries need and that are not defined here.
#include <cstdio>

#define API extern "C" __attribute__((visibility("default")))
extern "C" void nullgpu_launch(const char* name, void* stream);  // cudart.cpp

// A handle belongs to a thread in torch, so the stream of a thread's last cublasSetStream is that of its products.
static thread_local void* stream = nullptr;

API int nullgpu_cublas_product(const char* name) {  // also called by the functions that build.sh adds
  nullgpu_launch(name, stream);
  return 0;
}

API int cublasCreate_v2(void** handle) {
  *handle = (void*)1024;
  return 0;
}

API int cublasSetStream_v2(void*, void* new_stream) {
  stream = new_stream;
  return 0;
}

API int cublasGetMathMode(void*, int* mode) {
  *mode = 0;
  return 0;
}

API int cublasGetPointerMode_v2(void*, int* mode) {
  *mode = 0;
  return 0;
}

API int cublasGemmEx(void*, int transa, int transb, int m, int n, int k, const void*, const void*, int a_type, int,
                     const void*, int b_type, int, const void*, void*, int c_type, int, int, int) {
  char name[128];
  snprintf(name, sizeof name, "gemm %dx%dx%d %s%s types %d %d %d", m, n, k, transa ? "T" : "N", transb ? "T" : "N",
           a_type, b_type, c_type);
  return nullgpu_cublas_product(name);
}

API int cublasGemmStridedBatchedEx(void*, int transa, int transb, int m, int n, int k, const void*, const void*,
                                   int a_type, int, long long, const void*, int b_type, int, long long, const void*,
                                   void*, int c_type, int, long long, int batch, int, int) {
  char name[128];
  snprintf(name, sizeof name, "gemm %d x %dx%dx%d %s%s types %d %d %d", batch, m, n, k, transa ? "T" : "N",
           transb ? "T" : "N", a_type, b_type, c_type);
  return nullgpu_cublas_product(name);
}

API int cublasSgemm_v2(void*, int, int, int m, int n, int k, const float*, const float*, int, const float*, int,
                       const float*, float*, int) {
  char name[128];
  snprintf(name, sizeof name, "gemm %dx%dx%d float32", m, n, k);
  return nullgpu_cublas_product(name);
}
