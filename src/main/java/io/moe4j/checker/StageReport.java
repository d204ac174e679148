package io.moe4j.checker;

import com.fasterxml.jackson.annotation.JsonProperty;
import java.util.Optional;

/**
 * What {@link StageChecker} found in one step.
 *
 * @param backend backend of the layer under test
 * @param stagesAgreeing stages that agree, counted up to the first that does not
 * @param difference the first difference; null if all stages agree
 * @param tolerance largest relative L2 error of a row of floating-point values
 */
public record StageReport(
        String backend, int stagesAgreeing, StageDifference difference, double tolerance) {
    /** {@return whether all stages agree} */
    @JsonProperty
    public boolean pass() {
        return difference == null;
    }

    /** {@return the first difference, if there is one} */
    public Optional<StageDifference> firstDifference() {
        return Optional.ofNullable(difference);
    }

    /** One line. */
    @Override
    public String toString() {
        return pass()
                ? "all " + stagesAgreeing + " stages agree"
                : stagesAgreeing + " stages agree, then: " + difference;
    }
}
