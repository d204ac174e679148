/**
 * Mixtral models in Jlama with their experts on moe4j. {@link io.moe4j.jlama.MoeMixtralModel} is
 * the model to load; {@link io.moe4j.jlama.MoeFeedForward} is the block it puts where Jlama's own
 * was. Needs {@code --add-modules jdk.incubator.vector}, as Jlama does.
 */
package io.moe4j.jlama;
