// Programmatic dependent launch (PTX ISA 9.7.13.13). Both do nothing in a grid launched without it.
#pragma once

namespace moe::ptx {

// Returns when the grids before this one are complete and their writes visible.
__device__ __forceinline__ void wait_for_previous_grid() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

// Once every CTA has called it, the next grid may start beside this one.
__device__ __forceinline__ void allow_next_grid() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

}  // namespace moe::ptx
