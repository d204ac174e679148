package io.moe4j.checker;

import com.fasterxml.jackson.annotation.JsonProperty;
import com.fasterxml.jackson.core.JsonProcessingException;
import com.fasterxml.jackson.databind.ObjectMapper;
import com.fasterxml.jackson.databind.SerializationFeature;
import java.util.List;
import java.util.Locale;

/**
 * The results of a check, as a table for people and as JSON for programs.
 *
 * @param subject what was checked, for example the checkpoint's folder
 * @param cases the results, in the order they ran
 */
public record CheckReport(String subject, List<CaseResult> cases) {
    private static final String ROW_FORMAT =
            "%5s  %6s  %5s  %-7s  %-9s  %9s  %9s  %9s  %9s  %5s  %9s  %s%n";

    /**
     * Copies the list.
     *
     * @param subject {@link #subject()}
     * @param cases {@link #cases()}
     */
    public CheckReport {
        cases = List.copyOf(cases);
    }

    /** {@return whether there is a case and every case passed} */
    @JsonProperty
    public boolean pass() {
        return !cases.isEmpty() && cases.stream().allMatch(CaseResult::pass);
    }

    /** {@return the cases that failed} */
    public List<CaseResult> failures() {
        return cases.stream().filter(result -> !result.pass()).toList();
    }

    /** {@return one row per case; below it what is wrong with a failed one and how to repeat it} */
    public String table() {
        StringBuilder text = new StringBuilder();
        text.append(
                row(
                        "layer",
                        "tokens",
                        "ranks",
                        "backend",
                        "reference",
                        "routing",
                        "weights",
                        "routed",
                        "full",
                        "worst",
                        "tolerance",
                        "result"));
        for (CaseResult result : cases) {
            text.append(
                    row(
                            result.layer(),
                            result.tokens(),
                            result.ranks(),
                            result.backend(),
                            result.reference(),
                            result.routingAgreeing() + "/" + result.tokens(),
                            error(result.weightError()),
                            error(result.routed().max()),
                            error(result.full().max()),
                            result.worstToken(),
                            error(result.tolerance()),
                            result.pass() ? "ok" : "MISMATCH"));
        }
        for (CaseResult result : failures()) {
            text.append(String.format("%nmismatch: %s%n", result.failure()));
            text.append(String.format("  repeat: %s%n", result.repeat()));
        }
        return text.toString();
    }

    /** {@return one line: how many cases passed and the largest error} */
    public String verdict() {
        double worst =
                cases.stream()
                        .mapToDouble(r -> Math.max(r.routed().max(), r.full().max()))
                        .max()
                        .orElse(0);
        return String.format(
                Locale.ROOT,
                "%s: %d of %d cases agree, largest relative error of a token %s",
                pass() ? "OK" : "MISMATCH",
                cases.size() - failures().size(),
                cases.size(),
                error(worst));
    }

    /** {@return the report as indented JSON; infinite errors are the string {@code "Infinity"}} */
    public String toJson() {
        try {
            return new ObjectMapper()
                    .enable(SerializationFeature.INDENT_OUTPUT)
                    .writeValueAsString(this);
        } catch (JsonProcessingException e) {
            throw new IllegalStateException("report is not serialisable", e);
        }
    }

    private static String row(Object... cells) {
        return String.format(Locale.ROOT, ROW_FORMAT, cells);
    }

    private static String error(double value) {
        return Double.isInfinite(value) ? "inf" : String.format(Locale.ROOT, "%.2e", value);
    }
}
