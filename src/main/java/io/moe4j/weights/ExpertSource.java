package io.moe4j.weights;

import io.moe4j.model.ExpertWeights;

/** Gives the weights of each routed expert; safe for concurrent use. */
@FunctionalInterface
interface ExpertSource {
    /** The weights of one expert, its matrices not yet decoded. */
    ExpertWeights expert(int expert);
}
