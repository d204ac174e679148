package io.moe4j.bench;

import io.moe4j.MoeConfig;
import io.moe4j.RoutingInput;
import io.moe4j.ep.Group;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RandomWeights;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Comparator;
import java.util.List;
import java.util.function.Function;

/**
 * A group of GPUs in this process, one rank and one thread each, with one number of tokens: what
 * benchmarks of several GPUs have in common. Ids are given; the slowest rank counts.
 */
final class GroupCase {
    private final BenchOptions options;
    private final String model;
    private final MoeConfig config;
    private final RandomWeights vectors;
    private final RoutingPattern routing;
    private final BenchInput input;

    private GroupCase(
            BenchOptions options,
            String model,
            MoeConfig config,
            RandomWeights vectors,
            RoutingPattern routing) {
        this.options = options;
        this.model = model;
        this.config = config;
        this.vectors = vectors;
        this.routing = routing;
        MoeShape shape = config.shape();
        int tokens = config.ranks() * config.maxTokensPerRank();
        int[] ids = routing.ids(tokens, shape.experts(), shape.topK(), options.seed());
        this.input = BenchInput.of(config, ids, options.seed());
    }

    /** What {@code measure} gives for each number of tokens of a rank. */
    static List<BenchRow> each(
            BenchOptions options,
            int ranks,
            String model,
            MoeConfig layer,
            RandomWeights vectors,
            RoutingPattern routing,
            List<Integer> tokens,
            Function<GroupCase, List<BenchRow>> measure) {
        List<BenchRow> rows = new ArrayList<>();
        for (int i = 0; i < tokens.size(); i++) {
            MoeConfig config =
                    layer.toBuilder()
                            .ranks(ranks)
                            .maxTokensPerRank(tokens.get(i))
                            .routingInput(RoutingInput.TOPK)
                            .sharedExpert(false)
                            .backend("cuda")
                            .build();
            rows.addAll(measure.apply(new GroupCase(options, model, config, vectors, routing)));
            options.progress().progress(i + 1, tokens.size());
        }
        return rows;
    }

    BenchOptions options() {
        return options;
    }

    MoeConfig config() {
        return config;
    }

    /** The vectors of the layer; its matrices are filled in on the devices. */
    RandomWeights vectors() {
        return vectors;
    }

    BenchInput input() {
        return input;
    }

    /** What a rank gets to do, as a case with this number. */
    BenchCase ofRank(int rank, int number) {
        int first = rank * config.expertsPerRank();
        int[] counts = RoutingPattern.counts(input.ids(), first, first + config.expertsOn(rank));
        return BenchCase.of(number, model, config, routing.toString(), counts);
    }

    /** Members of a new group, each closed by its rank. */
    <M extends GroupRank> List<M> members(Function<Group, M> member) {
        return Group.inProcess(config.ranks()).stream().map(member).toList();
    }

    /** What each rank measures, all at once. */
    static <M extends GroupRank> Sample[] all(List<M> members, Function<M, Sample> of) {
        Sample[] samples = new Sample[members.size()];
        Group.together(members, member -> samples[member.rank()] = of.apply(member));
        return samples;
    }

    /** What the slowest rank measures. */
    static <M extends GroupRank> Sample slowest(List<M> members, Function<M, Sample> of) {
        return Arrays.stream(all(members, of))
                .max(Comparator.comparingDouble(Sample::medianUs))
                .orElseThrow();
    }
}
