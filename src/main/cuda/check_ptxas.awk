# Reads `ptxas -v` for -v target=...; fails if a kernel of kernels.def (first file) is missing, spills,
# has a stack, or has its wgmmas serialised.
# Functions that a kernel calls (_ZN3moe...) are held to the same, but are not in kernels.def.
# why: a stack may force a resize at launch, which waits for a kernel that spins for its peer.
FNR == NR { if ($0 !~ /^#/ && NF > 0 && ($7 == "all" || $7 == target)) wanted[$1] = 1; next }
/C7515/ { print; bad = 1 }
/Function properties for/ { name = $NF }
/bytes stack frame/ {
    seen[name] = 1
    if ($1 != 0 || $5 != 0 || $9 != 0) { print "kernel " name ": " $0; bad = 1 }
}
END {
    for (symbol in wanted) if (!(symbol in seen)) { print "kernel " symbol " of kernels.def is not in the module"; bad = 1 }
    for (symbol in seen) if (!(symbol in wanted) && symbol !~ /^_ZN3moe/) { print "kernel " symbol " is not in kernels.def"; bad = 1 }
    exit bad
}
