package io.moe4j.checker;

import io.moe4j.BackendMemory;
import io.moe4j.BoundStep;
import io.moe4j.Moe;
import io.moe4j.MoeConfig;
import io.moe4j.MoeLayer;
import io.moe4j.Phase;
import io.moe4j.ProgressListener;
import io.moe4j.RoutingInput;
import io.moe4j.StepInspection;
import io.moe4j.StepTensors;
import io.moe4j.tensor.DType;
import io.moe4j.tensor.Tensor;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.OptionalDouble;

/**
 * Debug-sync: runs a step phase by phase on a layer and on a twin with the same weights on the CPU,
 * waits after each phase and compares everything it wrote; names the first stage that differs, with
 * rank, token, expert and value. Counts, ids and lists must be equal and received rows equal bit
 * for bit; rows of floating-point values may be off by the tolerance, a relative L2 distance. The
 * layers know nothing of this: it uses {@link MoeLayer#inspect} between phases.
 *
 * <p>Where the layer under test is not the CPU backend, hidden states are rounded to bfloat16
 * first, for both layers. Owns both layers; one thread.
 */
public final class StageChecker implements AutoCloseable {
    /** What routing weights may be off by, relative; logits are rounded to float32. */
    public static final double WEIGHT_TOLERANCE = 1e-4;

    private static final int CHUNK_ELEMENTS = 1 << 22;

    private final MoeLayer tested;
    private final MoeLayer twin;
    private final long stream;
    private final double tolerance;
    private final MoeConfig config;
    private final List<StepTensors> testedTensors;
    private final List<StepTensors> twinTensors;
    private final BoundStep testedStep;
    private final BoundStep twinStep;
    private boolean stopped;

    /**
     * A checker over two prepared layers with the same configuration but for the backend.
     *
     * @param tested the layer under test
     * @param twin what it is compared with
     * @param stream the stream of the layer under test
     * @param tolerance largest relative L2 error of a row
     */
    public StageChecker(MoeLayer tested, MoeLayer twin, long stream, double tolerance) {
        this.tested = tested;
        this.twin = twin;
        this.stream = stream;
        this.tolerance = tolerance;
        this.config = twin.config();
        this.testedTensors = allocate(tested);
        this.twinTensors = allocate(twin);
        this.testedStep = tested.bind(testedTensors);
        this.twinStep = twin.bind(twinTensors);
    }

    /**
     * Opens and prepares a layer and its twin.
     *
     * @param config with weights; the backend is that of the layer under test
     * @param tolerance overrides the backend's tolerance if present
     * @param progress hears about weights being packed
     * @return the checker, which owns both layers
     */
    public static StageChecker open(
            MoeConfig config, OptionalDouble tolerance, ProgressListener progress) {
        MoeLayer tested = Moe.open(config);
        MoeLayer twin = null;
        try {
            tested.prepare((done, total) -> progress.progress(done, 2 * total));
            twin = Moe.open(config.toBuilder().backend("cpu").build());
            twin.prepare((done, total) -> progress.progress(total + done, 2 * total));
            double allowed = new Checker(tolerance).toleranceOf(tested.backend());
            return new StageChecker(tested, twin, 0L, allowed);
        } catch (RuntimeException | Error failure) {
            closeBoth(tested, twin, failure);
            throw failure;
        }
    }

    /**
     * Runs one step and compares its stages.
     *
     * @param inputs one element per rank
     * @return what was compared and the first differences
     * @throws IllegalStateException if an earlier step differed: both layers are left in the middle
     *     of that step
     * @throws io.moe4j.MoeFaultException if the layer reports a fault
     */
    public StageReport check(List<StepInput> inputs) {
        if (stopped) {
            throw new IllegalStateException(
                    "an earlier step differed and was not finished: open a new StageChecker");
        }
        if (inputs.size() != config.ranks()) {
            throw new IllegalArgumentException(
                    "got the input of "
                            + inputs.size()
                            + " ranks but the layer has ranks="
                            + config.ranks());
        }
        boolean round = !tested.backend().equals("cpu");
        for (int rank = 0; rank < inputs.size(); rank++) {
            StepInput input = round ? inputs.get(rank).roundedToBf16() : inputs.get(rank);
            load(tested.memory(), testedTensors.get(rank), input);
            load(twin.memory(), twinTensors.get(rank), input);
        }
        stopped = true; // why: a fault or a failure in the middle of a step leaves it unfinished
        int agreeing = 0;
        for (Phase phase : Phase.values()) {
            tested.enqueue(stream, testedStep, phase, phase);
            tested.synchronize(stream);
            tested.check();
            twin.enqueue(0L, twinStep, phase, phase);
            for (Stage stage : Stage.values()) {
                if (stage.phase() != phase
                        || (stage == Stage.SHARED_OUTPUT && !config.usesSharedExpert())) {
                    continue;
                }
                for (int rank = 0; rank < config.ranks(); rank++) {
                    StageDifference difference = compare(stage, rank);
                    if (difference != null) {
                        return new StageReport(tested.backend(), agreeing, difference, tolerance);
                    }
                }
                agreeing++;
            }
        }
        stopped = false;
        return new StageReport(tested.backend(), agreeing, null, tolerance);
    }

    /** Closes both layers. */
    @Override
    public void close() {
        RuntimeException failure = new RuntimeException("closing the stage checker");
        closeBoth(tested, twin, failure);
        if (failure.getSuppressed().length > 0) {
            throw failure;
        }
    }

    // ------------------------------------------------------------------ the stages

    private StageDifference compare(Stage stage, int rank) {
        StepInspection got = tested.inspect(0, rank);
        StepInspection want = twin.inspect(0, rank);
        return switch (stage) {
            case TOKENS -> number(stage, rank, got.tokens(), want.tokens());
            case EXPERT_IDS -> expertIds(rank, got, want);
            case ROUTING_WEIGHTS ->
                    tokenRows(
                            stage,
                            rank,
                            rank,
                            want.tokens(),
                            config.shape().topK(),
                            weightTolerance(),
                            null,
                            (from, first, count) -> from.routedWeights(first, count));
            case RECEIVED_TOKENS -> receivedTokens(rank, got, want);
            case RECEIVED_IDS -> headers(stage, rank, StepInspection::receivedIds);
            case RECEIVED_WEIGHTS -> receivedWeights(rank, want);
            case RECEIVED_ROWS -> receivedRows(rank, want);
            case EXPERT_COUNTS -> perExpert(stage, rank, got.expertCounts(), want.expertCounts());
            case EXPERT_OFFSETS ->
                    perExpert(stage, rank, got.expertOffsets(), want.expertOffsets());
            case ROW_LISTS -> rowLists(rank, got, want);
            case PACKED_ROWS -> headers(stage, rank, StepInspection::packedRows);
            case ACTIVATED_ROWS ->
                    packedRows(
                            stage,
                            rank,
                            config.shape().intermediate(),
                            StepInspection::activatedRows);
            case EXPERT_OUTPUTS ->
                    packedRows(stage, rank, config.shape().hidden(), StepInspection::expertOutputs);
            case COMBINED_ROWS -> combinedRows(rank, want);
            case SHARED_OUTPUT ->
                    tokenRows(
                            stage,
                            rank,
                            rank,
                            want.tokens(),
                            config.shape().hidden(),
                            tolerance,
                            null,
                            (from, first, count) -> from.sharedOutputs(first, count));
            case OUTPUT -> output(rank, want.tokens());
            case PADDING -> padding(rank, want.tokens());
        };
    }

    private StageDifference expertIds(int rank, StepInspection got, StepInspection want) {
        int k = config.shape().topK();
        int tokens = want.tokens();
        int chunk = chunk(k);
        for (int first = 0; first < tokens; first += chunk) {
            int count = Math.min(chunk, tokens - first);
            int[] seen = got.routedIds(first, count);
            int[] expected = want.routedIds(first, count);
            int i = Arrays.mismatch(seen, expected);
            if (i >= 0) {
                return StageDifference.of(Stage.EXPERT_IDS, rank, seen[i], expected[i])
                        .at(rank, first + i / k)
                        .choice(i % k, expected[i]);
            }
        }
        return null;
    }

    private StageDifference receivedTokens(int rank, StepInspection got, StepInspection want) {
        for (int source = 0; source < config.ranks(); source++) {
            StageDifference difference =
                    number(
                            Stage.RECEIVED_TOKENS,
                            rank,
                            got.receivedTokens(source),
                            want.receivedTokens(source));
            if (difference != null) {
                return difference.at(source, -1);
            }
        }
        return null;
    }

    /** Whole numbers per header entry. */
    private StageDifference headers(Stage stage, int rank, HeaderReader reader) {
        StepInspection got = tested.inspect(0, rank);
        StepInspection want = twin.inspect(0, rank);
        int k = config.shape().topK();
        int chunk = chunk(k);
        for (int source = 0; source < config.ranks(); source++) {
            int tokens = want.receivedTokens(source);
            for (int first = 0; first < tokens; first += chunk) {
                int count = Math.min(chunk, tokens - first);
                int[] seen = reader.read(got, source, first, count);
                int[] expected = reader.read(want, source, first, count);
                int i = Arrays.mismatch(seen, expected);
                if (i >= 0) {
                    int local = want.receivedIds(source, first, count)[i];
                    return StageDifference.of(stage, rank, seen[i], expected[i])
                            .at(source, first + i / k)
                            .choice(i % k, global(rank, local));
                }
            }
        }
        return null;
    }

    private StageDifference receivedWeights(int rank, StepInspection want) {
        for (int source = 0; source < config.ranks(); source++) {
            int from = source;
            StageDifference difference =
                    tokenRows(
                            Stage.RECEIVED_WEIGHTS,
                            rank,
                            source,
                            want.receivedTokens(source),
                            config.shape().topK(),
                            weightTolerance(),
                            null,
                            (inspected, first, count) ->
                                    inspected.receivedWeights(from, first, count));
            if (difference != null) {
                return difference;
            }
        }
        return null;
    }

    private StageDifference receivedRows(int rank, StepInspection want) {
        for (int source = 0; source < config.ranks(); source++) {
            int from = source;
            StageDifference difference =
                    tokenRows(
                            Stage.RECEIVED_ROWS,
                            rank,
                            source,
                            want.receivedTokens(source),
                            config.shape().hidden(),
                            0,
                            (first, count) -> want.receivedIds(from, first, count),
                            (inspected, first, count) ->
                                    inspected.receivedRows(from, first, count));
            if (difference != null) {
                return difference;
            }
        }
        return null;
    }

    private StageDifference perExpert(Stage stage, int rank, int[] seen, int[] expected) {
        int i = Arrays.mismatch(seen, expected);
        return i < 0
                ? null
                : StageDifference.of(stage, rank, seen[i], expected[i]).choice(-1, global(rank, i));
    }

    private StageDifference rowLists(int rank, StepInspection got, StepInspection want) {
        int[] offsets = want.expertOffsets();
        int rows = offsets[offsets.length - 1];
        int chunk = chunk(1);
        for (int first = 0; first < rows; first += chunk) {
            int count = Math.min(chunk, rows - first);
            int[] seen = got.rowSlots(first, count);
            int[] expected = want.rowSlots(first, count);
            int i = Arrays.mismatch(seen, expected);
            if (i >= 0) {
                StageDifference difference =
                        StageDifference.of(Stage.ROW_LISTS, rank, seen[i], expected[i]);
                return atRow(difference, offsets, first + i, expected[i]);
            }
        }
        return null;
    }

    private StageDifference packedRows(Stage stage, int rank, int width, RowReader reader) {
        StepInspection got = tested.inspect(0, rank);
        StepInspection want = twin.inspect(0, rank);
        int[] offsets = want.expertOffsets();
        int rows = offsets[offsets.length - 1];
        int chunk = chunk(width);
        for (int first = 0; first < rows; first += chunk) {
            int count = Math.min(chunk, rows - first);
            float[] seen = reader.read(got, first, count);
            float[] expected = reader.read(want, first, count);
            for (int i = 0; i < count; i++) {
                StageDifference difference =
                        row(stage, rank, seen, expected, i * width, width, tolerance);
                if (difference != null) {
                    int slot = want.rowSlots(first + i, 1)[0];
                    return atRow(difference, offsets, first + i, slot);
                }
            }
        }
        return null;
    }

    /** Rows that came home: of every expert rank, for the tokens that visited it. */
    private StageDifference combinedRows(int rank, StepInspection want) {
        for (int expertRank = 0; expertRank < config.ranks(); expertRank++) {
            int from = expertRank;
            StageDifference difference =
                    tokenRows(
                            Stage.COMBINED_ROWS,
                            expertRank,
                            rank,
                            want.tokens(),
                            config.shape().hidden(),
                            tolerance,
                            (first, count) -> onRank(from, want.routedIds(first, count)),
                            (inspected, first, count) -> inspected.combinedRows(from, first, count),
                            rank);
            if (difference != null) {
                return difference;
            }
        }
        return null;
    }

    /** Ids that live on a rank stay, others become −1. */
    private int[] onRank(int rank, int[] ids) {
        for (int i = 0; i < ids.length; i++) {
            if (ids[i] >= 0 && config.rankOf(ids[i]) != rank) {
                ids[i] = -1;
            }
        }
        return ids;
    }

    private StageDifference output(int rank, int tokens) {
        int h = config.shape().hidden();
        Tensor seen = outputOf(tested, testedTensors.get(rank));
        Tensor expected = outputOf(twin, twinTensors.get(rank));
        float[] seenRow = new float[h];
        float[] expectedRow = new float[h];
        for (int token = 0; token < tokens; token++) {
            seen.readFloats((long) token * h, seenRow, 0, h);
            expected.readFloats((long) token * h, expectedRow, 0, h);
            StageDifference difference =
                    row(Stage.OUTPUT, rank, seenRow, expectedRow, 0, h, tolerance);
            if (difference != null) {
                return difference.at(rank, token);
            }
        }
        return null;
    }

    private StageDifference padding(int rank, int tokens) {
        int h = config.shape().hidden();
        Tensor seen = outputOf(tested, testedTensors.get(rank));
        for (long i = (long) tokens * h; i < seen.elements(); i++) {
            if (!Float.isNaN(seen.getFloat(i))) {
                return StageDifference.of(Stage.PADDING, rank, seen.getFloat(i), Double.NaN)
                        .at(rank, (int) (i / h))
                        .column((int) (i % h), Double.NaN, 0);
            }
        }
        return null;
    }

    // ------------------------------------------------------------------ comparing

    private interface HeaderReader {
        int[] read(StepInspection from, int source, int firstToken, int count);
    }

    private interface RowReader {
        float[] read(StepInspection from, int first, int count);
    }

    /** Expert ids [count, K] of tokens; a token with none at or above 0 is skipped. */
    private interface VisitReader {
        int[] read(int firstToken, int count);
    }

    private StageDifference tokenRows(
            Stage stage,
            int rank,
            int homeRank,
            int tokens,
            int width,
            double allowed,
            VisitReader visits,
            RowReader reader) {
        return tokenRows(stage, rank, homeRank, tokens, width, allowed, visits, reader, rank);
    }

    private StageDifference tokenRows(
            Stage stage,
            int rank,
            int homeRank,
            int tokens,
            int width,
            double allowed,
            VisitReader visits,
            RowReader reader,
            int inspectedRank) {
        StepInspection got = tested.inspect(0, inspectedRank);
        StepInspection want = twin.inspect(0, inspectedRank);
        int chunk = chunk(width);
        for (int first = 0; first < tokens; first += chunk) {
            int count = Math.min(chunk, tokens - first);
            int[] ids = visits == null ? null : visits.read(first, count);
            float[] seen = reader.read(got, first, count);
            float[] expected = reader.read(want, first, count);
            for (int i = 0; i < count; i++) {
                if (ids != null && !visited(ids, i)) {
                    continue;
                }
                StageDifference difference =
                        row(stage, rank, seen, expected, i * width, width, allowed);
                if (difference != null) {
                    return difference.at(homeRank, first + i);
                }
            }
        }
        return null;
    }

    private boolean visited(int[] ids, int token) {
        int k = config.shape().topK();
        for (int i = token * k; i < (token + 1) * k; i++) {
            if (ids[i] >= 0) {
                return true;
            }
        }
        return false;
    }

    private StageDifference atRow(StageDifference difference, int[] offsets, int row, int slot) {
        int expert = 0;
        while (row >= offsets[expert + 1]) {
            expert++;
        }
        int m = config.maxTokensPerRank();
        return difference.row(row, global(difference.rank(), expert)).at(slot / m, slot % m);
    }

    private int global(int rank, int localExpert) {
        return localExpert < 0 ? -1 : rank * config.expertsPerRank() + localExpert;
    }

    private static StageDifference number(Stage stage, int rank, int seen, int expected) {
        return seen == expected ? null : StageDifference.of(stage, rank, seen, expected);
    }

    /** Null if the row is within tolerance; two NaN or two equal infinities agree. */
    private static StageDifference row(
            Stage stage,
            int rank,
            float[] seen,
            float[] expected,
            int at,
            int width,
            double allowed) {
        double distance = 0;
        double norm = 0;
        double largest = -1;
        int worst = -1;
        for (int i = at; i < at + width; i++) {
            if (Float.compare(seen[i], expected[i]) != 0) {
                double off = Math.abs((double) seen[i] - expected[i]);
                off = Double.isNaN(off) ? Double.POSITIVE_INFINITY : off;
                distance += off * off;
                if (off > largest) {
                    largest = off;
                    worst = i;
                }
            }
            if (Float.isFinite(expected[i])) {
                norm += (double) expected[i] * expected[i];
            }
        }
        double error = Math.sqrt(norm == 0 ? distance : distance / norm);
        return worst < 0 || error <= allowed
                ? null
                : StageDifference.of(stage, rank, seen[worst], expected[worst])
                        .column(worst - at, error, allowed);
    }

    private double weightTolerance() {
        return config.routingInput() == RoutingInput.TOPK ? 0 : WEIGHT_TOLERANCE;
    }

    private static int chunk(int width) {
        return Math.max(1, CHUNK_ELEMENTS / width);
    }

    // ------------------------------------------------------------------ tensors

    private static List<StepTensors> allocate(MoeLayer layer) {
        MoeConfig config = layer.config();
        BackendMemory memory = layer.memory();
        long m = config.maxTokensPerRank();
        long k = config.shape().topK();
        List<StepTensors> ranks = new ArrayList<>();
        for (int rank = 0; rank < config.ranks(); rank++) {
            Tensor out = memory.allocate(config.outDType(), m, config.shape().hidden());
            Tensor hidden = memory.allocate(config.hiddenDType(), m, config.shape().hidden());
            Tensor count = memory.allocate(DType.I32, 1);
            ranks.add(
                    switch (config.routingInput()) {
                        case TOPK ->
                                StepTensors.topk(
                                        out,
                                        hidden,
                                        memory.allocate(DType.I32, m, k),
                                        memory.allocate(DType.F32, m, k),
                                        count);
                        case LOGITS ->
                                StepTensors.logits(
                                        out,
                                        hidden,
                                        memory.allocate(DType.F32, m, config.shape().experts()),
                                        count);
                        case HIDDEN -> StepTensors.hidden(out, hidden, count);
                    });
        }
        return ranks;
    }

    /** Writes an input; what no token uses becomes NaN, so that reading or writing it shows. */
    private void load(BackendMemory memory, StepTensors to, StepInput input) {
        int m = config.maxTokensPerRank();
        if (input.tokens() < 0
                || input.tokens() > m
                || input.hidden().length != input.tokens() * config.shape().hidden()) {
            throw new IllegalArgumentException(
                    "input of "
                            + input.tokens()
                            + " tokens with "
                            + input.hidden().length
                            + " hidden values does not fit maxTokensPerRank="
                            + m
                            + " and hidden="
                            + config.shape().hidden());
        }
        writeFloats(memory, to.hidden(), input.hidden());
        writeFloats(memory, to.out(), new float[0]);
        if (to.topkIds() != null) {
            Tensor ids = Tensor.allocateHost(DType.I32, to.topkIds().shape());
            for (int i = 0; i < ids.elements(); i++) {
                ids.setInt(i, i < input.topkIds().length ? input.topkIds()[i] : Integer.MAX_VALUE);
            }
            memory.write(to.topkIds(), ids);
            writeFloats(memory, to.topkWeights(), input.topkWeights());
        }
        if (to.routerLogits() != null) {
            writeFloats(memory, to.routerLogits(), input.routerLogits());
        }
        memory.write(to.tokenCount(), Tensor.ofInts(new int[] {input.tokens()}, 1));
    }

    private static void writeFloats(BackendMemory memory, Tensor to, float[] values) {
        Tensor host = Tensor.allocateHost(to.dtype(), to.shape());
        host.writeFloats(values, 0, 0, values.length);
        float[] nan = new float[Math.toIntExact(Math.min(host.elements(), 1 << 16))];
        Arrays.fill(nan, Float.NaN);
        for (long at = values.length; at < host.elements(); at += nan.length) {
            host.writeFloats(nan, 0, at, (int) Math.min(nan.length, host.elements() - at));
        }
        memory.write(to, host);
    }

    private static Tensor outputOf(MoeLayer layer, StepTensors tensors) {
        if (tensors.out().isHost()) {
            return tensors.out();
        }
        Tensor host = Tensor.allocateHost(tensors.out().dtype(), tensors.out().shape());
        layer.memory().read(host, tensors.out());
        return host;
    }

    private static void closeBoth(MoeLayer first, MoeLayer second, Throwable failure) {
        for (MoeLayer layer : second == null ? List.of(first) : List.of(first, second)) {
            try {
                layer.close();
            } catch (RuntimeException closing) {
                failure.addSuppressed(closing);
            }
        }
    }
}
