package io.moe4j.cuda.nvtx;

/** Named ranges of a thread's time; they nest. Any thread. */
public interface Ranges {
    /**
     * Registers a name to push later, as often as wanted; it is never freed.
     *
     * @param text what a profiler shows
     * @return the name's number
     */
    long name(String text);

    /**
     * Begins a range on this thread.
     *
     * @param name as {@link #name} gave it
     */
    void push(long name);

    /** Ends the range begun last on this thread. */
    void pop();
}
