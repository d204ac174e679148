/* Replay after replay on one buffer set: the protocol of signal.cuh with plain rows and release flags.
 *
 * One process per rank (its stream) and one per ordered pair of ranks (the wire). A store does not
 * land when it is issued: the wire delivers payload and flag whenever it likes, and only a release
 * keeps the flag behind the payload. A cell holds the epoch that wrote it and whether it carries a
 * row, so reading stale or too new data fails an assertion. Epochs count modulo 3: the model has no
 * last step, and NOBODY_IS_AHEAD (a flag is at the epoch or one behind) is what makes 3 enough. A
 * reader's last read clears the cell, so that an old stamp cannot pass for a new one. A rank's own
 * slots need no wire: its stream orders them.
 *
 * -DRANKS=2..4   -DROUTING=0 every pair has a row; 1 a rank has a row for all or T = 0; 2 any pairs
 * -DWHOLE_WIRE   payload and flag of one send land together (for 4 ranks; 2 and 3 prove the rest)
 * -DUNCHECKED    no NOBODY_IS_AHEAD: a mutant must show in the data
 * Mutants: NO_RELEASE NO_ACQUIRE NO_COMBINE_WAIT WAIT_ONLY_FOR_ROWS NO_FLAG_WITHOUT_TOKENS
 *          COMBINE_FLAG_BEFORE_READ ONE_FLAG
 */
#ifndef RANKS
#define RANKS 2
#endif
#ifndef ROUTING
#define ROUTING 2
#endif
#define N RANKS
#define AT(owner, from) ((owner) * N + (from))
#define NEXT(e) (((e) + 1) % 3)
#define STAMP(e, row) (2 * (e) + 2 + (row))
#define EPOCH_OF(cell) ((cell) / 2 - 1)
#define HAS_ROW(cell) ((cell) % 2)
#define NONE 0                  /* a cell read for the last time; on the wire: nothing */

/* Symmetric region of each rank, [owner][from] */
byte dispatch_flag[N * N];
byte recv[N * N];               /* recv_tokens, recv_ids, recv_weights, recv_rows */
byte combined[N * N];           /* combine_rows */
#ifdef ONE_FLAG
#define combine_flag dispatch_flag
#else
byte combine_flag[N * N];
#endif

/* On the wire: issued, not landed. Flags as epoch + 1 */
byte sent_dispatch_flag[N * N];
byte sent_combine_flag[N * N];
byte sent_recv[N * N];
byte sent_combined[N * N];

#ifdef NO_RELEASE
#define LANDED(payload) true
#else
#define LANDED(payload) (payload) == NONE
#endif

proctype Wire(byte from, to) {
end:
    do
#ifdef WHOLE_WIRE
    :: d_step { sent_dispatch_flag[AT(to, from)] != NONE ->
           recv[AT(to, from)] = sent_recv[AT(to, from)]; sent_recv[AT(to, from)] = NONE;
           dispatch_flag[AT(to, from)] = sent_dispatch_flag[AT(to, from)] - 1;
           sent_dispatch_flag[AT(to, from)] = NONE }
    :: d_step { sent_combine_flag[AT(to, from)] != NONE ->
           combined[AT(to, from)] = sent_combined[AT(to, from)]; sent_combined[AT(to, from)] = NONE;
           combine_flag[AT(to, from)] = sent_combine_flag[AT(to, from)] - 1;
           sent_combine_flag[AT(to, from)] = NONE }
#else
    :: d_step { sent_recv[AT(to, from)] != NONE ->
           recv[AT(to, from)] = sent_recv[AT(to, from)]; sent_recv[AT(to, from)] = NONE }
    :: d_step { sent_dispatch_flag[AT(to, from)] != NONE && LANDED(sent_recv[AT(to, from)]) ->
           dispatch_flag[AT(to, from)] = sent_dispatch_flag[AT(to, from)] - 1;
           sent_dispatch_flag[AT(to, from)] = NONE }
    :: d_step { sent_combined[AT(to, from)] != NONE ->
           combined[AT(to, from)] = sent_combined[AT(to, from)]; sent_combined[AT(to, from)] = NONE }
    :: d_step { sent_combine_flag[AT(to, from)] != NONE && LANDED(sent_combined[AT(to, from)]) ->
           combine_flag[AT(to, from)] = sent_combine_flag[AT(to, from)] - 1;
           sent_combine_flag[AT(to, from)] = NONE }
#endif
    od
}

/* The wait `flag >= epoch`, as: not one behind */
#define OTHER(i) ((i) < N && (i) != me)
#define HERE(flags, i) (!OTHER(i) || NEXT(flags[AT(me, (i) % N)]) != e)
#define ALL_HERE(flags) (HERE(flags, 0) && HERE(flags, 1) && HERE(flags, 2) && HERE(flags, 3))
#define LEVEL(flags, i) (!OTHER(i) || flags[AT(me, (i) % N)] == e)
#define ROW_FOR(i) ((rows >> (i)) % 2)

#if defined(ONE_FLAG) || defined(UNCHECKED)
#define NOBODY_IS_AHEAD(flags) skip
#else
#define NOBODY_IS_AHEAD(flags) \
    assert(LEVEL(flags, 0) && LEVEL(flags, 1) && LEVEL(flags, 2) && LEVEL(flags, 3))
#endif
#ifdef WAIT_ONLY_FOR_ROWS
#define OWED(i) (ROW_FOR(i) == 0 || HERE(combine_flag, i))
#define COMBINE_IS_HERE (OWED(0) && OWED(1) && OWED(2) && OWED(3))
#define NOBODY_IS_AHEAD_IN_COMBINE skip
#else
#define COMBINE_IS_HERE ALL_HERE(combine_flag)
#define NOBODY_IS_AHEAD_IN_COMBINE NOBODY_IS_AHEAD(combine_flag)
#endif

inline send_dispatch() {
    i = 0;
    do
    :: i < N && i != me ->
        sent_recv[AT(i, me)] = STAMP(e, ROW_FOR(i));
#ifdef NO_FLAG_WITHOUT_TOKENS
        if
        :: rows != 0 -> sent_dispatch_flag[AT(i, me)] = e + 1
        :: else
        fi;
#else
        sent_dispatch_flag[AT(i, me)] = e + 1;
#endif
        i++
    :: i == me -> i++
    :: i >= N -> break
    od;
    i = 0
}

#ifdef NO_ACQUIRE
#define RECEIVED(i) early[i]
#else
#define RECEIVED(i) recv[AT(me, i)]
#endif

inline read_received() {
    i = 0;
    do
    :: i < N -> assert(i == me || EPOCH_OF(RECEIVED(i)) == e); i++
    :: else -> break
    od;
    i = 0
}

inline send_combine_rows(last) {
    i = 0;
    do
    :: i < N && i != me ->
        if
        :: HAS_ROW(recv[AT(me, i)]) -> sent_combined[AT(i, me)] = STAMP(e, 1)
        :: else
        fi;
        recv[AT(me, i)] = (last -> NONE : recv[AT(me, i)]);
        i++
    :: i == me -> i++
    :: i >= N -> break
    od;
    i = 0
}

inline send_combine_flags() {
    i = 0;
    do
    :: i < N -> sent_combine_flag[AT(i, me)] = (i == me -> NONE : e + 1); i++
    :: else -> break
    od;
    i = 0
}

inline read_combined(last) {
    i = 0;
    do
    :: i < N ->
        assert(i == me || ROW_FOR(i) == 0 || combined[AT(me, i)] == STAMP(e, 1));
        combined[AT(me, i)] = (last -> NONE : combined[AT(me, i)]);
        i++
    :: else -> break
    od;
    i = 0
}

proctype Rank(byte me) {
    byte e = 0;
    byte rows = 0;              /* bit d: this step has a row for rank d */
    byte i = 0;
#ifdef NO_ACQUIRE
    byte early[N];
#endif
    do
    ::  /* moe_route_topk: any routing; moe_dispatch_send */
        atomic {
            e = NEXT(e);
#if ROUTING == 0
            rows = (1 << N) - 1;
#elif ROUTING == 1
            if
            :: rows = 0
            :: rows = (1 << N) - 1
            fi;
#else
            do
            :: i < N ->
                if
                :: i != me -> rows = rows | (1 << i)
                :: true
                fi;
                i++
            :: i >= N -> break
            od;
            i = 0;
#endif
            send_dispatch()
        }
#ifdef NO_ACQUIRE
        d_step {    /* the reads of the payload pass the poll of the flag */
            do
            :: i < N -> early[i] = recv[AT(me, i)]; i++
            :: else -> break
            od;
            i = 0
        }
#endif
        /* moe_dispatch_recv, moe_dispatch_index */
        d_step { ALL_HERE(dispatch_flag); NOBODY_IS_AHEAD(dispatch_flag); read_received() }
        /* The GEMMs gather; moe_combine_send reads the headers again and sends rows, then flags */
#ifdef COMBINE_FLAG_BEFORE_READ
        d_step { read_received(); send_combine_rows(0); send_combine_flags() }
        d_step { read_received(); i = 0 }
#else
        d_step { read_received(); send_combine_rows(1); send_combine_flags() }
#endif
        /* moe_combine_recv: the wait, the first and the last read */
#ifndef NO_COMBINE_WAIT
        d_step { COMBINE_IS_HERE; NOBODY_IS_AHEAD_IN_COMBINE; read_combined(0) }
        d_step { read_combined(1); rows = 0 }
#else
        rows = 0
#endif
    od
}

init {
    byte r = 0;
    byte s = 0;
    atomic {
        do
        :: r < N ->
            run Rank(r);
            s = 0;
            do
            :: s < N && s != r -> run Wire(s, r); s++
            :: s == r -> s++
            :: s >= N -> break
            od;
            r++
        :: r >= N -> r = 0; s = 0; break
        od
    }
}
