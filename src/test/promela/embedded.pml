/* Few tokens: the epoch rides in the data. A proposal, not yet a kernel.
 *
 * A header and a row are lines: payload and epoch in one store, landing whole, in any order. The
 * receiver polls each line it needs for exactly its epoch. A home rank that has rows at a peer learns
 * from its result lines that the peer has read them; one without rows there needs the combine flag.
 * A late block of the combine kernel still looks at headers when all result lines are home.
 * Epochs do not wrap: here the stamps are the mechanism, and an old line stays until it is written over.
 *
 * -DRANKS=2..3   -DSTEPS=n   -DNO_WIRE the lines of a dispatch land together, results one by one (3 ranks)
 * Mutants: HEADERS_NOT_COPIED NO_FLAG_WITHOUT_ROWS SPLIT_LINE ONE_BIT_EPOCH
 */
#ifndef RANKS
#define RANKS 2
#endif
#ifndef STEPS
#define STEPS 4
#endif
#define N RANKS
#define AT(owner, from) ((owner) * N + (from))
#define NONE 0
#define HEADER(e, row) (2 * (e) + (row))
/* A line read for the last time; the mutant reads headers again */
#ifdef HEADERS_NOT_COPIED
#define FORGET(cell) skip
#else
#define FORGET(cell) cell = NONE
#endif
#define ROW_FOR(i) ((rows >> (i)) % 2)
#ifdef ONE_BIT_EPOCH
#define LINE_EPOCH(e) (1 + (e) % 2)
#else
#define LINE_EPOCH(e) (e)
#endif

/* Symmetric region of each rank, [owner][from]; rows and results as payload and epoch */
byte header[N * N];
byte row[N * N];
byte row_epoch[N * N];
byte result[N * N];
byte combine_flag[N * N];

#ifdef NO_WIRE
#define sent_header header
#define sent_row row
#define sent_row_epoch row_epoch
#define sent_result result
#define sent_combine_flag combine_flag
#else
/* On the wire, [to][from] */
byte sent_header[N * N];
byte sent_row[N * N];
byte sent_row_epoch[N * N];
byte sent_result[N * N];
byte sent_combine_flag[N * N];

proctype Wire(byte from, to) {
end:
    do
    :: d_step { sent_header[AT(to, from)] != NONE ->
           header[AT(to, from)] = sent_header[AT(to, from)]; sent_header[AT(to, from)] = NONE }
#ifdef SPLIT_LINE
    :: d_step { sent_row[AT(to, from)] != NONE ->
           row[AT(to, from)] = sent_row[AT(to, from)]; sent_row[AT(to, from)] = NONE }
    :: d_step { sent_row_epoch[AT(to, from)] != NONE ->
           row_epoch[AT(to, from)] = sent_row_epoch[AT(to, from)];
           sent_row_epoch[AT(to, from)] = NONE }
#else
    :: d_step { sent_row[AT(to, from)] != NONE ->
           row[AT(to, from)] = sent_row[AT(to, from)]; sent_row[AT(to, from)] = NONE;
           row_epoch[AT(to, from)] = sent_row_epoch[AT(to, from)];
           sent_row_epoch[AT(to, from)] = NONE }
#endif
    :: d_step { sent_result[AT(to, from)] != NONE ->
           result[AT(to, from)] = sent_result[AT(to, from)]; sent_result[AT(to, from)] = NONE }
    :: d_step { sent_combine_flag[AT(to, from)] != NONE ->
           combine_flag[AT(to, from)] = sent_combine_flag[AT(to, from)];
           sent_combine_flag[AT(to, from)] = NONE }
    od
}
#endif

proctype Rank(byte me) {
    byte e = 0;
    byte rows = 0;              /* bit d: this step has a row for rank d */
    byte copied = 0;            /* bit s: the header of s, copied by dispatch, names a row */
    byte i = 0;
    do
    :: e == STEPS -> break
    :: e < STEPS ->
        atomic {                /* any routing; dispatch sends a header to all, rows to some */
            e++;
            do
            :: i < N && i != me ->
                if
                :: d_step {
                       rows = rows | (1 << i);
                       sent_row[AT(i, me)] = e;
                       sent_row_epoch[AT(i, me)] = LINE_EPOCH(e)
                   }
                :: true
                fi;
                sent_header[AT(i, me)] = HEADER(e, ROW_FOR(i));
                i++
            :: i == me -> i++
            :: i >= N -> break
            od;
            i = 0
        }
        do                      /* poll headers and rows, copy and unpack */
        :: i < N && i != me ->
            d_step {
                header[AT(me, i)] / 2 == e;
                copied = copied | ((header[AT(me, i)] % 2) << i);
                FORGET(header[AT(me, i)])
            }
            if
            :: (copied >> i) % 2 == 0
            :: d_step { (copied >> i) % 2 == 1 && row_epoch[AT(me, i)] == LINE_EPOCH(e) ->
                   assert(row[AT(me, i)] == e) }
            fi;
            i++
        :: i == me -> i++
        :: i >= N -> break
        od;
        i = 0;
        do                      /* result lines home, and a flag where there is none */
        :: atomic { i < N && i != me ->
               if
               :: (copied >> i) % 2 == 1 -> sent_result[AT(i, me)] = e
#ifdef NO_FLAG_WITHOUT_ROWS
               :: else
#else
               :: else -> sent_combine_flag[AT(i, me)] = e
#endif
               fi;
               i++ }
        :: atomic { i == me -> i++ }
        :: i >= N -> break
        od;
        i = 0;
#ifdef HEADERS_NOT_COPIED
        d_step {                /* the late block */
            do
            :: i < N -> assert(i == me || header[AT(me, i)] / 2 == e); i++
            :: else -> break
            od;
            i = 0
        }
#endif
        copied = 0;
        do                      /* combine_recv */
        :: i < N && i != me ->
            if
            :: atomic { ROW_FOR(i) == 1 && result[AT(me, i)] == e -> result[AT(me, i)] = NONE }
#ifdef NO_FLAG_WITHOUT_ROWS
            :: ROW_FOR(i) == 0
#else
            :: ROW_FOR(i) == 0 && combine_flag[AT(me, i)] >= e ->
                assert(combine_flag[AT(me, i)] == e)
#endif
            fi;
            i++
        :: i == me -> i++
        :: i >= N -> break
        od;
        i = 0;
        rows = 0
    od
}

init {
    byte r = 0;
    byte s = 0;
    atomic {
        do
        :: r < N ->
            run Rank(r);
#ifndef NO_WIRE
            s = 0;
            do
            :: s < N && s != r -> run Wire(s, r); s++
            :: s == r -> s++
            :: s >= N -> break
            od;
#endif
            r++
        :: r >= N -> r = 0; s = 0; break
        od
    }
}
