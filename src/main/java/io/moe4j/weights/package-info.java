/**
 * Reads Mixture-of-Experts layers from model folders as published: safetensors files, an optional
 * shard index and config.json.
 *
 * <pre>
 *   Checkpoint.open(folder)
 *     ModelFolder ── config.json ─► ModelConfig ─┐
 *        │                                       ├─► ModelFamily (one entry of model-families.json)
 *        └─ shards ─► SafetensorsFile ─► names ──┘             │
 *                           ▲                                  ▼
 *                           └──── mapped reads ──── CheckpointLayer (a LayerWeights)
 * </pre>
 *
 * <p>Everything a folder says is untrusted: sizes are checked before anything is allocated, no file
 * outside the folder is opened, and whatever does not fit is a {@link
 * io.moe4j.weights.CheckpointException} that names the file, the tensor or field, and the cure. A
 * new model whose tensors are arranged like a known one is an entry in {@code model-families.json},
 * not code.
 */
package io.moe4j.weights;
