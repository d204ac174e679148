#!/bin/sh
# Builds the folder given and packs it as moe4j-gpu-bundle.tar.xz beside it. Run by `make gpu-bundle`
# after `mvn package`. The jars are stored uncompressed, because xz packs class files better than zip.
#   build-bundle.sh FOLDER
set -eu

bundle=$1
name=$(basename "$bundle")
mvn=${MVN:-mvn}
limit=$((40 * 1024 * 1024))

fail() { echo "gpu-bundle: $*" >&2; exit 1; }

jdk=$(sh src/main/bundle/newest-jdk.sh jlink)
[ -n "$jdk" ] || fail "no JDK with jlink found: set JAVA_HOME"

rm -rf "$bundle"
mkdir -p "$bundle/lib" target/bundle-work
trap 'rm -rf target/bundle-work' EXIT INT TERM
work=$(cd target/bundle-work && pwd)

# Jars: runtime and test, without what GPU tests do not need
"$mvn" -B -q help:evaluate -Dexpression=junit.platform.version "-Doutput=$work/junit-version" >/dev/null
junit=$(cat "$work/junit-version")
"$mvn" -B -q dependency:copy-dependencies -DincludeScope=test \
    -DexcludeArtifactIds=onnxruntime,xchart,VectorGraphics2D \
    -DexcludeGroupIds=io.micrometer,org.hdrhistogram,org.latencyutils,org.jspecify,com.tngtech.archunit,org.junit.jupiter,org.junit.platform,org.opentest4j,org.apiguardian,org.slf4j \
    "-DoutputDirectory=$work/jars"
"$mvn" -B -q dependency:copy "-DoutputDirectory=$work/jars" \
    "-Dartifact=org.junit.platform:junit-platform-console-standalone:$junit"
cp target/moe4j.jar "$work/jars/"
"$jdk/bin/jar" --create --file "$work/jars/moe4j-tests.jar" -C target/test-classes io

# Engines, if `make engines-test` has compiled them: their tests, and what Jlama needs to run
engines=
if [ -d engines/jlama/target/test-classes ]; then
    engines=jdk.incubator.vector,java.desktop # the latter for java.beans in Jinjava
    JAVA_HOME=$jdk "$mvn" -B -q -Dmaven.repo.local="$PWD/target/private-repository" \
        -f engines/jlama/pom.xml dependency:copy-dependencies "-DoutputDirectory=$work/jars" \
        -DincludeArtifactIds=jlama-core,guava,failureaccess,jctools-core,jafama,slf4j-api,slf4j-nop,jinjava,javassist,re2j,commons-lang3,commons-net,java-ipv6,big-math,jackson-dataformat-yaml,snakeyaml 2>/dev/null
    "$jdk/bin/jar" --create --file "$work/jars/moe4j-jlama.jar" -C engines/jlama/target/classes io
    "$jdk/bin/jar" --create --file "$work/jars/moe4j-engines-tests.jar" \
        -C engines/jlama/target/test-classes io -C engines/ffm/target/test-classes io
fi

for jar in "$work"/jars/*.jar; do
    file=$(basename "$jar")
    rm -rf "$work/x"
    mkdir "$work/x"
    (cd "$work/x" && "$jdk/bin/jar" --extract --file "$jar")
    # natives of other platforms, and JCuda's bindings for compilers that we do not use
    rm -f "$work"/x/lib/libJNv* "$work"/x/lib/libJCublas-* "$work"/x/lib/libJCudaRuntime-*
    if [ -d "$work/x/com/sun/jna" ]; then
        find "$work/x/com/sun/jna" -mindepth 1 -maxdepth 1 -type d -name '*-*' ! -name linux-x86-64 -exec rm -rf {} +
    fi
    rm -rf "$work"/x/org/jline/nativ/Windows "$work"/x/org/jline/nativ/Mac "$work"/x/org/jline/nativ/FreeBSD
    manifest=$work/x/META-INF/MANIFEST.MF
    if [ -f "$manifest" ]; then
        mv "$manifest" "$work/manifest"
        "$jdk/bin/jar" --create --no-compress --file "$bundle/lib/$file" --manifest "$work/manifest" -C "$work/x" .
    else
        "$jdk/bin/jar" --create --no-compress --file "$bundle/lib/$file" -C "$work/x" .
    fi
done

# A JVM with what the jars need. Jackson and picocli name java.desktop and java.sql but run without.
# zipfs: JUnit reads the jar of test classes through it
base=java.base,java.logging,java.management,jdk.management,java.xml,jdk.jfr,jdk.unsupported,jdk.zipfs
needed=$("$jdk/bin/jdeps" --multi-release 17 --ignore-missing-deps --print-module-deps \
    --class-path "$bundle/lib/*" "$bundle"/lib/*.jar 2>/dev/null || true)
modules=$(printf '%s,%s\n' "$base" "$needed" | tr ',' '\n' \
    | grep -E '^(java|jdk)\.' | grep -v -E '^(java\.desktop|java\.sql|java\.compiler|jdk\.compiler|java\.rmi)$' \
    | sort -u | paste -s -d , -)${engines:+,$engines}
# why zip-0: xz makes 15 MB of the uncompressed image but 24 MB of a zipped one
case $("$jdk/bin/java" -version 2>&1 | sed -n 's/.* version "\([0-9]*\).*/\1/p' | head -n 1) in
    17 | 18 | 19 | 20) compress=0 ;;
    *) compress=zip-0 ;;
esac
if [ -d "$jdk/jmods" ]; then path="--module-path $jdk/jmods"; else path=; fi
# shellcheck disable=SC2086
"$jdk/bin/jlink" $path --add-modules "$modules" --strip-debug --no-header-files --no-man-pages \
    --compress $compress --output "$bundle/runtime"

cp src/main/bundle/run "$bundle/run"
chmod 755 "$bundle/run"
mkdir -p "$bundle/bench/peers"
cp bench/cases.json bench/prefill.json bench/ep.json "$bundle/bench/"
cp bench/peers/*.py "$bundle/bench/peers/"
if [ -x target/step_main ]; then
    cp target/step_main "$bundle/step_main"
    cp target/ep_main "$bundle/ep_main"
fi
commit=$(git rev-parse HEAD 2>/dev/null || echo unknown)
[ -z "$(git status --porcelain 2>/dev/null)" ] || commit="$commit with local changes"
echo "$commit" > "$bundle/commit"

archive=$(dirname "$bundle")/moe4j-$name.tar.xz
tar -C "$(dirname "$bundle")" --sort=name --owner=0 --group=0 --numeric-owner -cf - "$name" | xz -T0 -7 > "$archive"
size=$(wc -c < "$archive")
echo "gpu-bundle: $archive, $((size / 1024)) KiB packed ($(du -sm "$bundle" | cut -f 1) MiB unpacked), JDK $("$bundle/runtime/bin/java" -version 2>&1 | sed -n 's/.* version "\([^"]*\)".*/\1/p' | head -n 1), modules $modules"
[ "$size" -lt "$limit" ] || fail "$archive is larger than $limit bytes"
