package io.moe4j.bench;

import io.moe4j.BoundStep;
import io.moe4j.MoeConfig;
import io.moe4j.MoeLayer;
import io.moe4j.StepTensors;
import io.moe4j.cuda.CudaProbe;
import io.moe4j.ep.Group;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RandomWeights;
import io.moe4j.tensor.Tensor;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Comparator;
import java.util.List;
import java.util.Map;
import java.util.stream.IntStream;

/**
 * Dispatch, experts and combine over several GPUs, one rank and one thread each, in this process.
 * Ids and weights are given; the slowest rank counts. Every output is checked before anything is
 * timed, and the ranks' faults after it.
 */
public final class EpBench {
    /** Bytes per second and direction a floor assumes: NVLink between two H200s. */
    static final double FLOOR_BYTES_PER_S = 365e9;

    /** A row's way from a store to a reader on another H200 in µs, one way, however few bytes. */
    static final double FLOOR_ONE_WAY_US = 1.6;

    private static final int PAIRS = 16;
    private static final int SKEWED_SAMPLES = 40;

    private final BenchOptions options;
    private final int ranks;
    private final boolean whole;
    private final double skewUs;
    private final List<EpCase> recorded;

    /**
     * A benchmark with these options.
     *
     * @param options how to measure
     * @param ranks GPUs to use, from device 0 on
     * @param whole false: dispatch and combine alone; true: also the experts, and whole steps
     * @param skewUs if positive, also pairs in which each rank comes that much after the one before
     * @param recorded times of others and aims; may be empty
     */
    public EpBench(
            BenchOptions options, int ranks, boolean whole, double skewUs, List<EpCase> recorded) {
        this.options = options;
        this.ranks = ranks;
        this.whole = whole;
        this.skewUs = skewUs;
        this.recorded = List.copyOf(recorded);
    }

    /**
     * Measures one group per number of tokens.
     *
     * @param model name for the report
     * @param layer shape, activation and so on; ranks, tokens and routing input are set here
     * @param vectors the vectors of the layer; its matrices are filled in on the devices
     * @param routing how tokens are routed
     * @param tokens tokens of each rank
     * @return the measurements
     */
    public List<BenchRow> run(
            String model,
            MoeConfig layer,
            RandomWeights vectors,
            RoutingPattern routing,
            List<Integer> tokens) {
        return GroupCase.each(
                options,
                ranks,
                model,
                layer,
                vectors,
                routing,
                tokens,
                groupCase -> new Run(groupCase).measure());
    }

    /** One group, one number of tokens. */
    private final class Run {
        private final GroupCase groupCase;
        private final MoeConfig config;
        private final EpCase known;

        Run(GroupCase groupCase) {
            this.groupCase = groupCase;
            this.config = groupCase.config();
            MoeShape shape = config.shape();
            known =
                    recorded.stream()
                            .filter(
                                    c ->
                                            c.fits(
                                                    ranks,
                                                    shape.hidden(),
                                                    shape.experts(),
                                                    shape.topK(),
                                                    config.maxTokensPerRank()))
                            .findFirst()
                            .orElse(null);
        }

        List<BenchRow> measure() {
            double bytes = 2.0 * leastHit() * config.shape().expertElements();
            int sets = whole ? options.weightSets(bytes) : 1;
            List<Member> members = groupCase.members(group -> new Member(groupCase, group));
            try {
                Group.together(members, member -> member.open(sets));
                Group.together(members, Member::runAll);
                Group.together(members, Member::runFirst);
                double error = members.get(0).check();
                return rows(members, sets, error);
            } finally {
                Group.together(members, Member::close);
            }
        }

        private List<BenchRow> rows(List<Member> members, int sets, double error) {
            Cost experts = slowestExperts();
            List<BenchRow> rows = new ArrayList<>();
            Sample pair = GroupCase.slowest(members, Member::pairs);
            rows.add(row(Stage.PAIR, pair, 1, null, null, error, options.mode()));
            if (skewUs > 0) {
                Sample late = late(members);
                String mode = String.format("graph, %.0f µs apart", skewUs);
                rows.add(row(Stage.PAIR, late, 1, null, null, error, mode));
            }
            if (whole) {
                Sample chain = GroupCase.slowest(members, Member::experts);
                rows.add(row(Stage.CHAIN, chain, sets, experts, null, error, options.mode()));
                Sample step = GroupCase.slowest(members, Member::steps);
                double sum = chain.medianUs() + pair.medianUs();
                rows.add(row(Stage.STEP, step, sets, experts, sum, error, options.mode()));
            }
            Group.together(members, Member::runAll); // why: its check reports a fault of any replay
            return rows;
        }

        private int leastHit() {
            return IntStream.range(0, ranks).map(r -> ofRank(r).hitExperts()).min().orElse(1);
        }

        private BenchCase ofRank(int rank) {
            return groupCase.ofRank(rank, known == null ? 0 : known.number());
        }

        private Cost cost(int rank) {
            BenchCase of = ofRank(rank);
            return Cost.experts(
                    Stage.CHAIN, of.hidden(), of.intermediate(), of.rows(), of.hitExperts());
        }

        private int slowestRank() {
            return IntStream.range(0, ranks)
                    .boxed()
                    .max(Comparator.comparingDouble(r -> cost(r).floorUs()))
                    .orElse(0);
        }

        private Cost slowestExperts() {
            return cost(slowestRank());
        }

        /**
         * There and back: the way itself, and the rows that leave a rank at the rate of its link.
         */
        private double wireFloorUs() {
            int perRank = config.maxTokensPerRank() * config.shape().topK();
            long most = 0;
            for (int rank = 0; rank < ranks; rank++) {
                long rows = 0;
                for (int token = 0; token < config.maxTokensPerRank(); token++) {
                    int at = rank * perRank + token * config.shape().topK();
                    int home = rank;
                    rows +=
                            Arrays.stream(groupCase.input().ids(), at, at + config.shape().topK())
                                    .map(config::rankOf)
                                    .filter(r -> r != home)
                                    .distinct()
                                    .count();
                }
                most = Math.max(most, rows);
            }
            return 2 * FLOOR_ONE_WAY_US
                    + 2e6 * most * config.shape().hidden() * 2 / FLOOR_BYTES_PER_S;
        }

        private BenchRow row(
                Stage stage,
                Sample sample,
                int sets,
                Cost experts,
                Double sumUs,
                double error,
                String mode) {
            BenchRow row =
                    Rows.row(
                            "ep",
                            ofRank(slowestRank()),
                            stage,
                            options,
                            sets,
                            sample,
                            experts,
                            "experts + pair",
                            sumUs,
                            error);
            double floor =
                    (experts == null ? 0 : experts.floorUs())
                            + (stage == Stage.CHAIN ? 0 : wireFloorUs());
            boolean plain = stage == Stage.PAIR && mode.equals("graph") && known != null;
            return row.of(
                    mode, floor, plain ? known.peersUs() : Map.of(), plain ? known.aimUs() : null);
        }

        /** Of the rank that comes last. */
        private Sample late(List<Member> members) {
            return GroupCase.all(members, Member::skewedPairs)[ranks - 1];
        }
    }

    /** One rank: its GPU, its layers, one per weight set. Its methods run on all ranks at once. */
    private final class Member extends GroupRank {
        private final List<BoundStep> steps = new ArrayList<>();
        private StepTensors tensors;
        private List<BoundStep> rotating;

        Member(GroupCase groupCase, Group group) {
            super(groupCase, group);
        }

        void open(int sets) {
            openProbe();
            for (int set = 0; set < sets; set++) {
                MoeLayer layer = open(config, set);
                if (tensors == null) {
                    tensors = load(layer, 0, config.maxTokensPerRank());
                }
                steps.add(layer.bind(List.of(tensors)));
            }
            rotating = CudaProbe.rotatingWeights(steps);
        }

        /** A whole step of every layer. */
        void runAll() {
            for (int set = 0; set < layers.size(); set++) {
                layers.get(set).enqueue(probe.stream(), steps.get(set));
            }
            checkFaults();
        }

        /** One step of layer 0, whose output then is in {@code out}. */
        void runFirst() {
            layers.get(0).enqueue(probe.stream(), steps.get(0));
            probe.synchronize();
            layers.get(0).check();
        }

        /**
         * The largest relative L2 error of this rank's first and last token against float64.
         *
         * @throws IllegalStateException if it is too large, so that nothing wrong is timed
         */
        double check() {
            int m = config.maxTokensPerRank();
            Tensor out = read(tensors.out());
            double worst = error(out, 0);
            return m == 1 ? worst : Math.max(worst, error(out, m - 1));
        }

        Sample pairs() {
            return time(CudaProbe.Phases.PAIR, List.of(steps.get(0)));
        }

        Sample experts() {
            return time(CudaProbe.Phases.EXPERTS, rotating);
        }

        Sample steps() {
            return time(CudaProbe.Phases.STEP, rotating);
        }

        /** Graphs of several rounds, or rounds of launches. */
        private Sample time(CudaProbe.Phases phases, List<BoundStep> of) {
            int rounds = Math.max(1, PAIRS / of.size());
            return time(work(phases, of, rounds), rounds * of.size());
        }

        /**
         * Pairs, each a graph of its own, for which rank r comes r times the skew late. The last
         * rank waits for nobody: its time shows what it costs that the others have come early.
         */
        Sample skewedPairs() {
            List<BoundStep> one = List.of(steps.get(0));
            double[] us = new double[SKEWED_SAMPLES];
            try (CudaTimer.Work work = work(CudaProbe.Phases.PAIR, one, 1)) {
                for (int i = 0; i < us.length; i++) {
                    meet(0);
                    long until = System.nanoTime() + Math.round(1e3 * skewUs * rank());
                    while (System.nanoTime() < until) {
                        Thread.onSpinWait();
                    }
                    us[i] = probe.deviceUs(work::enqueue);
                }
            }
            return Sample.of(us, 1);
        }

        private CudaTimer.Work work(CudaProbe.Phases phases, List<BoundStep> of, int rounds) {
            if (!options.graph()) {
                return CudaTimer.of(
                        () -> {
                            for (int round = 0; round < rounds; round++) {
                                of.forEach(step -> probe.launch(step, phases));
                            }
                        });
            }
            return CudaTimer.of(probe, probe.capture(of, phases, rounds));
        }
    }
}
