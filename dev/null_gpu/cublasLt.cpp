// libcublasLt of the null GPU: products are counted as launches. build.sh adds what else torch needs.
#define API extern "C" __attribute__((visibility("default")))
extern "C" void nullgpu_launch(const char* name, void* stream);  // cudart.cpp

static int create(void** object) {
  *object = (void*)1024;
  return 0;
}

API unsigned long cublasLtGetVersion() { return 130100; }
API int cublasLtMatmulDescCreate(void** object, int, int) { return create(object); }
API int cublasLtMatmulPreferenceCreate(void** object) { return create(object); }
API int cublasLtMatrixLayoutCreate(void** object, int, unsigned long, unsigned long, long) { return create(object); }

API int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void*, int* num_found) {
  *num_found = 1;
  return 0;
}

API int cublasLtMatmul(void*, void*, const void*, const void*, void*, const void*, void*, const void*, const void*,
                       void*, void*, void*, const void*, void*, unsigned long, void* stream) {
  nullgpu_launch("cublasLtMatmul", stream);
  return 0;
}
