package io.moe4j.engines;

import java.nio.ByteBuffer;

/**
 * What an inference engine does with CUDA itself, in a binding of its own: one context that it
 * created, one stream in it, memory and graphs. Knows nothing of moe4j. The context is current on
 * the thread that made this.
 */
public interface EngineCuda extends AutoCloseable {
    /** The CUcontext, not the primary one. */
    long context();

    /** The CUstream, which does not wait for the legacy default stream. */
    long stream();

    /** The context current on this thread; 0 if none. */
    long current();

    /** Makes a context, or none, current on this thread. */
    void makeCurrent(long context);

    /** Device memory. */
    long allocate(long bytes);

    /** Frees device memory. */
    void free(long address);

    /** Copies a direct buffer to the device in stream order and waits. */
    void write(long to, ByteBuffer from);

    /** Copies to a direct buffer from the device in stream order and waits. */
    void read(ByteBuffer to, long from);

    /** Begins a capture on the stream. */
    void beginCapture();

    /** Ends it and gives an executable graph; throws if the capture was broken. */
    long endCapture();

    /** Launches a graph on the stream. */
    void launch(long graph);

    /** Destroys a graph. */
    void destroyGraph(long graph);

    /** Waits for the stream. */
    void synchronize();

    /** Frees stream, context and what memory is left. */
    @Override
    void close();
}
