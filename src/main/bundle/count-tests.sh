#!/bin/sh
# Sums up surefire's reports in one line:  count-tests.sh REPORT_DIR...
set -eu
for dir in "$@"; do cat "$dir"/TEST-*.xml 2>/dev/null || true; done | awk '
    /<testsuite / {
        match($0, / tests="[0-9]+"/);   tests += substr($0, RSTART + 8, RLENGTH - 9)
        match($0, / skipped="[0-9]+"/); skipped += substr($0, RSTART + 10, RLENGTH - 11)
    }
    /<skipped/ && match($0, /message="[^"]*"/) { why = substr($0, RSTART + 9, RLENGTH - 10) }
    END {
        printf "gpu-test: %d run, %d skipped", tests - skipped, skipped
        if (skipped && why != "") printf " (%s)", why
        print ""
    }'
