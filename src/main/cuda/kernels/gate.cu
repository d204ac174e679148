// A test's gate: holds the stream until the host sets a word, or a bound has passed. One thread.
#include "../layout/pack_params.cuh"
#include "../ptx/globaltimer.cuh"
#include "../ptx/ld_st.cuh"

namespace moe {

constexpr int kGateThreads = 32;

}  // namespace moe

extern "C" __global__ __launch_bounds__(moe::kGateThreads)
void moe_gate(const __grid_constant__ moe::GateParams p) {
    if (threadIdx.x != 0) {
        return;
    }
    const uint64_t start = moe::ptx::globaltimer_ns();
    while (moe::ptx::load_acquire_sys(p.word) == 0 &&
           moe::ptx::globaltimer_ns() - start < p.timeout_ns) {
    }
}
