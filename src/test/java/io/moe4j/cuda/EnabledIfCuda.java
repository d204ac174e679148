package io.moe4j.cuda;

import java.lang.annotation.ElementType;
import java.lang.annotation.Inherited;
import java.lang.annotation.Retention;
import java.lang.annotation.RetentionPolicy;
import java.lang.annotation.Target;
import org.junit.jupiter.api.Tag;
import org.junit.jupiter.api.extension.ExtendWith;

/**
 * Marks a test that needs GPUs: it carries the tag {@code gpu} and is skipped, with the reason,
 * where they are missing. Classes with it are named {@code *GpuTest}.
 */
@Target({ElementType.TYPE, ElementType.METHOD})
@Retention(RetentionPolicy.RUNTIME)
@Inherited
@Tag("gpu")
@ExtendWith(CudaCondition.class)
public @interface EnabledIfCuda {
    /** Devices needed. */
    int devices() default 1;

    /** Smallest compute capability, as major × 10 + minor. */
    int computeCapability() default 80;

    /** Memory a device needs to have in all, in GiB. */
    int memoryGiB() default 0;
}
