package io.moe4j.ep;

import java.io.IOException;
import java.net.InetAddress;
import java.net.InetSocketAddress;
import java.net.SocketAddress;
import java.net.StandardProtocolFamily;
import java.net.UnixDomainSocketAddress;
import java.nio.channels.ServerSocketChannel;
import java.nio.channels.SocketChannel;
import java.nio.charset.StandardCharsets;
import java.nio.file.FileAlreadyExistsException;
import java.nio.file.Files;
import java.nio.file.LinkOption;
import java.nio.file.Path;
import java.nio.file.attribute.PosixFilePermission;
import java.nio.file.attribute.PosixFilePermissions;
import java.security.MessageDigest;
import java.security.NoSuchAlgorithmException;
import java.util.Set;

/** Where the processes of a group find each other. */
interface Meeting {
    /** Opens the place where a rank listens; nothing is accepted before. */
    ServerSocketChannel listen(int rank, int ranks) throws IOException;

    /** A channel to a rank that listens; fails while it does not. */
    SocketChannel connect(int rank) throws IOException;

    /** Called when a rank listens no more. */
    void left(int rank);

    /** 32 bytes that all ranks know. */
    byte[] secret();

    /** For messages. */
    String place();

    /** Sockets {@code rank-N.sock} in a directory that only one user can enter. */
    record Directory(Path path) implements Meeting {
        /** What sun_path holds, less the zero at its end. */
        private static final int LONGEST = 107;

        @Override
        public ServerSocketChannel listen(int rank, int ranks) throws IOException {
            requirePrivate();
            Path socket = socket(rank);
            if (socket.toString().getBytes(StandardCharsets.UTF_8).length > LONGEST) {
                throw new IllegalArgumentException(
                        socket
                                + " is too long for a socket ("
                                + LONGEST
                                + " bytes): choose a shorter"
                                + " directory");
            }
            if (Files.exists(socket, LinkOption.NOFOLLOW_LINKS)) {
                removeStale(rank, socket);
            }
            ServerSocketChannel server = ServerSocketChannel.open(StandardProtocolFamily.UNIX);
            try {
                server.bind(UnixDomainSocketAddress.of(socket), ranks);
                if (!Files.getOwner(socket).equals(Files.getOwner(path))) {
                    throw new IllegalArgumentException(
                            path + " belongs to another user: choose a directory of your own");
                }
                return server;
            } catch (IOException | RuntimeException e) {
                server.close();
                throw e;
            }
        }

        private void removeStale(int rank, Path socket) throws IOException {
            try (SocketChannel probe = connect(rank)) {
                throw new IllegalArgumentException(
                        "another process is rank "
                                + rank
                                + " in "
                                + path
                                + ": use a new directory"
                                + " for each group");
            } catch (IOException nobodyListens) {
                Files.deleteIfExists(socket);
            }
        }

        private void requirePrivate() throws IOException {
            try {
                Files.createDirectory(
                        path,
                        PosixFilePermissions.asFileAttribute(
                                PosixFilePermissions.fromString("rwx------")));
            } catch (FileAlreadyExistsException exists) {
                if (!Files.isDirectory(path, LinkOption.NOFOLLOW_LINKS)) {
                    throw new IllegalArgumentException(path + " is not a directory");
                }
            }
            Set<PosixFilePermission> permissions =
                    Files.getPosixFilePermissions(path, LinkOption.NOFOLLOW_LINKS);
            if (!PosixFilePermissions.toString(permissions).endsWith("------")) {
                throw new IllegalArgumentException(
                        path
                                + " is open to others ("
                                + PosixFilePermissions.toString(permissions)
                                + "): chmod 700, or name a directory that is to be made");
            }
        }

        private Path socket(int rank) {
            return path.toAbsolutePath().resolve("rank-" + rank + ".sock");
        }

        @Override
        public SocketChannel connect(int rank) throws IOException {
            return SocketChannel.open(UnixDomainSocketAddress.of(socket(rank)));
        }

        @Override
        public void left(int rank) {
            try {
                Files.deleteIfExists(socket(rank));
            } catch (IOException stays) {
                // the next group removes it
            }
        }

        @Override
        public byte[] secret() {
            return new byte[32]; // why none: who reaches the socket is the user
        }

        @Override
        public String place() {
            return path.toString();
        }
    }

    /** Ports from {@code port} on of the loopback address. */
    record Loopback(int port, String cookie) implements Meeting {
        private static final int SHORTEST = 16;

        public Loopback {
            if (cookie == null || cookie.length() < SHORTEST) {
                throw new IllegalArgumentException(
                        "the cookie has fewer than "
                                + SHORTEST
                                + " characters: others can guess it");
            }
        }

        @Override
        public ServerSocketChannel listen(int rank, int ranks) throws IOException {
            if (port < 1 || port + ranks - 1 > 65535) {
                throw new IllegalArgumentException(
                        "ports " + port + ".." + (port + ranks - 1) + " are outside 1..65535");
            }
            ServerSocketChannel server = ServerSocketChannel.open();
            try {
                return server.bind(address(rank), ranks);
            } catch (IOException | RuntimeException e) {
                server.close();
                throw e;
            }
        }

        private SocketAddress address(int rank) {
            return new InetSocketAddress(InetAddress.getLoopbackAddress(), port + rank);
        }

        @Override
        public SocketChannel connect(int rank) throws IOException {
            SocketChannel channel = SocketChannel.open(address(rank));
            channel.setOption(java.net.StandardSocketOptions.TCP_NODELAY, true);
            return channel;
        }

        @Override
        public void left(int rank) {}

        @Override
        public byte[] secret() {
            try {
                return MessageDigest.getInstance("SHA-256")
                        .digest(cookie.getBytes(StandardCharsets.UTF_8));
            } catch (NoSuchAlgorithmException e) {
                throw new IllegalStateException(e);
            }
        }

        @Override
        public String place() {
            return "127.0.0.1:" + port;
        }

        @Override
        public String toString() {
            return place(); // why: a cookie is not for logs
        }
    }
}
