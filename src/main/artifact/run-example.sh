#!/bin/sh
# Copies an example to an empty folder, builds it there against a local Maven repository, and runs
# it: what somebody who depends on moe4j by its coordinates does.
#   run-example.sh EXAMPLE REPOSITORY [ARGUMENT...]
# MVN and JAVA_HOME say what to build and run it with.
set -eu

example=$1
repository=$(cd "$2" && pwd)
shift 2
java=${JAVA_HOME:+$JAVA_HOME/bin/}java
folder=$(mktemp -d "${TMPDIR:-/tmp}/moe4j-example.XXXXXX")
trap 'rm -rf "$folder"' EXIT INT TERM

cp -R "$example/pom.xml" "$example/src" "$folder/"
# why the log: a warning of javac is a fault of the artifact, and Maven shows it only if it talks
(cd "$folder" && ${MVN:-mvn} -B "-Dmaven.repo.local=$repository" package) > "$folder/log" 2>&1 \
    || { cat "$folder/log" >&2; exit 1; }
if grep '^\[WARNING\]' "$folder/log" >&2; then
    echo "example: Maven or javac warned (above)" >&2
    exit 1
fi
echo "example: $(basename "$example"), with $(cd "$folder/target/lib" && echo *.jar)"
"$java" -jar "$folder/target/$(basename "$example").jar" "$@"
