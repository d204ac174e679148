package io.moe4j;

import io.moe4j.ep.Group;
import io.moe4j.model.Activation;
import io.moe4j.model.LayerWeights;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RoutingRule;
import io.moe4j.tensor.DType;
import java.time.Duration;
import java.util.Locale;

/**
 * Everything that is fixed when a layer opens. Immutable; made by {@link #builder()} (or prefilled
 * by a checkpoint), validated as a whole before anything is allocated.
 *
 * @param shape the layer's sizes
 * @param rule routing rule, used unless {@code routingInput} is TOPK
 * @param activation between the expert projections
 * @param expertBias whether the routed experts have biases
 * @param ranks R, expert-parallel ranks; virtual ranks on one device unless there is a group
 * @param maxTokensPerRank M, the most tokens one rank may bring to a step
 * @param hiddenDType type of the hidden states: F32, F16 or BF16
 * @param outDType type of the output: {@code hiddenDType} or F32
 * @param routingInput what the caller supplies
 * @param sharedExpert whether to add the shared expert's output, if the layer has one
 * @param backend {@code auto}, {@code cpu} or {@code cuda}
 * @param threads CPU backend: worker threads
 * @param handles steps that may be in flight at once; each handle has its own buffers and epochs
 * @param cudaContext CUDA: the CUcontext of an engine that the layer works in, which the engine
 *     owns and keeps until the layer is closed; 0 for the primary context of the device; the CPU
 *     backend ignores it
 * @param expectedRowsPerExpert rows one expert gets in a usual step, for the choice of kernels; 0:
 *     those of a full step that is routed evenly. Results do not depend on it
 * @param group CUDA: this rank's membership in a group of GPUs, of which the layer is one rank;
 *     null for virtual ranks on one device
 * @param device CUDA: number of the GPU; −1: that of the system property {@code moe4j.cuda.device},
 *     else with a group the rank's number modulo the number of GPUs, else 0
 * @param stepTimeout bound of every wait for a peer on the device
 * @param firstStepTimeout that bound in the first step after opening or recovering
 * @param weights where the weights come from; null for planning only
 */
public record MoeConfig(
        MoeShape shape,
        RoutingRule rule,
        Activation activation,
        boolean expertBias,
        int ranks,
        int maxTokensPerRank,
        DType hiddenDType,
        DType outDType,
        RoutingInput routingInput,
        boolean sharedExpert,
        String backend,
        int threads,
        int handles,
        long cudaContext,
        int expectedRowsPerExpert,
        Group group,
        int device,
        Duration stepTimeout,
        Duration firstStepTimeout,
        LayerWeights weights) {
    /** Most ranks in one group. */
    public static final int MAX_RANKS = 64;

    /** Bound of a wait for a peer unless another is set. */
    public static final Duration STEP_TIMEOUT = Duration.ofSeconds(2);

    /** Bound in the first step, when ranks arrive at different times, unless another is set. */
    public static final Duration FIRST_STEP_TIMEOUT = Duration.ofSeconds(20);

    private static final Duration LONGEST_TIMEOUT = Duration.ofHours(1);

    /**
     * Checks all fields together; the message names field, value and cure.
     *
     * @param shape required
     * @param rule required unless {@code routingInput} is TOPK
     * @param activation required
     * @param expertBias must be what the weights say
     * @param ranks 1 to {@link #MAX_RANKS}
     * @param maxTokensPerRank positive; times H below 2^31
     * @param hiddenDType F32, F16 or BF16
     * @param outDType {@code hiddenDType} or F32
     * @param routingInput required; HIDDEN needs router weights
     * @param sharedExpert true or false
     * @param backend {@code auto}, {@code cpu} or {@code cuda}
     * @param threads positive
     * @param handles 1 to 16
     * @param cudaContext 0 or a CUcontext
     * @param expectedRowsPerExpert 0 or more
     * @param group null, or of {@code ranks} ranks
     * @param device −1 or a number
     * @param stepTimeout 1 ms to 1 hour
     * @param firstStepTimeout from {@code stepTimeout} to 1 hour
     * @param weights of the same shape, or null for planning only
     * @throws IllegalArgumentException naming field, value and cure
     */
    public MoeConfig {
        require(shape != null, "shape is missing: set shape(...) or weights(...)");
        require(activation != null, "activation is missing: use Activation.swiGlu()");
        require(
                ranks >= 1 && ranks <= MAX_RANKS,
                "ranks=" + ranks + " is outside 1.." + MAX_RANKS + ": choose the EP group size");
        require(
                maxTokensPerRank >= 1,
                "maxTokensPerRank="
                        + maxTokensPerRank
                        + " is not positive: give the largest batch of one rank");
        require(
                (long) maxTokensPerRank * shape.hidden() <= Integer.MAX_VALUE - 64L,
                "maxTokensPerRank="
                        + maxTokensPerRank
                        + " times hidden="
                        + shape.hidden()
                        + " exceeds 2^31 elements per source rank: lower maxTokensPerRank");
        require(
                hiddenDType != null && hiddenDType.isActivation(),
                "hiddenDType=" + hiddenDType + " is not one of F32, F16, BF16");
        require(
                outDType == hiddenDType || outDType == DType.F32,
                "outDType=" + outDType + " must be hiddenDType=" + hiddenDType + " or F32");
        require(routingInput != null, "routingInput is missing: TOPK, LOGITS or HIDDEN");
        if (routingInput != RoutingInput.TOPK) {
            require(
                    rule != null,
                    "rule is missing: routingInput=" + routingInput + " needs a RoutingRule");
            rule.validate(shape);
        }
        require(
                backend.equals("auto") || backend.equals("cpu") || backend.equals("cuda"),
                "backend=" + backend + " is unknown: use auto, cpu or cuda");
        require(threads >= 1, "threads=" + threads + " is not positive");
        require(
                handles >= 1 && handles <= 16,
                "handles=" + handles + " is outside 1..16: one per step in flight");
        require(
                expectedRowsPerExpert >= 0,
                "expectedRowsPerExpert="
                        + expectedRowsPerExpert
                        + " is negative: give 0 for those of a full, evenly routed step");
        require(
                group == null || group.ranks() == ranks,
                "ranks="
                        + ranks
                        + " but the group has "
                        + (group == null ? 0 : group.ranks())
                        + ": leave ranks(...) out, group(...) sets them");
        require(device >= -1, "device=" + device + " is negative: give a number, or -1");
        require(
                stepTimeout.toNanos() >= 1_000_000 && stepTimeout.compareTo(LONGEST_TIMEOUT) <= 0,
                "stepTimeout=" + stepTimeout + " is outside 1 ms .. 1 h");
        require(
                firstStepTimeout.compareTo(stepTimeout) >= 0
                        && firstStepTimeout.compareTo(LONGEST_TIMEOUT) <= 0,
                "firstStepTimeout="
                        + firstStepTimeout
                        + " is outside stepTimeout="
                        + stepTimeout
                        + " .. 1 h");
        if (weights != null) {
            require(
                    weights.shape().equals(shape),
                    "shape=" + shape + " differs from the weights' " + weights.shape());
            require(
                    weights.hasBias() == expertBias,
                    "expertBias=" + expertBias + " but the weights say " + weights.hasBias());
            require(
                    routingInput != RoutingInput.HIDDEN || weights.router() != null,
                    "routingInput=HIDDEN needs router weights, which "
                            + weights.description()
                            + " lacks: use LOGITS or TOPK");
        }
    }

    /**
     * {@return a builder with the defaults: one rank, BF16 in, F32 out, TOPK input, backend auto}
     */
    public static Builder builder() {
        return new Builder();
    }

    /** {@return a builder that starts from this configuration} */
    public Builder toBuilder() {
        Builder builder = new Builder();
        builder.shape = shape;
        builder.rule = rule;
        builder.activation = activation;
        builder.expertBias = expertBias;
        builder.ranks = ranks;
        builder.maxTokensPerRank = maxTokensPerRank;
        builder.hiddenDType = hiddenDType;
        builder.outDType = outDType;
        builder.routingInput = routingInput;
        builder.sharedExpert = sharedExpert;
        builder.backend = backend;
        builder.threads = threads;
        builder.handles = handles;
        builder.cudaContext = cudaContext;
        builder.expectedRowsPerExpert = expectedRowsPerExpert;
        builder.group = group;
        builder.device = device;
        builder.stepTimeout = stepTimeout;
        builder.firstStepTimeout = firstStepTimeout;
        builder.weights = weights;
        return builder;
    }

    /**
     * {@return L, the experts one rank holds at most: ceil(E / R)} The last ranks may hold fewer.
     */
    public int expertsPerRank() {
        return (shape.experts() + ranks - 1) / ranks;
    }

    /**
     * {@return the rank that holds an expert: e / L}
     *
     * @param expert 0 to E − 1
     */
    public int rankOf(int expert) {
        return expert / expertsPerRank();
    }

    /**
     * {@return the number of experts that {@code rank} holds}
     *
     * @param rank 0 to R − 1
     */
    public int expertsOn(int rank) {
        int first = Math.min(shape.experts(), rank * expertsPerRank());
        return Math.min(shape.experts(), first + expertsPerRank()) - first;
    }

    /** {@return the ranks that live in the layer: one of a group, else all} */
    public int localRanks() {
        return group == null ? ranks : 1;
    }

    /** {@return the number of the layer's first rank: that of the group's member, else 0} */
    public int firstLocalRank() {
        return group == null ? 0 : group.rank();
    }

    /** {@return the experts whose weights the layer holds} */
    public int localExperts() {
        return group == null ? shape.experts() : expertsOn(group.rank());
    }

    /** {@return whether a step computes the shared expert} */
    public boolean usesSharedExpert() {
        return sharedExpert && shape.sharedIntermediate() > 0;
    }

    private static void require(boolean condition, String message) {
        if (!condition) {
            throw new IllegalArgumentException(message);
        }
    }

    /** Collects the fields; {@link #build()} validates them. Not thread-safe. */
    public static final class Builder {
        private MoeShape shape;
        private RoutingRule rule;
        private Activation activation = Activation.swiGlu();
        private boolean expertBias;
        private int ranks = 1;
        private int maxTokensPerRank = 128;
        private DType hiddenDType = DType.BF16;
        private DType outDType;
        private RoutingInput routingInput = RoutingInput.TOPK;
        private boolean sharedExpert = true;
        private String backend = "auto";
        private int threads = Runtime.getRuntime().availableProcessors();
        private int handles = 1;
        private long cudaContext;
        private int expectedRowsPerExpert;
        private Group group;
        private int device = -1;
        private Duration stepTimeout = STEP_TIMEOUT;
        private Duration firstStepTimeout;
        private LayerWeights weights;

        private Builder() {}

        /**
         * The layer's sizes.
         *
         * @param value H, I, E, K and the shared expert's width
         * @return this builder
         */
        public Builder shape(MoeShape value) {
            shape = value;
            return this;
        }

        /**
         * Takes shape and biases from the weights as well.
         *
         * @param value read by {@link MoeLayer#prepare}, and open until then; null for planning
         * @return this builder
         */
        public Builder weights(LayerWeights value) {
            weights = value;
            if (value != null) {
                shape = value.shape();
                expertBias = value.hasBias();
            }
            return this;
        }

        /**
         * The routing rule; needed unless the caller gives ids and weights.
         *
         * @param value how logits become ids and weights
         * @return this builder
         */
        public Builder rule(RoutingRule value) {
            rule = value;
            return this;
        }

        /**
         * The activation; SwiGLU if not set.
         *
         * @param value what stands between the projections
         * @return this builder
         */
        public Builder activation(Activation value) {
            activation = value;
            return this;
        }

        /**
         * For planning without weights: whether the routed experts have biases.
         *
         * @param value true if they have
         * @return this builder
         */
        public Builder expertBias(boolean value) {
            expertBias = value;
            return this;
        }

        /**
         * R; 1 if not set.
         *
         * @param value R, 1 to {@link #MAX_RANKS}
         * @return this builder
         */
        public Builder ranks(int value) {
            ranks = value;
            return this;
        }

        /**
         * M; 128 if not set.
         *
         * @param value M, the most tokens of one rank in a step
         * @return this builder
         */
        public Builder maxTokensPerRank(int value) {
            maxTokensPerRank = value;
            return this;
        }

        /**
         * Type of the hidden states; BF16 if not set.
         *
         * @param value F32, F16 or BF16
         * @return this builder
         */
        public Builder hiddenDType(DType value) {
            hiddenDType = value;
            return this;
        }

        /**
         * Type of the output; F32 if not set.
         *
         * @param value the type of the hidden states, or F32
         * @return this builder
         */
        public Builder outDType(DType value) {
            outDType = value;
            return this;
        }

        /**
         * What the caller supplies; TOPK if not set.
         *
         * @param value TOPK, LOGITS or HIDDEN
         * @return this builder
         */
        public Builder routingInput(RoutingInput value) {
            routingInput = value;
            return this;
        }

        /**
         * Whether to add the shared expert's output; true if not set.
         *
         * @param value false leaves it to the caller
         * @return this builder
         */
        public Builder sharedExpert(boolean value) {
            sharedExpert = value;
            return this;
        }

        /**
         * {@code auto} (a usable GPU, else the CPU), {@code cpu} or {@code cuda}.
         *
         * @param value name of the backend
         * @return this builder
         */
        public Builder backend(String value) {
            backend = value == null ? "auto" : value.toLowerCase(Locale.ROOT);
            return this;
        }

        /**
         * CPU backend: worker threads; all processors if not set.
         *
         * @param value number of threads, positive
         * @return this builder
         */
        public Builder threads(int value) {
            threads = value;
            return this;
        }

        /**
         * Steps that may be in flight at once; 1 if not set.
         *
         * @param value 1 to 16
         * @return this builder
         */
        public Builder handles(int value) {
            handles = value;
            return this;
        }

        /**
         * CUDA: the CUcontext of an engine whose streams and memory the layer is to use. The
         * primary context of the device if not set, which is also what the CUDA runtime uses.
         *
         * @param value a CUcontext that outlives the layer; 0 for the primary context
         * @return this builder
         */
        public Builder cudaContext(long value) {
            cudaContext = value;
            return this;
        }

        /**
         * Rows one expert gets in a usual step. If not set, those of a full step that is routed
         * evenly: R · M · K / E. Set it where a usual step is far from that, for example if M is
         * that of a prefill but most steps decode. Kernels are chosen by it; results do not depend
         * on it.
         *
         * @param value rows; 0 for those of a full, evenly routed step
         * @return this builder
         */
        public Builder expectedRowsPerExpert(int value) {
            expectedRowsPerExpert = value;
            return this;
        }

        /**
         * CUDA: makes the layer one rank of a group of GPUs, and sets {@code ranks}. It holds the
         * experts of that rank; {@link MoeLayer#prepare} and {@link MoeLayer#recover} meet the
         * other ranks.
         *
         * @param value this rank's membership, which the caller closes after the layer; null for
         *     virtual ranks on one device
         * @return this builder
         */
        public Builder group(Group value) {
            group = value;
            if (value != null) {
                ranks = value.ranks();
            }
            return this;
        }

        /**
         * CUDA: the GPU to use. If not set, that of the system property {@code moe4j.cuda.device};
         * else with a group the rank's number modulo the number of GPUs; else 0.
         *
         * @param value number of the device, or −1
         * @return this builder
         */
        public Builder device(int value) {
            device = value;
            return this;
        }

        /**
         * Bound of every wait for a peer on the device; {@link MoeConfig#STEP_TIMEOUT} if not set.
         * It has to be longer than ranks may be apart in a step.
         *
         * @param value 1 ms to 1 hour
         * @return this builder
         */
        public Builder stepTimeout(Duration value) {
            stepTimeout = value;
            return this;
        }

        /**
         * That bound in the first step of a handle after opening or recovering; {@link
         * MoeConfig#FIRST_STEP_TIMEOUT} if not set, or {@code stepTimeout} if that is longer.
         *
         * @param value from {@code stepTimeout} to 1 hour
         * @return this builder
         */
        public Builder firstStepTimeout(Duration value) {
            firstStepTimeout = value;
            return this;
        }

        private Duration firstTimeout() {
            if (firstStepTimeout != null) {
                return firstStepTimeout;
            }
            return stepTimeout.compareTo(FIRST_STEP_TIMEOUT) > 0 ? stepTimeout : FIRST_STEP_TIMEOUT;
        }

        /**
         * Validates and returns the configuration.
         *
         * @return the configuration
         * @throws IllegalArgumentException naming field, value and cure
         */
        public MoeConfig build() {
            return new MoeConfig(
                    shape,
                    rule,
                    activation,
                    expertBias,
                    ranks,
                    maxTokensPerRank,
                    hiddenDType,
                    outDType == null ? DType.F32 : outDType,
                    routingInput,
                    sharedExpert,
                    backend,
                    threads,
                    handles,
                    cudaContext,
                    expectedRowsPerExpert,
                    group,
                    device,
                    stepTimeout,
                    firstTimeout(),
                    weights);
        }
    }
}
