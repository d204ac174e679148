package io.moe4j.weights;

import io.moe4j.model.ExpertWeights;
import io.moe4j.model.LayerWeights;
import io.moe4j.model.MoeShape;
import io.moe4j.model.WeightMatrix;
import java.util.Objects;
import java.util.function.IntFunction;

/**
 * The weights of one layer in an engine's own memory, matrix by matrix: {@link EngineTensor}s, or
 * any {@link WeightMatrix}. Nothing is read before {@code prepare}. Immutable; safe for concurrent
 * reads if its matrices are.
 */
public final class EngineWeights implements LayerWeights {
    private final MoeShape shape;
    private final String description;
    private final IntFunction<ExpertWeights> experts;
    private final boolean bias;
    private final WeightMatrix router;
    private final float[] routerBias;
    private final float[] correctionBias;
    private final ExpertWeights sharedExpert;
    private final float[] sharedExpertGate;

    private EngineWeights(Builder from) {
        this.shape = from.shape;
        this.description = from.description;
        this.experts = from.experts;
        this.bias = expert(0).hasBias();
        this.router = from.router;
        this.routerBias = from.routerBias;
        this.correctionBias = from.correctionBias;
        this.sharedExpert = from.sharedExpert;
        this.sharedExpertGate = from.sharedExpertGate;
    }

    /**
     * Starts with the routed experts, which are all an engine needs that routes itself.
     *
     * @param shape the layer's sizes
     * @param description one line for plans and reports, for example file and layer
     * @param experts gives expert e, 0 ≤ e &lt; E; called once for each, perhaps from several
     *     threads, and once more for expert 0
     * @return a builder; nothing is read yet
     */
    public static Builder of(
            MoeShape shape, String description, IntFunction<ExpertWeights> experts) {
        return new Builder(shape, description, experts);
    }

    @Override
    public MoeShape shape() {
        return shape;
    }

    @Override
    public ExpertWeights expert(int expert) {
        Objects.checkIndex(expert, shape.experts());
        ExpertWeights weights = experts.apply(expert);
        requireSize("gate of expert " + expert, weights.gate(), intermediate(), shape.hidden());
        return weights;
    }

    private int intermediate() {
        return shape.intermediate();
    }

    @Override
    public boolean hasBias() {
        return bias;
    }

    @Override
    public WeightMatrix router() {
        return router;
    }

    @Override
    public float[] routerBias() {
        return routerBias == null ? null : routerBias.clone();
    }

    @Override
    public float[] correctionBias() {
        return correctionBias == null ? null : correctionBias.clone();
    }

    @Override
    public ExpertWeights sharedExpert() {
        return sharedExpert;
    }

    @Override
    public float[] sharedExpertGate() {
        return sharedExpertGate == null ? null : sharedExpertGate.clone();
    }

    @Override
    public String description() {
        return description;
    }

    private static void requireSize(String name, WeightMatrix matrix, int rows, int cols) {
        if (matrix.rows() != rows || matrix.cols() != cols) {
            throw new IllegalArgumentException(
                    name
                            + " is ["
                            + matrix.rows()
                            + ", "
                            + matrix.cols()
                            + "] but the layer's shape asks for ["
                            + rows
                            + ", "
                            + cols
                            + "]: rows are outputs, columns are inputs");
        }
    }

    /** Adds what not every layer has; {@link #build()} checks sizes. Not thread-safe. */
    public static final class Builder {
        private final MoeShape shape;
        private final String description;
        private final IntFunction<ExpertWeights> experts;
        private WeightMatrix router;
        private float[] routerBias;
        private float[] correctionBias;
        private ExpertWeights sharedExpert;
        private float[] sharedExpertGate;

        private Builder(MoeShape shape, String description, IntFunction<ExpertWeights> experts) {
            this.shape = Objects.requireNonNull(shape, "shape");
            this.description = Objects.requireNonNull(description, "description");
            this.experts = Objects.requireNonNull(experts, "experts");
        }

        /**
         * Router {@code [E, H]}, for layers that route from hidden states.
         *
         * @param value {@code [E, H]}
         * @return this builder
         */
        public Builder router(WeightMatrix value) {
            router = value;
            return this;
        }

        /**
         * Router bias {@code [E]}.
         *
         * @param value {@code [E]}
         * @return this builder
         */
        public Builder routerBias(float[] value) {
            routerBias = value.clone();
            return this;
        }

        /**
         * Correction bias {@code [E]} of sigmoid routing.
         *
         * @param value {@code [E]}
         * @return this builder
         */
        public Builder correctionBias(float[] value) {
            correctionBias = value.clone();
            return this;
        }

        /**
         * The shared expert, as wide as the shape's {@code sharedIntermediate}.
         *
         * @param value its matrices
         * @return this builder
         */
        public Builder sharedExpert(ExpertWeights value) {
            sharedExpert = value;
            return this;
        }

        /**
         * Gate vector {@code [H]} of the shared expert.
         *
         * @param value {@code [H]}
         * @return this builder
         */
        public Builder sharedExpertGate(float[] value) {
            sharedExpertGate = value.clone();
            return this;
        }

        /**
         * Checks everything against the shape; reads expert 0's description but no weights.
         *
         * @return the weights
         * @throws IllegalArgumentException naming what does not fit
         */
        public EngineWeights build() {
            if (router != null) {
                requireSize("router", router, shape.experts(), shape.hidden());
            }
            requireLength("routerBias", routerBias, shape.experts());
            requireLength("correctionBias", correctionBias, shape.experts());
            requireLength("sharedExpertGate", sharedExpertGate, shape.hidden());
            int shared = shape.sharedIntermediate();
            if ((shared > 0) != (sharedExpert != null)) {
                throw new IllegalArgumentException(
                        "sharedIntermediate="
                                + shared
                                + " but the shared expert is "
                                + (sharedExpert == null ? "missing" : "given")
                                + ": set both or neither");
            }
            if (sharedExpert != null) {
                requireSize(
                        "gate of the shared expert", sharedExpert.gate(), shared, shape.hidden());
            }
            return new EngineWeights(this);
        }

        private static void requireLength(String name, float[] values, int length) {
            if (values != null && values.length != length) {
                throw new IllegalArgumentException(
                        name + " has " + values.length + " elements, expected " + length);
            }
        }
    }
}
