package io.moe4j.cpu;

import io.moe4j.model.ExpertWeights;

/** One expert's packed weights. Immutable; owned by its layer. */
record CpuExpert(
        PackedMatrix gate,
        PackedMatrix up,
        PackedMatrix down,
        float[] gateBias,
        float[] upBias,
        float[] downBias) {
    /** Packs an expert; {@code scratch} holds one matrix and is overwritten. */
    static CpuExpert pack(ExpertWeights weights, float[] scratch) {
        return new CpuExpert(
                PackedMatrix.pack(weights.gate(), scratch),
                PackedMatrix.pack(weights.up(), scratch),
                PackedMatrix.pack(weights.down(), scratch),
                weights.gateBias(),
                weights.upBias(),
                weights.downBias());
    }
}
