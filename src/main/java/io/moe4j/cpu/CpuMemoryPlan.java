package io.moe4j.cpu;

import io.moe4j.MemoryPlan;
import io.moe4j.MoeConfig;
import io.moe4j.RoutingInput;
import io.moe4j.model.MoeShape;

/** Sizes of everything the CPU backend allocates, in one place; see docs/memory.md. */
final class CpuMemoryPlan {
    private CpuMemoryPlan() {}

    /** Most packed rows on one rank: a slot has one row per distinct local expert. */
    static int maxPackedRows(MoeConfig config) {
        long rows =
                (long) config.ranks()
                        * config.maxTokensPerRank()
                        * Math.min(config.shape().topK(), config.expertsPerRank());
        if (rows * config.shape().topK() > Integer.MAX_VALUE) {
            throw new IllegalArgumentException(
                    "ranks="
                            + config.ranks()
                            + " times maxTokensPerRank="
                            + config.maxTokensPerRank()
                            + " gives "
                            + rows
                            + " packed rows, more than the CPU backend can index: lower"
                            + " maxTokensPerRank");
        }
        return (int) rows;
    }

    static MemoryPlan of(MoeConfig config) {
        MoeShape shape = config.shape();
        long r = config.ranks();
        long m = config.maxTokensPerRank();
        long h = shape.hidden();
        long i = shape.intermediate();
        long e = shape.experts();
        long k = shape.topK();
        long n = config.handles();
        long rows = maxPackedRows(config);
        MemoryPlan.Builder plan =
                new MemoryPlan.Builder(
                        String.format(
                                "CPU backend: R=%d M=%d H=%d I=%d E=%d L=%d K=%d handles N=%d",
                                r, m, h, i, e, config.expertsPerRank(), k, n));
        plan.add("expert weights", "E*3*I*H*4", e, 3, i, h, 4);
        if (config.expertBias()) {
            plan.add("expert biases", "E*(2*I+H)*4", e, 2 * i + h, 4);
        }
        if (config.routingInput() == RoutingInput.HIDDEN) {
            plan.add("router", "E*H*8", e, h, 8);
        }
        if (config.usesSharedExpert()) {
            long s = shape.sharedIntermediate();
            plan.add("shared expert weights", "3*S*H*4", 3, s, h, 4);
            plan.add("shared expert activations", "N*R*M*(S+H)*4", n, r, m, s + h, 4);
        }
        plan.add("home rows", "N*R*M*H*4", n, r, m, h, 4);
        plan.add("routing", "N*R*M*K*8", n, r, m, k, 8);
        plan.add("receive buffer", "N*R*[R][M][H]*4", n, r, r, m, h, 4);
        plan.add("receive headers", "N*R*[R][M][K]*8", n, r, r, m, k, 8);
        plan.add("row lists", "N*R*(rows+R*M*K)*4, rows=R*M*min(K,L)", n, r, rows + r * m * k, 4);
        plan.add("activations", "rows*I*4 (shared by virtual ranks)", rows, i, 4);
        plan.add("expert outputs", "N*R*rows*H*4", n, r, rows, h, 4);
        plan.add("combine buffer", "N*R*[R][M][H]*4", n, r, r, m, h, 4);
        return plan.build();
    }
}
