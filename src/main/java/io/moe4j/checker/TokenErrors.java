package io.moe4j.checker;

/**
 * The error of an output, token by token: the relative L2 distance ‖got − want‖₂ / ‖want‖₂ in
 * float64. A single number for the whole tensor would hide one wrong token among a thousand right
 * ones, so only the worst token counts. Where the wanted row is zero the distance is absolute; a
 * value that is not finite, on either side, is an infinite error.
 *
 * @param max the largest error of all tokens, 0 if there are none
 * @param worstToken the first token with that error, −1 if there are no tokens
 */
public record TokenErrors(double max, int worstToken) {
    /**
     * Compares [T, width] outputs, row-major.
     *
     * @param got what the layer gave
     * @param want what was expected
     * @param tokens T, number of tokens
     * @param width columns of both
     * @return the errors
     */
    public static TokenErrors of(float[] got, double[] want, int tokens, int width) {
        if (got.length != tokens * width || want.length != tokens * width) {
            throw new IllegalArgumentException(
                    "comparing "
                            + tokens
                            + " tokens of width "
                            + width
                            + " but got has "
                            + got.length
                            + " and want "
                            + want.length
                            + " elements");
        }
        TokenErrors worst = new TokenErrors(0, tokens == 0 ? -1 : 0);
        for (int token = 0; token < tokens; token++) {
            double error = rowError(got, want, token * width, width);
            if (error > worst.max) {
                worst = new TokenErrors(error, token);
            }
        }
        return worst;
    }

    private static double rowError(float[] got, double[] want, int from, int width) {
        double distance = 0;
        double norm = 0;
        for (int i = from; i < from + width; i++) {
            double difference = got[i] - want[i];
            distance += difference * difference;
            norm += want[i] * want[i];
        }
        double error = Math.sqrt(norm == 0 ? distance : distance / norm);
        return Double.isFinite(error) ? error : Double.POSITIVE_INFINITY;
    }
}
