package io.moe4j.cuda;

import io.moe4j.MoeFaultException;
import io.moe4j.MoeGraph;
import io.moe4j.cuda.driver.Context;
import io.moe4j.cuda.driver.Drivers;
import io.moe4j.ep.Group;
import java.nio.file.Path;
import java.time.Duration;

/** Rank 1 of 2 in a process of its own: {@code DIRECTORY TOKENS SEED}; runs until it is killed. */
public final class GpuRankMain {
    private GpuRankMain() {}

    /** Joins, opens, says so on standard output, and replays one step for ever. */
    public static void main(String[] args) {
        int tokens = Integer.parseInt(args[1]);
        long seed = Long.parseLong(args[2]);
        // why before it joins: what takes long is done when its round begins
        Context warm = new Context(Drivers.open(), 1);
        Group group = Group.join(Path.of(args[0]), 1, 2, Duration.ofSeconds(30));
        GpuRank rank = GpuRank.open(GpuRank.config(), group);
        rank.load(GpuRank.batch(1, tokens, seed));
        MoeGraph graph = rank.capture();
        group.exchange("loaded", new byte[0]);
        try (warm) {
            while (true) {
                rank.enqueue();
                for (int i = 0; i < 9; i++) {
                    rank.launch(graph);
                }
                rank.await();
                rank.harness.layer.check();
            }
        } catch (MoeFaultException e) {
            System.out.println("FAULT " + e.getMessage());
            System.out.flush();
        }
    }
}
