// The part of a forwarding library that is the same for all: opens the library behind it and fills
// the jump table when it is loaded. build-bridges.sh adds the table and one jump per symbol.
//
// why a table filled at load: every symbol that the JNI library imports exists, so a function that
// the newer library dropped returns "not supported" instead of ending the process at its first
// call, which is what a missing symbol does.
#include <dlfcn.h>
#include <stddef.h>

extern const char *const moe4j_bridge_names[];
extern void *moe4j_bridge_slots[];
extern const int moe4j_bridge_count;

static int not_supported(void) { return MOE4J_NOT_SUPPORTED; }
static const char *not_supported_text(void) { return "NOT_SUPPORTED (missing in " MOE4J_TARGET ")"; }

static int returns_text(const char *name) {
    // names end in String or Name, such as cublasGetStatusString
    size_t n = 0;
    while (name[n]) n++;
    if (n > 6 && name[n - 6] == 'S' && name[n - 5] == 't' && name[n - 1] == 'g') return 1;
    return n > 4 && name[n - 4] == 'N' && name[n - 3] == 'a' && name[n - 1] == 'e';
}

__attribute__((constructor)) static void fill(void) {
    // why: by soname only, so it is the copy that was loaded before or one on the loader's own path
    void *target = dlopen(MOE4J_TARGET, RTLD_LAZY | RTLD_LOCAL);
    for (int i = 0; i < moe4j_bridge_count; i++) {
        const char *name = moe4j_bridge_names[i];
        void *f = target ? dlsym(target, name) : NULL;
        if (!f) f = returns_text(name) ? (void *)not_supported_text : (void *)not_supported;
        moe4j_bridge_slots[i] = f;
    }
}
