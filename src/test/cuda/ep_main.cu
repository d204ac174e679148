// Dispatch and combine over several ranks, on one GPU or several, without a JVM. One thread a GPU, one
// captured graph each, ranks spread evenly over the GPUs. A trivial expert stands between the two, so
// that the host can compute every result bit for bit.
//
//   ep_main fuzz SECONDS      changing T and routing, random delays, steps back to back: results, lists,
//                             counters and figures equal the host's, for both wires, fused and split;
//                             before that, a rank that could run a step ahead of one that it needs nothing of
//   ep_main faults            a rank that never comes, a skipped epoch, a wrong flag, an abort that ends a
//                             wait at once, recovery by generation, a rank left out
//   ep_main time              medians of a pair in a graph of 16, maximum over GPUs
//   ep_main sweep             the same, for several numbers of CTAs
//   ep_main sizes             the same, and larger steps: where lines stop to pay
//   ep_main direct            the pairs of the figures, nothing between, twice each with out in bf16 and float32
//   ep_main grids             pairs of 128 tokens for several numbers of CTAs of both kernels
//   ep_main pairs             a few of them in two seconds, also with experts that last: combine starts beside
//                             them, as it does beside real ones
// With -DEP_ONLY only the kernels that it uses are compiled. With -DMOE_TRACE, ep_main trace: when the warps of
// both passed their trace points.
#include <algorithm>
#include <atomic>
#include <barrier>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#define MOE_TEST_STUBS
#ifdef EP_ONLY
#include "../../main/cuda/kernels/route_topk.cu"
#include "../../main/cuda/kernels/dispatch_send.cu"
#include "../../main/cuda/kernels/dispatch_recv.cu"
#include "../../main/cuda/kernels/dispatch_fused.cu"
#include "../../main/cuda/kernels/combine_send.cu"
#include "../../main/cuda/kernels/combine_recv.cu"
#include "../../main/cuda/kernels/combine_fused.cu"
#else
#include "../../main/cuda/moe4j.cu"
#endif

#include "harness.h"

namespace {

using moe::StepParams;
using Clock = std::chrono::steady_clock;

std::mutex g_print;
std::atomic<int> g_failed{0};
std::atomic<long> g_checked{0};

void expect(bool ok, const std::string& what) {
    g_checked++;
    if (!ok && ++g_failed <= 25) {
        std::lock_guard<std::mutex> lock(g_print);
        std::printf("FAILED %s\n", what.c_str());
        std::fflush(stdout);
    }
}

double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

float rounded(float v) {
    uint32_t u;
    std::memcpy(&u, &v, 4);
    u = (u + 0x7fff + (u >> 16 & 1)) & 0xffff0000u;
    std::memcpy(&v, &u, 4);
    return v;
}
uint16_t half_of(float v) {
    const float r = rounded(v);
    uint32_t u;
    std::memcpy(&u, &r, 4);
    return static_cast<uint16_t>(u >> 16);
}
float float_of(uint16_t h) {
    const uint32_t u = static_cast<uint32_t>(h) << 16;
    float v;
    std::memcpy(&v, &u, 4);
    return v;
}

__host__ __device__ inline float expert_scale(int expert) { return 0.5f + 0.125f * (expert % 8); }

// The trivial expert: a row times a number of its expert's.
__global__ __launch_bounds__(256) void trivial_expert(const __grid_constant__ StepParams p) {
    moe::ptx::wait_for_previous_grid();
    moe::ptx::allow_next_grid();
    const moe::LocalRank& me = p.locals[blockIdx.y];
    const int rows = me.expert_offsets[p.experts_per_rank];
    for (int row = blockIdx.x; row < rows; row += gridDim.x) {
        int low = 0, high = p.experts_per_rank;  // the last expert that begins at or before the row
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            (me.expert_offsets[middle] <= row ? low : high) = middle;
        }
        const float scale = expert_scale(me.rank * p.experts_per_rank + low);
        const __nv_bfloat16* in = moe::symmetric_of(p, me.rank).recv_row(me.expert_rows[row]);
        __nv_bfloat16* out = me.expert_out + static_cast<int64_t>(row) * p.hidden_pad;
        for (int c = threadIdx.x * 8; c < p.hidden_pad; c += 256 * 8) {
            float v[8];
            moe::unpack_bf16(v, *reinterpret_cast<const uint4*>(in + c));
            for (int i = 0; i < 8; i++) v[i] = __fmul_rn(v[i], scale);
            *reinterpret_cast<uint4*>(out + c) = moe::pack_bf16(v);
        }
    }
}

// Stands for experts in timings: nothing but its place in the order of kernels.
__global__ __launch_bounds__(32) void empty_expert(const __grid_constant__ StepParams p) {
    moe::ptx::wait_for_previous_grid();
    moe::ptx::allow_next_grid();
}

// The same for so many cycles.
__global__ __launch_bounds__(32) void lasting_expert(const __grid_constant__ StepParams p) {
    moe::ptx::wait_for_previous_grid();
    moe::ptx::allow_next_grid();
    const long long start = clock64();
    while (clock64() - start < 10000) {
    }
}

__global__ void delay_kernel(uint64_t ns) {
    const uint64_t start = moe::ptx::globaltimer_ns();
    while (moe::ptx::globaltimer_ns() - start < ns) {
    }
}

__global__ void scramble_kernel(uint8_t* bytes, size_t n, uint32_t value) {
    for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < n / 4; i += static_cast<size_t>(gridDim.x) * blockDim.x) {
        reinterpret_cast<uint32_t*>(bytes)[i] = value;
    }
}

void use(int gpu) { CHECK_CUDA(cudaSetDevice(gpu)); }

int up_to(int n, int m) { return (n + m - 1) / m * m; }

enum Form { kFused, kSplit, kForms };
constexpr int kOwnThenAny = 6;  // routing: variants by turns without a row for another rank, and with any
const char* const kFormNames[] = {"fused", "split"};
const char* const kWireNames[] = {"rows", "lines"};

struct Config {
    int G = 1, R = 2, M = 8, K = 2, E = 4, H = 64;
    int wire = moe::kLines;
    int variants = 8;  // inputs in device memory at once
    int dispatch_ctas = 0, combine_ctas = 0;
    int pairs = 1;
    bool empty = false, one_cta = false;  // empty: no expert, for timings
    bool lasting = false, direct = false;
    bool f32 = false;   // out, else bf16
    bool tail = false;  // a dispatch more behind the pairs, for traces
    uint64_t timeout_ns = 5000000000ull;
    std::string text() const {
        char s[160];
        std::snprintf(s, sizeof s, "G=%d R=%d M=%d K=%d E=%d H=%d %s%s", G, R, M, K, E, H, kWireNames[wire], f32 ? " f32" : "");
        return s;
    }
};

struct Input {
    int asked = 0;
    std::vector<uint16_t> hidden;
    std::vector<int32_t> ids;
    std::vector<float> weights;
};

struct Rank {
    std::vector<Input> inputs;
    uint8_t* region;
    moe::LocalRank device;
    std::vector<void*> memory;
    int32_t *d_count, *all_counts, *d_ids, *all_ids;
    float *d_weights, *all_weights;
    uint16_t *d_hidden, *all_hidden;
    uint8_t *d_out, *all_out;
    moe::ErrorRecord* error;
    moe::SoftCounters* counters;
    moe::PeerStats* stats;
    uint64_t* received_rows;
    std::vector<uint64_t> received;  // by source and local expert, all steps
    uint64_t dropped = 0, duplicates = 0, over = 0, lost = 0, steps = 0;
};

class Group {
   public:
    const Config c;
    int L, Hp, local, sms;
    std::vector<Rank> ranks;
    std::vector<cudaStream_t> streams;
    std::vector<StepParams> params;
    std::vector<std::vector<cudaGraphExec_t>> graphs;  // of GPU, of form
    std::vector<uint64_t> members;
    std::barrier<> meet;
    uint64_t delay_before_recv = 0;  // ns, of a split dispatch that is launched and not captured
    std::vector<std::pair<size_t, size_t>> scratch;  // of a region: offset and bytes that every step rewrites

    explicit Group(const Config& config) : c(config), meet(config.G) {
        L = (c.E + c.R - 1) / c.R, Hp = up_to(c.H, 64), local = c.R / c.G;
        ranks.resize(c.R), streams.resize(c.G), params.resize(c.G), graphs.resize(c.G);
        members.assign(c.R, ~0ull >> (64 - c.R));
        CHECK_CUDA(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
        size_t at = 0;
        auto place = [&](size_t bytes) {
            const size_t here = at;
            at = (at + bytes + 255) / 256 * 256;
            return here;
        };
        StepParams p{};
        const int64_t slots = static_cast<int64_t>(c.R) * c.M;
        p.num_ranks = c.R, p.num_local_ranks = local, p.max_tokens = c.M, p.top_k = c.K, p.experts = c.E;
        p.experts_per_rank = L, p.hidden = c.H, p.hidden_pad = Hp, p.hidden_dtype = moe::kBF16, p.out_dtype = c.f32 ? moe::kF32 : moe::kBF16;
        p.routing_input = moe::kTopK, p.groups = p.topk_groups = 1, p.scale = 1, p.wire = c.wire;
        p.early_next = local == 1;
        p.timeout_ns = p.first_timeout_ns = c.timeout_ns;
        p.off_dispatch_flags = place(8 * c.R), p.off_combine_flags = place(8 * c.R), p.off_abort_words = place(8 * c.R);
        p.off_recv_tokens = place(4 * c.R), p.off_recv_ids = place(4 * slots * c.K);
        p.off_recv_weights = place(4 * slots * c.K), p.off_recv_rows = place(2 * slots * Hp);
        p.off_combine_rows = place(2 * slots * Hp);
        scratch.push_back({p.off_recv_ids, at - p.off_recv_ids});
        if (c.wire == moe::kLines) {
            p.off_dispatch_lines = place(c.R * moe::dispatch_lines_of(c.M, Hp, c.K) * moe::kLineBytes);
            p.off_combine_lines = place(slots * moe::combine_row_lines(Hp) * moe::kLineBytes);
        }
        for (int g = 0; g < c.G; g++) {
            CHECK_CUDA(cudaSetDevice(g));
            CHECK_CUDA(cudaStreamCreateWithFlags(&streams[g], cudaStreamNonBlocking));
            for (int r = g * local; r < (g + 1) * local; r++) open_rank(r, at);
        }
        for (int g = 0; g < c.G; g++) {
            CHECK_CUDA(cudaSetDevice(g));
            std::vector<moe::RankView> views;
            for (Rank& r : ranks) views.push_back({r.region});
            std::vector<moe::LocalRank> locals;
            for (int r = g * local; r < (g + 1) * local; r++) locals.push_back(ranks[r].device);
            params[g] = p;
            params[g].ranks = upload(views, ranks[g * local]);
            params[g].locals = upload(locals, ranks[g * local]);
            graphs[g] = {capture(g, kFused), capture(g, kSplit)};
            CHECK_CUDA(cudaStreamSynchronize(streams[g]));
        }
    }

    ~Group() {
        for (int g = 0; g < c.G; g++) {
            CHECK_CUDA(cudaSetDevice(g));
            CHECK_CUDA(cudaStreamSynchronize(streams[g]));
            for (auto e : graphs[g]) cudaGraphExecDestroy(e);
        }
        for (int r = 0; r < c.R; r++) {
            CHECK_CUDA(cudaSetDevice(gpu_of(r)));
            for (void* m : ranks[r].memory) cudaFree(m);
            cudaFreeHost(ranks[r].error), cudaFreeHost(ranks[r].counters), cudaFreeHost(ranks[r].stats), cudaFreeHost(ranks[r].received_rows);
        }
        for (int g = 0; g < c.G; g++) cudaSetDevice(g), cudaStreamDestroy(streams[g]);
    }

    void end(int gpu) {
        use(gpu);
        CHECK_CUDA(cudaStreamSynchronize(streams[gpu]));
    }

    size_t out_bytes() const { return static_cast<size_t>(c.M) * c.H * (c.f32 ? 4 : 2); }

    int gpu_of(int rank) const { return rank / local; }

    // f(gpu) on a thread each.
    void on_gpus(const std::function<void(int)>& f) {
        std::vector<std::thread> threads;
        for (int g = 0; g < c.G; g++) {
            threads.emplace_back([&, g] {
                CHECK_CUDA(cudaSetDevice(g));
                f(g);
            });
        }
        for (auto& t : threads) t.join();
    }

    template <class F>
    void on_ranks_of(int gpu, F f) {
        for (int r = gpu * local; r < (gpu + 1) * local; r++) f(r, ranks[r]);
    }

    template <class T>
    std::vector<T> get(const T* from, size_t n) {
        std::vector<T> v(n);
        if (n) CHECK_CUDA(cudaMemcpy(v.data(), from, n * sizeof(T), cudaMemcpyDeviceToHost));
        return v;
    }

    template <class T>
    T* region_at(int rank, uint64_t offset) { return reinterpret_cast<T*>(ranks[rank].region + offset); }

    // Inputs of all variants of a GPU's ranks. The same on every thread that asks.
    void make_inputs(int gpu, uint64_t seed, int routing, int fixed_tokens = -1) {
        on_ranks_of(gpu, [&](int r, Rank& k) {
            Random random{seed * 1000003 + r};
            k.inputs.resize(c.variants);
            for (int v = 0; v < c.variants; v++) {
                Input& in = k.inputs[v];
                const int counts[] = {0, 1, c.M, c.M + 3, -2, random.below(c.M + 1), random.below(c.M + 1), 1};
                in.asked = fixed_tokens >= 0 ? fixed_tokens : counts[random.below(8)];
                in.hidden.resize(static_cast<size_t>(c.M) * c.H), in.ids.resize(c.M * c.K), in.weights.resize(c.M * c.K);
                for (auto& h : in.hidden) h = half_of(random.uniform());
                const int form = routing == kOwnThenAny ? (v % 2 ? 0 : 4) : routing >= 0 ? routing : random.below(6);
                std::vector<int> all(c.E);
                for (int t = 0; t < c.M; t++) {
                    for (int e = 0; e < c.E; e++) all[e] = e;
                    for (int i = 0; i < c.K; i++) {
                        std::swap(all[i], all[i + random.below(c.E - i)]);
                        int id = all[i];
                        if (form == 1) id = i == 0 ? c.E - 1 : -1;
                        if (form == 2) id = -1;
                        if (form == 3) {
                            const int pick = random.below(6);
                            if (pick == 0) id = -1;
                            if (pick == 1) id = c.E + random.below(3);
                            if (pick == 2) id = static_cast<int>(random.bits());
                            if (pick == 3 && i > 0) id = in.ids[t * c.K + i - 1];
                        }
                        if (form == 4) id = id % L + r * L < c.E ? id % L + r * L : -1;  // own rank only
                        if (form == 5) id = t % 2 ? id : -1;
                        in.ids[t * c.K + i] = id;
                        in.weights[t * c.K + i] = id < 0 || id >= c.E ? NAN : 0.25f + 0.5f * std::fabs(random.uniform());
                    }
                }
                const size_t th = static_cast<size_t>(c.M) * c.H, tk = static_cast<size_t>(c.M) * c.K;
                CHECK_CUDA(cudaMemcpy(k.all_counts + v, &in.asked, 4, cudaMemcpyHostToDevice));
                CHECK_CUDA(cudaMemcpy(k.all_hidden + v * th, in.hidden.data(), th * 2, cudaMemcpyHostToDevice));
                CHECK_CUDA(cudaMemcpy(k.all_ids + v * tk, in.ids.data(), tk * 4, cudaMemcpyHostToDevice));
                CHECK_CUDA(cudaMemcpy(k.all_weights + v * tk, in.weights.data(), tk * 4, cudaMemcpyHostToDevice));
            }
        });
    }

    void use_variant(int gpu, int v) {
        on_ranks_of(gpu, [&](int, Rank& k) {
            const size_t th = static_cast<size_t>(c.M) * c.H, tk = static_cast<size_t>(c.M) * c.K;
            cudaStream_t s = streams[gpu];
            CHECK_CUDA(cudaMemcpyAsync(k.d_count, k.all_counts + v, 4, cudaMemcpyDeviceToDevice, s));
            CHECK_CUDA(cudaMemcpyAsync(k.d_hidden, k.all_hidden + v * th, th * 2, cudaMemcpyDeviceToDevice, s));
            CHECK_CUDA(cudaMemcpyAsync(k.d_ids, k.all_ids + v * tk, tk * 4, cudaMemcpyDeviceToDevice, s));
            CHECK_CUDA(cudaMemcpyAsync(k.d_weights, k.all_weights + v * tk, tk * 4, cudaMemcpyDeviceToDevice, s));
            CHECK_CUDA(cudaMemsetAsync(k.d_out, 0xff, out_bytes(), s));
        });
    }

    void keep_output(int gpu, int v) {
        on_ranks_of(gpu, [&](int, Rank& k) {
            CHECK_CUDA(cudaMemcpyAsync(k.all_out + v * out_bytes(), k.d_out, out_bytes(), cudaMemcpyDeviceToDevice, streams[gpu]));
        });
    }

    void launch(int gpu, Form form) { CHECK_CUDA(cudaGraphLaunch(graphs[gpu][form], streams[gpu])); }

    int clamped(int rank, int v) const { return std::max(0, std::min(ranks[rank].inputs[v].asked, c.M)); }

    void count_soft(int rank, int v) {
        Rank& k = ranks[rank];
        k.steps++;
        k.over += std::max(0, k.inputs[v].asked - c.M);
        for (int t = 0; t < clamped(rank, v); t++) {
            uint64_t away = 0;
            for (int i = 0; i < c.K; i++) {
                const int id = k.inputs[v].ids[t * c.K + i];
                const bool in = id >= 0 && id < c.E;
                k.dropped += !in && id != -1;
                bool repeat = false;
                for (int j = 0; j < i; j++) repeat |= in && k.inputs[v].ids[t * c.K + j] == id;
                k.duplicates += repeat;
                if (in && !(members[rank] >> (id / L) & 1)) away |= 1ull << (id / L);
            }
            k.lost += __builtin_popcountll(away);
        }
        for (int s = 0; s < c.R; s++) {
            for (int t = 0; members[rank] >> s & 1 && t < clamped(s, v); t++) {
                std::vector<bool> named(L, false);
                for (int i = 0; i < c.K; i++) {
                    const int id = ranks[s].inputs[v].ids[t * c.K + i];
                    if (id >= rank * L && id < std::min(c.E, (rank + 1) * L)) named[id - rank * L] = true;
                }
                for (int e = 0; e < L; e++) k.received[s * L + e] += named[e];
            }
        }
    }

    void check_output(int rank, int v, const std::string& where) {
        const Rank& k = ranks[rank];
        const Input& in = k.inputs[v];
        const auto out = get(k.all_out + v * out_bytes(), out_bytes());
        const int T = clamped(rank, v);
        int bad = 0, first = -1;
        for (int t = 0; t < c.M; t++) {
            for (int h = 0; h < c.H; h++) {
                uint32_t want = 0xffffffff, got = 0xffff0000;
                if (t < T) {
                    const float x = float_of(in.hidden[static_cast<size_t>(t) * c.H + h]);
                    float total = 0;
                    bool any_rank = false;
                    for (int r = 0; r < c.R; r++) {
                        if (!(members[rank] >> r & 1)) continue;
                        volatile float sum = 0;
                        bool any = false;
                        for (int i = 0; i < c.K; i++) {
                            const int id = in.ids[t * c.K + i];
                            if (id < 0 || id >= c.E || id / L != r) continue;
                            volatile float term = in.weights[t * c.K + i] * rounded(x * expert_scale(id));
                            sum = any ? sum + term : static_cast<float>(term);
                            any = true;
                        }
                        if (!any) continue;
                        const float row = rounded(sum);
                        total = any_rank ? total + row : row;
                        any_rank = true;
                    }
                    if (c.f32) std::memcpy(&want, &total, 4);
                    else want = 0xffff0000 | half_of(total);
                }
                const size_t bytes = c.f32 ? 4 : 2;
                std::memcpy(&got, out.data() + (static_cast<size_t>(t) * c.H + h) * bytes, bytes);
                if (!c.f32) got |= 0xffff0000;
                if (got != want && bad++ == 0) first = t * c.H + h;
            }
        }
        expect(bad == 0, "output " + where + " rank " + std::to_string(rank) + " T " + std::to_string(T) + ": " +
                             std::to_string(bad) + " wrong, first token " + std::to_string(first / c.H) + " column " +
                             std::to_string(first % c.H));
    }

    // Lists, headers and figures of a variant that was the last to run.
    void check_lists(int rank, int v, const std::string& where) {
        Rank& k = ranks[rank];
        std::vector<int32_t> counts(L, 0), offsets(L + 1, 0), rows;
        std::vector<std::vector<int>> of(L);
        std::vector<uint64_t> from(c.R, 0);
        for (int s = 0; s < c.R; s++) {
            if (!(members[rank] >> s & 1)) continue;
            for (int t = 0; t < clamped(s, v); t++) {
                bool any = false;
                for (int e = 0; e < L; e++) {
                    bool named = false;
                    for (int i = 0; i < c.K; i++) named |= ranks[s].inputs[v].ids[t * c.K + i] == rank * L + e && rank * L + e < c.E;
                    if (named) of[e].push_back(s * c.M + t), any = true;
                }
                from[s] += any;
            }
        }
        for (int e = 0; e < L; e++) {
            counts[e] = of[e].size(), offsets[e + 1] = offsets[e] + counts[e];
            rows.insert(rows.end(), of[e].begin(), of[e].end());
        }
        expect(get(k.device.expert_counts, L) == counts, "counts " + where);
        expect(get(k.device.expert_offsets, L + 1) == offsets, "offsets " + where);
        expect(get(k.device.expert_rows, rows.size()) == rows, "row lists " + where);
        expect(get(k.device.received_totals, c.R * L) == k.received, "rows received per expert " + where);
        expect(std::equal(k.received.begin(), k.received.end(), k.received_rows), "rows received per expert, told " + where);
        const auto packed = get(k.device.packed_row_of, static_cast<size_t>(c.R) * c.M * c.K);
        const auto ids = get(region_at<const int32_t>(rank, params[0].off_recv_ids), static_cast<size_t>(c.R) * c.M * c.K);
        const auto tokens = get(region_at<const int32_t>(rank, params[0].off_recv_tokens), c.R);
        bool same = true, headers = true;
        for (int s = 0; s < c.R; s++) {
            if (!(members[rank] >> s & 1)) continue;
            headers &= tokens[s] == clamped(s, v);
            for (int i = 0; i < clamped(s, v) * c.K; i++) {
                const int id = ranks[s].inputs[v].ids[i];
                const bool here = id >= rank * L && id < std::min(c.E, (rank + 1) * L);
                headers &= ids[s * c.M * c.K + i] == (here ? id - rank * L : -1);
                if (!here) continue;
                const auto& list = of[id - rank * L];
                const int at = std::lower_bound(list.begin(), list.end(), s * c.M + i / c.K) - list.begin();
                same &= packed[s * c.M * c.K + i] == offsets[id - rank * L] + at;
            }
        }
        expect(same, "packed rows " + where), expect(headers, "headers " + where);
        for (int s = 0; s < c.R; s++) {
            if (members[rank] >> s & 1) expect(k.stats[s].rows_received == from[s], "rows received " + where + " got " + std::to_string(k.stats[s].rows_received) + " want " + std::to_string(from[s]));
        }
        const moe::SoftCounters& n = *k.counters;
        expect(n.steps == k.steps && n.dropped_ids == k.dropped && n.duplicate_ids == k.duplicates &&
                   n.over_capacity_tokens == k.over && n.lost_rows == k.lost,
               "counters " + where + " steps " + std::to_string(n.steps) + "/" + std::to_string(k.steps) + " lost " + std::to_string(n.lost_rows) + "/" + std::to_string(k.lost));
    }

    // The last step of a rank that is valid, and how many were; all streams have ended.
    uint64_t valid_epoch(int rank) const {
        const moe::ErrorRecord& e = *ranks[rank].error;
        return e.code == 0 ? e.valid_epoch : std::min(e.valid_epoch, e.epoch - 1);
    }
    uint64_t steps(int rank) const { return ranks[rank].counters->steps - (ranks[rank].error->valid_epoch != valid_epoch(rank)); }

    std::string record(int rank) const {
        const moe::ErrorRecord& e = *ranks[rank].error;
        char s[200];
        std::snprintf(s, sizeof s, "code %u op %u rank %u peer %u expected %llx seen %llx waited %.2f ms valid %llx", e.code,
                      e.op, e.rank, e.peer, (unsigned long long)e.epoch_expected, (unsigned long long)e.epoch_seen,
                      e.waited_ns / 1e6, (unsigned long long)valid_epoch(rank));
        return s;
    }

    // What the host does when a group recovers; all streams have ended.
    void recover(uint64_t generation, uint64_t who = ~0ull) {
        for (int r = 0; r < c.R; r++) {
            CHECK_CUDA(cudaSetDevice(gpu_of(r)));
            CHECK_CUDA(cudaDeviceSynchronize());
            const uint64_t epochs[2] = {generation << moe::kGenerationShift, generation << moe::kGenerationShift};
            members[r] = (who >> r & 1 ? who : 1ull << r) & (~0ull >> (64 - c.R));
            CHECK_CUDA(cudaMemcpy(ranks[r].device.epoch, epochs, 16, cudaMemcpyHostToDevice));
            CHECK_CUDA(cudaMemset(ranks[r].device.arrivals, 0, 32));
            CHECK_CUDA(cudaMemcpy(ranks[r].device.members, &members[r], 8, cudaMemcpyHostToDevice));
            // A step that failed has told the host of itself if it came as far as combine
            const uint64_t steps = this->steps(r), valid = valid_epoch(r);
            CHECK_CUDA(cudaMemcpy(ranks[r].device.totals, &steps, 8, cudaMemcpyHostToDevice));
            ranks[r].error->valid_epoch = valid, ranks[r].counters->steps = steps;
            ranks[r].error->code = 0;
            CHECK_CUDA(cudaDeviceSynchronize());
            const auto totals = get(ranks[r].device.totals, 8);  // but for steps it has counted
            ranks[r].received = get(ranks[r].device.received_totals, c.R * L);
            ranks[r].steps = totals[0], ranks[r].dropped = totals[1], ranks[r].duplicates = totals[2];
            ranks[r].over = totals[3], ranks[r].lost = totals[4];
        }
    }

    // Garbage where every step writes before it reads. All streams have ended.
    void poison(uint32_t value) {
        for (int r = 0; r < c.R; r++) {
            CHECK_CUDA(cudaSetDevice(gpu_of(r)));
            for (auto& s : scratch) scramble_kernel<<<64, 256, 0, streams[gpu_of(r)]>>>(ranks[r].region + s.first, s.second, value);
            const moe::LocalRank& d = ranks[r].device;
            const size_t packed = static_cast<size_t>(c.R) * c.M * std::min(c.K, L);
            auto fill = [&](void* at, size_t bytes) { scramble_kernel<<<64, 256, 0, streams[gpu_of(r)]>>>(static_cast<uint8_t*>(at), bytes, value); };
            fill(d.home_tokens, 4), fill(d.home_ids, 4ul * c.M * c.K), fill(d.home_weights, 4ul * c.M * c.K), fill(d.home_mask, 8ul * c.M);
            fill(d.expert_counts, 4ul * L), fill(d.expert_offsets, 4ul * (L + 1)), fill(d.expert_rows, 4 * packed);
            fill(d.packed_row_of, 4ul * c.R * c.M * c.K), fill(d.expert_out, 2 * packed * Hp);
            CHECK_CUDA(cudaStreamSynchronize(streams[gpu_of(r)]));
        }
    }

    // A part of a step, launched alone: 0 to the dispatch, 1 the rest.
    void launch_part(int gpu, Form form, int part) {
        if (part == 0) enqueue_dispatch(gpu, form);
        else enqueue_experts(gpu), enqueue_combine(gpu, form);
    }

    cudaGraphExec_t capture(int gpu, Form form) {
        cudaGraph_t graph;
        cudaGraphExec_t exec;
        CHECK_CUDA(cudaStreamBeginCapture(streams[gpu], cudaStreamCaptureModeThreadLocal));
        for (int i = 0; i < c.pairs; i++) {
            enqueue_dispatch(gpu, form);
            if (!c.direct) enqueue_experts(gpu);
            enqueue_combine(gpu, form);
        }
        if (c.tail) enqueue_dispatch(gpu, form);
        CHECK_CUDA(cudaStreamEndCapture(streams[gpu], &graph));
        CHECK_CUDA(cudaGraphInstantiate(&exec, graph, 0));
        CHECK_CUDA(cudaGraphDestroy(graph));
        CHECK_CUDA(cudaGraphUpload(exec, streams[gpu]));
        return exec;
    }

    int64_t dispatch_ctas() const {
        if (c.dispatch_ctas) return std::min(c.dispatch_ctas, sms / local);
        const int64_t pieces = (moe::dispatch_row_lines(Hp, c.K) + 3) / 4;
        return std::clamp<int64_t>(1 + (c.M * pieces + 15) / 16, 2, std::max(2, sms / local));
    }

    using Kernel = void (*)(StepParams);

    void run(int gpu, Kernel kernel, int64_t ctas, int threads, bool pdl) {
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(c.one_cta ? 1 : static_cast<unsigned>(std::max<int64_t>(1, ctas)), local);
        config.blockDim = dim3(threads), config.stream = streams[gpu];
        cudaLaunchAttribute attribute{};
        attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attribute.val.programmaticStreamSerializationAllowed = pdl;
        config.attrs = &attribute, config.numAttrs = 1;
        CHECK_CUDA(cudaLaunchKernelEx(&config, kernel, params[gpu]));
    }

    void delay(int gpu) {
        if (delay_before_recv) delay_kernel<<<1, 1, 0, streams[gpu]>>>(delay_before_recv);
    }

    int64_t combine_ctas() const {
        if (c.combine_ctas) return std::min(c.combine_ctas, sms / local);
        const int64_t pieces = (moe::combine_row_lines(Hp) + 3) / 4;
        return std::clamp<int64_t>(1 + (c.M * pieces + 3) / 4, 1, std::max(1, sms / local));
    }

    void enqueue_dispatch(int gpu, Form form) {
        const int64_t chunks = (Hp + 2047) / 2048, rows = std::min<int64_t>(c.M * chunks, 2 * sms);
        const bool lines = c.wire == moe::kLines;
        if (form == kFused && (lines || c.R == 1)) {
            run(gpu, lines ? moe_dispatch_lines : moe_dispatch_local, dispatch_ctas(), moe::kFusedThreads, true);
            return;
        }
        const int64_t tokens = std::max<int64_t>((c.M + 7) / 8, std::min<int64_t>(c.M, sms));
        run(gpu, moe_route_topk, std::min<int64_t>(tokens, 8 * sms), moe::kTopKThreads, false);
        if (lines) {
            run(gpu, moe_dispatch_send_lines, dispatch_ctas(), moe::kFusedThreads, true);
            delay(gpu);
            run(gpu, moe_dispatch_recv_lines, dispatch_ctas(), moe::kFusedThreads, true);
        } else {
            run(gpu, moe_dispatch_send, rows, 256, false);
            delay(gpu);
            run(gpu, moe_dispatch_recv, std::min(L, 4 * sms), 256, false);
            run(gpu, moe_dispatch_index, std::min(L, 4 * sms), 256, false);
        }
    }
    void enqueue_experts(int gpu) {
        if (c.empty) {
            run(gpu, c.lasting ? lasting_expert : empty_expert, sms, 32, true);
            return;
        }
        run(gpu, trivial_expert, std::min<int64_t>(sms, static_cast<int64_t>(c.R) * c.M * std::min(c.K, L)), 256, true);
    }
    void enqueue_combine(int gpu, Form form) {
        const int64_t chunks = (Hp + 2047) / 2048, rows = std::min<int64_t>(c.M * chunks, 2 * sms);
        const bool lines = c.wire == moe::kLines;
        if (form == kFused && (lines || c.R == 1)) {
            run(gpu, lines ? moe_combine_lines : moe_combine_local, combine_ctas(), moe::kSumThreads, true);
        } else if (lines) {
            run(gpu, moe_combine_send_lines, combine_ctas(), moe::kSumThreads, true);
            run(gpu, moe_combine_recv_lines, combine_ctas(), moe::kSumThreads, true);
        } else {
            run(gpu, moe_combine_send, std::min<int64_t>(c.R * c.M * chunks, 2 * sms), 256, false);
            run(gpu, moe_combine_recv, rows, 256, false);
        }
    }

    template <class T>
    T* alloc(Rank& k, size_t n) {
        void* a;
        CHECK_CUDA(cudaMalloc(&a, std::max<size_t>(16, n * sizeof(T))));
        CHECK_CUDA(cudaMemset(a, 0, std::max<size_t>(16, n * sizeof(T))));
        k.memory.push_back(a);
        return static_cast<T*>(a);
    }
    template <class T>
    T* upload(const std::vector<T>& v, Rank& owner) {
        T* d = alloc<T>(owner, v.size());
        CHECK_CUDA(cudaMemcpy(d, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice));
        return d;
    }
    template <class T>
    T* pinned(size_t n) {
        void* a;
        CHECK_CUDA(cudaHostAlloc(&a, n * sizeof(T), cudaHostAllocMapped | cudaHostAllocPortable));
        std::memset(a, 0, n * sizeof(T));
        return static_cast<T*>(a);
    }

    void open_rank(int r, size_t region_bytes) {
        Rank& k = ranks[r];
        moe::LocalRank& d = k.device;
        std::memset(&d, 0, sizeof d);
        const size_t th = static_cast<size_t>(c.M) * c.H, tk = static_cast<size_t>(c.M) * c.K;
        const size_t packed = static_cast<size_t>(c.R) * c.M * std::min(c.K, L);
        k.region = alloc<uint8_t>(k, region_bytes);
        k.d_count = alloc<int32_t>(k, 1), k.all_counts = alloc<int32_t>(k, c.variants);
        k.d_ids = alloc<int32_t>(k, tk), k.all_ids = alloc<int32_t>(k, tk * c.variants);
        k.d_weights = alloc<float>(k, tk), k.all_weights = alloc<float>(k, tk * c.variants);
        k.d_hidden = alloc<uint16_t>(k, th), k.all_hidden = alloc<uint16_t>(k, th * c.variants);
        k.d_out = alloc<uint8_t>(k, out_bytes()), k.all_out = alloc<uint8_t>(k, out_bytes() * c.variants);
        k.error = pinned<moe::ErrorRecord>(1), k.counters = pinned<moe::SoftCounters>(1), k.stats = pinned<moe::PeerStats>(c.R);
        k.received_rows = pinned<uint64_t>(static_cast<size_t>(c.R) * L), k.received.assign(static_cast<size_t>(c.R) * L, 0);
        d.received_rows = k.received_rows, d.received_totals = alloc<uint64_t>(k, static_cast<size_t>(c.R) * L);
        d.hidden = k.d_hidden, d.out = k.d_out, d.token_count = k.d_count, d.topk_ids = k.d_ids, d.topk_weights = k.d_weights;
        d.rank = r;
        const int first = std::min(c.E, r * L);
        d.local_experts = std::min(c.E, first + L) - first;
        d.home_tokens = alloc<int32_t>(k, 1), d.home_ids = alloc<int32_t>(k, tk), d.home_weights = alloc<float>(k, tk);
        d.home_mask = alloc<uint64_t>(k, c.M);
        d.expert_counts = alloc<int32_t>(k, L), d.expert_offsets = alloc<int32_t>(k, L + 1), d.expert_rows = alloc<int32_t>(k, packed);
        d.packed_row_of = alloc<int32_t>(k, static_cast<size_t>(c.R) * tk);
        d.expert_out = alloc<__nv_bfloat16>(k, packed * Hp);
        d.epoch = alloc<uint64_t>(k, 2), d.arrivals = alloc<uint32_t>(k, 8), d.totals = alloc<uint64_t>(k, 8);
        d.error = k.error, d.counters = k.counters, d.stats = k.stats;
        d.members = alloc<uint64_t>(k, 1), d.peer_totals = alloc<uint64_t>(k, moe::kPeerWords * c.R);
        CHECK_CUDA(cudaMemcpy(d.members, &members[r], 8, cudaMemcpyHostToDevice));
    }
};

// One batch: every variant once, back to back, with delays of random ranks.
void run_batch(Group& group, uint64_t seed, bool delays, bool mixed, Form form) {
    const Config& c = group.c;
    group.on_gpus([&](int g) {
        group.make_inputs(g, seed, -1);
        group.meet.arrive_and_wait();
        Random own{seed * 77 + g}, shared{seed * 31};
        for (int v = 0; v < c.variants; v++) {
            const Form f = mixed ? static_cast<Form>(shared.below(kForms)) : form;
            group.use_variant(g, v);
            if (delays && own.below(3) == 0) delay_kernel<<<1, 1, 0, group.streams[g]>>>(own.below(60000));
            group.launch(g, f);
            group.keep_output(g, v);
        }
        CHECK_CUDA(cudaStreamSynchronize(group.streams[g]));
        group.meet.arrive_and_wait();
        const std::string where = c.text() + " seed " + std::to_string(seed) + (mixed ? " mixed" : kFormNames[form]);
        group.on_ranks_of(g, [&](int r, Rank& k) {
            for (int v = 0; v < c.variants; v++) {
                group.count_soft(r, v);
                group.check_output(r, v, where + " variant " + std::to_string(v));
            }
            group.check_lists(r, c.variants - 1, where + " rank " + std::to_string(r));
            expect(k.error->code == 0 && (k.error->valid_epoch & 0xffffffffffffull) > 0, "valid " + where + " " + group.record(r));
        });
        group.meet.arrive_and_wait();
    });
}

// A home rank that needs nothing from a peer may still not go on before the peer has read what it sent: the
// combine flag says so. Rank 0 has no row for rank 1, and rank 1 is slow between sending and reading. In the
// next step rank 0 has rows for it, which would overwrite what rank 1 has not read. With the flag forged
// rank 0 does what a combine does that does not wait: rank 1 has to notice.
void runs_ahead(int wire, Form form, bool forged) {
    Config c;
    c.G = 2, c.R = 2, c.M = 16, c.K = 4, c.E = 16, c.H = 256, c.wire = wire, c.timeout_ns = 500000000;
    Group group(c);
    const uint64_t late = 20000000, epoch = 1;
    const std::string name = std::string(kWireNames[wire]) + " " + kFormNames[form] + (forged ? " flag forged" : "") + ": a rank ahead ";
    for (int g = 0; g < 2; g++) use(g), group.make_inputs(g, 21, kOwnThenAny, 12);
    if (forged) CHECK_CUDA(cudaMemcpy(group.region_at<uint64_t>(0, group.params[0].off_combine_flags) + 1, &epoch, 8, cudaMemcpyHostToDevice));
    const auto start = Clock::now();
    use(1);
    group.use_variant(1, 0);
    group.delay_before_recv = late;
    group.launch_part(1, kSplit, 0);
    group.delay_before_recv = 0;
    group.launch_part(1, kSplit, 1);
    group.keep_output(1, 0), group.use_variant(1, 1), group.launch(1, form), group.keep_output(1, 1);
    use(0);
    for (int v = 0; v < 2; v++) group.use_variant(0, v), group.launch(0, form), group.keep_output(0, v);
    for (int g = 0; g < 2; g++) group.end(g);
    const double took = seconds_since(start);
    if (forged) {
        expect(group.ranks[1].error->code == moe::kEpochMismatch && group.ranks[1].error->op == moe::kOpDispatchRecv,
               name + "shows: " + group.record(1));
        return;
    }
    expect(took >= late / 1e9, name + "waits for the slow one");
    for (int g = 0; g < 2; g++) {
        use(g);
        group.on_ranks_of(g, [&](int r, Rank& k) {
            for (int v = 0; v < 2; v++) group.check_output(r, v, name + "variant " + std::to_string(v));
            expect(k.error->code == 0, name + group.record(r));
        });
    }
}

void fuzz(int gpus, double budget) {
    const auto start = Clock::now();
    for (int i = 0; i < 8 && gpus == 2; i++) runs_ahead(i / 4 ? moe::kRows : moe::kLines, i / 2 % 2 ? kSplit : kFused, i % 2);
    Random random{2024};
    long batches = 0;
    int round = 0;
    const struct { int R, M, K, E, H; } shapes[] = {
        {2, 8, 2, 4, 64}, {2, 37, 8, 64, 192}, {2, 128, 8, 256, 448}, {2, 70, 3, 10, 100}, {2, 16, 6, 24, 1000},
        {4, 37, 8, 64, 192}, {4, 20, 5, 18, 328}, {8, 12, 8, 64, 256}, {8, 64, 4, 20, 90}, {2, 130, 1, 7, 64},
        {2, 9, 32, 70, 72}, {1, 37, 8, 64, 192}, {1, 600, 8, 256, 64}, {1, 128, 3, 10, 100}, {4, 300, 8, 128, 64}};
    const int n = sizeof shapes / sizeof shapes[0];
    while (seconds_since(start) < budget && g_failed < 20) {
        const auto& s = shapes[round % n];
        Config c;
        c.G = s.R == 1 ? 1 : std::max(1, round / n % 2 == 0 ? gpus : (gpus > 1 ? 1 : gpus));
        c.R = s.R, c.M = s.M, c.K = s.K, c.E = s.E, c.H = s.H;
        c.wire = s.R == 1 ? moe::kRows : (round / (2 * n) % 3 == 2 ? moe::kRows : moe::kLines);
        // why not with ranks that share a GPU and wait for each other's CTAs by flags: see docs/ordering.md
        c.one_cta = round / n % 3 == 1;
        c.variants = 16;
        c.f32 = (round / 4 + round) % 2 == 1;
        c.timeout_ns = 3000000000ull;
        Group group(c);
        for (int i = 0; i < 6 && seconds_since(start) < budget; i++) {
            if (i % 2 == 1) group.poison(i % 4 == 1 ? 0xffffffffu : 0x7fc07fc0u);
            const bool mixed = i >= 2;
            run_batch(group, random.bits() % 1000000, i > 0, mixed, static_cast<Form>(i % kForms));
            batches++;
        }
        round++;
    }
    std::printf("fuzz on %d GPUs: %ld batches of 16 replays over %d configurations, %ld checks, %d failed, %.0f s\n", gpus,
                batches, round, g_checked.load(), g_failed.load(), seconds_since(start));
}

void one_step(Group& group, int v, Form form, const std::string& where, bool check = true) {
    group.on_gpus([&](int g) {
        group.use_variant(g, v);
        group.launch(g, form);
        group.keep_output(g, v);
        CHECK_CUDA(cudaStreamSynchronize(group.streams[g]));
        group.meet.arrive_and_wait();
        group.on_ranks_of(g, [&](int r, Rank& k) {
            group.count_soft(r, v);
            if (check && group.members[r] != 1ull << r) {
                group.check_output(r, v, where);
                group.check_lists(r, v, where);
                expect(k.error->code == 0, where + " " + group.record(r));
            }
        });
    });
}

void faults(int gpus) {
    if (gpus < 2) {
        std::printf("faults need two GPUs\n");
        return;
    }
    for (int wire : {moe::kLines, moe::kRows}) {
        for (int form = 0; form < (wire == moe::kLines ? 2 : 1); form++) {
            const Form f = static_cast<Form>(form);
            Config c;
            c.G = 2, c.R = 2, c.M = 16, c.K = 4, c.E = 16, c.H = 256, c.wire = wire, c.timeout_ns = 30000000;
            Group group(c);
            const std::string name = std::string(kWireNames[wire]) + " " + kFormNames[f] + ": ";
            for (int g = 0; g < 2; g++) use(g), group.make_inputs(g, 5, 0, 12);
            for (int v = 0; v < 3; v++) one_step(group, v, f, name + "before a fault");

            // Rank 1 never comes
            auto start = Clock::now();
            CHECK_CUDA(cudaSetDevice(0));
            for (int i = 0; i < 3; i++) group.launch(0, f);
            CHECK_CUDA(cudaStreamSynchronize(group.streams[0]));
            double took = seconds_since(start);
            const moe::ErrorRecord* e = group.ranks[0].error;
            expect(e->code == moe::kTimeout && e->op == moe::kOpDispatchRecv && e->rank == 0 && e->peer == 1 &&
                       e->epoch_expected == 4 && e->epoch_seen == 3 && e->waited_ns >= c.timeout_ns && e->epoch == 4 && group.valid_epoch(0) == 3 && took < 0.5,
                   name + "missing rank " + group.record(0));
            std::printf("%smissing rank: %.1f ms for 3 replays; %s\n", name.c_str(), took * 1e3, group.record(0).c_str());
            CHECK_CUDA(cudaSetDevice(1));
            expect(group.get(group.region_at<const uint64_t>(1, group.params[0].off_abort_words), 1)[0] == (2ull << 32 | 1), name + "abort word at the missing rank");
            // It comes late, three steps: the first finds what was sent, later ones end by the abort
            start = Clock::now();
            for (int i = 0; i < 3; i++) group.launch(1, f);
            CHECK_CUDA(cudaStreamSynchronize(group.streams[1]));
            took = seconds_since(start);
            expect(group.ranks[1].error->code == moe::kPeerAbort && took < 0.02, name + "late rank is aborted at once " + group.record(1));
            std::printf("%slate rank: %.2f ms; %s\n", name.c_str(), took * 1e3, group.record(1).c_str());
            group.recover(1);
            for (int g = 0; g < 2; g++) use(g), group.make_inputs(g, 6, 0, 12);
            for (int v = 0; v < 3; v++) one_step(group, v, f, name + "after a missing rank");
            expect(group.valid_epoch(0) == ((1ull << 48) | 3), name + "valid epoch of generation 1 " + group.record(0));

            // A rank skips a step
            CHECK_CUDA(cudaSetDevice(1));
            const uint64_t skipped = (1ull << 48) | 4;
            CHECK_CUDA(cudaMemcpy(group.ranks[1].device.epoch + 1, &skipped, 8, cudaMemcpyHostToDevice));
            start = Clock::now();
            for (int g = 1; g >= 0; g--) {
                CHECK_CUDA(cudaSetDevice(g));
                group.launch(g, f);
                if (g == 1) delay_kernel<<<1, 1, 0, group.streams[0]>>>(1000);
            }
            for (int g = 0; g < 2; g++) group.end(g);
            took = seconds_since(start);
            expect(e->code == moe::kEpochMismatch && e->peer == 1 && e->epoch_expected == ((1ull << 48) | 4) && e->epoch_seen == ((1ull << 48) | 5),
                   name + "skipped epoch " + group.record(0));
            std::printf("%sskipped epoch: %.2f ms; %s | %s\n", name.c_str(), took * 1e3, group.record(0).c_str(), group.record(1).c_str());
            group.recover(2);
            for (int v = 0; v < 3; v++) one_step(group, v, f, name + "after a skipped epoch");

            // A flag is past the epoch: with rows the flag of dispatch, with lines a line of ids
            const uint64_t wrong = ~0ull;
            uint64_t* at = group.region_at<uint64_t>(0, group.params[0].off_dispatch_flags) + 1;
            if (wire == moe::kLines) {
                at = group.region_at<uint64_t>(0, group.params[0].off_dispatch_lines +
                                                      moe::dispatch_lines_of(c.M, group.Hp, c.K) * moe::kLineBytes + 120);
            }
            CHECK_CUDA(cudaMemcpy(at, &wrong, 8, cudaMemcpyDefault));
            use(0);
            group.launch(0, f);
            CHECK_CUDA(cudaStreamSynchronize(group.streams[0]));
            std::printf("%swrong flag: %s\n", name.c_str(), group.record(0).c_str());
            expect(e->code == moe::kEpochMismatch && e->op == moe::kOpDispatchRecv && e->peer == 1 && e->epoch_seen == wrong,
                   name + "wrong flag " + group.record(0));
            group.recover(3);
            const uint64_t right = 3ull << 48;
            CHECK_CUDA(cudaMemcpy(at, &right, 8, cudaMemcpyDefault));
            for (int v = 0; v < 3; v++) one_step(group, v, f, name + "after a wrong flag");
        }

        // A fault in combine is told at once: rank 0 gives up after 30 ms, rank 1 would wait 5 s
        Config c;
        c.G = 2, c.R = 2, c.M = 16, c.K = 4, c.E = 16, c.H = 256, c.wire = wire, c.timeout_ns = 5000000000ull;
        Group group(c);
        const std::string name = std::string(kWireNames[wire]) + " abort in combine: ";
        for (int g = 0; g < 2; g++) use(g), group.make_inputs(g, 5, 0, 12);
        one_step(group, 0, kFused, name);
        group.params[0].timeout_ns = 30000000;
        CHECK_CUDA(cudaSetDevice(1));
        group.launch_part(1, kFused, 0);
        CHECK_CUDA(cudaSetDevice(0));
        group.launch_part(0, kFused, 0), group.launch_part(0, kFused, 1);
        CHECK_CUDA(cudaStreamSynchronize(group.streams[0]));
        // Told of before it failed, and not valid all the same
        expect(group.ranks[0].error->code == moe::kTimeout && group.ranks[0].error->op == moe::kOpCombineRecv &&
                   group.ranks[0].error->epoch == 2 && group.valid_epoch(0) == 1 && group.steps(0) == 1,
               name + group.record(0));
        CHECK_CUDA(cudaSetDevice(1));
        const auto start = Clock::now();
        group.launch_part(1, kFused, 1), group.launch_part(1, kFused, 0);
        CHECK_CUDA(cudaStreamSynchronize(group.streams[1]));
        const double took = seconds_since(start);
        expect(group.ranks[1].error->code == moe::kPeerAbort && took < 0.1, name + group.record(1));
        std::printf("%s%s; the peer ends after %.2f ms: %s\n", name.c_str(), group.record(0).c_str(), took * 1e3, group.record(1).c_str());

        // Rank 2 of 4 says that rank 3 is gone: ranks 0 and 1 put it down to rank 3, not to rank 2
        c.R = 4, c.timeout_ns = 500000000;
        {
            Group told(c);
            for (int g = 0; g < 2; g++) use(g), told.make_inputs(g, 7, 0, 12);
            const uint64_t word = 4ull << 32 | 1;
            for (int r = 0; r < 2; r++) {
                CHECK_CUDA(cudaMemcpy(told.region_at<uint64_t>(r, told.params[0].off_abort_words) + 2, &word, 8,
                                      cudaMemcpyHostToDevice));
            }
            CHECK_CUDA(cudaSetDevice(0));
            told.launch_part(0, kFused, 0);
            CHECK_CUDA(cudaStreamSynchronize(told.streams[0]));
            for (int r = 0; r < 2; r++) {
                expect(told.ranks[r].error->code == moe::kPeerAbort && told.ranks[r].error->peer == 3,
                       std::string(kWireNames[wire]) + " the cause is passed on: " + told.record(r));
            }
        }

        // Rank 3 of 4 is left out and runs on alone
        Group four(c);
        for (int g = 0; g < 2; g++) use(g), four.make_inputs(g, 9, 0, 12);
        one_step(four, 0, kFused, "four ranks");
        four.recover(1, 0b0111);
        for (int v = 1; v < 5; v++) one_step(four, v, static_cast<Form>(v % 2), std::string(kWireNames[wire]) + " three of four ranks");
        expect(four.ranks[0].counters->lost_rows > 0, "lost rows are counted");
        four.recover(2);
        for (int v = 5; v < 8; v++) one_step(four, v, static_cast<Form>(v % 2), std::string(kWireNames[wire]) + " four ranks again");
    }
    std::printf("faults: %ld checks, %d failed\n", g_checked.load(), g_failed.load());
}

double median(std::vector<double> v) {
    std::sort(v.begin(), v.end());
    return v[v.size() / 2];
}

double time_pair(Group& group, Form form, int launches) {
    std::vector<double> medians(group.c.G);
    group.on_gpus([&](int g) {
        cudaStream_t s = group.streams[g];
        std::vector<cudaEvent_t> events(launches + 1);
        for (auto& e : events) CHECK_CUDA(cudaEventCreate(&e));
        for (int i = 0; i < 3; i++) group.launch(g, form);
        CHECK_CUDA(cudaStreamSynchronize(s));
        group.meet.arrive_and_wait();
        group.launch(g, form);
        CHECK_CUDA(cudaEventRecord(events[0], s));
        for (int i = 0; i < launches; i++) {
            group.launch(g, form);
            CHECK_CUDA(cudaEventRecord(events[i + 1], s));
        }
        CHECK_CUDA(cudaStreamSynchronize(s));
        std::vector<double> us;
        for (int i = 0; i < launches; i++) {
            float ms;
            CHECK_CUDA(cudaEventElapsedTime(&ms, events[i], events[i + 1]));
            us.push_back(ms * 1e3 / group.c.pairs);
        }
        medians[g] = median(us);
        for (auto& e : events) CHECK_CUDA(cudaEventDestroy(e));
        group.meet.arrive_and_wait();
    });
    return *std::max_element(medians.begin(), medians.end());
}

double time_config(Config c, int tokens, Form form) {
    c.pairs = 16, c.variants = 1;
    Group group(c);
    for (int g = 0; g < c.G; g++) {
        CHECK_CUDA(cudaSetDevice(g));
        group.make_inputs(g, 11, 0, tokens);
        group.use_variant(g, 0);
        CHECK_CUDA(cudaStreamSynchronize(group.streams[g]));
    }
    const double us = time_pair(group, form, 24);
    for (int r = 0; r < c.R; r++) expect(group.ranks[r].error->code == 0, "timing " + c.text() + " " + group.record(r));
    return us;
}

#ifdef MOE_TRACE
// Cycles, of the last dispatch and combine of a graph of 16 pairs, on one GPU: each CTA's after its own wait for the
// kernel before; and the end of the kernel before on the same multiprocessor, before that wait.
// tail: a dispatch more, so that the kernel before it is a combine.
void trace_case(int gpus, int H, int E, int T, bool tail) {
    Config c;
    c.G = c.R = gpus, c.K = 8, c.E = E, c.H = H, c.M = T, c.wire = moe::kLines;
    c.direct = true, c.pairs = 16, c.variants = 1, c.tail = tail;
    Group group(c);
    for (int g = 0; g < c.G; g++) {
        use(g);
        group.make_inputs(g, 11, 0, T), group.use_variant(g, 0);
        CHECK_CUDA(cudaStreamSynchronize(group.streams[g]));
    }
    if (tail) {
        for (int g = 0; g < c.G; g++) use(g), group.launch(g, kFused);
        for (int g = 0; g < c.G; g++) group.end(g);
    } else {
        time_pair(group, kFused, 8);
    }
    use(0);
    static long long at[2][160][32][moe::kTracePoints];
    CHECK_CUDA(cudaMemcpyFromSymbol(at, moe::g_trace, sizeof at));
    const int ctas[2] = {static_cast<int>(group.dispatch_ctas()), static_cast<int>(group.combine_ctas())};
    const int next = tail ? 0 : 1;  // the kernel that came last
    std::printf("trace H %d T %d, %d and %d CTAs; the last is %s\n", H, T, ctas[0], ctas[1], next ? "combine" : "dispatch");
    auto print = [](const char* name, std::vector<double> v) {
        if (v.empty()) return;
        std::sort(v.begin(), v.end());
        std::printf("  %-44s %7.0f %7.0f %7.0f %7.0f\n", name, v[0], v[v.size() / 2], v[v.size() * 9 / 10], v.back());
    };
    std::printf("  %-44s %7s %7s %7s %7s\n", "cycles", "first", "median", "90 %", "last");
    const struct { int kernel, point; bool ids; const char* name; } points[] = {
        {0, 11, false, "dispatch: rows: start"}, {0, 13, false, "  here"}, {0, 10, false, "  before the wait"}, {0, 1, false, "  loads"},
        {0, 3, false, "  last piece out"}, {0, 2, false, "  sent"}, {0, 4, false, "  last of peers' rows"}, {0, 9, false, "  end"},
        {0, 11, true, "dispatch: ids: start"}, {0, 13, true, "  here"}, {0, 10, true, "  before the wait"}, {0, 1, true, "  loads"},
        {0, 14, true, "  first line out"}, {0, 2, true, "  own out, bits"}, {0, 4, true, "  peers' ids"}, {0, 5, true, "  bits"}, {0, 6, true, "  all bits"}, {0, 7, true, "  offsets"},
        {0, 8, true, "  lists"}, {0, 9, true, "  end"},
        {1, 11, false, "combine: start"}, {1, 10, false, "  before the wait"}, {1, 1, false, "  loads"}, {1, 5, false, "  first line sent"},
        {1, 2, false, "  last line sent"}, {1, 6, false, "  first own share"}, {1, 3, false, "  last own share, or last sent"}, {1, 4, false, "  last of peers' lines"}, {1, 9, false, "  end"},
    };
    for (const auto& k : points) {
        std::vector<double> all;
        for (int b = 0; b < ctas[k.kernel]; b++) {
            if (k.kernel == 0 && (b == 0) != k.ids) continue;
            if (k.kernel == 1 && b == ctas[1] - 1) continue;
            for (int w = 0; w < 32; w++) {
                if (at[k.kernel][b][w][k.point]) all.push_back(at[k.kernel][b][w][k.point] - at[k.kernel][b][w][0]);
            }
        }
        print(k.name, all);
    }
    std::vector<double> ends, starts;
    for (int b = 0; b < ctas[next]; b++) {
        for (int a = 0; a < ctas[1 - next]; a++) {
            if (at[next][b][0][moe::kTraceMultiprocessor] != at[1 - next][a][0][moe::kTraceMultiprocessor]) continue;
            long long end = 0;
            for (int w = 0; w < 32; w++) end = std::max(end, at[1 - next][a][w][9]);
            ends.push_back(end - at[next][b][0][0]), starts.push_back(at[next][b][0][11] - end);
        }
    }
    print("the one before: end, before this one's wait", ends);
    print("from there to this one's start", starts);
    for (int w = 0; w < 16 && tail; w++) {
        std::printf("  ids warp %2d:", w);
        for (int i : {1, 14, 2, 3, 4, 5, 6, 7, 8, 9}) std::printf(" %6lld", at[0][0][w][i] - at[0][0][w][0]);
        std::printf("\n");
    }
}

void trace_all(int gpus) {
    for (int T : {1, 128}) {
        for (bool tail : {false, true}) trace_case(gpus, 7168, 256, T, tail);
    }
    for (bool tail : {false, true}) trace_case(gpus, 2048, 128, 128, tail);
}
#endif

// Numbers of CTAs of both kernels at T 128, nothing between.
void time_grids(int gpus) {
    for (const auto& k : {std::pair{7168, 256}, std::pair{2048, 128}}) {
        std::printf("H %d T 128, us per pair; down: CTAs of dispatch; across: of combine\n     ", k.first);
        const std::vector<int> of_combine = {96, 112, 124, 132};
        for (int e : of_combine) std::printf(" %6d", e);
        for (int d : {48, 64, 80, 96, 112, 132}) {
            std::printf("\n%4d:", d);
            for (int e : of_combine) {
                Config c;
                c.G = c.R = gpus, c.K = 8, c.E = k.second, c.H = k.first, c.M = 128, c.wire = moe::kLines;
                c.empty = c.direct = true, c.dispatch_ctas = d, c.combine_ctas = e;
                std::printf(" %6.2f", time_config(c, 128, kFused));
            }
        }
        std::printf("\n");
        std::fflush(stdout);
    }
}

const struct { int H, E, T; } kPairs[] = {{7168, 256, 1}, {7168, 256, 8}, {7168, 256, 32}, {7168, 256, 128},
                                          {2048, 128, 1}, {2048, 128, 32}, {2048, 128, 128}};

// Pairs with nothing between, in turns: to compare builds.
void time_direct(int gpus) {
    for (int turn = 0; turn < 4; turn++) {
        std::printf("%s", turn % 2 ? "f32   " : "bf16  ");
        for (const auto& k : kPairs) {
            Config c;
            c.G = c.R = gpus, c.K = 8, c.E = k.E, c.H = k.H, c.M = k.T, c.wire = moe::kLines, c.empty = c.direct = true;
            c.f32 = turn % 2;
            std::printf("%s%.2f", &k == kPairs ? "" : "  ", time_config(c, k.T, kFused));
        }
        std::printf("\n");
        std::fflush(stdout);
    }
}

void time_pairs(int gpus) {
    const auto& cases = kPairs;
    std::printf("us per pair, graph of 16, K 8, M = T: nothing between; an empty kernel; one of 10,000 cycles; M 128, an empty kernel\n");
    for (int R : {gpus, 1}) {
        for (const auto& k : cases) {
            Config c;
            c.G = c.R = R, c.K = 8, c.E = k.E, c.H = k.H, c.M = k.T, c.wire = R == 1 ? moe::kRows : moe::kLines;
            c.empty = c.direct = true;
            const double direct = time_config(c, k.T, kFused);
            c.direct = false;
            const double empty = time_config(c, k.T, kFused);
            c.lasting = true;
            const double lasting = time_config(c, k.T, kFused);
            c.lasting = false, c.M = 128;
            std::printf("R %d H %d T %3d: %6.2f %6.2f %6.2f %6.2f\n", R, k.H, k.T, direct, empty, lasting, time_config(c, k.T, kFused));
            std::fflush(stdout);
        }
        if (gpus == 1) break;
    }
}

void time_all(int gpus, bool sweep, bool thresholds) {
    const struct { int H, E, T; double aim; } cases[] = {
        {7168, 256, 1, 8}, {7168, 256, 8, 8.5}, {7168, 256, 32, 10}, {7168, 256, 128, 19},
        {2048, 128, 1, 8}, {2048, 128, 8, 8}, {2048, 128, 32, 8.5}, {2048, 128, 128, 10.7}};
    std::printf("us per pair, graph of 16, an empty kernel between; R GPUs, K 8, M = T unless said\n");
    for (int R : {1, gpus}) {
        if (R == 1 && gpus == 1 && thresholds) continue;
        for (const auto& k : cases) {
            Config c;
            c.G = R, c.R = R, c.K = 8, c.E = k.E, c.H = k.H, c.M = k.T, c.wire = R == 1 ? moe::kRows : moe::kLines;
            c.empty = true;
            const double fused = time_config(c, k.T, kFused);
            Config big = c;
            big.M = 128;
            const double of_128 = time_config(big, k.T, kFused);
            const double split = time_config(c, k.T, kSplit);
            c.wire = moe::kRows;
            const double rows = time_config(c, k.T, kSplit);
            std::printf("R %d H %d T %3d: fused %6.2f (aim %.1f), fused of M 128 %6.2f, split %6.2f, rows split %6.2f\n", R, k.H, k.T, fused, k.aim, of_128, split, rows);
            std::fflush(stdout);
            for (int ctas : {4, 8, 16, 32, 64, 96, 132}) {
                if (!sweep || R == 1) break;
                c.wire = moe::kLines;
                Config d = c;
                d.dispatch_ctas = ctas;
                Config e = c;
                e.combine_ctas = ctas;
                std::printf("    CTAs %3d: dispatch %6.2f combine %6.2f\n", ctas, time_config(d, k.T, kFused), time_config(e, k.T, kFused));
            }
        }
    }
    for (int R : {1, gpus}) {
        for (int H : {2048, 7168}) {
            for (int M : {256, 512, 1024, 2048, 4096}) {
                if (!thresholds || (R == 1 && gpus == 1) || (R > 1 && M > 1024)) break;
                Config c;
                c.G = c.R = R, c.K = 8, c.E = 128, c.H = H, c.M = M, c.wire = R == 1 ? moe::kRows : moe::kLines, c.empty = true;
                const double one = time_config(c, 1, kFused), all = time_config(c, M, kFused);
                c.wire = moe::kRows;
                std::printf("R %d H %d M %d: T 1 fused %.2f split %.2f, T %d fused %.2f split %.2f\n", R, H, M, one,
                            time_config(c, 1, kSplit), M, all, time_config(c, M, kSplit));
                std::fflush(stdout);
            }
        }
    }
}

}  // namespace

int main(int argc, char** argv) {
    const std::string mode = argc > 1 ? argv[1] : "fuzz";
    const double budget = argc > 2 ? std::atof(argv[2]) : 20;
    int gpus = 0;
    CHECK_CUDA(cudaGetDeviceCount(&gpus));
    gpus = std::min(gpus, 2);
    for (int a = 0; a < gpus; a++) {
        CHECK_CUDA(cudaSetDevice(a));
        for (int b = 0; b < gpus; b++) {
            if (a != b) CHECK_CUDA(cudaDeviceEnablePeerAccess(b, 0));
        }
    }
    std::printf("%s on %d GPUs\n", mode.c_str(), gpus);
    if (mode == "fuzz") fuzz(gpus, budget);
    else if (mode == "faults") faults(gpus);
    else if (mode == "time") time_all(gpus, false, false);
    else if (mode == "sweep") time_all(gpus, true, false);
    else if (mode == "pairs") time_pairs(gpus);
    else if (mode == "direct") time_direct(gpus);
    else if (mode == "grids") time_grids(gpus);
#ifdef MOE_TRACE
    else if (mode == "trace") trace_all(gpus);
#endif
    else if (mode == "sizes") time_all(gpus, false, true);
    std::printf("%s: %ld checks, %d failed\n", g_failed ? "FAILED" : "ok", g_checked.load(), g_failed.load());
    return g_failed ? 1 : 0;
}
