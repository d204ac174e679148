package io.moe4j;

import java.util.ArrayList;
import java.util.List;
import java.util.Locale;
import java.util.OptionalInt;
import java.util.function.IntFunction;

/**
 * Every buffer a layer will allocate, with its formula and its size in bytes, known before anything
 * is allocated. Printable by {@link #toString()}. Immutable.
 *
 * @param title what the plan is for
 * @param entries the buffers, summed over the local ranks
 */
public record MemoryPlan(String title, List<Entry> entries) {
    /**
     * One buffer.
     *
     * @param name as in docs/memory.md
     * @param formula the size as a formula over R, M, H, I, E, L, K
     * @param bytes the size for this configuration
     */
    public record Entry(String name, String formula, long bytes) {
        /**
         * Refuses a negative size.
         *
         * @param name as in docs/memory.md
         * @param formula the size as a formula
         * @param bytes the size, not negative
         * @throws IllegalArgumentException if the size is negative
         */
        public Entry {
            if (bytes < 0) {
                throw new IllegalArgumentException(name + " has " + bytes + " bytes");
            }
        }
    }

    /**
     * Copies the list.
     *
     * @param title {@link #title()}
     * @param entries {@link #entries()}
     */
    public MemoryPlan {
        entries = List.copyOf(entries);
    }

    /** {@return the sum over all buffers, in bytes} */
    public long totalBytes() {
        long total = 0;
        for (Entry entry : entries) {
            total = Math.addExact(total, entry.bytes());
        }
        return total;
    }

    /**
     * {@return the bytes of the buffer of that name, 0 if the plan has none}
     *
     * @param name name of a buffer
     */
    public long bytes(String name) {
        return entries.stream().filter(e -> e.name().equals(name)).mapToLong(Entry::bytes).sum();
    }

    /**
     * {@return the largest M whose plan fits {@code budgetBytes}; empty if not even one token fits}
     * Plans grow with M, so this searches by halving.
     *
     * @param planOf the plan for a given M; may throw IllegalArgumentException for an M too large
     * @param budgetBytes the most bytes a plan may have
     */
    public static OptionalInt largestMaxTokensPerRank(
            IntFunction<MemoryPlan> planOf, long budgetBytes) {
        int low = 0;
        int high = 1 << 26;
        while (low < high) {
            int middle = low + (high - low + 1) / 2;
            if (fits(planOf, middle, budgetBytes)) {
                low = middle;
            } else {
                high = middle - 1;
            }
        }
        return low == 0 ? OptionalInt.empty() : OptionalInt.of(low);
    }

    private static boolean fits(IntFunction<MemoryPlan> planOf, int maxTokens, long budgetBytes) {
        try {
            return planOf.apply(maxTokens).totalBytes() <= budgetBytes;
        } catch (IllegalArgumentException | ArithmeticException tooLarge) {
            return false;
        }
    }

    /**
     * {@return bytes as people read them, for example {@code 28.0 MiB}}
     *
     * @param bytes a size
     */
    public static String human(long bytes) {
        if (bytes < 1024) {
            return bytes + " B";
        }
        String[] units = {"KiB", "MiB", "GiB", "TiB", "PiB"};
        double value = bytes;
        int unit = -1;
        while (value >= 1024 && unit < units.length - 1) {
            value /= 1024;
            unit++;
        }
        return String.format(Locale.ROOT, "%.1f %s", value, units[unit]);
    }

    /** A table: name, bytes, formula; the total last. */
    @Override
    public String toString() {
        List<String[]> rows = new ArrayList<>();
        for (Entry entry : entries) {
            rows.add(new String[] {entry.name(), human(entry.bytes()), entry.formula()});
        }
        rows.add(new String[] {"total", human(totalBytes()), totalBytes() + " bytes"});
        int name = rows.stream().mapToInt(r -> r[0].length()).max().orElse(0);
        int size = rows.stream().mapToInt(r -> r[1].length()).max().orElse(0);
        StringBuilder text = new StringBuilder(title).append(System.lineSeparator());
        for (String[] row : rows) {
            text.append(
                    String.format(
                            "  %-" + name + "s  %" + size + "s  %s%n", row[0], row[1], row[2]));
        }
        return text.toString();
    }

    /** Collects entries in order. Not thread-safe. */
    public static final class Builder {
        private final String title;
        private final List<Entry> entries = new ArrayList<>();

        /**
         * A plan with that title.
         *
         * @param title what the plan is for
         */
        public Builder(String title) {
            this.title = title;
        }

        /**
         * Adds a buffer whose size is the exact product of {@code factors}.
         *
         * @param name name of the buffer
         * @param formula the size as a formula
         * @param factors whose product is the size in bytes
         * @return this builder
         * @throws ArithmeticException if the product exceeds 2^63 − 1
         */
        public Builder add(String name, String formula, long... factors) {
            long bytes = 1;
            for (long factor : factors) {
                bytes = Math.multiplyExact(bytes, factor);
            }
            entries.add(new Entry(name, formula, bytes));
            return this;
        }

        /** {@return the plan} */
        public MemoryPlan build() {
            return new MemoryPlan(title, entries);
        }
    }
}
