#!/bin/sh
# Prints the home of the newest JDK with a tool, nothing if there is none:
#   newest-jdk.sh TOOL [OLDEST]
# Looks at JAVA_HOME and every variable JAVA_HOME_*, as CI machines have them, and at the folders in
# JDK_DIRS, where Linux distributions, SDKMAN and container images put JDKs.
set -eu

tool=$1
oldest=${2:-0}
dirs=${JDK_DIRS-/usr/lib/jvm /usr/java /opt/java /opt/jdk $HOME/.sdkman/candidates/java $HOME/.jdks}

homes=$(env | sed -n 's/^JAVA_HOME\(_[A-Za-z0-9_]*\)\{0,1\}=//p')
for dir in $dirs; do
    homes="$homes
$(ls -d "$dir"/* 2>/dev/null || true)"
done
echo "$homes" | sort -u | while read -r home; do
    [ -n "$home" ] && [ -x "$home/bin/$tool" ] && [ -x "$home/bin/java" ] || continue
    version=$("$home/bin/java" -version 2>&1 | sed -n 's/.* version "\([0-9]*\).*/\1/p' | head -n 1)
    [ "${version:-0}" -ge "$oldest" ] && echo "${version:-0} $home"
done | sort -n | tail -n 1 | cut -d ' ' -f 2-
