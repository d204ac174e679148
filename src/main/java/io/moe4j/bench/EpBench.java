package io.moe4j.bench;

import io.moe4j.BoundStep;
import io.moe4j.Moe;
import io.moe4j.MoeConfig;
import io.moe4j.MoeGraph;
import io.moe4j.MoeLayer;
import io.moe4j.RoutingInput;
import io.moe4j.StepTensors;
import io.moe4j.checker.Checker;
import io.moe4j.checker.Float64Oracle;
import io.moe4j.checker.Routing;
import io.moe4j.checker.TokenErrors;
import io.moe4j.cuda.CudaProbe;
import io.moe4j.ep.Group;
import io.moe4j.model.LayerWeights;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RandomWeights;
import io.moe4j.tensor.DType;
import io.moe4j.tensor.Tensor;
import java.nio.ByteBuffer;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Comparator;
import java.util.List;
import java.util.Map;
import java.util.OptionalDouble;
import java.util.function.Function;
import java.util.function.IntFunction;
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
            rows.addAll(new Run(model, config, vectors, routing).measure());
            options.progress().progress(i + 1, tokens.size());
        }
        return rows;
    }

    /** One group, one number of tokens. */
    private final class Run {
        private final String model;
        private final MoeConfig config;
        private final RandomWeights vectors;
        private final RoutingPattern routing;
        private final int[] ids;
        private final float[] hidden;
        private final EpCase known;

        Run(String model, MoeConfig config, RandomWeights vectors, RoutingPattern routing) {
            this.model = model;
            this.config = config;
            this.vectors = vectors;
            this.routing = routing;
            MoeShape shape = config.shape();
            int tokens = ranks * config.maxTokensPerRank();
            ids = routing.ids(tokens, shape.experts(), shape.topK(), options.seed());
            hidden = Checker.randomHidden(options.seed(), 0, tokens, shape.hidden());
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
            int sets = whole ? options.weightSets(2.0 * leastHit() * expertElements()) : 1;
            List<Member> members =
                    Group.inProcess(ranks).stream().map(group -> new Member(this, group)).toList();
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
            Sample pair = slowest(members, Member::pairs);
            rows.add(row(Stage.PAIR, pair, 1, null, null, error, options.mode()));
            if (skewUs > 0) {
                Sample late = late(members);
                String mode = String.format("graph, %.0f µs apart", skewUs);
                rows.add(row(Stage.PAIR, late, 1, null, null, error, mode));
            }
            if (whole) {
                Sample chain = slowest(members, Member::experts);
                rows.add(row(Stage.CHAIN, chain, sets, experts, null, error, options.mode()));
                Sample step = slowest(members, Member::steps);
                double sum = chain.medianUs() + pair.medianUs();
                rows.add(row(Stage.STEP, step, sets, experts, sum, error, options.mode()));
            }
            Group.together(members, Member::runAll); // why: its check reports a fault of any replay
            return rows;
        }

        private long expertElements() {
            return config.shape().expertElements();
        }

        private int[] counts(int rank) {
            int first = rank * config.expertsPerRank();
            return RoutingPattern.counts(ids, first, first + config.expertsOn(rank));
        }

        private int leastHit() {
            return IntStream.range(0, ranks)
                    .map(r -> (int) Arrays.stream(counts(r)).filter(c -> c > 0).count())
                    .min()
                    .orElse(1);
        }

        private BenchCase ofRank(int rank) {
            MoeShape shape = config.shape();
            return new BenchCase(
                    known == null ? 0 : known.number(),
                    model,
                    shape.hidden(),
                    shape.intermediate(),
                    shape.experts(),
                    shape.topK(),
                    ranks,
                    config.maxTokensPerRank(),
                    routing.toString(),
                    counts(rank),
                    Map.of());
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
                            Arrays.stream(ids, at, at + config.shape().topK())
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

        private Sample slowest(List<Member> members, Function<Member, Sample> of) {
            return Arrays.stream(all(members, of))
                    .max(Comparator.comparingDouble(Sample::medianUs))
                    .orElseThrow();
        }

        /** Of the rank that comes last. */
        private Sample late(List<Member> members) {
            return all(members, Member::skewedPairs)[ranks - 1];
        }

        private Sample[] all(List<Member> members, Function<Member, Sample> of) {
            Sample[] samples = new Sample[ranks];
            Group.together(members, member -> samples[member.rank()] = of.apply(member));
            return samples;
        }
    }

    /** One rank: its GPU, its layers, one per weight set. Its methods run on all ranks at once. */
    private final class Member implements AutoCloseable {
        private final Run run;
        private final MoeConfig config;
        private final Group group;
        private final List<MoeLayer> layers = new ArrayList<>();
        private final List<BoundStep> steps = new ArrayList<>();
        private StepTensors tensors;
        private List<BoundStep> rotating;
        private CudaProbe probe;
        private int meetings;

        Member(Run run, Group group) {
            this.run = run;
            this.config = run.config;
            this.group = group;
        }

        int rank() {
            return group.rank();
        }

        void open(int sets) {
            probe = new CudaProbe(rank());
            IntFunction<LayerWeights> weights =
                    set ->
                            CudaProbe.randomWeights(
                                    config.shape(), run.vectors, options.seed() + set);
            for (int set = 0; set < sets; set++) {
                MoeLayer layer =
                        Moe.open(
                                config.toBuilder()
                                        .weights(weights.apply(set))
                                        .group(group)
                                        .device(rank())
                                        .build());
                layers.add(layer);
                layer.prepare();
                if (tensors == null) {
                    tensors = load(layer);
                }
                steps.add(layer.bind(List.of(tensors)));
            }
            rotating = CudaProbe.rotatingWeights(steps);
        }

        private StepTensors load(MoeLayer layer) {
            int m = config.maxTokensPerRank();
            int h = config.shape().hidden();
            int k = config.shape().topK();
            Tensor in = layer.memory().allocate(config.hiddenDType(), m, h);
            Tensor host = Tensor.allocateHost(config.hiddenDType(), m, h);
            host.writeFloats(run.hidden, rank() * m * h, 0, m * h);
            layer.memory().write(in, host);
            Tensor count = layer.memory().allocate(DType.I32, 1);
            layer.memory().write(count, Tensor.ofInts(new int[] {m}, 1));
            Tensor out = layer.memory().allocate(config.outDType(), m, h);
            Tensor ids = layer.memory().allocate(DType.I32, m, k);
            int[] mine = Arrays.copyOfRange(run.ids, rank() * m * k, (rank() + 1) * m * k);
            layer.memory().write(ids, Tensor.ofInts(mine, m, k));
            float[] equal = new float[m * k];
            Arrays.fill(equal, 1f / k);
            Tensor weights = layer.memory().allocate(DType.F32, m, k);
            layer.memory().write(weights, Tensor.ofFloats(equal, m, k));
            return StepTensors.topk(out, in, ids, weights, count);
        }

        /** A whole step of every layer. */
        void runAll() {
            for (int set = 0; set < layers.size(); set++) {
                layers.get(set).enqueue(probe.stream(), steps.get(set));
            }
            probe.synchronize();
            layers.forEach(MoeLayer::check);
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
            int h = config.shape().hidden();
            int k = config.shape().topK();
            Tensor host = Tensor.allocateHost(config.outDType(), m, h);
            layers.get(0).memory().read(host, tensors.out());
            float[] equal = new float[k];
            Arrays.fill(equal, 1f / k);
            Float64Oracle oracle = Float64Oracle.of(layers.get(0).config());
            double tolerance = new Checker(OptionalDouble.empty()).toleranceOf("cuda");
            double worst = 0;
            for (int token : m == 1 ? new int[] {0} : new int[] {0, m - 1}) {
                int at = rank() * m + token;
                float[] row = Arrays.copyOfRange(run.hidden, at * h, (at + 1) * h);
                int[] chosen = Arrays.copyOfRange(run.ids, at * k, (at + 1) * k);
                float[] got = new float[h];
                host.readFloats(token * h, got, 0, h);
                double[] want = oracle.routed(row, new Routing(1, k, chosen, equal));
                double error = TokenErrors.of(got, want, 1, h).max();
                if (!(error <= tolerance)) {
                    throw new IllegalStateException(
                            String.format(
                                    "token %d of rank %d is off by %.1e (tolerance %.1e): a wrong"
                                            + " result is not timed",
                                    token, rank(), error, tolerance));
                }
                worst = Math.max(worst, error);
            }
            return worst;
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

        /** Graphs of several rounds, or rounds of launches; all ranks take as many samples. */
        private Sample time(CudaProbe.Phases phases, List<BoundStep> of) {
            int rounds = Math.max(1, PAIRS / of.size());
            try (CudaTimer.Work work = work(phases, of, rounds)) {
                meet(0);
                double us = meet(Sample.of(probe.deviceUs(work::enqueue, 5), 1).medianUs());
                int samples = (int) Math.max(20, Math.min(1000, 1e3 * options.sampleMs() / us));
                meet(0);
                return Sample.of(probe.deviceUs(work::enqueue, samples), rounds * of.size());
            }
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
            MoeGraph graph = probe.capture(of, phases, rounds);
            return new CudaTimer.Work() {
                @Override
                public void enqueue() {
                    graph.launch(probe.stream());
                }

                @Override
                public void close() {
                    graph.close();
                }
            };
        }

        /** All ranks get the largest of their numbers. */
        private double meet(double mine) {
            byte[] bytes = ByteBuffer.allocate(Double.BYTES).putDouble(mine).array();
            return group.exchange("bench " + meetings++, bytes).stream()
                    .mapToDouble(theirs -> ByteBuffer.wrap(theirs).getDouble())
                    .max()
                    .orElseThrow();
        }

        @Override
        public void close() {
            try (CudaProbe closed = probe) {
                layers.forEach(MoeLayer::close);
            } finally {
                group.close();
            }
        }
    }
}
