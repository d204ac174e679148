package io.moe4j.jlama;

import com.github.tjake.jlama.model.functions.FeedForward;
import com.github.tjake.jlama.tensor.AbstractTensor;
import com.github.tjake.jlama.tensor.TensorShape;
import io.moe4j.MoeConfig;
import io.moe4j.checker.Float64Oracle;
import io.moe4j.checker.ReferenceCase;
import io.moe4j.weights.Checkpoint;
import java.util.List;
import java.util.Optional;
import java.util.function.Consumer;

/**
 * The corrected reference: Mixtral's block by the textbook formula in float64, with weights that
 * moe4j's own reader took from the files. Shares with the block under test neither a backend nor a
 * path of the weights.
 */
final class ReferenceBlock implements FeedForward {
    private final MoeMixtralModel model;
    private final Float64Oracle oracle;
    private final int layer;

    ReferenceBlock(MoeMixtralModel model, Checkpoint checkpoint, int layer) {
        this.model = model;
        MoeConfig config = checkpoint.layer(layer).config().build();
        this.oracle = Float64Oracle.of(config);
        this.layer = layer;
    }

    /** The output for rows of hidden states. */
    ReferenceCase expect(float[] hidden, int tokens) {
        return oracle.expect(layer, hidden, tokens);
    }

    @Override
    public AbstractTensor forward(
            AbstractTensor x, Optional<Consumer<List<AbstractTensor>>> tensorReducer) {
        int tokens = x.shape().first();
        double[] full = expect(floats(x), tokens).full();
        AbstractTensor y = model.makeDenseTensor(TensorShape.of(tokens, x.shape().last()));
        for (int i = 0; i < full.length; i++) {
            y.set((float) full[i], i / x.shape().last(), i % x.shape().last());
        }
        return y;
    }

    /** All values of a tensor of Jlama's. */
    static float[] floats(AbstractTensor tensor) {
        int width = tensor.shape().last();
        float[] values = new float[tensor.shape().first() * width];
        for (int i = 0; i < values.length; i++) {
            values[i] = tensor.get(i / width, i % width);
        }
        return values;
    }
}
