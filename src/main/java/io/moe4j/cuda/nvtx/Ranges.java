package io.moe4j.cuda.nvtx;

/** Named ranges of a thread's time; they nest. Any thread. */
public interface Ranges {
    /** A name to push later, as often as wanted; never freed. */
    long name(String text);

    /** Begins a range on this thread. */
    void push(long name);

    /** Ends the range begun last on this thread. */
    void pop();
}
