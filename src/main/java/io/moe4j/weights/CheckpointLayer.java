package io.moe4j.weights;

import io.moe4j.MoeConfig;
import io.moe4j.RoutingInput;
import io.moe4j.model.Activation;
import io.moe4j.model.ExpertWeights;
import io.moe4j.model.LayerWeights;
import io.moe4j.model.MoeShape;
import io.moe4j.model.RoutingRule;
import io.moe4j.model.WeightMatrix;
import io.moe4j.tensor.DType;
import io.moe4j.weights.ModelFamily.ExpertNames;

/**
 * One Mixture-of-Experts layer of a {@link Checkpoint}. Names, shapes and types of all its tensors
 * were checked when it was opened; matrices are decoded from the mapped files when they are read.
 * Safe for concurrent reads; readable until the checkpoint closes.
 */
public final class CheckpointLayer implements LayerWeights {
    private final String description;
    private final int index;
    private final MoeShape shape;
    private final RoutingRule rule;
    private final Activation activation;
    private final ExpertSource experts;
    private final boolean bias;
    private final WeightMatrix router;
    private final StoredTensor routerBias;
    private final StoredTensor correctionBias;
    private final ExpertWeights sharedExpert;
    private final StoredTensor sharedExpertGate;

    CheckpointLayer(
            String description,
            int index,
            ModelFamily family,
            MoeShape shape,
            RoutingRule rule,
            Activation activation,
            LayerTensors tensors) {
        this.description = description;
        this.index = index;
        this.shape = shape;
        this.rule = rule;
        this.activation = activation;
        this.router = tensors.matrix(family.router(), shape.experts(), shape.hidden());
        this.routerBias = tensors.floats(family.routerBias(), shape.experts());
        this.correctionBias = openCorrectionBias(family, tensors);
        ExpertNames names = arrangement(family, tensors);
        this.experts = names.arrangement().open(tensors, names, shape);
        this.bias = names.gateBias() != null;
        boolean shared = shape.sharedIntermediate() > 0;
        this.sharedExpert = shared ? openShared(family.shared(), tensors) : null;
        this.sharedExpertGate =
                shared ? tensors.floats(family.shared().scalarGate(), 1, shape.hidden()) : null;
        tensors.requireAllUsed(family.name(), shape);
    }

    /** {@return the layer's number in the checkpoint} */
    public int index() {
        return index;
    }

    /** {@return the model's routing rule} */
    public RoutingRule rule() {
        return rule;
    }

    /** {@return the model's activation} */
    public Activation activation() {
        return activation;
    }

    /**
     * {@return a configuration builder with this layer's weights, rule and activation, routing from
     * hidden states, and F32 output}
     */
    public MoeConfig.Builder config() {
        return MoeConfig.builder()
                .weights(this)
                .rule(rule)
                .activation(activation)
                .routingInput(RoutingInput.HIDDEN)
                .outDType(DType.F32);
    }

    @Override
    public MoeShape shape() {
        return shape;
    }

    @Override
    public ExpertWeights expert(int expert) {
        if (expert < 0 || expert >= shape.experts()) {
            throw new IndexOutOfBoundsException(
                    "expert=" + expert + " is outside 0.." + (shape.experts() - 1));
        }
        return experts.expert(expert);
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
        return routerBias == null ? null : routerBias.floats(0, shape.experts());
    }

    @Override
    public float[] correctionBias() {
        return correctionBias == null ? null : correctionBias.floats(0, shape.experts());
    }

    @Override
    public ExpertWeights sharedExpert() {
        return sharedExpert;
    }

    @Override
    public float[] sharedExpertGate() {
        return sharedExpertGate == null ? null : sharedExpertGate.floats(0, shape.hidden());
    }

    @Override
    public String description() {
        return description;
    }

    private StoredTensor openCorrectionBias(ModelFamily family, LayerTensors tensors) {
        String name = family.correctionBias();
        return name != null && tensors.has(name) ? tensors.floats(name, shape.experts()) : null;
    }

    private static ExpertNames arrangement(ModelFamily family, LayerTensors tensors) {
        // why: with none there, the first one's error names the tensor that is missing
        return family.experts().stream()
                .filter(names -> names.arrangement().isIn(tensors, names))
                .findFirst()
                .orElse(family.experts().get(0));
    }

    private ExpertWeights openShared(ModelFamily.SharedExpert shared, LayerTensors tensors) {
        int width = shape.sharedIntermediate();
        return ExpertWeights.of(
                tensors.matrix(shared.gate(), width, shape.hidden()),
                tensors.matrix(shared.up(), width, shape.hidden()),
                tensors.matrix(shared.down(), shape.hidden(), width));
    }
}
