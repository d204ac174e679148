package io.moe4j.checker;

import com.fasterxml.jackson.annotation.JsonProperty;
import java.util.List;

/**
 * How one case went on one backend.
 *
 * @param layer number of the layer
 * @param tokens T
 * @param ranks R
 * @param backend name of the backend
 * @param reference what was compared with: {@code golden} or {@code oracle}
 * @param routingAgreeing tokens whose set of experts equals the reference's
 * @param routingMismatches the other tokens
 * @param weightError worst token's relative L2 of the routing weights, over agreeing tokens
 * @param routed worst token's error of the routed experts' output
 * @param full worst token's error of the layer's output
 * @param tolerance what the three errors may be
 * @param paddingUntouched whether rows past the tokens were left alone
 * @param equalToVirtual of a group: whether no bit differs from virtual ranks on one GPU
 * @param repeat the command that repeats this case
 */
public record CaseResult(
        int layer,
        int tokens,
        int ranks,
        String backend,
        String reference,
        int routingAgreeing,
        List<RoutingMismatch> routingMismatches,
        double weightError,
        TokenErrors routed,
        TokenErrors full,
        double tolerance,
        boolean paddingUntouched,
        boolean equalToVirtual,
        String repeat) {
    /**
     * Copies the list.
     *
     * @param layer {@link #layer()}
     * @param tokens {@link #tokens()}
     * @param ranks {@link #ranks()}
     * @param backend {@link #backend()}
     * @param reference {@link #reference()}
     * @param routingAgreeing {@link #routingAgreeing()}
     * @param routingMismatches {@link #routingMismatches()}
     * @param weightError {@link #weightError()}
     * @param routed {@link #routed()}
     * @param full {@link #full()}
     * @param tolerance {@link #tolerance()}
     * @param paddingUntouched {@link #paddingUntouched()}
     * @param equalToVirtual {@link #equalToVirtual()}
     * @param repeat {@link #repeat()}
     */
    public CaseResult {
        routingMismatches = List.copyOf(routingMismatches);
    }

    /**
     * {@return whether routing agrees for every token, all errors are within tolerance, no row
     * leaks and no bit differs from virtual ranks}
     */
    @JsonProperty
    public boolean pass() {
        return routingAgreeing == tokens
                && weightError <= tolerance
                && routed.max() <= tolerance
                && full.max() <= tolerance
                && paddingUntouched
                && equalToVirtual;
    }

    /** {@return the token with the larger of the two output errors} */
    @JsonProperty
    public int worstToken() {
        return full.max() >= routed.max() ? full.worstToken() : routed.worstToken();
    }

    /** {@return one line that says what is wrong; empty if nothing is} */
    public String failure() {
        StringBuilder text = new StringBuilder();
        if (!routingMismatches.isEmpty()) {
            text.append("; routing of ").append(routingMismatches.get(0));
            if (routingMismatches.size() > 1) {
                text.append(" and of ").append(routingMismatches.size() - 1).append(" more");
            }
        }
        appendError(text, "routing weights", weightError, -1);
        appendError(text, "routed output", routed.max(), routed.worstToken());
        appendError(text, "full output", full.max(), full.worstToken());
        if (!paddingUntouched) {
            text.append("; rows past the token count were written");
        }
        if (!equalToVirtual) {
            text.append("; bits differ from those of virtual ranks on one GPU");
        }
        return text.isEmpty() ? "" : text.substring(2);
    }

    /** The same case, compared with virtual ranks as well. */
    CaseResult against(boolean equal) {
        return new CaseResult(
                layer,
                tokens,
                ranks,
                backend,
                reference,
                routingAgreeing,
                routingMismatches,
                weightError,
                routed,
                full,
                tolerance,
                paddingUntouched,
                equal,
                repeat);
    }

    private void appendError(StringBuilder text, String what, double error, int token) {
        if (!(error <= tolerance)) {
            text.append(String.format("; %s off by %.3g > %.3g", what, error, tolerance));
            if (token >= 0) {
                text.append(" at token ").append(token);
            }
        }
    }
}
