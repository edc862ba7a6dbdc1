// libcudart of the null GPU: memory is host memory, kernels do nothing. Counts launches, copies and syncs, and follows
// the documented rules of stream capture: which calls end a capture, and which streams take part in it.
//
// NULLGPU_DEVICES=2 gives two devices; NULLGPU_CARD="Tesla T4,7.5,15.8" pretends to be another card (name, compute
// capability, GiB).
#include <cuda_runtime_api.h>
#include <sys/mman.h>
#include <dlfcn.h>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>
#include <chrono>
#include <sys/syscall.h>
#include <unistd.h>
using namespace std;
#define API extern "C" __attribute__((visibility("default")))
static recursive_mutex M;
typedef lock_guard<recursive_mutex> L;
API int nullgpu_num_devices() {
  const char* s = getenv("NULLGPU_DEVICES");
  return s ? atoi(s) : 1;
}
static int num_devices() { return nullgpu_num_devices(); }
struct Card {
  char name[128] = "NVIDIA H100 80GB HBM3";
  int major = 9, minor = 0;
  double gib = 79.205;
};
static const Card& card() {
  static const Card c = [] {
    Card c;
    const char* s = getenv("NULLGPU_CARD");
    if (s) sscanf(s, "%127[^,],%d.%d,%lf", c.name, &c.major, &c.minor, &c.gib);
    return c;
  }();
  return c;
}
// KiB of shared memory of a multiprocessor, by compute capability (CUDA C++ Programming Guide, technical
// specifications). A block can have 1 KiB less from Ampere on.
static int shared_memory() {
  switch (10 * card().major + card().minor) {
    case 75:
      return 64;
    case 70:
      return 96;
    case 80:
    case 87:
      return 164;
    case 86:
    case 89:
    case 120:
      return 100;
    default:
      return card().major < 7 ? 64 : 228;
  }
}
static int shared_memory_of_block() {
  int block = card().major < 7 ? 48 : card().major < 8 ? shared_memory() : shared_memory() - 1;
  return block * 1024;
}
static size_t total_memory() { return (size_t)(card().gib * (1ull << 30)) / 65536 * 65536; }
static thread_local int dev = 0;
static thread_local cudaError_t last = cudaSuccess;
static thread_local cudaStreamCaptureMode tmode = cudaStreamCaptureModeGlobal;
struct Capture {
  unsigned long long id;
  cudaStreamCaptureMode mode;
  long tid;
  bool invalid = false;
  size_t nodes = 0;
};
struct St {
  int device;
  unsigned flags;
  Capture* cap = nullptr;
};
struct Ev {
  Capture* cap = nullptr;
  double t = 0;
};
struct Gr {
  size_t nodes;
  int device;
};
static set<St*> streams;
static unsigned long long next_id = 1;
static set<Capture*> captures;
static unordered_map<const void*, string> names;
static map<string, long> launches, captured, calls, syncs, escaped, memcpys;
static size_t used[16], peak[16];
static map<void*, pair<size_t, int>> allocs, hosts;
static cudaError_t err(cudaError_t e) {
  if (e) last = e;
  return e;
}
static long tid() { return syscall(SYS_gettid); }
static bool is_handle(cudaStream_t s) { return (size_t)s > 64; }
static St* S(cudaStream_t s) { return is_handle(s) ? (St*)s : nullptr; }
static bool own_capture() {
  for (auto c : captures)
    if (c->tid == tid() && c->mode != cudaStreamCaptureModeRelaxed) return true;
  return false;
}
// documented rule of "potentially unsafe" calls
static cudaError_t unsafe(const char* what) {
  L l(M);
  if (tmode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  bool bad = own_capture();
  if (tmode == cudaStreamCaptureModeGlobal)
    for (auto c : captures)
      if (c->mode == cudaStreamCaptureModeGlobal) bad = true;
  if (!bad) return cudaSuccess;
  for (auto c : captures)
    if (c->tid == tid() || c->mode == cudaStreamCaptureModeGlobal) c->invalid = true;
  calls[string("UNSAFE_IN_CAPTURE ") + what]++;
  return err(cudaErrorStreamCaptureUnsupported);
}
static cudaError_t launch(const string& name, cudaStream_t s, dim3 g, dim3 b) {
  L l(M);
  St* st = S(s);
  if (st && st->cap) {
    captured[name]++;
    st->cap->nodes++;
    if (st->cap->invalid) return err(cudaErrorStreamCaptureInvalidated);
  } else {
    launches[name]++;
    if (own_capture()) escaped[name]++;
  }
  return cudaSuccess;
}
API void nullgpu_reset() {
  L l(M);
  launches.clear();
  captured.clear();
  calls.clear();
  syncs.clear();
  escaped.clear();
  memcpys.clear();
  for (int i = 0; i < 16; i++) peak[i] = used[i];
}
API void nullgpu_launch(const char* name, void* stream) { launch(name, (cudaStream_t)stream, dim3(), dim3()); }
API void nullgpu_dump(const char* path) {
  L l(M);
  FILE* f = fopen(path, "w");
  for (auto* m : {&launches, &captured, &calls, &syncs, &escaped, &memcpys}) {
    const char* n = m == &launches   ? "launch"
                    : m == &captured ? "captured"
                    : m == &calls    ? "call"
                    : m == &syncs    ? "sync"
                    : m == &escaped  ? "escaped"
                                     : "memcpy";
    for (auto& [k, v] : *m) fprintf(f, "%s\t%ld\t%s\n", n, v, k.c_str());
  }
  for (int i = 0; i < num_devices(); i++) fprintf(f, "memory\t%zu\t%zu peak of device %d\n", used[i], peak[i], i);
  fclose(f);
}
// ---- fat binaries, names ----
API void** __cudaRegisterFatBinary(void*) {
  static void* h;
  return &h;
}
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API char __cudaInitModule(void**) { return 1; }
API void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                                int*) {
  L l(M);
  names[host] = name;
}
API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
struct Cfg {
  dim3 g, b;
  size_t sh;
  cudaStream_t s;
};
static thread_local vector<Cfg> cfg;
API unsigned __cudaPushCallConfiguration(dim3 g, dim3 b, size_t sh, cudaStream_t s) {
  cfg.push_back({g, b, sh, s});
  return 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3* g, dim3* b, size_t* sh, void* s) {
  auto c = cfg.back();
  cfg.pop_back();
  *g = c.g;
  *b = c.b;
  *sh = c.sh;
  *(cudaStream_t*)s = c.s;
  return cudaSuccess;
}
API cudaError_t __cudaGetKernel(cudaKernel_t* k, const void* f) {
  *k = (cudaKernel_t)f;
  return cudaSuccess;
}
static string nm(const void* f) {
  L l(M);
  auto i = names.find(f);
  return i == names.end() ? "?" : i->second;
}
API cudaError_t __cudaLaunchKernel(cudaKernel_t k, dim3 g, dim3 b, void**, size_t, cudaStream_t s) {
  return launch(nm((void*)k), s, g, b);
}
API cudaError_t cudaLaunchKernel(const void* f, dim3 g, dim3 b, void**, size_t, cudaStream_t s) {
  return launch(nm(f), s, g, b);
}
API cudaError_t cudaLaunchCooperativeKernel(const void* f, dim3 g, dim3 b, void**, size_t, cudaStream_t s) {
  return launch(nm(f), s, g, b);
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* f, void**) {
  return launch(nm(f), c->stream, c->gridDim, c->blockDim);
}
API cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t fn, void* d) {
  if (!(S(s) && S(s)->cap)) fn(d);
  return cudaSuccess;
}
API cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t cb, void* d, unsigned) {
  cb(s, cudaSuccess, d);
  return cudaSuccess;
}
// ---- devices ----
API cudaError_t cudaGetDeviceCount(int* n) {
  *n = num_devices();
  return cudaSuccess;
}
API cudaError_t cudaGetDevice(int* d) {
  *d = dev;
  return cudaSuccess;
}
API cudaError_t cudaSetDevice(int d) {
  if (d >= num_devices()) return err(cudaErrorInvalidDevice);
  dev = d;
  return cudaSuccess;
}
API int nullgpu_attribute(int a) {
  switch (a) {
    case cudaDevAttrMaxThreadsPerBlock:
      return 1024;
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY:
      return 1024;
    case cudaDevAttrMaxBlockDimZ:
      return 64;
    case cudaDevAttrMaxGridDimX:
      return 2147483647;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ:
      return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      return 49152;
    case cudaDevAttrTotalConstantMemory:
      return 65536;
    case cudaDevAttrWarpSize:
      return 32;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      return 65536;
    case cudaDevAttrClockRate:
      return 1980000;
    case cudaDevAttrMultiProcessorCount:
      return 132;
    case cudaDevAttrMemoryClockRate:
      return 2619000;
    case cudaDevAttrGlobalMemoryBusWidth:
      return 5120;
    case cudaDevAttrL2CacheSize:
      return 52428800;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      return 2048;
    case cudaDevAttrComputeCapabilityMajor:
      return card().major;
    case cudaDevAttrComputeCapabilityMinor:
      return card().minor;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return shared_memory() * 1024;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return shared_memory_of_block();
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      return 32;
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrConcurrentKernels:
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrMemoryPoolsSupported:
      return 1;
    case cudaDevAttrTextureAlignment:
      return 512;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      return 1024;
    default:
      return 0;
  }
}
API cudaError_t cudaDeviceGetAttribute(int* v, cudaDeviceAttr a, int) {
  *v = nullgpu_attribute(a);
  return cudaSuccess;
}
API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int d) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, card().name);
  p->totalGlobalMem = total_memory();
  p->sharedMemPerBlock = 49152;
  p->regsPerBlock = 65536;
  p->warpSize = 32;
  p->memPitch = 2147483647;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->totalConstMem = 65536;
  p->major = card().major;
  p->minor = card().minor;
  p->textureAlignment = 512;
  p->multiProcessorCount = 132;
  p->concurrentKernels = 1;
  p->unifiedAddressing = 1;
  p->memoryBusWidth = 5120;
  p->l2CacheSize = 52428800;
  p->maxThreadsPerMultiProcessor = 2048;
  p->sharedMemPerMultiprocessor = shared_memory() * 1024;
  p->regsPerMultiprocessor = 65536;
  p->sharedMemPerBlockOptin = shared_memory_of_block();
  p->cooperativeLaunch = 1;
  p->maxBlocksPerMultiProcessor = 32;
  p->reservedSharedMemPerBlock = 1024;
  p->pciBusID = d;
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetPCIBusId(char* s, int n, int d) {
  snprintf(s, n, "0000:%02x:00.0", d);
  return cudaSuccess;
}
API cudaError_t cudaDeviceCanAccessPeer(int* v, int, int) {
  *v = 1;
  return cudaSuccess;
}
API cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }
API cudaError_t cudaDeviceGetStreamPriorityRange(int* a, int* b) {
  *a = 0;
  *b = -5;
  return cudaSuccess;
}
API cudaError_t cudaDriverGetVersion(int* v) {
  *v = 13000;
  return cudaSuccess;
}
API cudaError_t cudaRuntimeGetVersion(int* v) {
  *v = 13000;
  return cudaSuccess;
}
API cudaError_t cudaDeviceSynchronize() {
  if (auto e = unsafe("cudaDeviceSynchronize")) return e;
  L l(M);
  syncs["cudaDeviceSynchronize"]++;
  return cudaSuccess;
}
API const char* cudaGetErrorName(cudaError_t e) {
  return e == 900   ? "cudaErrorStreamCaptureUnsupported"
         : e == 901 ? "cudaErrorStreamCaptureInvalidated"
         : e == 2   ? "cudaErrorMemoryAllocation"
                    : "cudaError";
}
API const char* cudaGetErrorString(cudaError_t e) {
  return e == 900   ? "operation not permitted when stream is capturing"
         : e == 901 ? "operation failed due to a previous error during capture"
         : e == 2   ? "out of memory"
         : e == 600 ? "device not ready"
         : e == 101 ? "invalid device ordinal"
                    : "null gpu error";
}
API cudaError_t cudaGetLastError() {
  auto e = last;
  last = cudaSuccess;
  return e;
}
API cudaError_t cudaPeekAtLastError() { return last; }
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 32;
  a->ptxVersion = 90;
  a->binaryVersion = 90;
  return cudaSuccess;
}
API cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void*, int, size_t) {
  *n = 2;
  return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int, size_t, unsigned) {
  *n = 2;
  return cudaSuccess;
}
API cudaError_t cudaProfilerStart() { return cudaSuccess; }
API cudaError_t cudaProfilerStop() { return cudaSuccess; }
// ---- memory ----
API cudaError_t cudaMalloc(void** p, size_t n) {
  if (auto e = unsafe("cudaMalloc")) return e;
  L l(M);
  calls["cudaMalloc"]++;
  if (used[dev] + n > total_memory()) {
    *p = nullptr;
    return err(cudaErrorMemoryAllocation);
  }
  void* q = mmap(nullptr, n ? n : 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (q == MAP_FAILED) return err(cudaErrorMemoryAllocation);
  *p = q;
  allocs[q] = {n ? n : 1, dev};
  used[dev] += n;
  if (used[dev] > peak[dev]) peak[dev] = used[dev];
  return cudaSuccess;
}
API cudaError_t cudaFree(void* p) {
  if (!p) return cudaSuccess;
  if (auto e = unsafe("cudaFree")) return e;
  L l(M);
  calls["cudaFree"]++;
  auto i = allocs.find(p);
  if (i == allocs.end()) return cudaSuccess;
  used[i->second.second] -= i->second.first;
  munmap(p, i->second.first);
  allocs.erase(i);
  return cudaSuccess;
}
// For cuda.cpp: takes (or with negative bytes gives back) memory of a device, false if there is not enough left; notes
// to which device addresses belong.
API int nullgpu_use(int device, long bytes) {
  L l(M);
  if (bytes > 0 && used[device] + bytes > total_memory()) return false;
  used[device] += bytes;
  if (used[device] > peak[device]) peak[device] = used[device];
  return true;
}
API void nullgpu_map(void* address, size_t size, int device) {
  L l(M);
  allocs[address] = {size, device};
}
API void nullgpu_unmap(void* address, size_t size) {
  L l(M);
  allocs.erase(allocs.lower_bound(address), allocs.lower_bound((char*)address + size));
}
API cudaError_t cudaMallocAsync(void** p, size_t n, cudaStream_t) { return cudaMalloc(p, n); }
API cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return cudaFree(p); }
API cudaError_t cudaHostAlloc(void** p, size_t n, unsigned) {
  if (auto e = unsafe("cudaHostAlloc")) return e;
  L l(M);
  calls["cudaHostAlloc"]++;
  *p = aligned_alloc(4096, (n + 4095) / 4096 * 4096);
  hosts[*p] = {n, 0};
  return cudaSuccess;
}
API cudaError_t cudaFreeHost(void* p) {
  if (auto e = unsafe("cudaFreeHost")) return e;
  L l(M);
  hosts.erase(p);
  free(p);
  return cudaSuccess;
}
API cudaError_t cudaHostRegister(void*, size_t, unsigned) { return cudaSuccess; }
API cudaError_t cudaHostUnregister(void*) { return cudaSuccess; }
API cudaError_t cudaMemGetInfo(size_t* f, size_t* t) {
  L l(M);
  *t = total_memory();
  *f = total_memory() - used[dev];
  return cudaSuccess;
}
static int where(const void* p) {
  L l(M);
  auto i = allocs.upper_bound((void*)p);
  if (i != allocs.begin()) {
    --i;
    if ((char*)p < (char*)i->first + i->second.first) return i->second.second;
  }
  return -1;
}
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  memset(a, 0, sizeof *a);
  int d = where(p);
  if (d >= 0) {
    a->type = cudaMemoryTypeDevice;
    a->device = d;
    a->devicePointer = (void*)p;
    return cudaSuccess;
  }
  L l(M);
  auto i = hosts.upper_bound((void*)p);
  if (i != hosts.begin()) {
    --i;
    if ((char*)p < (char*)i->first + i->second.first) {
      a->type = cudaMemoryTypeHost;
      a->hostPointer = a->devicePointer = (void*)p;
      return cudaSuccess;
    }
  }
  a->type = cudaMemoryTypeUnregistered;
  a->device = -2;
  return cudaSuccess;
}
static const char* kind(cudaMemcpyKind k) {
  return k == cudaMemcpyHostToDevice     ? "H2D"
         : k == cudaMemcpyDeviceToHost   ? "D2H"
         : k == cudaMemcpyDeviceToDevice ? "D2D"
         : k == cudaMemcpyHostToHost     ? "H2H"
                                         : "default";
}
// The host reads zeros, so that what it decides does not depend on what a kernel should have written.
static void transfer(void* d, const void* s, size_t n, cudaMemcpyKind k) {
  if (k == cudaMemcpyDeviceToHost) memset(d, 0, n);
  if (k == cudaMemcpyHostToDevice || k == cudaMemcpyHostToHost) memmove(d, s, n);
}
API cudaError_t cudaMemcpyAsync(void* d, const void* s, size_t n, cudaMemcpyKind k, cudaStream_t st) {
  L l(M);
  St* q = S(st);
  memcpys[string(kind(k)) + (n > 1 << 20 ? " >1MiB" : "")]++;
  if (q && q->cap) {
    captured[string("memcpy ") + kind(k)]++;
    q->cap->nodes++;
    if (k == cudaMemcpyHostToDevice || k == cudaMemcpyDeviceToHost) {
      cudaPointerAttributes a;
      cudaPointerGetAttributes(&a, k == cudaMemcpyHostToDevice ? s : d);
      if (a.type == cudaMemoryTypeUnregistered) {
        q->cap->invalid = true;
        calls["CAPTURED PAGEABLE COPY"]++;
        return err(cudaErrorStreamCaptureUnsupported);
      }
    }
    return cudaSuccess;
  }
  if (own_capture()) escaped[string("memcpy ") + kind(k)]++;
  transfer(d, s, n, k);
  return cudaSuccess;
}
API cudaError_t cudaMemcpy(void* d, const void* s, size_t n, cudaMemcpyKind k) {
  if (auto e = unsafe("cudaMemcpy")) return e;
  L l(M);
  syncs["cudaMemcpy"]++;
  memcpys[kind(k)]++;
  transfer(d, s, n, k);
  return cudaSuccess;
}
API cudaError_t cudaMemcpy2DAsync(void* d, size_t dp, const void* s, size_t sp, size_t w, size_t h, cudaMemcpyKind k,
                                  cudaStream_t) {
  for (size_t i = 0; i < h; i++) memcpy((char*)d + i * dp, (char*)s + i * sp, w);
  return cudaSuccess;
}
API cudaError_t cudaMemcpyPeerAsync(void* d, int, const void* s, int, size_t n, cudaStream_t) {
  L l(M);
  memcpys["peer"]++;
  memcpy(d, s, n);
  return cudaSuccess;
}
API cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) { return cudaSuccess; }
API cudaError_t cudaGetSymbolAddress(void** p, const void*) {
  static char b[65536];
  *p = b;
  return cudaSuccess;
}
API cudaError_t cudaMemset(void*, int, size_t) { return cudaSuccess; }
API cudaError_t cudaMemsetAsync(void* p, int v, size_t n, cudaStream_t s) {
  return launch("memset", s, dim3(), dim3());
}
API cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* p, int) {
  *p = (cudaMemPool_t)1;
  return cudaSuccess;
}
API cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void* v) {
  *(size_t*)v = 0;
  return cudaSuccess;
}
API cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }
API cudaError_t cudaMemPoolSetAccess(cudaMemPool_t, const cudaMemAccessDesc*, size_t) { return cudaSuccess; }
API cudaError_t cudaMemPoolTrimTo(cudaMemPool_t, size_t) { return cudaSuccess; }
API cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t*, void*) { return cudaSuccess; }
API cudaError_t cudaIpcOpenMemHandle(void**, cudaIpcMemHandle_t, unsigned) { return cudaSuccess; }
API cudaError_t cudaIpcCloseMemHandle(void*) { return cudaSuccess; }
API cudaError_t cudaIpcGetEventHandle(cudaIpcEventHandle_t*, cudaEvent_t) { return cudaSuccess; }
API cudaError_t cudaIpcOpenEventHandle(cudaEvent_t*, cudaIpcEventHandle_t) { return cudaSuccess; }
// ---- streams, events ----
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned f, int) {
  L l(M);
  auto q = new St{dev, f};
  streams.insert(q);
  *s = (cudaStream_t)q;
  return cudaSuccess;
}
API cudaError_t cudaStreamCreate(cudaStream_t* s) { return cudaStreamCreateWithPriority(s, 0, 0); }
API cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
API cudaError_t cudaStreamGetPriority(cudaStream_t, int* p) {
  *p = 0;
  return cudaSuccess;
}
API cudaError_t cudaStreamQuery(cudaStream_t s) {
  if (S(s) && S(s)->cap) return err(cudaErrorStreamCaptureUnsupported);
  return cudaSuccess;
}
API cudaError_t cudaStreamSynchronize(cudaStream_t s) {
  L l(M);
  if (S(s) && S(s)->cap) {
    S(s)->cap->invalid = true;
    calls["SYNC OF CAPTURING STREAM"]++;
    return err(cudaErrorStreamCaptureUnsupported);
  }
  syncs["cudaStreamSynchronize"]++;
  return cudaSuccess;
}
API cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned) {
  L l(M);
  auto ev = (Ev*)e;
  if (S(s) && ev->cap && captures.count(ev->cap)) S(s)->cap = ev->cap;
  return cudaSuccess;
}
static double now() { return chrono::duration<double>(chrono::steady_clock::now().time_since_epoch()).count(); }
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) {
  *e = (cudaEvent_t) new Ev;
  return cudaSuccess;
}
API cudaError_t cudaEventCreate(cudaEvent_t* e) { return cudaEventCreateWithFlags(e, 0); }
API cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
API cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
  L l(M);
  auto ev = (Ev*)e;
  ev->cap = S(s) ? S(s)->cap : nullptr;
  ev->t = now();
  return cudaSuccess;
}
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned) { return cudaEventRecord(e, s); }
API cudaError_t cudaEventQuery(cudaEvent_t e) {
  if (((Ev*)e)->cap && captures.count(((Ev*)e)->cap)) return err(cudaErrorStreamCaptureUnsupported);
  return unsafe("cudaEventQuery");
}
API cudaError_t cudaEventSynchronize(cudaEvent_t) {
  L l(M);
  syncs["cudaEventSynchronize"]++;
  return cudaSuccess;
}
API cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t a, cudaEvent_t b) {
  *ms = (((Ev*)b)->t - ((Ev*)a)->t) * 1e3;
  return cudaSuccess;
}
// ---- capture, graphs ----
API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* m) {
  swap(*m, tmode);
  return cudaSuccess;
}
API cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode m) {
  L l(M);
  if (!S(s)) return err(cudaErrorStreamCaptureUnsupported);
  auto c = new Capture{next_id++, m, tid()};
  captures.insert(c);
  S(s)->cap = c;
  calls["captures"]++;
  return cudaSuccess;
}
API cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t* g) {
  L l(M);
  auto c = S(s) ? S(s)->cap : nullptr;
  if (!c) return err(cudaErrorIllegalState);
  for (auto q : streams)
    if (q->cap == c) q->cap = nullptr;
  captures.erase(c);
  *g = nullptr;
  if (c->invalid) return err(cudaErrorStreamCaptureInvalidated);
  *g = (cudaGraph_t) new Gr{c->nodes, dev};
  if (!c->nodes) calls["EMPTY GRAPH"]++;
  return cudaSuccess;
}
API cudaError_t cudaStreamIsCapturing(cudaStream_t s, cudaStreamCaptureStatus* st) {
  L l(M);
  *st = S(s) && S(s)->cap ? (S(s)->cap->invalid ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive)
                          : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, cudaStreamCaptureStatus* st, unsigned long long* id,
                                         cudaGraph_t* g, const cudaGraphNode_t** d, const cudaGraphEdgeData** e,
                                         size_t* n) {
  cudaStreamIsCapturing(s, st);
  if (id) *id = S(s) && S(s)->cap ? S(s)->cap->id : 0;
  if (g) *g = nullptr;
  if (n) *n = 0;
  if (d) *d = nullptr;
  return cudaSuccess;
}
API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* e, cudaGraph_t g, unsigned long long) {
  *e = (cudaGraphExec_t) new Gr(*(Gr*)g);
  return cudaSuccess;
}
API cudaError_t cudaGraphInstantiate(cudaGraphExec_t* e, cudaGraph_t g, unsigned long long) {
  return cudaGraphInstantiateWithFlags(e, g, 0);
}
API cudaError_t cudaGraphLaunch(cudaGraphExec_t e, cudaStream_t) {
  L l(M);
  calls["graph launches"]++;
  calls["graph kernels"] += ((Gr*)e)->nodes;
  return cudaSuccess;
}
API cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }
API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaSuccess; }
API cudaError_t cudaGraphDebugDotPrint(cudaGraph_t, const char*, unsigned) { return cudaSuccess; }
API cudaError_t cudaGraphGetNodes(cudaGraph_t g, cudaGraphNode_t*, size_t* n) {
  *n = g ? ((Gr*)g)->nodes : 0;
  return cudaSuccess;
}
API cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t, cudaGraphNode_t*, cudaGraphEdgeData*, size_t* n) {
  *n = 0;
  return cudaSuccess;
}
static int zero_function() { return 0; }
API cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** f, unsigned, unsigned long long,
                                                 cudaDriverEntryPointQueryResult* st) {
  static void* h = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
  void* p = h ? dlsym(h, (string(name) + "_v2").c_str()) : nullptr;
  if (!p && h) p = dlsym(h, name);
  *f = p ? p : (void*)zero_function;
  if (st) *st = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
