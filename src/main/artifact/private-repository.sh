#!/bin/sh
# Makes FOLDER a local Maven repository in which io.moe4j is this checkout's own and everything else
# is the user's repository, by links: nothing is copied, nothing downloaded twice, it works offline,
# and two checkouts that build the same version at the same time do not mix.
#   private-repository.sh FOLDER
# The user's repository is the one Maven wrote to target/local-repository when it built the jar.
set -eu

private=$1
users=$(cat target/local-repository)
case $users in */target/private-repository) exit 0 ;; esac # Maven ran in one already
[ -d "$users" ] || { echo "private-repository: no folder $users: run make build" >&2; exit 1; }

link_all() { # from, to, but not the entry named
    mkdir -p "$2"
    for entry in "$1"/*; do
        name=$(basename "$entry")
        [ "$name" = "$3" ] || [ ! -e "$entry" ] || [ -e "$2/$name" ] || ln -s "$entry" "$2/$name"
    done
}

link_all "$users" "$private" io
link_all "$users/io" "$private/io" moe4j
