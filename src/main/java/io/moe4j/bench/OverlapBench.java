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
import io.moe4j.model.MoeShape;
import io.moe4j.model.RandomWeights;
import io.moe4j.overlap.TwoBatchOverlap;
import io.moe4j.tensor.DType;
import io.moe4j.tensor.Tensor;
import java.nio.ByteBuffer;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.Map;
import java.util.OptionalDouble;
import java.util.function.Function;
import java.util.function.ToDoubleFunction;

/**
 * What two overlapped micro-batches gain: T tokens of each rank as one step, as two steps of T/2
 * one after the other, and as two overlapped steps of T/2. Several layers run one after the other
 * in a graph, as in a model; times are per layer, of the slowest rank. All three must give the same
 * bits before anything is timed.
 */
public final class OverlapBench {
    /** Layers in a graph, at least. */
    private static final int LAYERS = 8;

    private final BenchOptions options;
    private final int ranks;

    /**
     * A benchmark with these options.
     *
     * @param options how to measure; always graphs
     * @param ranks GPUs to use, from device 0 on
     */
    public OverlapBench(BenchOptions options, int ranks) {
        this.options = options;
        this.ranks = ranks;
    }

    /**
     * Measures one group per number of tokens.
     *
     * @param model name for the report
     * @param layer shape, activation and so on; ranks, tokens, handles and routing input are set
     *     here
     * @param vectors the vectors of the layer; its matrices are filled in on the devices
     * @param routing how tokens are routed
     * @param tokens tokens of each rank over both batches, even numbers
     * @return three rows for each
     * @throws IllegalArgumentException if a number of tokens cannot be halved
     */
    public List<BenchRow> run(
            String model,
            MoeConfig layer,
            RandomWeights vectors,
            RoutingPattern routing,
            List<Integer> tokens) {
        for (int each : tokens) {
            if (each % 2 != 0) {
                throw new IllegalArgumentException(
                        "--tokens " + each + " cannot be halved: give even numbers with --overlap");
            }
        }
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

        Run(String model, MoeConfig config, RandomWeights vectors, RoutingPattern routing) {
            this.model = model;
            this.config = config;
            this.vectors = vectors;
            this.routing = routing;
            MoeShape shape = config.shape();
            int tokens = ranks * config.maxTokensPerRank();
            ids = routing.ids(tokens, shape.experts(), shape.topK(), options.seed());
            hidden = Checker.randomHidden(options.seed(), 0, tokens, shape.hidden());
        }

        List<BenchRow> measure() {
            BenchCase busiest = ofRank(0);
            for (int rank = 1; rank < ranks; rank++) {
                busiest = ofRank(rank).rows() > busiest.rows() ? ofRank(rank) : busiest;
            }
            double bytes = 2.0 * busiest.hitExperts() * config.shape().expertElements();
            int sets = options.weightSets(bytes);
            List<Member> members =
                    Group.inProcess(ranks).stream().map(group -> new Member(this, group)).toList();
            try {
                Group.together(members, member -> member.open(sets));
                double error = worst(members, Member::check);
                Sample whole = slowest(members, Member::oneStep);
                Sample twice = slowest(members, Member::twoSteps);
                Sample overlap = slowest(members, Member::overlapped);
                Group.together(members, Member::checkFaults);
                double wholeUs = whole.medianUs();
                return List.of(
                        row(busiest, Stage.STEP, whole, sets, null, null, error),
                        row(busiest, Stage.TWO_STEPS, twice, sets, "one step", wholeUs, error),
                        row(
                                busiest,
                                Stage.OVERLAP,
                                overlap,
                                sets,
                                "faster of one and two steps",
                                Math.min(wholeUs, twice.medianUs()),
                                error));
            } finally {
                Group.together(members, Member::close);
            }
        }

        private BenchRow row(
                BenchCase of,
                Stage stage,
                Sample sample,
                int sets,
                String baseline,
                Double baselineUs,
                double error) {
            return Rows.row(
                    "overlap", of, stage, options, sets, sample, null, baseline, baselineUs, error);
        }

        private BenchCase ofRank(int rank) {
            MoeShape shape = config.shape();
            int first = rank * config.expertsPerRank();
            return new BenchCase(
                    0,
                    model,
                    shape.hidden(),
                    shape.intermediate(),
                    shape.experts(),
                    shape.topK(),
                    ranks,
                    config.maxTokensPerRank(),
                    routing.toString(),
                    RoutingPattern.counts(ids, first, first + config.expertsOn(rank)),
                    Map.of());
        }

        private Sample slowest(List<Member> members, Function<Member, Sample> of) {
            Sample[] samples = new Sample[ranks];
            Group.together(members, member -> samples[member.rank()] = of.apply(member));
            return Arrays.stream(samples)
                    .max((a, b) -> Double.compare(a.medianUs(), b.medianUs()))
                    .orElseThrow();
        }

        private double worst(List<Member> members, ToDoubleFunction<Member> of) {
            double[] all = new double[ranks];
            Group.together(members, member -> all[member.rank()] = of.applyAsDouble(member));
            return Arrays.stream(all).max().orElseThrow();
        }
    }

    /** One rank and its GPU. Its methods run on all ranks at once. */
    private final class Member implements AutoCloseable {
        private final Run run;
        private final MoeConfig config;
        private final Group group;
        private final List<MoeLayer> layers = new ArrayList<>();
        private CudaProbe probe;
        private StepTensors whole;
        private final List<StepTensors> halves = new ArrayList<>();
        private List<BoundStep> wholeSteps;
        private List<BoundStep> firstSteps;
        private List<BoundStep> secondSteps;
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
            int m = config.maxTokensPerRank();
            MoeConfig half = config.toBuilder().maxTokensPerRank(m / 2).handles(2).build();
            List<MoeLayer> wholeLayers = openAll(config, sets);
            List<MoeLayer> halfLayers = openAll(half, sets);
            whole = load(wholeLayers.get(0), 0, m);
            wholeSteps = steps(wholeLayers, whole, 0);
            for (int i = 0; i < 2; i++) {
                halves.add(load(halfLayers.get(0), i * m / 2, m / 2));
            }
            firstSteps = steps(halfLayers, halves.get(0), 0);
            secondSteps = steps(halfLayers, halves.get(1), 1);
        }

        private List<MoeLayer> openAll(MoeConfig of, int sets) {
            List<MoeLayer> opened = new ArrayList<>();
            for (int set = 0; set < sets; set++) {
                MoeConfig one =
                        of.toBuilder()
                                .weights(
                                        CudaProbe.randomWeights(
                                                of.shape(), run.vectors, options.seed() + set))
                                .group(group)
                                .device(rank())
                                .build();
                MoeLayer layer = Moe.open(one);
                layers.add(layer);
                opened.add(layer);
                layer.prepare();
            }
            return opened;
        }

        /** Layer after layer, each with the weights of the next set. */
        private List<BoundStep> steps(List<MoeLayer> of, StepTensors tensors, int handle) {
            List<BoundStep> rotating =
                    CudaProbe.rotatingWeights(
                            of.stream()
                                    .map(layer -> layer.bind(List.of(tensors), handle))
                                    .toList());
            List<BoundStep> all = new ArrayList<>();
            while (all.size() < LAYERS) {
                all.addAll(rotating);
            }
            return all;
        }

        private StepTensors load(MoeLayer layer, int first, int tokens) {
            int h = config.shape().hidden();
            int k = config.shape().topK();
            int token = rank() * config.maxTokensPerRank() + first;
            Tensor in = layer.memory().allocate(config.hiddenDType(), tokens, h);
            Tensor host = Tensor.allocateHost(config.hiddenDType(), tokens, h);
            host.writeFloats(run.hidden, token * h, 0, tokens * h);
            layer.memory().write(in, host);
            Tensor count = layer.memory().allocate(DType.I32, 1);
            layer.memory().write(count, Tensor.ofInts(new int[] {tokens}, 1));
            Tensor out = layer.memory().allocate(config.outDType(), tokens, h);
            Tensor ids = layer.memory().allocate(DType.I32, tokens, k);
            int[] mine = Arrays.copyOfRange(run.ids, token * k, (token + tokens) * k);
            layer.memory().write(ids, Tensor.ofInts(mine, tokens, k));
            float[] equal = new float[tokens * k];
            Arrays.fill(equal, 1f / k);
            Tensor weights = layer.memory().allocate(DType.F32, tokens, k);
            layer.memory().write(weights, Tensor.ofFloats(equal, tokens, k));
            return StepTensors.topk(out, in, ids, weights, count);
        }

        /**
         * The relative L2 error of this rank's last token against float64.
         *
         * @throws IllegalStateException if the overlapped halves give other bits than one step, or
         *     a token is off
         */
        double check() {
            wholeSteps.get(0).layer().enqueue(probe.stream(), wholeSteps.get(0));
            try (TwoBatchOverlap overlap =
                    TwoBatchOverlap.of(firstSteps.subList(0, 1), secondSteps.subList(0, 1))) {
                overlap.enqueue(probe.stream());
                probe.synchronize();
            }
            checkFaults();
            int m = config.maxTokensPerRank();
            Tensor want = read(whole.out());
            int half = (int) (want.bytes() / 2);
            for (int i = 0; i < 2; i++) {
                Tensor got = read(halves.get(i).out());
                int differs =
                        want.buffer().slice(i * half, half).mismatch(got.buffer().slice(0, half));
                if (differs >= 0) {
                    throw new IllegalStateException(
                            "overlapped batch "
                                    + i
                                    + " of rank "
                                    + rank()
                                    + " differs from one step at byte "
                                    + differs
                                    + ": a wrong result is not timed");
                }
            }
            return error(want, m - 1);
        }

        private double error(Tensor got, int token) {
            int h = config.shape().hidden();
            int k = config.shape().topK();
            int at = rank() * config.maxTokensPerRank() + token;
            float[] row = Arrays.copyOfRange(run.hidden, at * h, (at + 1) * h);
            int[] chosen = Arrays.copyOfRange(run.ids, at * k, (at + 1) * k);
            float[] equal = new float[k];
            Arrays.fill(equal, 1f / k);
            float[] values = new float[h];
            got.readFloats((long) token * h, values, 0, h);
            double[] want =
                    Float64Oracle.of(layers.get(0).config())
                            .routed(row, new Routing(1, k, chosen, equal));
            double error = TokenErrors.of(values, want, 1, h).max();
            double tolerance = new Checker(OptionalDouble.empty()).toleranceOf("cuda");
            if (!(error <= tolerance)) {
                throw new IllegalStateException(
                        String.format(
                                "token %d of rank %d is off by %.1e (tolerance %.1e): a wrong"
                                        + " result is not timed",
                                token, rank(), error, tolerance));
            }
            return error;
        }

        private Tensor read(Tensor out) {
            Tensor host = Tensor.allocateHost(out.dtype(), out.shape());
            layers.get(0).memory().read(host, out);
            return host;
        }

        void checkFaults() {
            probe.synchronize();
            layers.forEach(MoeLayer::check);
        }

        Sample oneStep() {
            return time(probe.capture(wholeSteps, CudaProbe.Phases.STEP, 1));
        }

        Sample twoSteps() {
            List<BoundStep> inTurn = new ArrayList<>();
            for (int i = 0; i < firstSteps.size(); i++) {
                inTurn.add(firstSteps.get(i));
                inTurn.add(secondSteps.get(i));
            }
            return time(probe.capture(inTurn, CudaProbe.Phases.STEP, 1));
        }

        Sample overlapped() {
            try (TwoBatchOverlap overlap = TwoBatchOverlap.of(firstSteps, secondSteps)) {
                return time(overlap.capture(probe.stream()));
            }
        }

        private Sample time(MoeGraph layersInARow) {
            try (MoeGraph graph = layersInARow) {
                Runnable launch = () -> graph.launch(probe.stream());
                meet(0);
                double us = meet(Sample.of(probe.deviceUs(launch, 5), 1).medianUs());
                int samples = (int) Math.max(20, Math.min(1000, 1e3 * options.sampleMs() / us));
                meet(0);
                return Sample.of(probe.deviceUs(launch, samples), wholeSteps.size());
            }
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
