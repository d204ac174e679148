package io.moe4j.cuda;

import io.moe4j.MoeConfig;
import io.moe4j.MoeFaultException;
import io.moe4j.MoeGraph;
import io.moe4j.cuda.driver.Context;
import io.moe4j.cuda.driver.Drivers;
import io.moe4j.ep.Group;
import java.io.IOException;
import java.nio.file.Path;
import java.time.Duration;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.concurrent.ConcurrentHashMap;

/**
 * The odd ranks of a group in a process of their own, on GPU 1: {@code DIRECTORY TOKENS SEED
 * RANKS}; runs until it is killed.
 */
public final class GpuRankMain {
    private GpuRankMain() {}

    /** Joins, opens, says so to the group, and replays one step for ever. */
    public static void main(String[] args) {
        int tokens = Integer.parseInt(args[1]);
        long seed = Long.parseLong(args[2]);
        int ranks = Integer.parseInt(args[3]);
        // why before it joins: what takes long is done when its round begins
        Context warm = new Context(Drivers.open(), 1);
        MoeConfig config = GpuRank.config(ranks).toBuilder().device(1).build();
        List<Integer> own = new ArrayList<>();
        for (int r = 1; r < ranks; r += 2) {
            own.add(r);
        }
        Map<GpuRank, MoeGraph> opened = new ConcurrentHashMap<>();
        Group.together(
                own,
                r -> {
                    Group group = Group.join(Path.of(args[0]), r, ranks, Duration.ofSeconds(30));
                    GpuRank rank = GpuRank.open(config, group);
                    rank.load(GpuRank.batch(r, tokens, seed));
                    opened.put(rank, rank.capture());
                    group.exchange("loaded", new byte[0]);
                });
        try (warm) {
            while (true) {
                opened.keySet().forEach(GpuRank::enqueue);
                for (int i = 0; i < 9; i++) {
                    opened.forEach(GpuRank::launch);
                }
                opened.keySet().forEach(GpuRank::await);
                opened.keySet().forEach(rank -> rank.harness.layer.check());
            }
        } catch (MoeFaultException e) {
            System.out.println("FAULT " + e.getMessage());
            System.out.flush();
        }
    }

    /** Starts it. */
    static Process start(Path meeting, int tokens, long seed, int ranks) throws IOException {
        return new ProcessBuilder(
                        Path.of(System.getProperty("java.home"), "bin", "java").toString(),
                        "-Xmx256m",
                        "-XX:TieredStopAtLevel=1",
                        "-XX:+UseSerialGC",
                        "-cp",
                        System.getProperty("java.class.path"),
                        GpuRankMain.class.getName(),
                        meeting.toString(),
                        Integer.toString(tokens),
                        Long.toString(seed),
                        Integer.toString(ranks))
                .redirectErrorStream(true)
                .redirectOutput(ProcessBuilder.Redirect.DISCARD)
                .start();
    }
}
