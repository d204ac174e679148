package io.moe4j.jlama;

import com.github.tjake.jlama.math.ActivationFunction;
import com.github.tjake.jlama.model.CausalSelfAttention;
import com.github.tjake.jlama.model.RMSNorm;
import com.github.tjake.jlama.model.TransformerBlock;
import com.github.tjake.jlama.model.functions.FeedForward;
import com.github.tjake.jlama.model.llama.LlamaTokenizer;
import com.github.tjake.jlama.model.mixtral.MixtralConfig;
import com.github.tjake.jlama.model.mixtral.MixtralModel;
import com.github.tjake.jlama.safetensors.DType;
import com.github.tjake.jlama.safetensors.SafeTensorSupport;
import com.github.tjake.jlama.safetensors.TensorInfo;
import com.github.tjake.jlama.safetensors.WeightLoader;
import com.github.tjake.jlama.safetensors.tokenizer.Tokenizer;
import com.github.tjake.jlama.tensor.AbstractTensor;
import com.github.tjake.jlama.util.JsonSupport;
import io.moe4j.MoeConfig;
import io.moe4j.RoutingInput;
import io.moe4j.model.RoutingRule;
import java.io.IOException;
import java.io.UncheckedIOException;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.Optional;
import java.util.function.UnaryOperator;

/**
 * Jlama's Mixtral with the expert layers on moe4j. Attention, norms, tokenizer, cache and sampling
 * stay Jlama's. Owns the layers: close it.
 */
public final class MoeMixtralModel extends MixtralModel {
    /** Makes the block of one layer; a test or a profiler may wrap or replace it. */
    @FunctionalInterface
    public interface Blocks {
        /**
         * @param model the model under construction, for {@code makeDenseTensor}
         * @param layer the layer's number
         * @param config routing and weights of this layer, backend auto, 256 tokens at most
         */
        FeedForward open(MoeMixtralModel model, int layer, MoeConfig.Builder config);
    }

    /** No initialiser: {@link #loadTransformerBlockWeights} fills it while super is constructed. */
    private List<FeedForward> blocks;

    private MoeMixtralModel(
            MixtralConfig config,
            Loader weights,
            Tokenizer tokenizer,
            DType workingMemory,
            DType workingQuantization) {
        super(config, weights, tokenizer, workingMemory, workingQuantization, Optional.empty());
    }

    // docs: begin jlama-load
    /**
     * Loads a model folder as Jlama's {@code ModelSupport.loadModel} does.
     *
     * @param folder with config.json, tokenizer.json and safetensors files
     * @param options may change backend, threads or maxTokensPerRank
     */
    public static MoeMixtralModel load(Path folder, UnaryOperator<MoeConfig.Builder> options) {
        return load(
                folder,
                DType.F32,
                DType.I8,
                (model, layer, config) ->
                        new MoeFeedForward(options.apply(config).build(), model::makeDenseTensor));
    }

    // docs: end jlama-load

    /**
     * Loads a model folder with blocks of the caller's making.
     *
     * @param workingMemory Jlama's type of activations
     * @param workingQuantization Jlama's type of activations that multiply weights
     */
    public static MoeMixtralModel load(
            Path folder, DType workingMemory, DType workingQuantization, Blocks blocks) {
        try {
            MixtralConfig config =
                    JsonSupport.om.readValue(
                            folder.resolve("config.json").toFile(), MixtralConfig.class);
            if (config.activationFunction != ActivationFunction.Type.SILU) {
                throw new IllegalArgumentException(
                        "hidden_act="
                                + config.activationFunction
                                + " is not silu: this is not a Mixtral model");
            }
            return new MoeMixtralModel(
                    config,
                    new Loader(SafeTensorSupport.loadWeights(folder.toFile()), blocks),
                    new LlamaTokenizer(folder),
                    workingMemory,
                    workingQuantization);
        } catch (IOException e) {
            throw new UncheckedIOException(folder + ": config.json cannot be read", e);
        }
    }

    @Override
    protected TransformerBlock[] loadTransformerBlockWeights() {
        blocks = new ArrayList<>();
        MixtralConfig config = (MixtralConfig) c;
        if (c.dctx().hasModelShard()) {
            throw new UnsupportedOperationException(
                    "the model is split over Jlama workers: load it whole");
        }
        TransformerBlock[] all = new TransformerBlock[config.numberOfLayers];
        try {
            for (int layer = 0; layer < all.length; layer++) {
                all[layer] = block(config, layer);
            }
        } catch (RuntimeException | Error e) {
            closeBlocks();
            throw e;
        }
        return all;
    }

    private TransformerBlock block(MixtralConfig config, int layer) {
        String base = "model.layers." + layer + ".";
        CausalSelfAttention attention =
                new CausalSelfAttention(
                        this,
                        layer,
                        weights.load(base + "self_attn.q_proj.weight"),
                        weights.load(base + "self_attn.k_proj.weight"),
                        weights.load(base + "self_attn.v_proj.weight"),
                        weights.load(base + "self_attn.o_proj.weight"));
        FeedForward experts =
                ((Loader) weights)
                        .blocks.open(
                                this,
                                layer,
                                MoeConfig.builder()
                                        .weights(JlamaWeights.of(weights, config, layer))
                                        .rule(RoutingRule.softmaxTopK(true))
                                        .routingInput(RoutingInput.HIDDEN)
                                        .hiddenDType(io.moe4j.tensor.DType.F32)
                                        .maxTokensPerRank(256));
        blocks.add(experts);
        return new TransformerBlock(
                this,
                layer,
                new RMSNorm(this, weights.load(base + "input_layernorm.weight")),
                attention,
                new RMSNorm(this, weights.load(base + "post_attention_layernorm.weight")),
                experts);
    }

    /** The block of each layer. */
    public List<FeedForward> blocks() {
        return List.copyOf(blocks);
    }

    /** Closes the layers and Jlama's cache. */
    @Override
    public void close() {
        super.close();
        closeBlocks();
    }

    private void closeBlocks() {
        for (FeedForward block : blocks) {
            if (block instanceof MoeFeedForward moe) {
                moe.close();
            }
        }
    }

    /**
     * Jlama's weights, and what makes the blocks. why: Jlama loads the layers in the constructor of
     * the super class, where the weights are the only thing this class can have passed.
     */
    private record Loader(WeightLoader files, Blocks blocks) implements WeightLoader {
        @Override
        public Map<String, String> metadata() {
            return files.metadata();
        }

        @Override
        public Map<String, TensorInfo> tensorInfoMap() {
            return files.tensorInfoMap();
        }

        @Override
        public AbstractTensor load(
                String name,
                com.github.tjake.jlama.model.DistributedContext dctx,
                boolean sparseRows,
                boolean sparseColumns) {
            return files.load(name, dctx, sparseRows, sparseColumns);
        }

        @Override
        public DType getModelDType() {
            return files.getModelDType();
        }

        @Override
        public void close() throws Exception {
            files.close();
        }
    }
}
