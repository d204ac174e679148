package io.moe4j.bench;

import static org.assertj.core.api.Assertions.assertThat;

import io.moe4j.MoeConfig;
import io.moe4j.checker.Checker;
import io.moe4j.checker.Float64Oracle;
import io.moe4j.checker.Routing;
import io.moe4j.checker.TokenErrors;
import io.moe4j.cuda.CudaProbe;
import io.moe4j.cuda.EnabledIfCuda;
import java.io.IOException;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.TreeMap;
import java.util.stream.IntStream;
import java.util.stream.Stream;
import org.junit.jupiter.api.DynamicTest;
import org.junit.jupiter.api.TestFactory;

/**
 * Every case of the benchmark and of prefill: all matrix kernels give the bits of the portable
 * ones, which were written independently, in every token; and some tokens agree with float64.
 */
@EnabledIfCuda
class CasesGpuTest {
    private static final long SEED = 7;

    /** Expected rows of an expert for which layers choose each of the kernels there are. */
    private static final int[] EXPECTED_ROWS = {1, 16, 96};

    private static final int DECODE_TOKENS_IN_FLOAT64 = 64;
    private static final int PREFILL_TOKENS_IN_FLOAT64 = 16;

    @TestFactory
    Stream<DynamicTest> shouldGiveEveryCaseTheSameBitsByEveryKernelAndAgreeWithFloat64()
            throws IOException {
        Path file = Path.of(System.getProperty("moe4j.home", "."), "bench/cases.json");
        List<BenchCase> cases = new ArrayList<>(CaseFile.read(file));
        cases.addAll(Prefill.cases(1));
        return cases.stream()
                .map(
                        one ->
                                DynamicTest.dynamicTest(
                                        "case " + one.number() + " " + one.model(),
                                        () -> check(one)));
    }

    private static void check(BenchCase one) {
        ExpertsBench bench = new ExpertsBench(options());
        MoeConfig config = bench.config(one, bench.vectors(one));
        int[] ids = one.deal(config.shape().topK());
        BenchInput input = BenchInput.of(config, ids, SEED);
        TreeMap<String, Double> portable = new TreeMap<>();
        float[] want = run("mma", config, input, portable, one);
        TreeMap<String, Double> errors = new TreeMap<>();
        assertEqual(one, want, run("", config, input, errors, one));
        for (int rows : EXPECTED_ROWS) {
            MoeConfig other = config.toBuilder().expectedRowsPerExpert(rows).build();
            assertEqual(one, want, run("", other, input, errors, one));
        }
        assertEqual(one, want, run("split", config, input, errors, one));
        System.out.printf(
                "BITWISE case=%d %s tokens=%d kernels=%s mismatches=0, %d tokens off by at most"
                        + " %.2e from float64%n",
                one.number(),
                one.model(),
                one.allTokens(),
                errors.keySet(),
                sampled(one).length,
                portable.firstEntry().getValue());
        assertThat(portable.firstEntry().getValue()).isLessThanOrEqualTo(Checker.CUDA_TOLERANCE);
    }

    private static BenchOptions options() {
        return new BenchOptions("cuda", SEED, true, false, null, 1, io.moe4j.ProgressListener.NONE);
    }

    /** The output of all tokens; notes the kernels and, for the portable ones, the error. */
    private static float[] run(
            String gemm,
            MoeConfig config,
            BenchInput input,
            TreeMap<String, Double> ran,
            BenchCase one) {
        System.setProperty("moe4j.cuda.gemm", gemm);
        var vectors = new ExpertsBench(options()).vectors(one);
        try (CudaProbe probe = new CudaProbe();
                LayerSet layers =
                        new LayerSet(
                                config,
                                set -> CudaProbe.randomWeights(config.shape(), vectors, SEED),
                                1,
                                input,
                                probe.stream())) {
            layers.runAll();
            float[] out = layers.output(0);
            String kernels =
                    String.join(
                            "+", CudaProbe.kernels(layers.steps().get(0), CudaProbe.Part.CHAIN));
            double error = gemm.equals("mma") ? worst(layers.layer().config(), input, out, one) : 0;
            ran.put(kernels.replace("moe_", ""), error);
            return out;
        } finally {
            System.clearProperty("moe4j.cuda.gemm");
        }
    }

    private static void assertEqual(BenchCase one, float[] want, float[] got) {
        for (int i = 0; i < want.length; i++) {
            if (Float.floatToRawIntBits(want[i]) != Float.floatToRawIntBits(got[i])) {
                throw new AssertionError(
                        "case "
                                + one.number()
                                + ", seed "
                                + SEED
                                + ": token "
                                + i / one.hidden()
                                + " column "
                                + i % one.hidden()
                                + " is "
                                + got[i]
                                + ", by mma.sync "
                                + want[i]);
            }
        }
    }

    /** Largest relative L2 error of the sampled tokens. */
    private static double worst(MoeConfig config, BenchInput input, float[] out, BenchCase one) {
        int h = one.hidden();
        int k = config.shape().topK();
        int[] tokens = sampled(one);
        float[] hidden = new float[tokens.length * h];
        float[] got = new float[tokens.length * h];
        int[] ids = new int[tokens.length * k];
        for (int i = 0; i < tokens.length; i++) {
            System.arraycopy(input.hidden(), tokens[i] * h, hidden, i * h, h);
            System.arraycopy(out, tokens[i] * h, got, i * h, h);
            System.arraycopy(input.ids(), tokens[i] * k, ids, i * k, k);
        }
        float[] equal = new float[ids.length];
        Arrays.fill(equal, 1f / k);
        Routing routing = new Routing(tokens.length, k, ids, equal);
        double[] want = Float64Oracle.of(config).routed(hidden, routing);
        return TokenErrors.of(got, want, tokens.length, h).max();
    }

    /** Tokens that visit an expert of this rank: all if they are few, else evenly spread. */
    private static int[] sampled(BenchCase one) {
        int k = Math.min(one.topK(), one.counts().length);
        int[] ids = one.deal(k);
        int[] visiting =
                IntStream.range(0, one.allTokens())
                        .filter(t -> Arrays.stream(ids, t * k, (t + 1) * k).anyMatch(e -> e >= 0))
                        .toArray();
        int most =
                one.number() >= Prefill.FIRST_NUMBER
                        ? PREFILL_TOKENS_IN_FLOAT64
                        : DECODE_TOKENS_IN_FLOAT64;
        int count = Math.min(most, visiting.length);
        return IntStream.range(0, count)
                .map(i -> visiting[(int) ((long) i * visiting.length / count)])
                .toArray();
    }
}
