// Do lines arrive whole? Run once when a group opens whose rows are to travel in lines (comm/lines.cuh).
// Every rank hammers a few lines of each peer's tile for the self-test, epoch after epoch as fast as it
// can, and looks at what its peers do to its own: whoever sees an epoch has to see the payload of that
// epoch. An aligned line that a converged warp stores and loads is whole on the hardware that we know;
// the PTX memory model does not say so, hence this test.
//
// Lines are stored and looked at in both forms: as those of rows, eight lanes of 16 bytes a line, and as those of
// ids, a warp of 4 bytes a lane. The first half of a CTA has one form, the second half the other.
// CTA 2p writes to rank p, CTA 2p + 1 looks at what rank p writes. A writer begins when the peer has
// greeted it, so that somebody looks; all waits are bounded by one clock. Owners clear the tiles before.
#include "../layout/pack_params.cuh"
#include "../ptx/globaltimer.cuh"
#include "../ptx/ld_st.cuh"

namespace moe {

constexpr int kLineTestThreads = 256;
constexpr int kRowFormThreads = kLineTestThreads / 2;
constexpr int kGreetingAt = kTileBytes / 2;  // a word of its own, past the lines
constexpr uint64_t kLastEpoch = 1ull << 63;
constexpr int kEpochsPerClockRead = 16;

// Bits of LineTestParams::halves.
enum LineForm : int32_t { kRowForm = 1, kIdForm = 2 };

// Word of a line in an epoch: no two epochs in a row share one.
__device__ __forceinline__ uint32_t line_word(uint64_t epoch, int line, int word) {
    return static_cast<uint32_t>(epoch) * 0x9e3779b9u + static_cast<uint32_t>(epoch >> 32) +
           static_cast<uint32_t>(line * 32 + word) * 0x85ebca6bu;
}

// A lane's part of a line whose last eight bytes are the epoch. The same interface for both forms.
struct RowLinePart {
    static constexpr LineForm kForm = kRowForm;
    uint4 words;

    static __device__ __forceinline__ int line() { return static_cast<int>(threadIdx.x) / 8; }
    static __device__ __forceinline__ int byte() { return static_cast<int>(threadIdx.x) * 16; }
    static __device__ __forceinline__ bool is_first_half() { return threadIdx.x % 8 < 4; }
    // Lanes of this lane's line.
    static __device__ __forceinline__ uint32_t lanes() { return 0xffu << (threadIdx.x % 32 / 8 * 8); }

    static __device__ __forceinline__ RowLinePart of(uint64_t epoch) {
        const int word = static_cast<int>(threadIdx.x) % 8 * 4;
        uint4 v = make_uint4(line_word(epoch, line(), word), line_word(epoch, line(), word + 1),
                             line_word(epoch, line(), word + 2), line_word(epoch, line(), word + 3));
        if (word == 28) {
            v.z = static_cast<uint32_t>(epoch);
            v.w = static_cast<uint32_t>(epoch >> 32);
        }
        return RowLinePart{v};
    }
    static __device__ __forceinline__ RowLinePart load(const uint8_t* from) { return RowLinePart{ptx::load_line_sys(from)}; }
    __device__ __forceinline__ void store(uint8_t* to) const { ptx::store_line_sys(to, words); }
    __device__ __forceinline__ uint64_t epoch() const {
        const int last = static_cast<int>(threadIdx.x) % 32 | 7;
        const uint32_t low = __shfl_sync(0xffffffffu, words.z, last);
        return static_cast<uint64_t>(__shfl_sync(0xffffffffu, words.w, last)) << 32 | low;
    }
    __device__ __forceinline__ bool operator==(const RowLinePart& other) const {
        return words.x == other.words.x && words.y == other.words.y && words.z == other.words.z &&
               words.w == other.words.w;
    }
};

struct IdLinePart {
    static constexpr LineForm kForm = kIdForm;
    uint32_t word;

    // Behind those of the other form
    static __device__ __forceinline__ int line() {
        return kRowFormThreads / 8 + (static_cast<int>(threadIdx.x) - kRowFormThreads) / 32;
    }
    static __device__ __forceinline__ int byte() { return line() * 128 + static_cast<int>(threadIdx.x) % 32 * 4; }
    static __device__ __forceinline__ bool is_first_half() { return threadIdx.x % 32 < 16; }
    static __device__ __forceinline__ uint32_t lanes() { return 0xffffffffu; }

    static __device__ __forceinline__ IdLinePart of(uint64_t epoch) {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        const uint32_t payload = line_word(epoch, line(), lane);
        return IdLinePart{lane < 30 ? payload : static_cast<uint32_t>(lane == 30 ? epoch : epoch >> 32)};
    }
    static __device__ __forceinline__ IdLinePart load(const uint8_t* from) { return IdLinePart{ptx::load_line_word_sys(from)}; }
    __device__ __forceinline__ void store(uint8_t* to) const { ptx::store_line_word_sys(to, word); }
    __device__ __forceinline__ uint64_t epoch() const {
        const uint32_t low = __shfl_sync(0xffffffffu, word, 30);
        return static_cast<uint64_t>(__shfl_sync(0xffffffffu, word, 31)) << 32 | low;
    }
    __device__ __forceinline__ bool operator==(const IdLinePart& other) const { return word == other.word; }
};

__device__ __forceinline__ uint8_t* tile_of(const LineTestParams& p, int owner, int source) {
    return p.ranks[owner].symmetric + p.off_tiles + static_cast<int64_t>(source) * kTileBytes;
}

template <class Part>
__device__ __forceinline__ void store_test_line(const LineTestParams& p, uint8_t* to, const Part& part) {
    __syncwarp();
    if ((p.halves & Part::kForm) == 0) {
        part.store(to);
        return;
    }
    // As a diverged warp does it: the half with the epoch is one transaction, the other another
    if (!Part::is_first_half()) {
        part.store(to);
    }
    __syncwarp();
    if (Part::is_first_half()) {
        part.store(to);
    }
}

template <class Part>
__device__ __forceinline__ void hammer_lines(const LineTestParams& p, int peer) {
    uint8_t* to = tile_of(p, peer, p.rank) + Part::byte();
    const uint64_t begin = ptx::globaltimer_ns();
    uint64_t epoch = 0;
    bool over = false;
    while (!over) {
        for (int i = 0; i < kEpochsPerClockRead; i++) {
            epoch++;
            store_test_line(p, to, Part::of(epoch));
        }
        over = __any_sync(0xffffffffu, ptx::globaltimer_ns() - begin >= p.hammer_ns);
    }
    epoch = (epoch + 1) | kLastEpoch;
    store_test_line(p, to, Part::of(epoch));
}

__device__ __forceinline__ void hammer_both_forms(const LineTestParams& p, int peer, uint64_t start) {
    if (threadIdx.x == 0) {
        const uint64_t* greeting =
            reinterpret_cast<const uint64_t*>(tile_of(p, p.rank, peer) + kGreetingAt);
        while (ptx::load_relaxed_sys(greeting) == 0 && ptx::globaltimer_ns() - start < p.timeout_ns) {
        }
    }
    __syncthreads();
    if (threadIdx.x < kRowFormThreads) {
        hammer_lines<RowLinePart>(p, peer);
    } else {
        hammer_lines<IdLinePart>(p, peer);
    }
}

struct LineCounts {
    unsigned long long torn;
    unsigned long long missing;
    unsigned long long epochs;
};

template <class Part>
__device__ __forceinline__ void look_at_lines(const LineTestParams& p, int peer, uint64_t start, LineCounts& counts) {
    const uint8_t* from = tile_of(p, p.rank, peer) + Part::byte();
    uint64_t before = 0;
    uint32_t wrong = 0;
    uint32_t changes = 0;
    bool waits = true;
    bool late = false;
    while (waits && !late) {
        __syncwarp();
        const Part seen = Part::load(from);
        const uint64_t epoch = seen.epoch();
        const uint32_t bad = __ballot_sync(0xffffffffu, !(seen == Part::of(epoch)) && epoch != 0);
        wrong += (bad & Part::lanes()) != 0;
        changes += epoch != before;
        before = epoch;
        waits = __any_sync(0xffffffffu, (epoch & kLastEpoch) == 0);
        late = __any_sync(0xffffffffu, ptx::globaltimer_ns() - start >= p.timeout_ns);
    }
    // A lane of each line speaks
    if ((Part::lanes() & ((1u << threadIdx.x % 32) - 1)) == 0) {
        atomicAdd(&counts.torn, static_cast<unsigned long long>(wrong));
        atomicAdd(&counts.epochs, static_cast<unsigned long long>(changes));
        atomicAdd(&counts.missing, (before & kLastEpoch) == 0 ? 1ull : 0ull);
    }
}

__device__ __forceinline__ void look_at_both_forms(const LineTestParams& p, int peer, uint64_t start) {
    __shared__ LineCounts counts;
    if (threadIdx.x == 0) {
        counts = LineCounts{0, 0, 0};
        ptx::store_relaxed_sys(reinterpret_cast<uint64_t*>(tile_of(p, peer, p.rank) + kGreetingAt), 1);
    }
    __syncthreads();
    if (threadIdx.x < kRowFormThreads) {
        look_at_lines<RowLinePart>(p, peer, start, counts);
    } else {
        look_at_lines<IdLinePart>(p, peer, start, counts);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        p.findings[peer] = LineFinding{counts.torn, counts.missing, counts.epochs, 0};
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
        moe::hammer_both_forms(p, peer, start);
    } else {
        moe::look_at_both_forms(p, peer, start);
    }
}
