/*
 * NVTX ranges for a process that was not linked with NVTX. NVTX 3 exists as C headers only: code
 * that includes them loads the library a profiler names in NVTX_INJECTION64_PATH and hands it a
 * table of functions to fill in. This file does the same for Java. Older toolkits have
 * libnvToolsExt.so.1, which exports the functions; it is used where no profiler is named.
 *
 * Numbers and structs are those of nvtx3/nvtxDetail/nvtxTypes.h; a test compares them.
 */
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#define EXPORT __attribute__((visibility("default")))

typedef void (*function)(void);
typedef int (*push_function)(const char *);
typedef int (*pop_function)(void);

enum { TABLE_CALLBACKS = 1, TABLE_VERSION = 3 };
enum { CORE = 1, MODULES = 7, SLOTS = 32, RANGE_PUSH_A = 9, RANGE_POP = 11 };

/* Functions of each module, and a null at the end: none, core, cuda, opencl, cudart, core2, sync */
static const unsigned sizes[MODULES] = {0, 16, 9, 15, 7, 16, 7};
static function functions[MODULES][SLOTS];
static function *slots[MODULES][SLOTS + 1];
static push_function push;
static pop_function pop;

static int module_table(int module, function ***table, unsigned *size) {
    if (module <= 0 || module >= MODULES) {
        return 0;
    }
    if (table) {
        *table = slots[module];
    }
    if (size) {
        *size = sizes[module];
    }
    return 1;
}

static void tool_version(uint32_t version) { (void)version; }

static const struct {
    size_t size;
    int (*module_table)(int, function ***, unsigned *);
} callbacks = {sizeof(callbacks), module_table};

static const struct {
    size_t size;
    uint32_t version, reserved;
    void (*tool_version)(uint32_t);
} version = {sizeof(version), 3, 0, tool_version};

static const void *export_table(uint32_t id) {
    return id == TABLE_CALLBACKS ? (const void *)&callbacks : id == TABLE_VERSION ? (const void *)&version : NULL;
}

/* 1: through the profiler's library; 2: through libnvToolsExt; 0: neither is there. Called once. */
EXPORT int moe4j_nvtx_open(void) {
    const char *path = getenv("NVTX_INJECTION64_PATH");
    void *library = path ? dlopen(path, RTLD_LAZY) : NULL;
    if (library) {
        int (*attach)(const void *(*)(uint32_t)) =
            (int (*)(const void *(*)(uint32_t)))dlsym(library, "InitializeInjectionNvtx2");
        for (int module = 1; module < MODULES; module++) {
            for (unsigned i = 1; i < sizes[module]; i++) {
                slots[module][i] = &functions[module][i];
            }
        }
        if (attach && attach(export_table)) {
            push = (push_function)functions[CORE][RANGE_PUSH_A];
            pop = (pop_function)functions[CORE][RANGE_POP];
            if (push && pop) {
                return 1;
            }
        }
    }
    library = dlopen("libnvToolsExt.so.1", RTLD_LAZY);
    if (library) {
        push = (push_function)dlsym(library, "nvtxRangePushA");
        pop = (pop_function)dlsym(library, "nvtxRangePop");
    }
    return library && push && pop ? 2 : 0;
}

/* Only after moe4j_nvtx_open returned 1 or 2. Ranges are per thread. */
EXPORT int moe4j_nvtx_push(const char *name) { return push(name); }

EXPORT int moe4j_nvtx_pop(void) { return pop(); }
