package io.moe4j.checker;

import java.util.Locale;

/**
 * Where a layer first differs from its twin on the CPU. A field that has no meaning for the stage
 * is −1 (or NaN for the errors).
 *
 * @param stage the stage
 * @param rank the rank that holds the experts concerned; for routing and output the token's own
 * @param sourceRank the rank the token belongs to
 * @param token the token, counted within its rank
 * @param k which of the token's K choices
 * @param expert global number of the expert
 * @param packedRow row of the expert buffers
 * @param element column of the row with the largest difference
 * @param seen value of the layer under test
 * @param expected value of the twin
 * @param error relative L2 distance of the row; NaN where values must be equal
 * @param tolerance what the error may be
 */
public record StageDifference(
        Stage stage,
        int rank,
        int sourceRank,
        int token,
        int k,
        int expert,
        int packedRow,
        int element,
        double seen,
        double expected,
        double error,
        double tolerance) {
    /** A difference between whole numbers on a rank; {@link #at} and others say where. */
    static StageDifference of(Stage stage, int rank, double seen, double expected) {
        return new StageDifference(
                stage, rank, -1, -1, -1, -1, -1, -1, seen, expected, Double.NaN, 0);
    }

    StageDifference at(int homeRank, int homeToken) {
        return new StageDifference(
                stage, rank, homeRank, homeToken, k, expert, packedRow, element, seen, expected,
                error, tolerance);
    }

    StageDifference choice(int index, int globalExpert) {
        return new StageDifference(
                stage,
                rank,
                sourceRank,
                token,
                index,
                globalExpert,
                packedRow,
                element,
                seen,
                expected,
                error,
                tolerance);
    }

    StageDifference row(int row, int globalExpert) {
        return new StageDifference(
                stage,
                rank,
                sourceRank,
                token,
                k,
                globalExpert,
                row,
                element,
                seen,
                expected,
                error,
                tolerance);
    }

    StageDifference column(int column, double rowError, double allowed) {
        return new StageDifference(
                stage,
                rank,
                sourceRank,
                token,
                k,
                expert,
                packedRow,
                column,
                seen,
                expected,
                rowError,
                allowed);
    }

    /** One line: stage, place, value seen and value expected. */
    @Override
    public String toString() {
        StringBuilder text = new StringBuilder();
        text.append(stage.title())
                .append(" (")
                .append(stage.phase())
                .append(") on rank ")
                .append(rank);
        if (token >= 0) {
            text.append(", token ").append(token).append(" of rank ").append(sourceRank);
        } else if (sourceRank >= 0) {
            text.append(", source rank ").append(sourceRank);
        }
        append(text, "k", k);
        append(text, "expert", expert);
        append(text, "packed row", packedRow);
        append(text, "element", element);
        text.append(": seen ").append(value(seen)).append(", expected ").append(value(expected));
        if (!Double.isNaN(error)) {
            text.append(
                    String.format(Locale.ROOT, "; error of the row %.3g > %.3g", error, tolerance));
        }
        return text.toString();
    }

    private static void append(StringBuilder text, String name, int number) {
        if (number >= 0) {
            text.append(", ").append(name).append(' ').append(number);
        }
    }

    private String value(double value) {
        return Double.isNaN(error) && stage != Stage.PADDING
                ? Long.toString((long) value)
                : Float.toString((float) value);
    }
}
