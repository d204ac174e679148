package io.moe4j.observe;

import io.moe4j.SoftCounters;

/** Where events go: the Flight Recorder, or nowhere in a JVM without the module jdk.jfr. */
interface Events {
    /** The one of this JVM. */
    Events HERE =
            ModuleLayer.boot().findModule("jdk.jfr").isPresent() ? JfrEvents.start() : new None();

    /** Something that takes time: begun when it is made. */
    interface Span {
        /**
         * Ends it.
         *
         * @param failure what was thrown, or null
         * @param nodes of a graph that was captured
         */
        void end(Throwable failure, long nodes);
    }

    void opened(LayerTrace layer);

    Span prepare(LayerTrace layer);

    Span capture(GraphTrace graph, int parts);

    /** Returns whether somebody listens. */
    boolean fault(LayerTrace layer, int handle, LayerFault fault);

    void counters(LayerTrace layer, SoftCounters counters);

    /** Whether somebody listens to {@link #counters}. */
    boolean wantsCounters();

    void replays(GraphTrace graph, long launches, long total);

    /** Whether somebody listens to {@link #replays}. */
    boolean wantsReplays();

    /** Nobody listens, ever. */
    final class None implements Events {
        private static final Span NO_SPAN = (failure, nodes) -> {};

        @Override
        public void opened(LayerTrace layer) {}

        @Override
        public Span prepare(LayerTrace layer) {
            return NO_SPAN;
        }

        @Override
        public Span capture(GraphTrace graph, int parts) {
            return NO_SPAN;
        }

        @Override
        public boolean fault(LayerTrace layer, int handle, LayerFault fault) {
            return false;
        }

        @Override
        public void counters(LayerTrace layer, SoftCounters counters) {}

        @Override
        public boolean wantsCounters() {
            return false;
        }

        @Override
        public void replays(GraphTrace graph, long launches, long total) {}

        @Override
        public boolean wantsReplays() {
            return false;
        }
    }
}
