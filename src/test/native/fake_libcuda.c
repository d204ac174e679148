// A libcuda.so.1 without a GPU: host memory stands in for device memory and one kernel exists,
// so that the way from Java through JCuda and JNA into the driver can be tested anywhere.
//   gcc -shared -fPIC -Wl,-soname,libcuda.so.1 -o libcuda.so.1 fake_libcuda.c
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int R;
typedef void* P;
typedef unsigned long long D;
#define E __attribute__((visibility("default")))

static P current[16];
static int depth;
static int capturing;
static size_t nodes;

E R cuInit(unsigned flags) { return getenv("FAKE_CUDA_INIT") ? atoi(getenv("FAKE_CUDA_INIT")) : 0; }
E R cuDriverGetVersion(int* v) { *v = 13000; return 0; }
E R cuDeviceGetCount(int* n) { *n = 2; return 0; }
E R cuDeviceGet(int* d, int ordinal) { *d = ordinal; return ordinal < 2 ? 0 : 101; }
E R cuDeviceGetName(char* name, int len, int d) { snprintf(name, len, "Fake GPU %d", d); return 0; }
E R cuDeviceGetAttribute(int* v, int a, int d) { *v = a == 75 ? 9 : a == 76 ? 0 : a == 16 ? 132 : a; return 0; }
E R cuDeviceTotalMem_v2(size_t* b, int d) { *b = 1ull << 37; return 0; }
E R cuDeviceGetPCIBusId(char* s, int len, int d) { snprintf(s, len, "0000:%02x:00.0", d + 27); return 0; }
E R cuDeviceCanAccessPeer(int* can, int a, int b) { *can = a != b; return 0; }
E R cuDevicePrimaryCtxRetain(P* c, int d) { *c = (P)(uintptr_t)(0xc000 + d); return 0; }
E R cuDevicePrimaryCtxRelease_v2(int d) { return 0; }
E R cuCtxGetCurrent(P* c) { *c = depth ? current[depth - 1] : 0; return 0; }
E R cuCtxCreate_v2(P* c, unsigned f, int d) { *c = current[depth++] = (P)(uintptr_t)(0xe000 + d); return 0; }
E R cuCtxDestroy_v2(P c) { if (depth && current[depth - 1] == c) depth--; return 0; }
E R cuCtxSetCurrent(P c) { if (depth) depth--; if (c) current[depth++] = c; return 0; }
E R cuCtxPushCurrent_v2(P c) { current[depth++] = c; return 0; }
E R cuCtxPopCurrent_v2(P* c) { if (!depth) return 201; *c = current[--depth]; return 0; }
E R cuCtxGetDevice(int* d) { if (!depth) return 201; *d = (int)((uintptr_t)current[depth - 1] & 0xff) % 16; return 0; }
E R cuCtxSynchronize(void) { return 0; }
E R cuCtxEnablePeerAccess(P c, unsigned f) { return 704; }
E R cuMemAlloc_v2(D* p, size_t n) { if (n > 1u << 30) return 2; *p = (D)(uintptr_t)malloc(n); return 0; }
E R cuMemFree_v2(D p) { free((P)(uintptr_t)p); return 0; }
// every address below 2^16 is unknown; 1 context, 2 memory type, 8 managed, 9 device
E R cuPointerGetAttribute(P out, int a, D p) {
    if (p < 1 << 16) return 1;
    if (a == 1) *(P*)out = (P)0xc001; else *(int*)out = a == 2 ? 2 : a == 9 ? 1 : 0;
    return 0;
}
E R cuMemGetInfo_v2(size_t* f, size_t* t) { *f = 1000; *t = 2000; return 0; }
E R cuMemHostAlloc(P* p, size_t n, unsigned f) { if (f != 3) return 1; *p = aligned_alloc(4096, (n + 4095) & ~4095ul); return 0; }
E R cuMemHostGetDevicePointer_v2(D* d, P p, unsigned f) { *d = (D)(uintptr_t)p; return 0; }
E R cuMemFreeHost(P p) { free(p); return 0; }
E R cuMemsetD8_v2(D p, unsigned char v, size_t n) { memset((P)(uintptr_t)p, v, n); return 0; }
E R cuMemsetD32_v2(D p, unsigned v, size_t n) { for (size_t i = 0; i < n; i++) ((unsigned*)(uintptr_t)p)[i] = v; return 0; }
E R cuMemsetD8Async(D p, unsigned char v, size_t n, P s) { return cuMemsetD8_v2(p, v, n); }
E R cuMemsetD32Async(D p, unsigned v, size_t n, P s) { return cuMemsetD32_v2(p, v, n); }
E R cuMemcpyHtoD_v2(D d, const void* s, size_t n) { memcpy((P)(uintptr_t)d, s, n); return 0; }
E R cuMemcpyDtoH_v2(P d, D s, size_t n) { memcpy(d, (P)(uintptr_t)s, n); return 0; }
E R cuMemcpyDtoD_v2(D d, D s, size_t n) { memcpy((P)(uintptr_t)d, (P)(uintptr_t)s, n); return 0; }
E R cuMemcpyHtoDAsync_v2(D d, const void* s, size_t n, P st) { return cuMemcpyHtoD_v2(d, s, n); }
E R cuMemcpyDtoHAsync_v2(P d, D s, size_t n, P st) { return cuMemcpyDtoH_v2(d, s, n); }
E R cuMemcpyDtoDAsync_v2(D d, D s, size_t n, P st) { return cuMemcpyDtoD_v2(d, s, n); }
E R cuStreamCreate(P* s, unsigned f) { if (f != 1) return 1; *s = (P)0x57000; return 0; }
E R cuStreamDestroy_v2(P s) { return 0; }
E R cuStreamSynchronize(P s) { return s == (P)0xdead ? 719 : 0; }
E R cuStreamQuery(P s) { return s == (P)0xb0 ? 600 : 0; }
E R cuStreamWaitEvent(P s, P e, unsigned f) { return 0; }
E R cuStreamIsCapturing(P s, int* st) { *st = capturing; return 0; }
E R cuStreamBeginCapture_v2(P s, int mode) { if (mode != 1) return 1; capturing = 1; nodes = 0; return 0; }
E R cuStreamEndCapture(P s, P* g) { capturing = 0; *g = (P)0x6000; return 0; }
E R cuGraphInstantiateWithFlags(P* e, P g, unsigned long long f) { *e = (P)0x6e000; return g == (P)0x6000 ? 0 : 400; }
E R cuThreadExchangeStreamCaptureMode(int* m) { static int mode = 1; int was = mode; mode = *m; *m = was; return 0; }
E R cuGraphUpload(P e, P s) { return 0; }
E R cuGraphLaunch(P e, P s) { return e == (P)0x6e000 ? 0 : 400; }
E R cuGraphGetNodes(P g, P* n, size_t* count) { *count = nodes; return 0; }
E R cuGraphDestroy(P g) { return 0; }
E R cuGraphExecDestroy(P e) { return 0; }
E R cuEventCreate(P* e, unsigned f) { *e = (P)(uintptr_t)(0xe000 + f); return 0; }
E R cuEventDestroy_v2(P e) { return 0; }
E R cuEventRecord(P e, P s) { return 0; }
E R cuEventQuery(P e) { return 0; }
E R cuEventSynchronize(P e) { return 0; }
E R cuEventElapsedTime(float* ms, P a, P b) { *ms = 1.5f; return 0; }
E R cuModuleLoadDataEx(P* m, const void* image, unsigned n, int* o, P* v) {
    const char* text = image;
    *m = (P)0x30d;
    return strcmp(text, "// ptx") == 0 ? 0 : 222;   // the zero byte at the end is part of the test
}
E R cuModuleUnload(P m) { return 0; }
E R cuModuleGetFunction(P* f, P m, const char* name) { *f = (P)0xf00; return strcmp(name, "add") ? 500 : 0; }
E R cuFuncGetAttribute(int* v, int a, P f) { *v = 100 + a; return 0; }
E R cuFuncSetAttribute(P f, int a, int v) { return a == 8 && v <= 232448 ? 0 : 1; }
E R cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n, P f, int block, size_t smem) { *n = 2048 / block; return 0; }
E R cuIpcGetMemHandle(char* h, D p) { memset(h, 7, 64); memcpy(h, &p, 8); return 0; }
typedef struct { char bytes[64]; } Ipc;
E R cuIpcOpenMemHandle_v2(D* p, Ipc h, unsigned f) { memcpy(p, h.bytes, 8); return f == 1 && h.bytes[63] == 7 ? 0 : 1; }
E R cuIpcCloseMemHandle(D p) { return 0; }

// add(int* values, int count, struct { float scale; int add; } how): values = values · scale + add
static R add(void** params) {
    int* values = *(int**)params[0];
    int count = *(int*)params[1];
    struct { float scale; int add; } how;
    memcpy(&how, params[2], sizeof how);
    for (int i = 0; i < count; i++) values[i] = (int)(values[i] * how.scale) + how.add;
    nodes++;
    return 0;
}

E R cuLaunchKernel(P f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned smem, P stream, void** params, void** extra) {
    if (f != (P)0xf00 || extra) return 400;
    if (gx != 3 || gy != 2 || gz != 1 || bx != 128 || by != 1 || bz != 1 || smem != 4096) return 1;
    return add(params);
}

typedef struct {
    unsigned gx, gy, gz, bx, by, bz, smem;
    P stream;
    struct { int id; char pad[4]; union { int allowed; char bytes[64]; } value; }* attrs;
    unsigned count;
} Config;

E R cuLaunchKernelEx(const Config* c, P f, void** params, void** extra) {
    if (c->count != 1 || c->attrs->id != 6 || c->attrs->value.allowed != 1) return 1;
    if (sizeof *c->attrs != 72 || c->stream != (P)0x57000) return 1;
    return cuLaunchKernel(f, c->gx, c->gy, c->gz, c->bx, c->by, c->bz, c->smem, c->stream, params, extra);
}
