/**
 * What layers tell about themselves while they run: {@link io.moe4j.observe.LayerTrace} and {@link
 * io.moe4j.observe.GraphTrace} count in plain fields, and events of the JDK's Flight Recorder are
 * made from those counts by its own thread. For the backends; programs look at the events
 * (docs/observability.md). No class here but {@code JfrEvents} needs the module {@code jdk.jfr},
 * and that one is loaded only where the module is.
 */
package io.moe4j.observe;
