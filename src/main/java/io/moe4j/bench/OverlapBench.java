package io.moe4j.bench;

import io.moe4j.BoundStep;
import io.moe4j.MoeConfig;
import io.moe4j.MoeGraph;
import io.moe4j.MoeLayer;
import io.moe4j.StepTensors;
import io.moe4j.cuda.CudaProbe;
import io.moe4j.ep.Group;
import io.moe4j.model.RandomWeights;
import io.moe4j.overlap.TwoBatchOverlap;
import io.moe4j.tensor.Tensor;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.function.ToDoubleFunction;
import java.util.stream.IntStream;

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

        Run(GroupCase groupCase) {
            this.groupCase = groupCase;
        }

        List<BenchRow> measure() {
            BenchCase busiest = groupCase.ofRank(0, 0);
            for (int rank = 1; rank < ranks; rank++) {
                BenchCase other = groupCase.ofRank(rank, 0);
                busiest = other.rows() > busiest.rows() ? other : busiest;
            }
            double bytes = 2.0 * busiest.hitExperts() * groupCase.config().shape().expertElements();
            int sets = options.weightSets(bytes);
            List<Member> members = groupCase.members(group -> new Member(groupCase, group));
            try {
                Group.together(members, member -> member.open(sets));
                double error = worst(members, Member::check);
                Sample whole = GroupCase.slowest(members, Member::oneStep);
                Sample twice = GroupCase.slowest(members, Member::twoSteps);
                Sample overlap = GroupCase.slowest(members, Member::overlapped);
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

        private double worst(List<Member> members, ToDoubleFunction<Member> of) {
            double[] all = new double[ranks];
            Group.together(members, member -> all[member.rank()] = of.applyAsDouble(member));
            return Arrays.stream(all).max().orElseThrow();
        }
    }

    /** One rank and its GPU. Its methods run on all ranks at once. */
    private final class Member extends GroupRank {
        private final List<StepTensors> halves = new ArrayList<>();
        private StepTensors whole;
        private List<BoundStep> wholeSteps;
        private List<BoundStep> firstSteps;
        private List<BoundStep> secondSteps;

        Member(GroupCase groupCase, Group group) {
            super(groupCase, group);
        }

        void open(int sets) {
            openProbe();
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
            return IntStream.range(0, sets).mapToObj(set -> open(of, set)).toList();
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
            return time(CudaTimer.of(probe, layersInARow), wholeSteps.size());
        }
    }
}
