package io.moe4j.checker;

/**
 * A token whose experts differ from the reference.
 *
 * @param token row in the case
 * @param missing the best-scored expert the reference has and the backend has not, −1 if none
 * @param unexpected the best-scored expert the backend has and the reference has not, −1 if the
 *     backend dropped or repeated an id
 * @param scoreGap score of {@code missing} minus score of {@code unexpected}: close to 0 for a near
 *     tie; NaN if one of them is −1
 */
public record RoutingMismatch(int token, int missing, int unexpected, double scoreGap) {
    /** For example {@code token 3: expert 7 missing, 9 instead (score gap 1.2e-9)}. */
    @Override
    public String toString() {
        return "token "
                + token
                + ": expert "
                + missing
                + " missing, "
                + (unexpected < 0 ? "none" : unexpected)
                + " instead"
                + (Double.isNaN(scoreGap) ? "" : String.format(" (score gap %.3g)", scoreGap));
    }
}
