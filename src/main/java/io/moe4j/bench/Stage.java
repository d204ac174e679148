package io.moe4j.bench;

/** What a row of a report timed. */
public enum Stage {
    /** The gate/up product, with the activation in its epilogue. */
    G1("g1"),
    /** The down product. */
    G2("g2"),
    /** Gate/up, activation, down. */
    CHAIN("ch"),
    /** The whole step, router to combine. */
    STEP("step"),
    /** Dispatch and combine, without experts between them. */
    PAIR("pair"),
    /** Two whole steps of half the tokens, one after the other. */
    TWO_STEPS("two_steps"),
    /** Two whole steps of half the tokens, one's experts while the other's rows travel. */
    OVERLAP("overlap"),
    /** One dense 8192³ product by cuBLAS, which prefill is compared with. */
    DENSE("dense"),
    /** From opening a layer to its first output on the host, in a fresh process. */
    COLD_START("cold_start"),
    /** Host time of enqueueing a whole step. */
    HOST_ENQUEUE("enqueue"),
    /** Host time of launching a graph of a whole step. */
    HOST_GRAPH("graph_launch");

    private final String id;

    Stage(String id) {
        this.id = id;
    }

    /** {@return the name in reports and case files} */
    public String id() {
        return id;
    }
}
