// What a profiler names in NVTX_INJECTION64_PATH: fills in the functions for ranges and writes each
// call to the file FAKE_NVTX_LOG. Compiled with NVTX_HEADER it takes types and numbers from NVTX.
//   gcc -shared -fPIC [-DNVTX_HEADER -I/usr/local/cuda/include] -o libfake_nvtx.so fake_nvtx.c
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#ifdef NVTX_HEADER
#define NVTX_NO_IMPL
#include <nvtx3/nvToolsExt.h>
typedef const NvtxExportTableCallbacks *callbacks;
typedef const NvtxExportTableVersionInfo *version_info;
typedef NvtxFunctionTable table;
typedef NvtxFunctionPointer function;
typedef NvtxGetExportTableFunc_t export_table;
#else
enum {
    NVTX_CB_MODULE_CORE = 1, NVTX_CB_MODULE_SIZE = 7,
    NVTX_CBID_CORE_RangePushA = 9, NVTX_CBID_CORE_RangePop = 11, NVTX_CBID_CORE_SIZE = 16,
    NVTX_CBID_CUDA_SIZE = 9, NVTX_CBID_OPENCL_SIZE = 15, NVTX_CBID_CUDART_SIZE = 7,
    NVTX_CBID_CORE2_SIZE = 16, NVTX_CBID_SYNC_SIZE = 7,
    NVTX_ETID_CALLBACKS = 1, NVTX_ETID_VERSIONINFO = 3
};
typedef void (*function)(void);
typedef function **table;
typedef const void *(*export_table)(uint32_t);
typedef const struct { size_t struct_size; int (*GetModuleFunctionTable)(int, table *, unsigned *); } *callbacks;
typedef const struct { size_t struct_size; uint32_t version, reserved; void (*SetInjectionNvtxVersion)(uint32_t); } *version_info;
#endif

static FILE *out;
static int depth;

static int range_push(const char *name) {
    if (out) { fprintf(out, "push %s\n", name); fflush(out); }
    return depth++;
}

static int range_pop(void) {
    if (out) { fprintf(out, "pop\n"); fflush(out); }
    return --depth;
}

int InitializeInjectionNvtx2(export_table get) {
    const char *log = getenv("FAKE_NVTX_LOG");
    out = log ? fopen(log, "w") : NULL;
    callbacks calls = (callbacks)get(NVTX_ETID_CALLBACKS);
    version_info version = (version_info)get(NVTX_ETID_VERSIONINFO);
    if (!calls || calls->struct_size < sizeof(*calls) || !version || version->struct_size < sizeof(*version) || get(99)) return 0;
    version->SetInjectionNvtxVersion(3);
    static const unsigned sizes[NVTX_CB_MODULE_SIZE] = {
        0, NVTX_CBID_CORE_SIZE, NVTX_CBID_CUDA_SIZE, NVTX_CBID_OPENCL_SIZE, NVTX_CBID_CUDART_SIZE, NVTX_CBID_CORE2_SIZE, NVTX_CBID_SYNC_SIZE};
    table functions = NULL;
    unsigned size = 0;
    for (int module = 1; module < NVTX_CB_MODULE_SIZE; module++) {
        if (!calls->GetModuleFunctionTable(module, &functions, &size) || size != sizes[module]) return 0;
        for (unsigned i = 1; i < size; i++) {
            if (!functions[i]) return 0;
        }
        if (functions[0] || functions[size]) return 0;
    }
    if (calls->GetModuleFunctionTable(NVTX_CB_MODULE_SIZE, &functions, &size)) return 0;
    calls->GetModuleFunctionTable(NVTX_CB_MODULE_CORE, &functions, &size);
    *functions[NVTX_CBID_CORE_RangePushA] = (function)range_push;
    *functions[NVTX_CBID_CORE_RangePop] = (function)range_pop;
    if (out) { fprintf(out, "attached\n"); fflush(out); }
    return 1;
}

#ifdef NVTX_TOOLS_EXT  // libnvToolsExt.so.1 of older toolkits
int nvtxRangePushA(const char *name) {
    if (!out) { out = fopen(getenv("FAKE_NVTX_LOG"), "w"); fprintf(out, "exported\n"); }
    return range_push(name);
}

int nvtxRangePop(void) { return range_pop(); }
#endif
