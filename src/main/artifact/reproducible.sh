#!/bin/sh
# Builds this checkout twice, in two folders, with other time zones and languages, and
# compares every file that leaves a build bit by bit: jars, POM, SBOM, kernels, libraries. Then looks
# at what the jar says of itself. Needs what a build needs; takes two of them.
#   reproducible.sh [FOLDER]
set -eu

folder=${1:-target/reproducible}
mvn=${MVN:-mvn}
fail() { echo "reproducible: $*" >&2; exit 1; }

# copy NAME: why both before the first build: so that a file that is edited meanwhile is in none
copy() {
    rm -rf "${folder:?}/$1"
    mkdir -p "$folder/$1"
    git ls-files -z --cached --others --exclude-standard | xargs -0 ls -d 2>/dev/null \
        | tar -cf - -T - | tar -xf - -C "$folder/$1"
}

# build NAME ZONE LANGUAGE
build() {
    (
        # why: the umask is the one thing of the surroundings that a jar keeps, as modes of its entries
        umask 022
        cd "$folder/$1"
        export TZ="$2" LC_ALL="$3"
        ${MAKE:-make} -s kernels
        $mvn -B -q -Partifact -DskipTests package
    ) > "$folder/$1.log" 2>&1 || { tail -n 40 "$folder/$1.log" >&2; fail "build $1 failed"; }
    (
        cd "$folder/$1"
        find target -maxdepth 1 -type f \( -name '*.jar' -o -name '*-sbom.*' \) -print > files
        find target/classes/io/moe4j/kernels target/classes/io/moe4j/natives -type f >> files 2>/dev/null || true
        LC_ALL=C sort files | xargs sha256sum
        sha256sum pom.xml
    ) > "$folder/$1.sha256"
}

mkdir -p "$folder"
copy one
copy a-second-one
build one UTC C.UTF-8
build a-second-one Pacific/Auckland tr_TR.UTF-8
cat "$folder/one.sha256"
diff "$folder/one.sha256" "$folder/a-second-one.sha256" > "$folder/difference" \
    || { cat "$folder/difference" >&2; fail "the files above differ between two builds"; }

target=$folder/one/target
manifest=$(unzip -p "$target/moe4j.jar" META-INF/MANIFEST.MF | tr -d '\r')
for line in 'Automatic-Module-Name: io.moe4j' 'Build-Jdk-Spec: ' 'Git-Commit: '; do
    echo "$manifest" | grep -q "^$line" || fail "moe4j.jar's manifest lacks $line"
done
! echo "$manifest" | grep -q '^Class-Path' || fail "moe4j.jar has a Class-Path"
unzip -p "$target/moe4j-cli.jar" META-INF/MANIFEST.MF | grep -q '^Enable-Native-Access: ALL-UNNAMED' \
    || fail "moe4j-cli.jar has no Enable-Native-Access"
for jar in moe4j-sources moe4j-javadoc; do
    [ -f "$target/$jar.jar" ] || fail "no $jar.jar"
done
if command -v "${NVCC:-nvcc}" > /dev/null; then
    unzip -l "$target/moe4j.jar" | grep -q 'io/moe4j/kernels/moe4j-sm_90a.cubin' || fail "moe4j.jar has no kernels"
fi
echo "reproducible: $(wc -l < "$folder/one.sha256") files, the same in both builds"
