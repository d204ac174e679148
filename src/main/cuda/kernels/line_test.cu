// Do lines arrive whole? Run once when a group opens whose rows are to travel in lines (comm/lines.cuh).
// Every rank hammers a few lines of each peer's tile for the self-test, epoch after epoch as fast as it
// can, and looks at what its peers do to its own: whoever sees an epoch has to see the payload of that
// epoch. An aligned line that a converged warp stores and loads is whole on the hardware that we know;
// the PTX memory model does not say so, hence this test.
//
// CTA 2p writes to rank p, CTA 2p + 1 looks at what rank p writes. A writer begins when the peer has
// greeted it, so that somebody looks; all waits are bounded by one clock. Owners clear the tiles before.
#include "../layout/pack_params.cuh"
#include "../ptx/globaltimer.cuh"
#include "../ptx/ld_st.cuh"

namespace moe {

constexpr int kLineTestThreads = 256;
constexpr int kLineTestLines = kLineTestThreads / 8;  // eight lanes each
constexpr int kGreetingAt = kTileBytes / 2;           // a word of its own, past the lines
constexpr uint64_t kLastEpoch = 1ull << 63;
constexpr int kEpochsPerClockRead = 16;

// Word of a line in an epoch: no two epochs in a row share one.
__device__ __forceinline__ uint32_t line_word(uint64_t epoch, int line, int word) {
    return static_cast<uint32_t>(epoch) * 0x9e3779b9u + static_cast<uint32_t>(epoch >> 32) +
           static_cast<uint32_t>(line * 32 + word) * 0x85ebca6bu;
}

// This lane's 16 bytes; the last eight of the line are the epoch.
__device__ __forceinline__ uint4 line_part(uint64_t epoch, int line, int part) {
    uint4 v = make_uint4(line_word(epoch, line, 4 * part), line_word(epoch, line, 4 * part + 1),
                         line_word(epoch, line, 4 * part + 2), line_word(epoch, line, 4 * part + 3));
    if (part == 7) {
        v.z = static_cast<uint32_t>(epoch);
        v.w = static_cast<uint32_t>(epoch >> 32);
    }
    return v;
}

__device__ __forceinline__ uint8_t* tile_of(const LineTestParams& p, int owner, int source) {
    return p.ranks[owner].symmetric + p.off_tiles + static_cast<int64_t>(source) * kTileBytes;
}

__device__ __forceinline__ void store_test_line(const LineTestParams& p, uint8_t* address, uint4 v, int part) {
    __syncwarp();
    if (p.halves == 0) {
        ptx::store_line_sys(address, v);
        return;
    }
    // As a diverged warp does it: the half with the epoch is one transaction, the other another
    if (part >= 4) {
        ptx::store_line_sys(address, v);
    }
    __syncwarp();
    if (part < 4) {
        ptx::store_line_sys(address, v);
    }
}

__device__ __forceinline__ void hammer_lines(const LineTestParams& p, int peer, uint64_t start) {
    const int line = static_cast<int>(threadIdx.x) / 8;
    const int part = static_cast<int>(threadIdx.x) % 8;
    if (threadIdx.x == 0) {
        const uint64_t* greeting =
            reinterpret_cast<const uint64_t*>(tile_of(p, p.rank, peer) + kGreetingAt);
        while (ptx::load_relaxed_sys(greeting) == 0 && ptx::globaltimer_ns() - start < p.timeout_ns) {
        }
    }
    __syncthreads();
    uint8_t* to = tile_of(p, peer, p.rank) + threadIdx.x * 16;
    const uint64_t begin = ptx::globaltimer_ns();
    uint64_t epoch = 0;
    bool over = false;
    while (!over) {
        for (int i = 0; i < kEpochsPerClockRead; i++) {
            epoch++;
            store_test_line(p, to, line_part(epoch, line, part), part);
        }
        over = __any_sync(0xffffffffu, ptx::globaltimer_ns() - begin >= p.hammer_ns);
    }
    epoch = (epoch + 1) | kLastEpoch;
    store_test_line(p, to, line_part(epoch, line, part), part);
}

__device__ __forceinline__ void look_at_lines(const LineTestParams& p, int peer, uint64_t start) {
    __shared__ unsigned long long torn, missing, epochs;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int line = static_cast<int>(threadIdx.x) / 8;
    const int part = lane % 8;
    if (threadIdx.x == 0) {
        torn = 0;
        missing = 0;
        epochs = 0;
        ptx::store_relaxed_sys(reinterpret_cast<uint64_t*>(tile_of(p, peer, p.rank) + kGreetingAt), 1);
    }
    __syncthreads();
    const uint8_t* from = tile_of(p, p.rank, peer) + threadIdx.x * 16;
    uint64_t before = 0;
    uint32_t wrong = 0;
    uint32_t changes = 0;
    bool waits = true;
    bool late = false;
    while (waits && !late) {
        __syncwarp();
        const uint4 v = ptx::load_line_sys(from);
        const uint32_t low = __shfl_sync(0xffffffffu, v.z, lane | 7);
        const uint32_t high = __shfl_sync(0xffffffffu, v.w, lane | 7);
        const uint64_t epoch = static_cast<uint64_t>(high) << 32 | low;
        const uint4 want = line_part(epoch, line, part);
        const bool same = v.x == want.x && v.y == want.y && v.z == want.z && v.w == want.w;
        const uint32_t bad = __ballot_sync(0xffffffffu, !same && epoch != 0);
        wrong += (bad >> (lane & ~7) & 0xff) != 0;
        changes += epoch != before;
        before = epoch;
        waits = __any_sync(0xffffffffu, (epoch & kLastEpoch) == 0);
        late = __any_sync(0xffffffffu, ptx::globaltimer_ns() - start >= p.timeout_ns);
    }
    if (part == 0) {
        atomicAdd(&torn, static_cast<unsigned long long>(wrong));
        atomicAdd(&epochs, static_cast<unsigned long long>(changes));
        atomicAdd(&missing, (before & kLastEpoch) == 0 ? 1ull : 0ull);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        p.findings[peer] = LineFinding{torn, missing, epochs, 0};
    }
}

}  // namespace moe

extern "C" __global__ __launch_bounds__(moe::kLineTestThreads)
void moe_line_test(const __grid_constant__ moe::LineTestParams p) {
    const int peer = static_cast<int>(blockIdx.x) / 2;
    if (peer >= p.num_ranks || peer == p.rank) {
        return;
    }
    const uint64_t start = moe::ptx::globaltimer_ns();
    if (blockIdx.x % 2 == 0) {
        moe::hammer_lines(p, peer, start);
    } else {
        moe::look_at_lines(p, peer, start);
    }
}
