// Trace points, for measurements with ep_main trace: clocks of each warp's first lane, and the multiprocessor,
// by which a kernel's points are set against those of the one before it. Without MOE_TRACE nothing.
#pragma once

namespace moe {

enum TraceKernel { kTraceDispatch = 0, kTraceCombine = 1 };

#ifdef MOE_TRACE
constexpr int kTracePoints = 16;
constexpr int kTraceMultiprocessor = 15;
__device__ long long g_trace[2][160][32][kTracePoints];
__device__ __forceinline__ void trace_point(TraceKernel kernel, int point) {
    if (threadIdx.x % 32 == 0) {
        g_trace[kernel][blockIdx.x][threadIdx.x / 32][point] = clock64();
    }
}
__device__ __forceinline__ void trace_start(TraceKernel kernel) {
    if (threadIdx.x % 32 == 0) {
        uint32_t multiprocessor;
        asm volatile("mov.u32 %0, %smid;" : "=r"(multiprocessor));
        for (int i = 0; i < kTracePoints; i++) {
            g_trace[kernel][blockIdx.x][threadIdx.x / 32][i] = 0;
        }
        g_trace[kernel][blockIdx.x][threadIdx.x / 32][kTraceMultiprocessor] = multiprocessor;
    }
}
#else
__device__ __forceinline__ void trace_point(TraceKernel, int) {}
__device__ __forceinline__ void trace_start(TraceKernel) {}
#endif

}  // namespace moe
