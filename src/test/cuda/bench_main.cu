// The expert chain (gate/up GEMM with its activation, down GEMM) without a JVM: times of the cases in
// bench_cases.h and of prefill, cold weights, graph replay, medians; and bits compared between the
// wgmma kernels and those with mma.sync, over poisoned outputs.
//
//   bench_main [cases] [prefill] [verify] [turns] [only=N] [kernels=NAME] [cubin=NAME:FILE:SHARED ...]
//              [fused=NAME:FILE:SHARED ...]
//
// kernels: times these alone, for example prefill+pdl; bits are compared with mma.sync all the same.
// cubin: moe_experts_wgmma_prefill and its halves from another build, with that build's bytes of shared memory.
// fused: moe_experts_wgmma from another build, the same way.
// turns: the prefill kernel and those of the cubins in turns on a GPU that they have made hot, in the cases
// (only=N: this one, else 5, 10 and 14) and, with prefill, in prefill, with the clock of the SMs. With fused
// cubins these and the kernel here, and cases 1, 4 and 5.
// Prefill prints the rate of cuBLAS beside, measured before each time of a chain, where the variable CUBLAS
// names libcublas.so.13.
#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "../../main/cuda/moe4j.cu"
#include "bench_cases.h"
#include "harness.h"

namespace {

enum Stage { kGateUp = 1, kDown = 2, kChain = 3 };

struct Variant {
    const char* name;
    void (*gate_up)(moe::StepParams);
    void (*down)(moe::StepParams);
    void (*both)(moe::StepParams);  // null: the chain is the two
    int threads, shared, ctas_per_sm;
    bool pdl;
};

const int kNarrowShared = moe::kWgmmaSharedBytes<moe::NarrowShape>;
std::vector<Variant> g_variants = {
    {"mma", moe_gate_up_mma, moe_down_mma, nullptr, 256, moe::kGemmSharedBytes, 2, false},
    {"split", moe_gate_up_wgmma, moe_down_wgmma, nullptr, moe::kWgmmaThreads, kNarrowShared, 1, false},
    {"split+pdl", moe_gate_up_wgmma, moe_down_wgmma, nullptr, moe::kWgmmaThreads, kNarrowShared, 1, true},
    {"fused", moe_gate_up_wgmma, moe_down_wgmma, moe_experts_wgmma, moe::kWgmmaThreads, kNarrowShared, 1, false},
    {"fused+pdl", moe_gate_up_wgmma, moe_down_wgmma, moe_experts_wgmma, moe::kWgmmaThreads, kNarrowShared, 1, true},
    {"pre-split", moe_gate_up_wgmma_prefill, moe_down_wgmma_prefill, nullptr, moe::prefill::kThreads,
     moe::prefill::kSharedBytes, 1, false},
    {"prefill+pdl", moe_gate_up_wgmma_prefill, moe_down_wgmma_prefill, moe_experts_wgmma_prefill,
     moe::prefill::kThreads, moe::prefill::kSharedBytes, 1, true},
};

int g_sms;
const std::ptrdiff_t kBuiltIn = static_cast<std::ptrdiff_t>(g_variants.size());  // variants that are no cubin's
bool g_fused_cubins = false;  // of moe_experts_wgmma
const char* g_kernels = nullptr;  // the name of one of g_variants, or all

bool is_wanted(const Variant& v) { return g_kernels == nullptr || std::strcmp(g_kernels, v.name) == 0; }

// The first SM's clock and the time.
__global__ void read_clocks(unsigned long long* clocks) {
    unsigned sm;
    asm volatile("mov.u32 %0, %%smid;" : "=r"(sm));
    if (sm == 0 && threadIdx.x == 0) {
        unsigned long long clock, ns;
        asm volatile("mov.u64 %0, %%clock64;" : "=l"(clock));
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
        clocks[0] = clock, clocks[1] = ns;
    }
}

// The SM clock, in GHz, between two moments in the stream.
struct ClockRate {
    unsigned long long* at;
    cudaStream_t stream;

    explicit ClockRate(cudaStream_t stream) : stream(stream) {
        CHECK_CUDA(cudaMallocManaged(&at, 4 * sizeof(*at)));
    }
    ~ClockRate() { cudaFree(at); }
    void mark(int end) { read_clocks<<<8 * g_sms, 32, 0, stream>>>(at + 2 * end); }
    double ghz() const {  // once the stream has passed both
        return static_cast<double>(at[2] - at[0]) / static_cast<double>(at[3] - at[1]);
    }
};

cudaStream_t g_stream;
uint8_t* g_pool;
size_t g_pool_bytes;

void fill(void* to, size_t bytes, uint64_t seed, float scale) {
    const int rows = static_cast<int>(bytes / moe::kTileBytes);
    moe::FillParams f{static_cast<__nv_bfloat16*>(to), seed, rows, 128, 64, 1, 1, 0, scale, 0};
    moe_fill_random<<<8 * g_sms, 256, 0, g_stream>>>(f);
    CHECK_CUDA(cudaGetLastError());
}

template <class T>
T* upload(const std::vector<T>& v) {
    T* d;
    CHECK_CUDA(cudaMalloc(&d, std::max<size_t>(16, v.size() * sizeof(T))));
    CHECK_CUDA(cudaMemcpy(d, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice));
    return d;
}

// A rank's buffers for given counts, and sets of weights to rotate through.
struct Bench {
    std::vector<int> counts;
    int hidden, intermediate, rows = 0, hit = 0, sets;
    std::vector<moe::StepParams> params;
    std::vector<void*> allocations;
    __nv_bfloat16 *activated, *expert_out;
    size_t activated_bytes, expert_out_bytes;
    static constexpr int kGuardRows = 64;

    Bench(const std::vector<int>& counts, int hidden, int intermediate, int slots)
        : counts(counts), hidden(hidden), intermediate(intermediate) {
        const int experts = static_cast<int>(counts.size());
        Random random{77};
        std::vector<int> offsets(experts + 1, 0), list;
        for (int e = 0; e < experts; e++) {
            offsets[e + 1] = offsets[e] + counts[e];
            rows += counts[e], hit += counts[e] > 0;
            for (int i = 0; i < counts[e]; i++) list.push_back(random.below(slots));
        }
        const size_t gate_up = 2ull * intermediate * hidden * 2, down = gate_up / 2;
        const size_t set = (gate_up + down) * experts;
        sets = static_cast<int>(std::min<size_t>(8, std::max<size_t>(2, (450u << 20) / ((gate_up + down) * hit) + 1)));
        if (set * sets > g_pool_bytes) sets = static_cast<int>(g_pool_bytes / set);

        const size_t x_bytes = static_cast<size_t>(slots) * hidden * 2;
        auto* region = static_cast<uint8_t*>(keep(nullptr, (x_bytes + moe::kTileBytes) / moe::kTileBytes * moe::kTileBytes));
        fill(region, (x_bytes + moe::kTileBytes) / moe::kTileBytes * moe::kTileBytes, 5, 1.7f);
        activated_bytes = static_cast<size_t>(rows + kGuardRows) * intermediate * 2;
        expert_out_bytes = static_cast<size_t>(rows + kGuardRows) * hidden * 2;
        activated = static_cast<__nv_bfloat16*>(keep(nullptr, activated_bytes));
        expert_out = static_cast<__nv_bfloat16*>(keep(nullptr, expert_out_bytes));

        moe::StepParams p{};
        p.num_ranks = 1, p.num_local_ranks = 1, p.max_tokens = slots, p.top_k = 8, p.experts = experts;
        p.experts_per_rank = experts, p.hidden = p.hidden_pad = hidden;
        p.intermediate = p.intermediate_pad = intermediate;
        p.activation = moe::kSwiGlu, p.limit = INFINITY, p.timeout_ns = 1000000000;
        p.ranks = static_cast<moe::RankView*>(keep(upload(std::vector<moe::RankView>{{region}}), 0));
        auto* d_counts = static_cast<int*>(keep(upload(counts), 0));
        auto* d_offsets = static_cast<int*>(keep(upload(offsets), 0));
        auto* d_list = static_cast<int*>(keep(upload(list), 0));
        auto* work = static_cast<uint32_t*>(keep(nullptr, 32));
        auto* done = static_cast<uint32_t*>(keep(nullptr, 4ull * experts));
        CHECK_CUDA(cudaMemset(work, 0, 32));
        CHECK_CUDA(cudaMemset(done, 0, 4ull * experts));
        for (int s = 0; s < sets; s++) {
            moe::LocalRank me{};
            me.local_experts = experts;
            me.expert_counts = d_counts, me.expert_offsets = d_offsets, me.expert_rows = d_list;
            me.activated = activated, me.expert_out = expert_out;
            me.w_gate_up = reinterpret_cast<__nv_bfloat16*>(g_pool + s * set);
            me.w_down = reinterpret_cast<__nv_bfloat16*>(g_pool + s * set + gate_up * experts);
            me.work = work, me.expert_done = done;
            p.locals = static_cast<moe::LocalRank*>(keep(upload(std::vector<moe::LocalRank>{me}), 0));
            params.push_back(p);
        }
        CHECK_CUDA(cudaDeviceSynchronize());
    }

    ~Bench() {
        for (void* a : allocations) cudaFree(a);
    }

    void* keep(void* a, size_t bytes) {
        if (a == nullptr) CHECK_CUDA(cudaMalloc(&a, bytes));
        allocations.push_back(a);
        return a;
    }

    void launch(const Variant& v, void (*kernel)(moe::StepParams), const moe::StepParams& p,
                cudaStream_t stream = g_stream) {
        cudaLaunchConfig_t c{};
        c.gridDim = dim3(v.ctas_per_sm * g_sms), c.blockDim = dim3(v.threads);
        c.dynamicSmemBytes = v.shared, c.stream = stream;
        cudaLaunchAttribute a{};
        a.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        a.val.programmaticStreamSerializationAllowed = 1;
        c.attrs = &a, c.numAttrs = v.pdl;
        CHECK_CUDA(cudaLaunchKernelEx(&c, kernel, p));
    }

    void enqueue(const Variant& v, int stage, int set) {
        const moe::StepParams& p = params[set];
        if (stage == kChain && v.both != nullptr) {
            launch(v, v.both, p);
            return;
        }
        if (stage & kGateUp) launch(v, v.gate_up, p);
        if (stage & kDown) launch(v, v.down, p);
    }

    // Median time of a stage over replays of a graph that goes through the sets.
    double time_us(const Variant& v, int stage, int replays, double* ghz = nullptr) {
        Replay replay(*this, v, stage);
        replay.time_us(2);
        std::vector<double> times = replay.time_us(replays, ghz);
        std::sort(times.begin(), times.end());
        return times[times.size() / 2];
    }

    // A graph of a stage that goes through the sets.
    struct Replay {
        int runs;
        cudaGraph_t graph;
        cudaGraphExec_t exec;
        cudaEvent_t a, b;

        Replay(Bench& bench, const Variant& v, int stage) : runs(std::max(1, 8 / bench.sets) * bench.sets) {
            CHECK_CUDA(cudaStreamBeginCapture(g_stream, cudaStreamCaptureModeGlobal));
            for (int i = 0; i < runs; i++) bench.enqueue(v, stage, i % bench.sets);
            CHECK_CUDA(cudaStreamEndCapture(g_stream, &graph));
            CHECK_CUDA(cudaGraphInstantiate(&exec, graph, 0));
            CHECK_CUDA(cudaEventCreate(&a));
            CHECK_CUDA(cudaEventCreate(&b));
        }
        Replay(const Replay&) = delete;
        ~Replay() {
            cudaEventDestroy(a);
            cudaEventDestroy(b);
            cudaGraphExecDestroy(exec);
            cudaGraphDestroy(graph);
        }

        // Of one run in each replay.
        std::vector<double> time_us(int replays, double* ghz = nullptr) {
            std::vector<double> times;
            ClockRate clock(g_stream);
            clock.mark(0);
            for (int i = 0; i < replays; i++) {
                CHECK_CUDA(cudaEventRecord(a, g_stream));
                CHECK_CUDA(cudaGraphLaunch(exec, g_stream));
                CHECK_CUDA(cudaEventRecord(b, g_stream));
                CHECK_CUDA(cudaStreamSynchronize(g_stream));
                float ms;
                CHECK_CUDA(cudaEventElapsedTime(&ms, a, b));
                times.push_back(ms * 1000.0 / runs);
            }
            clock.mark(1);
            CHECK_CUDA(cudaStreamSynchronize(g_stream));
            if (ghz != nullptr) *ghz = clock.ghz();
            return times;
        }
    };

    std::vector<uint8_t> outputs(const Variant& v, int set, int poison) {
        poison_outputs(poison);
        enqueue(v, kChain, set);
        CHECK_CUDA(cudaGetLastError());
        return read_outputs();
    }

    void poison_outputs(int poison) {
        CHECK_CUDA(cudaMemsetAsync(activated, poison, activated_bytes, g_stream));
        CHECK_CUDA(cudaMemsetAsync(expert_out, poison, expert_out_bytes, g_stream));
    }

    std::vector<uint8_t> read_outputs() {
        CHECK_CUDA(cudaStreamSynchronize(g_stream));
        std::vector<uint8_t> all(activated_bytes + expert_out_bytes);
        CHECK_CUDA(cudaMemcpy(all.data(), activated, activated_bytes, cudaMemcpyDeviceToHost));
        CHECK_CUDA(cudaMemcpy(all.data() + activated_bytes, expert_out, expert_out_bytes, cudaMemcpyDeviceToHost));
        return all;
    }

    // Bits of every variant against mma.sync, in every row and in the guard rows. The number of
    // variants that differ.
    int verify(const char* name) {
        int wrong = 0;
        const auto expected = outputs(g_variants[0], 0, 0xff);
        for (const Variant& v : g_variants) {
            if (!is_wanted(v)) continue;
            for (int again = 0; again < 2; again++) {
                const auto got = outputs(v, 0, 0xff);
                if (got == expected) continue;
                size_t bad = 0, first = 0;
                for (size_t i = 0; i < got.size(); i += 2) {
                    if (got[i] != expected[i] || got[i + 1] != expected[i + 1]) {
                        if (bad++ == 0) first = i;
                    }
                }
                const bool in_out = first >= activated_bytes;
                const size_t pitch = 2 * (in_out ? hidden : intermediate);
                const size_t at = in_out ? first - activated_bytes : first;
                std::printf("  DIFFERS %s %s: %zu of %zu, first in %s row %zu column %zu (rows %d)\n", name, v.name,
                            bad, got.size() / 2, in_out ? "expert_out" : "activated", at / pitch, at % pitch / 2, rows);
                wrong++;
                break;
            }
        }
        return wrong;
    }
};

// Takes an SM for each of its CTAs until told to leave, at the latest after bound_ns.
__global__ void occupy(int* started, volatile int* leave, uint64_t bound_ns) {
    if (threadIdx.x == 0) {
        atomicAdd_system(started, 1);
        const uint64_t start = moe::ptx::globaltimer_ns();
        while (*leave == 0 && moe::ptx::globaltimer_ns() - start < bound_ns) __nanosleep(1000);
    }
}

// Kernels for both products of two layers, on two streams at once, while another kernel keeps half of the SMs:
// most of their CTAs get none until others have left, so none may wait for one that has not started.
// The number of kernels that waited for the occupant or whose bits differ.
int verify_beside_occupant() {
    const int taken = g_sms / 2, shared = 200 << 10;
    int* words;  // CTAs started, leave
    CHECK_CUDA(cudaHostAlloc(&words, 2 * sizeof(int), cudaHostAllocMapped));
    CHECK_CUDA(cudaFuncSetAttribute(occupy, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    cudaStream_t streams[3];
    for (cudaStream_t& stream : streams) CHECK_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    int wrong = 0;
    for (const Variant& v : g_variants) {
        if (v.both == nullptr) continue;
        // Sizes: a gate_up tile for about each CTA of a whole GPU, and more down tiles of experts whose gate_up
        // tiles lie past half of these than there are CTAs with an SM
        Bench layers[2] = {{std::vector<int>(8, 3), 5120, 1024, 99}, {std::vector<int>(4, 20), 5120, 2048, 99}};
        std::vector<uint8_t> expected[2];
        for (int i = 0; i < 2; i++) expected[i] = layers[i].outputs(g_variants[0], 0, 0xff);
        for (Bench& layer : layers) layer.poison_outputs(0xff);
        CHECK_CUDA(cudaStreamSynchronize(g_stream));
        volatile int* seen = words;
        seen[0] = seen[1] = 0;
        occupy<<<taken, 32, shared, streams[2]>>>(words, words + 1, 500000000);
        CHECK_CUDA(cudaGetLastError());
        while (seen[0] < taken && cudaStreamQuery(streams[2]) == cudaErrorNotReady) {
        }
        for (int i = 0; i < 2; i++) layers[i].launch(v, v.both, layers[i].params[0], streams[i]);
        for (int i = 0; i < 2; i++) CHECK_CUDA(cudaStreamSynchronize(streams[i]));
        const bool waited = cudaStreamQuery(streams[2]) != cudaErrorNotReady;
        seen[1] = 1;
        CHECK_CUDA(cudaStreamSynchronize(streams[2]));
        bool differ = false;
        for (int i = 0; i < 2; i++) differ |= layers[i].read_outputs() != expected[i];
        if (waited || differ) {
            std::printf("  beside an occupant, %s: %s%s\n", v.name, waited ? "waited for it to leave" : "",
                        differ ? " DIFFERS" : "");
            wrong++;
        }
    }
    for (cudaStream_t stream : streams) CHECK_CUDA(cudaStreamDestroy(stream));
    CHECK_CUDA(cudaFreeHost(words));
    return wrong;
}

// Awkward sizes: odd numbers of row tiles, an overhanging last one, one k block, counts around each bound.
int verify_odd() {
    struct Odd {
        const char* name;
        std::vector<int> counts;
        int hidden, intermediate;
    };
    std::vector<int> many;
    Random random{9};
    for (int i = 0; i < 75; i++) many.push_back(random.below(3) ? random.below(400) : random.below(3));
    int wrong = 0;
    for (const Odd& odd : {Odd{"one k block", {1, 0, 3, 40}, 64, 64},
                           Odd{"bounds", {0, 1, 7, 8, 9, 255, 256, 257, 1000, 16, 17, 353}, 320, 192},
                           Odd{"tall", {56, 57, 64, 71, 72, 73, 0, 104, 105, 150, 151, 152, 153, 304, 305, 3}, 576, 1088},
                           Odd{"75 experts", many, 448, 704}, Odd{"thousands", {5000, 1, 0, 2049}, 1024, 512}}) {
        Bench bench(odd.counts, odd.hidden, odd.intermediate, 999);
        wrong += bench.verify(odd.name);
    }
    return wrong;
}

// TFLOP/s of cuBLAS in dense 8192^3 products of random data, one after the other; 0 without cuBLAS.
double dense_tflops(double* ghz) {
    constexpr int kSize = 8192, kProducts = 25, kOpN = 0, kOpT = 1, kBf16 = 14, kCompute32F = 68, kDefault = -1;
    using Create = int (*)(void**);
    using SetStream = int (*)(void*, cudaStream_t);
    using Gemm = int (*)(void*, int, int, int, int, int, const void*, const void*, int, int, const void*, int, int,
                         const void*, void*, int, int, int, int);
    static void* const library = std::getenv("CUBLAS") ? dlopen(std::getenv("CUBLAS"), RTLD_NOW) : nullptr;
    if (library == nullptr) return 0;
    static void *handle = nullptr, *out = nullptr;
    if (handle == nullptr) {
        reinterpret_cast<Create>(dlsym(library, "cublasCreate_v2"))(&handle);
        reinterpret_cast<SetStream>(dlsym(library, "cublasSetStream_v2"))(handle, g_stream);
        CHECK_CUDA(cudaMalloc(&out, 2ull * kSize * kSize));
    }
    const auto gemm = reinterpret_cast<Gemm>(dlsym(library, "cublasGemmEx"));
    const float one = 1, zero = 0;
    cudaEvent_t a, b;
    CHECK_CUDA(cudaEventCreate(&a));
    CHECK_CUDA(cudaEventCreate(&b));
    ClockRate clock(g_stream);
    for (int i = -2; i < kProducts; i++) {
        if (i == 0) clock.mark(0);
        if (i == 0) CHECK_CUDA(cudaEventRecord(a, g_stream));
        if (gemm(handle, kOpT, kOpN, kSize, kSize, kSize, &one, g_pool, kBf16, kSize, g_pool + 2ull * kSize * kSize,
                 kBf16, kSize, &zero, out, kBf16, kSize, kCompute32F, kDefault) != 0) {
            return 0;
        }
    }
    CHECK_CUDA(cudaEventRecord(b, g_stream));
    clock.mark(1);
    CHECK_CUDA(cudaStreamSynchronize(g_stream));
    *ghz = clock.ghz();
    float ms;
    CHECK_CUDA(cudaEventElapsedTime(&ms, a, b));
    CHECK_CUDA(cudaEventDestroy(a));
    CHECK_CUDA(cudaEventDestroy(b));
    return 2.0 * kSize * kSize * kSize * kProducts / ms * 1e-9;
}

void bench_cases(int only, bool verify, bool time) {
    const int n = static_cast<int>(g_variants.size());
    int wrong = verify && only == 0 ? verify_odd() + verify_beside_occupant() : 0;
    std::vector<double> log_sum(n, 0.0);
    double best_log = 0;
    int cases = 0;
    if (time) {
        std::printf("%-34s %6s %6s |", "chain us", "floor", "peer");
        for (const Variant& v : g_variants) {
            if (is_wanted(v)) std::printf(" %12s", v.name);
        }
        std::printf(" | best/floor best/peer | gate_up down of the best without PDL, / floor\n");
    }
    for (const BenchCase& c : kBenchCases) {
        if (only != 0 && std::atoi(c.name) != only) continue;
        Bench bench(std::vector<int>(c.counts, c.counts + c.experts), c.hidden, c.intermediate, c.slots);
        if (verify) wrong += bench.verify(c.name);
        if (!time) continue;
        std::printf("%-34s %6.1f %6.1f |", c.name, c.floor[2], c.peer[2]);
        int best = -1;
        std::vector<double> us(n);
        for (int i = 0; i < n; i++) {
            if (!is_wanted(g_variants[i])) continue;
            us[i] = bench.time_us(g_variants[i], kChain, i == 0 ? 3 : 15);
            if (best < 0 || us[i] < us[best]) best = i;
            log_sum[i] += std::log(us[i] / c.floor[2]);
            std::printf(" %12.1f", us[i]);
            std::fflush(stdout);
        }
        Variant plain = g_variants[best];
        plain.pdl = false;
        const double g1 = bench.time_us(plain, kGateUp, 9), g2 = bench.time_us(plain, kDown, 9);
        best_log += std::log(us[best] / c.floor[2]);
        cases++;
        std::printf(" | %5.2f %5.2f | %.1f %.1f (%.2f %.2f)\n", us[best] / c.floor[2], us[best] / c.peer[2], g1, g2,
                    g1 / c.floor[0], g2 / c.floor[1]);
    }
    if (time && cases > 0) {
        std::printf("geometric mean / floor                           |");
        for (int i = 0; i < n; i++) {
            if (is_wanted(g_variants[i])) std::printf(" %12.3f", std::exp(log_sum[i] / cases));
        }
        std::printf(" | %5.3f\n", std::exp(best_log / cases));
    }
    if (verify) std::printf("bits: %s\n", wrong == 0 ? "all variants equal mma.sync" : "SOME DIFFER");
}

struct PrefillShape {
    const char* name;
    int hidden, intermediate, experts, top_k, tokens;
    bool even;

    std::vector<int> counts() const {
        std::vector<int> counts(experts, 0);
        Random random{3};
        for (int i = 0; i < tokens * top_k; i++) counts[even ? i % experts : random.below(experts)]++;
        return counts;
    }
};
const PrefillShape kPrefillShapes[] = {{"qwen3-30b-a3b 4096 tokens, even", 2048, 768, 128, 8, 4096, true},
                                       {"qwen3-30b-a3b 4096 tokens, random", 2048, 768, 128, 8, 4096, false},
                                       {"mixtral-8x7b 4096 tokens, even", 4096, 14336, 8, 2, 4096, true},
                                       {"mixtral-8x7b 4096 tokens, random", 4096, 14336, 8, 2, 4096, false}};

void bench_prefill(bool verify) {
    for (const PrefillShape& s : kPrefillShapes) {
        Bench bench(s.counts(), s.hidden, s.intermediate, s.tokens);
        if (verify) std::printf("%s", bench.verify(s.name) ? "" : "bits equal; ");
        const double flop = 2.0 * bench.rows * s.hidden * s.intermediate;
        std::printf("%-36s", s.name);
        // the share of the clocks in which the tensor cores multiply, at 4096 operations a clock and SM
        auto busy = [](double tflops, double ghz) { return 100 * tflops / (4.096 * g_sms * ghz); };
        for (const Variant& v : g_variants) {
            if (!is_wanted(v)) continue;
            const int replays = v.gate_up == moe_gate_up_mma ? 1 : 9;
            double ghz1, ghz2, ghz, dense_ghz = 1;
            const double g1 = 2 * flop / bench.time_us(v, kGateUp, replays, &ghz1) * 1e-6;
            const double g2 = flop / bench.time_us(v, kDown, replays, &ghz2) * 1e-6;
            const double dense = dense_tflops(&dense_ghz);
            const double us = bench.time_us(v, kChain, replays, &ghz), chain = 3 * flop / us * 1e-6;
            std::printf(" | %s %.0f us, TFLOP/s %.0f %.0f chain %.0f, busy %.1f %.1f %.1f %% at %.2f GHz", v.name, us,
                        g1, g2, chain, busy(g1, ghz1), busy(g2, ghz2), busy(chain, ghz), ghz);
            if (dense > 0) {
                std::printf(", cuBLAS %.0f, busy %.1f %% at %.2f GHz: %.2f", dense, busy(dense, dense_ghz), dense_ghz,
                            chain / dense);
            }
            std::fflush(stdout);
        }
        std::printf("\n");
    }
}

// The prefill kernel and those of cubins in turns: a second of all of them, then five turns of 40 ms each.
void bench_turns(const char* name, Bench& bench) {
    constexpr int kTurns = 5;
    constexpr double kTurnUs = 40000, kWarmUs = 500000;
    struct Entry {
        const Variant* variant;
        std::unique_ptr<Bench::Replay> replay;
        int replays;  // of a turn
        std::vector<double> us, ghz;
    };
    std::vector<Entry> entries;
    bool from_here = false;
    for (const Variant& v : g_variants) {
        from_here |= v.both == moe_experts_wgmma_prefill;
        const bool added = &v - g_variants.data() >= kBuiltIn;
        if (g_fused_cubins ? !added && !(v.both == moe_experts_wgmma && v.pdl) : !from_here) continue;
        Entry entry{&v, std::make_unique<Bench::Replay>(bench, v, kChain), 1, {}, {}};
        entry.replay->time_us(1);
        const double us = entry.replay->time_us(1)[0] * entry.replay->runs;
        entry.replays = std::max(3, static_cast<int>(kTurnUs / us));
        entries.push_back(std::move(entry));
    }
    const int warm_turns = static_cast<int>(kWarmUs / kTurnUs / static_cast<double>(entries.size())) + 1;
    for (int turn = -warm_turns; turn < kTurns; turn++) {
        for (Entry& entry : entries) {
            double ghz;
            const std::vector<double> us = entry.replay->time_us(entry.replays, &ghz);
            if (turn < 0) continue;
            entry.us.insert(entry.us.end(), us.begin(), us.end());
            entry.ghz.push_back(ghz);
        }
    }
    double first = 0;
    for (Entry& entry : entries) {
        std::sort(entry.us.begin(), entry.us.end());
        std::sort(entry.ghz.begin(), entry.ghz.end());
        const double median = entry.us[entry.us.size() / 2], ghz = entry.ghz[kTurns / 2];
        if (first == 0) first = median;
        std::printf("%-36s %-14s %8.1f us (p20 %.1f, p80 %.1f) at %.3f GHz: %7.1f k clocks, %+.1f %%\n", name,
                    entry.variant->name, median, entry.us[entry.us.size() / 5], entry.us[entry.us.size() * 4 / 5],
                    ghz, median * ghz, 100 * (median / first - 1));
    }
}

void bench_all_in_turns(int only, bool prefill) {
    for (const BenchCase& c : kBenchCases) {
        const int number = std::atoi(c.name);
        const bool of_fused = number == 1 || number == 4 || number == 5;
        const bool of_prefill = number == 5 || number == 10 || number == 14;
        if (only != 0 ? number != only : !(g_fused_cubins ? of_fused : of_prefill)) continue;
        Bench bench(std::vector<int>(c.counts, c.counts + c.experts), c.hidden, c.intermediate, c.slots);
        bench_turns(c.name, bench);
    }
    for (const PrefillShape& s : kPrefillShapes) {
        if (!prefill) break;
        Bench bench(s.counts(), s.hidden, s.intermediate, s.tokens);
        bench_turns(s.name, bench);
    }
}

// Adds a variant of NAME:FILE:SHARED; the strings live on.
void add_cubin(char* spec, bool fused) {
    char* file = std::strchr(spec, ':');
    char* shared = file == nullptr ? nullptr : std::strchr(file + 1, ':');
    if (shared == nullptr) {
        std::printf("%s=NAME:FILE:SHARED\n", fused ? "fused" : "cubin");
        std::exit(2);
    }
    *file++ = 0, *shared++ = 0;
    cudaLibrary_t library;
    CHECK_CUDA(cudaLibraryLoadFromFile(&library, file, nullptr, nullptr, 0, nullptr, nullptr, 0));
    auto kernel = [&](const char* name) {
        cudaKernel_t handle = nullptr;
        CHECK_CUDA(cudaLibraryGetKernel(&handle, library, name));
        return reinterpret_cast<void (*)(moe::StepParams)>(handle);
    };
    if (fused) {
        g_variants.push_back({spec, moe_gate_up_wgmma, moe_down_wgmma, kernel("moe_experts_wgmma"),
                              moe::kWgmmaThreads, std::atoi(shared), 1, true});
        return;
    }
    g_variants.push_back({spec, kernel("moe_gate_up_wgmma_prefill"), kernel("moe_down_wgmma_prefill"),
                         kernel("moe_experts_wgmma_prefill"), moe::prefill::kThreads, std::atoi(shared), 1, true});
}

}  // namespace

int main(int argc, char** argv) {
    auto asked = [&](const char* word) {
        for (int i = 1; i < argc; i++) {
            if (std::strcmp(argv[i], word) == 0) return true;
        }
        return false;
    };
    int only = 0;
    for (int i = 1; i < argc; i++) {
        if (std::strncmp(argv[i], "only=", 5) == 0) only = std::atoi(argv[i] + 5);
        if (std::strncmp(argv[i], "kernels=", 8) == 0) g_kernels = argv[i] + 8;
        if (std::strncmp(argv[i], "cubin=", 6) == 0) add_cubin(argv[i] + 6, false);
        if (std::strncmp(argv[i], "fused=", 6) == 0) {
            g_fused_cubins = true;
            add_cubin(argv[i] + 6, true);
        }
    }
    std::setvbuf(stdout, nullptr, _IOLBF, 0);
    CHECK_CUDA(cudaStreamCreateWithFlags(&g_stream, cudaStreamNonBlocking));
    CHECK_CUDA(cudaDeviceGetAttribute(&g_sms, cudaDevAttrMultiProcessorCount, 0));
    for (const Variant& v : g_variants) {
        CHECK_CUDA(cudaFuncSetAttribute(v.gate_up, cudaFuncAttributeMaxDynamicSharedMemorySize, v.shared));
        if (v.both != nullptr) {
            CHECK_CUDA(cudaFuncSetAttribute(v.both, cudaFuncAttributeMaxDynamicSharedMemorySize, v.shared));
        }
        CHECK_CUDA(cudaFuncSetAttribute(v.down, cudaFuncAttributeMaxDynamicSharedMemorySize, v.shared));
    }
    g_pool_bytes = 10ull << 30;
    CHECK_CUDA(cudaMalloc(&g_pool, g_pool_bytes));
    fill(g_pool, g_pool_bytes, 11, 0.05f);
    CHECK_CUDA(cudaStreamSynchronize(g_stream));
    if (asked("cases") || asked("verify")) bench_cases(only, asked("verify"), asked("cases"));
    if (asked("turns")) {
        bench_all_in_turns(only, asked("prefill"));
    } else if (asked("prefill")) {
        bench_prefill(asked("verify"));
    }
    return 0;
}
