package io.moe4j.model;

/**
 * The gated activation between the two expert projections.
 *
 * <p>{@link Kind#SWIGLU}: {@code silu(gate) · up} with {@code silu(x) = x / (1 + exp(−x))}
 * (Shazeer, "GLU Variants Improve Transformer", 2020).
 *
 * <p>{@link Kind#CLAMPED_SWIGLU} (gpt-oss): {@code g = min(gate, limit)}, {@code u = clamp(up,
 * −limit, limit)}, result {@code (u + 1) · g · sigmoid(alpha · g)}.
 *
 * @param kind which formula
 * @param alpha slope inside the sigmoid, used by CLAMPED_SWIGLU only
 * @param limit clamp bound, used by CLAMPED_SWIGLU only
 */
public record Activation(Kind kind, float alpha, float limit) {
    /** The formulas a layer can use. */
    public enum Kind {
        /** silu(gate) · up. */
        SWIGLU,
        /** (clamp(up) + 1) · g · sigmoid(alpha · g), g = min(gate, limit). */
        CLAMPED_SWIGLU
    }

    /**
     * Checks that the parameters of the clamped variant are finite and positive.
     *
     * @param kind which formula
     * @param alpha slope inside the sigmoid; finite and positive for CLAMPED_SWIGLU
     * @param limit clamp bound; finite and positive for CLAMPED_SWIGLU
     * @throws IllegalArgumentException naming the parameter that is not
     */
    public Activation {
        if (kind == Kind.CLAMPED_SWIGLU
                && !(alpha > 0 && limit > 0 && Float.isFinite(alpha) && Float.isFinite(limit))) {
            throw new IllegalArgumentException(
                    "clamped SwiGLU needs finite positive alpha and limit, got alpha="
                            + alpha
                            + " limit="
                            + limit);
        }
    }

    /** {@return the plain SwiGLU} */
    public static Activation swiGlu() {
        return new Activation(Kind.SWIGLU, 1f, Float.POSITIVE_INFINITY);
    }

    /**
     * gpt-oss' clamped variant; its models use alpha 1.702 and limit 7.
     *
     * @param alpha slope inside the sigmoid, finite and positive
     * @param limit clamp bound, finite and positive
     * @return the activation
     * @throws IllegalArgumentException if one is not
     */
    public static Activation clampedSwiGlu(float alpha, float limit) {
        return new Activation(Kind.CLAMPED_SWIGLU, alpha, limit);
    }
}
