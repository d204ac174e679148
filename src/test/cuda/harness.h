// What the programs without a JVM have in common: CUDA calls that must not fail, and random numbers
// from a seed.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

// why _Exit: threads of other GPUs may still wait, and what runs at an exit may wait for a GPU
#define CHECK_CUDA(call)                                                                         \
    do {                                                                                         \
        const cudaError_t code_ = (call);                                                        \
        if (code_ != cudaSuccess) {                                                              \
            std::printf("%s:%d %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(code_)); \
            std::fflush(stdout);                                                                 \
            std::_Exit(2);                                                                       \
        }                                                                                        \
    } while (0)

// SplitMix64.
struct Random {
    uint64_t state;
    uint64_t bits() {
        uint64_t x = (state += 0x9e3779b97f4a7c15ull);
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
        x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
        return x ^ (x >> 31);
    }
    int below(int n) { return static_cast<int>(bits() % static_cast<uint64_t>(n)); }
    float uniform() { return static_cast<float>(static_cast<int64_t>(bits() >> 40)) * 0x1p-23f - 1.0f; }  // −1 to 1
};
