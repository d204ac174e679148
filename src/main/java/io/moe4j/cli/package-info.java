/**
 * The command line tool {@code moe4j}: {@link io.moe4j.cli.DemoCommand demo}, {@link
 * io.moe4j.cli.CheckCommand check}, {@link io.moe4j.cli.PlanCommand plan} and {@link
 * io.moe4j.cli.InfoCommand info}. Results go to stdout, progress and errors to stderr; {@link
 * io.moe4j.cli.ExitCodes} says what the exit code means.
 */
package io.moe4j.cli;
