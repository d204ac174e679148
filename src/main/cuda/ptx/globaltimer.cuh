// The device's nanosecond clock (PTX ISA 10.30). Its step may be as coarse as a microsecond.
#pragma once
#include <cstdint>

namespace moe::ptx {

__device__ __forceinline__ uint64_t globaltimer_ns() {
    uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
    return now;
}

}  // namespace moe::ptx
