#!/bin/sh
# Checks every protocol model and every mutant with Spin and prints a table; exits 1 if one does not
# end as expected. Without spin or gcc it says so and exits 0. CASES=word runs the matching lines.
#
# A case: model | expected verdict | flags. ok: all states explored without an error; wrong: an
# assertion fails (stale or too new data, a flag ahead, a false alarm); stuck: a rank waits for ever.
set -u
cd "$(dirname "$0")" || exit 1

SECONDS_PER_CASE=${SECONDS_PER_CASE:-300}
MEBIBYTES=${MEBIBYTES:-1900}
MAX_DEPTH=2000000

for tool in spin "${CC:=gcc}"; do
    if ! command -v "$tool" > /dev/null; then
        echo "protocol models: skipped, $tool is not installed (Debian: apt-get install spin gcc)"
        exit 0
    fi
done

cases() {
    cat << 'END'
replay   | ok    | -DRANKS=2
replay   | ok    | -DRANKS=3
replay   | ok    | -DRANKS=4 -DROUTING=0 -DWHOLE_WIRE
replay   | wrong | -DRANKS=2 -DNO_RELEASE
replay   | wrong | -DRANKS=2 -DNO_ACQUIRE
replay   | wrong | -DRANKS=2 -DNO_COMBINE_WAIT -DUNCHECKED
replay   | wrong | -DRANKS=2 -DWAIT_ONLY_FOR_ROWS -DUNCHECKED
replay   | stuck | -DRANKS=2 -DNO_FLAG_WITHOUT_TOKENS
replay   | wrong | -DRANKS=2 -DCOMBINE_FLAG_BEFORE_READ
replay   | wrong | -DRANKS=2 -DONE_FLAG
arrive   | ok    | -DBLOCKS=3
arrive   | wrong | -DBLOCKS=3 -DNO_FENCE
arrive   | wrong | -DBLOCKS=3 -DFIRST_BLOCK_FLAGS
arrive   | stuck | -DBLOCKS=3 -DCOUNTER_NOT_CLEARED
recover  | ok    | -DRANKS=2 -DGENERATIONS=1 -DAS_IMPLEMENTED -DHOST_STOPS
recover  | ok    | -DRANKS=3 -DGENERATIONS=1 -DAS_IMPLEMENTED -DHOST_STOPS -DDEATH -DNO_WIRE
recover  | ok    | -DRANKS=2 -DGENERATIONS=1 -DAS_IMPLEMENTED -DEXPIRIES=1
recover  | stuck | -DRANKS=2 -DGENERATIONS=1 -DAS_IMPLEMENTED -DEXPIRIES=1 -DWAIT_EQUAL
recover  | stuck | -DRANKS=2 -DGENERATIONS=1 -DAS_IMPLEMENTED -DEXPIRIES=1 -DHOST_STOPS
recover  | stuck | -DRANKS=3 -DGENERATIONS=1 -DAS_IMPLEMENTED -DEXPIRIES=1 -DDEATH -DNO_WIRE
recover  | ok    | -DRANKS=3 -DGENERATIONS=1 -DEXPIRIES=1 -DDEATH -DNO_WIRE
recover  | ok    | -DRANKS=2 -DSPLIT_WIRE
recover  | ok    | -DRANKS=3 -DNO_WIRE
recover  | wrong | -DRANKS=2 -DNO_GENERATION
recover  | wrong | -DRANKS=2 -DEPOCH_KEPT -DUNCHECKED
recover  | wrong | -DRANKS=2 -DNO_MEETING -DUNCHECKED
recover  | stuck | -DRANKS=2 -DFLAGS_CLEARED
recover  | wrong | -DRANKS=2 -DNOT_SILENT -DUNCHECKED
recover  | wrong | -DRANKS=2 -DABORT_WITHOUT_GENERATION
recover  | wrong | -DRANKS=2 -DVALID_AS_TOLD
recover  | wrong | -DRANKS=2 -DASKED_TOO_EARLY
recover  | ok    | -DRANKS=3 -DEVICT -DNO_WIRE
recover  | wrong | -DRANKS=3 -DEVICT -DNO_WIRE -DWRITE_TO_EVICTED -DUNCHECKED
recover  | ok    | -DRANKS=2 -DREPLACE -DSPLIT_WIRE
recover  | stuck | -DRANKS=2 -DREPLACE -DSPLIT_WIRE -DREUSED_SLOTS
embedded | ok    | -DRANKS=2
embedded | ok    | -DRANKS=3 -DSTEPS=2 -DNO_WIRE
embedded | wrong | -DRANKS=2 -DHEADERS_NOT_COPIED
embedded | stuck | -DRANKS=2 -DNO_FLAG_WITHOUT_ROWS
embedded | wrong | -DRANKS=2 -DSPLIT_LINE
embedded | wrong | -DRANKS=2 -DONE_BIT_EPOCH
END
}

work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT

# Leaves what pan said in $work/said.
check() {
    model=$PWD/$1.pml
    shift
    (
        cd "$work" && rm -f ./pan* && spin -a "$@" "$model" > said 2>&1 \
            && "$CC" -O2 -w -DSAFETY -DNOCLAIM -DMEMLIM="$MEBIBYTES" -o pan pan.c >> said 2>&1 \
            && timeout "$SECONDS_PER_CASE" ./pan -m"$MAX_DEPTH" >> said 2>&1
    )
    code=$?
    if [ "$code" -eq 124 ]; then
        echo "timeout"
    elif grep -q 'invalid end state (at' "$work/said"; then
        echo "stuck"
    elif grep -q 'assertion violated' "$work/said"; then
        echo "wrong"
    elif grep -Eq 'max search depth too small|reached -DMEMLIM|out of memory' "$work/said"; then
        echo "too large"
    elif grep -q 'errors: 0' "$work/said"; then
        echo "ok"
    else
        echo "failed"
    fi
}

count() {
    sed -n "s/^ *\([0-9.e+]*\) states, stored.*/\1/p" "$work/said" | head -n 1
}

depth() {
    sed -n 's/.*depth reached \([0-9]*\).*/\1/p' "$work/said" | head -n 1
}

surprises=0
total=0
printf '%-9s %5s %10s %8s  %-10s %-8s  %s\n' model ranks states depth verdict expected variant
cases > "$work/cases"
while IFS='|' read -r model expected flags; do
    case "$model $flags" in
        *"${CASES:-}"*) ;;
        *) continue ;;
    esac
    model=$(echo $model)
    expected=$(echo $expected)
    # shellcheck disable=SC2086
    verdict=$(check "$model" $flags)
    ranks=$(echo "$flags" | sed -n 's/.*-DRANKS=\([0-9]\).*/\1/p')
    variant=$(echo "$flags" | sed 's/ *-D\(RANKS\|BLOCKS\)=[0-9]//; s/ *-D/ /g; s/^ //')
    printf '%-9s %5s %10s %8s  %-10s %-8s  %s\n' \
        "$model" "${ranks:--}" "$(count)" "$(depth)" "$verdict" "$expected" "$variant"
    total=$((total + 1))
    if [ "$verdict" != "$expected" ]; then
        surprises=$((surprises + 1))
        echo "SURPRISE: expected $expected, got $verdict"
        tail -n 5 "$work/said"
    fi
done < "$work/cases"

echo "protocol models: $total cases, $surprises surprises"
[ "$surprises" -eq 0 ] && [ "$total" -gt 0 ]
