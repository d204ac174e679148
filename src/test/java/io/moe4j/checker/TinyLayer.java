package io.moe4j.checker;

import io.moe4j.model.ExpertWeights;
import io.moe4j.model.LayerWeights;
import io.moe4j.model.MoeShape;
import io.moe4j.model.WeightMatrix;

/**
 * A layer small enough to be computed by hand: every expert is the same one-by-one network times
 * its own factor, down = factor, gate = up = 1, and the router passes hidden states on as logits.
 */
final class TinyLayer implements LayerWeights {
    private final MoeShape shape;
    private final float[] routerBias;
    private final float[] correctionBias;
    private final float[] expertBias;
    private final ExpertWeights shared;
    private final float[] sharedGate;

    private TinyLayer(
            MoeShape shape,
            float[] routerBias,
            float[] correctionBias,
            float[] expertBias,
            ExpertWeights shared,
            float[] sharedGate) {
        this.shape = shape;
        this.routerBias = routerBias;
        this.correctionBias = correctionBias;
        this.expertBias = expertBias;
        this.shared = shared;
        this.sharedGate = sharedGate;
    }

    /** E experts, K per token, H = 1. */
    static TinyLayer of(int experts, int topK) {
        return new TinyLayer(MoeShape.of(1, 1, experts, topK), null, null, null, null, null);
    }

    TinyLayer withRouterBias(float... bias) {
        return new TinyLayer(shape, bias, correctionBias, expertBias, shared, sharedGate);
    }

    TinyLayer withCorrectionBias(float... bias) {
        return new TinyLayer(shape, routerBias, bias, expertBias, shared, sharedGate);
    }

    /** Every expert gets these three: gate, up and down bias. */
    TinyLayer withExpertBias(float gate, float up, float down) {
        return new TinyLayer(
                shape,
                routerBias,
                correctionBias,
                new float[] {gate, up, down},
                shared,
                sharedGate);
    }

    /** A shared expert like the others with that factor; a gate of 0 stands for none. */
    TinyLayer withShared(float factor, float gate) {
        return new TinyLayer(
                new MoeShape(1, 1, shape.experts(), shape.topK(), 1),
                routerBias,
                correctionBias,
                expertBias,
                ExpertWeights.of(scalar(1), scalar(1), scalar(factor)),
                gate == 0 ? null : new float[] {gate});
    }

    @Override
    public MoeShape shape() {
        return shape;
    }

    @Override
    public ExpertWeights expert(int expert) {
        WeightMatrix down = scalar(expert + 1);
        return expertBias == null
                ? ExpertWeights.of(scalar(1), scalar(1), down)
                : new ExpertWeights(
                        scalar(1),
                        scalar(1),
                        down,
                        new float[] {expertBias[0]},
                        new float[] {expertBias[1]},
                        new float[] {expertBias[2]});
    }

    @Override
    public boolean hasBias() {
        return expertBias != null;
    }

    /** Logit of expert e is (e + 1) · x. */
    @Override
    public WeightMatrix router() {
        float[] values = new float[shape.experts()];
        for (int expert = 0; expert < values.length; expert++) {
            values[expert] = expert + 1;
        }
        return WeightMatrix.of(values, shape.experts(), 1);
    }

    @Override
    public float[] routerBias() {
        return routerBias;
    }

    @Override
    public float[] correctionBias() {
        return correctionBias;
    }

    @Override
    public ExpertWeights sharedExpert() {
        return shared;
    }

    @Override
    public float[] sharedExpertGate() {
        return sharedGate;
    }

    @Override
    public String description() {
        return "tiny layer";
    }

    private static WeightMatrix scalar(float value) {
        return WeightMatrix.of(new float[] {value}, 1, 1);
    }
}
