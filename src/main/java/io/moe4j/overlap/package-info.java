/** Schedules that run parts of several steps at the same time. */
package io.moe4j.overlap;
