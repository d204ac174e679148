package io.moe4j.cuda;

import io.moe4j.cuda.driver.Driver;
import java.lang.reflect.InvocationTargetException;
import java.lang.reflect.Proxy;

/** A driver with a wait for the device planted before one of its calls. */
final class WaitingDriver {
    private WaitingDriver() {}

    static Driver before(String method, Driver driver) {
        return (Driver)
                Proxy.newProxyInstance(
                        Driver.class.getClassLoader(),
                        new Class<?>[] {Driver.class},
                        (proxy, called, args) -> {
                            if (called.getName().equals(method)) {
                                driver.contextSynchronize();
                            }
                            try {
                                return called.invoke(driver, args);
                            } catch (InvocationTargetException e) {
                                throw e.getCause();
                            }
                        });
    }
}
