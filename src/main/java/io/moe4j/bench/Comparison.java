package io.moe4j.bench;

import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Locale;
import java.util.Map;

/**
 * A report against an older one, measurement by measurement.
 *
 * @param lines one per measurement that both have
 * @param slower those of them that are slower than allowed
 * @param unmatched measurements the older report lacks
 */
public record Comparison(List<String> lines, List<String> slower, int unmatched) {
    /**
     * Compares medians.
     *
     * @param now the newer report
     * @param before the older report
     * @param allowed how much slower is no failure: 0.05 for 5 %
     * @return the comparison
     */
    public static Comparison of(BenchReport now, BenchReport before, double allowed) {
        Map<String, BenchRow> old = new HashMap<>();
        before.rows().forEach(row -> old.put(row.key(), row));
        List<String> lines = new ArrayList<>();
        List<String> slower = new ArrayList<>();
        int unmatched = 0;
        for (BenchRow row : now.rows()) {
            BenchRow then = old.get(row.key());
            if (then == null) {
                unmatched++;
                continue;
            }
            String line =
                    String.format(
                            Locale.ROOT,
                            "%+6.1f %%  %.1f -> %.1f us  %s",
                            100 * (row.medianUs() / then.medianUs() - 1),
                            then.medianUs(),
                            row.medianUs(),
                            row.key());
            lines.add(line);
            if (row.medianUs() > then.medianUs() * (1 + allowed)) {
                slower.add(line);
            }
        }
        return new Comparison(lines, slower, unmatched);
    }

    /**
     * Reads {@code 5%} or {@code 0.05}.
     *
     * @param text as given on the command line
     * @return the comparison
     */
    public static double parseAllowed(String text) {
        String number = text.endsWith("%") ? text.substring(0, text.length() - 1) : text;
        try {
            double value = Double.parseDouble(number) / (text.endsWith("%") ? 100 : 1);
            if (value >= 0) {
                return value;
            }
        } catch (NumberFormatException e) {
            // falls through to the message
        }
        throw new IllegalArgumentException("--fail-slower=" + text + " is not a share such as 5%");
    }
}
