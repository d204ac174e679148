package io.moe4j.cuda;

import static org.junit.platform.commons.support.AnnotationSupport.findAnnotation;

import io.moe4j.BackendProvider.Availability;
import io.moe4j.cuda.driver.DeviceAttribute;
import io.moe4j.cuda.driver.Driver;
import io.moe4j.cuda.driver.Drivers;
import org.junit.jupiter.api.extension.AfterAllCallback;
import org.junit.jupiter.api.extension.ConditionEvaluationResult;
import org.junit.jupiter.api.extension.ExecutionCondition;
import org.junit.jupiter.api.extension.ExtensionContext;

/**
 * Evaluates {@link EnabledIfCuda}. With the system property {@code moe4j.requireGpu} a machine
 * without any usable GPU fails the run instead of skipping it; a test that needs more than the
 * machine has is still skipped, with the reason. A class that leaves a context current on the
 * thread of the tests fails, and not the next class that finds it there.
 */
final class CudaCondition implements ExecutionCondition, AfterAllCallback {
    @Override
    public void afterAll(ExtensionContext context) {
        if (!Drivers.availability().usable()) {
            return;
        }
        Driver driver = Drivers.open();
        int left = 0;
        while (driver.contextCurrent() != 0) {
            driver.contextPop();
            left++;
        }
        if (left > 0) {
            System.out.println("CONTEXTS " + context.getDisplayName() + " left current: " + left);
        }
    }

    @Override
    public ConditionEvaluationResult evaluateExecutionCondition(ExtensionContext context) {
        return findAnnotation(context.getElement(), EnabledIfCuda.class)
                .map(CudaCondition::evaluate)
                .orElseGet(() -> ConditionEvaluationResult.enabled("needs no GPU"));
    }

    private static ConditionEvaluationResult evaluate(EnabledIfCuda needs) {
        Availability availability = Drivers.availability();
        if (!availability.usable()) {
            if (Boolean.getBoolean("moe4j.requireGpu")) {
                return ConditionEvaluationResult.enabled("moe4j.requireGpu is set");
            }
            return ConditionEvaluationResult.disabled("needs a GPU: " + availability.reason());
        }
        Driver driver = Drivers.open();
        if (driver.deviceCount() < needs.devices()) {
            return ConditionEvaluationResult.disabled(
                    "needs " + needs.devices() + " GPUs, found " + driver.deviceCount());
        }
        int capability =
                10 * driver.deviceAttribute(0, DeviceAttribute.COMPUTE_CAPABILITY_MAJOR)
                        + driver.deviceAttribute(0, DeviceAttribute.COMPUTE_CAPABILITY_MINOR);
        if (capability < needs.computeCapability()) {
            return ConditionEvaluationResult.disabled(
                    "needs compute capability "
                            + needs.computeCapability()
                            + ", found "
                            + capability);
        }
        long gib = driver.deviceTotalMemory(0) >> 30;
        if (gib < needs.memoryGiB()) {
            return ConditionEvaluationResult.disabled(
                    "needs a GPU with " + needs.memoryGiB() + " GiB, found " + gib);
        }
        return ConditionEvaluationResult.enabled(availability.reason());
    }
}
