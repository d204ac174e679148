// Programmatic dependent launch (PTX ISA 9.7.13.13). Both do nothing in a grid launched without it, and
// are nothing in code for a target older than Hopper, whose grids must be launched without it.
#pragma once

namespace moe::ptx {

// Returns when the grids before this one are complete and their writes visible.
__device__ __forceinline__ void wait_for_previous_grid() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Once every CTA has called it, the next grid may start beside this one.
__device__ __forceinline__ void allow_next_grid() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace moe::ptx
