package io.moe4j.cpu;

import io.moe4j.model.Activation;

/** The gated activation, float32 in and out; the sigmoid is evaluated in float64. */
final class CpuSwiGlu {
    private CpuSwiGlu() {}

    /** {@code to[i] = activation(gate[i], up[i])}, formulas in {@link Activation}. */
    static void apply(
            float[] to, int toAt, float[] gate, float[] up, int count, Activation activation) {
        switch (activation.kind()) {
            case SWIGLU -> {
                for (int i = 0; i < count; i++) {
                    to[toAt + i] = gate[i] * sigmoid(gate[i]) * up[i];
                }
            }
            case CLAMPED_SWIGLU -> {
                float limit = activation.limit();
                for (int i = 0; i < count; i++) {
                    float g = Math.min(gate[i], limit);
                    float u = Math.max(-limit, Math.min(up[i], limit));
                    to[toAt + i] = (u + 1f) * (g * sigmoid(activation.alpha() * g));
                }
            }
            default -> throw new IllegalArgumentException("activation " + activation.kind());
        }
    }

    /** 1 / (1 + exp(−x)). */
    static float sigmoid(float x) {
        return (float) (1.0 / (1.0 + Math.exp(-x)));
    }
}
