package io.moe4j.ep;

import java.time.Duration;
import java.util.ArrayList;
import java.util.List;

/** A member of a group within this process: frames go from hand to hand. */
final class LocalGroup extends MeshGroup {
    private final List<LocalGroup> members;

    private LocalGroup(List<LocalGroup> members, int rank, int ranks, Duration limit) {
        super(rank, ranks, limit);
        this.members = members;
    }

    static List<LocalGroup> create(int ranks, Duration limit) {
        requireValid(0, ranks, limit);
        List<LocalGroup> members = new ArrayList<>();
        for (int rank = 0; rank < ranks; rank++) {
            members.add(new LocalGroup(members, rank, ranks, limit));
        }
        return members;
    }

    @Override
    void send(int to, Frame frame) {
        // why a copy: the giver may change its array
        members.get(to)
                .deliver(rank(), new Frame(frame.kind(), frame.what(), frame.bytes().clone()));
    }

    @Override
    void disconnect() {}
}
