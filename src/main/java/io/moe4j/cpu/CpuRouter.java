package io.moe4j.cpu;

import io.moe4j.model.WeightMatrix;
import java.util.Arrays;

/**
 * The router matrix, transposed and widened, so that logits are summed in float64 over consecutive
 * experts and rounded to float32 once. Immutable.
 */
final class CpuRouter {
    private final int experts;
    private final int hidden;
    private final double[][] byInput;
    private final float[] bias;

    CpuRouter(WeightMatrix router, float[] bias) {
        this.experts = router.rows();
        this.hidden = router.cols();
        this.bias = bias;
        float[] rowMajor = new float[Math.multiplyExact(experts, hidden)];
        router.read(rowMajor);
        this.byInput = new double[hidden][experts];
        for (int e = 0; e < experts; e++) {
            for (int k = 0; k < hidden; k++) {
                byInput[k][e] = rowMajor[e * hidden + k];
            }
        }
    }

    /** logits[e] = router[e] · x + bias[e]; {@code sums} has E elements and is overwritten. */
    void logits(float[] logits, double[] sums, float[] x, int xAt) {
        Arrays.fill(sums, 0.0);
        for (int k = 0; k < hidden; k++) {
            addScaled(sums, byInput[k], x[xAt + k]);
        }
        for (int e = 0; e < experts; e++) {
            logits[e] = (float) (bias == null ? sums[e] : sums[e] + bias[e]);
        }
    }

    private static void addScaled(double[] sums, double[] w, double x) {
        for (int e = 0; e < sums.length; e++) {
            sums[e] += x * w[e];
        }
    }
}
