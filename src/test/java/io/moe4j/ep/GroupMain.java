package io.moe4j.ep;

import java.nio.charset.StandardCharsets;
import java.nio.file.Path;
import java.time.Duration;
import java.util.List;

/** One rank in a process of its own: {@code DIRECTORY RANK RANKS MEETINGS [stay]}. */
public final class GroupMain {
    private GroupMain() {}

    /** Joins, meets so many times, prints what came and leaves, or stays until it is killed. */
    public static void main(String[] args) throws InterruptedException {
        int rank = Integer.parseInt(args[1]);
        int ranks = Integer.parseInt(args[2]);
        try (Group group = Group.join(Path.of(args[0]), rank, ranks, Duration.ofSeconds(30))) {
            for (int i = 0; i < Integer.parseInt(args[3]); i++) {
                byte[] mine = ("rank " + rank + " pid " + ProcessHandle.current().pid()).getBytes();
                List<byte[]> all = group.exchange("meeting " + i, mine);
                for (byte[] bytes : all) {
                    System.out.println(i + ": " + new String(bytes, StandardCharsets.UTF_8));
                }
            }
            System.out.flush();
            if (args.length > 4) {
                Thread.sleep(60_000);
            }
        }
    }
}
