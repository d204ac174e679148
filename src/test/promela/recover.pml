/* A bound expires, the group goes silent, recovers with a new generation and computes again.
 *
 * Cells, wires and reads as in replay.pml; every pair has a row. Epochs do not wrap here: an epoch is
 * generation * 4 + step, as the u64 is generation << 48 | step. In generation 0 any wait may expire at
 * any time while its flag is missing (EXPIRIES of them in all); a rank whose wait failed sends nothing
 * more, and its host may stop enqueueing. Then recover(): wait for the own stream, meet the other
 * members, epoch = generation << 48, clear the fault, leave every word that peers write alone. In the
 * last generation nothing may expire, so each rank must end with every step valid: a stale or late
 * word that hurts shows as a failed assertion or a rank that waits for ever.
 *
 * The host is told of a step when the kernel that combines begins, before the step can no longer fail. It
 * takes for valid what was told, but nothing from the step on that the error record names, and it asks when
 * the stream has ended. AS_IMPLEMENTED tells at the end, as the wire of rows still does.
 *
 * Abort: the thread that claims the error record stores the generation into the abort word [from] of
 * each peer; every wait looks at these words until its flags are there. -DAS_IMPLEMENTED: the kernels
 * as they were: no generation, no abort words, a silent rank's next flags carry ABORT instead.
 *
 * -DRANKS=2..3   -DFIRST_STEPS=n of generation 0   -DEXPIRIES=n   -DGENERATIONS=1|2   -DSPLIT_WIRE payload and flag land one by one
 * -DNO_WIRE      stores land as issued, one destination after the other (for 3 ranks)
 * -DDEATH        the last rank may die before any stage of generation 0; with one expiry, that of another
 * -DHOST_STOPS   the host of a rank with a fault may enqueue no further step (AS_IMPLEMENTED only;
 *                otherwise it always may)
 * -DEVICT        the last rank does not come to recover(), and runs on as a zombie
 * -DREPLACE      and a new process takes its place, in slots of its own
 * -DUNCHECKED    a flag ahead of the epoch is no error of its own: a mutant must show in the data
 * Mutants: NO_GENERATION EPOCH_KEPT NO_MEETING FLAGS_CLEARED NOT_SILENT ABORT_WITHOUT_GENERATION
 *          VALID_AS_TOLD the host takes for valid what it was told  ASKED_TOO_EARLY before the stream has ended
 *          WAIT_EQUAL (AS_IMPLEMENTED) WRITE_TO_EVICTED (EVICT) REUSED_SLOTS (REPLACE)
 */
#ifndef RANKS
#define RANKS 2
#endif
#ifndef EXPIRIES
#define EXPIRIES RANKS
#endif
#ifndef GENERATIONS
#define GENERATIONS 2
#endif
#ifdef REPLACE
#define EVICT
#define N (RANKS + 1)           /* processes; the newcomer is the last */
#else
#define N RANKS
#endif
#ifndef FIRST_STEPS
#define FIRST_STEPS 2           /* of generation 0 */
#endif
#define STEPS (generation == 0 -> FIRST_STEPS : 2)
#define AT(owner, slot) ((owner) * N + (slot))
#define NONE 0
#define ABORT 15                /* kAbortEpoch */
#ifdef REUSED_SLOTS
#define SLOT(process) ((process) == RANKS -> RANKS - 1 : (process))
#else
#define SLOT(process) (process)
#endif

#define EVERYONE ((1 << RANKS) - 1)
#ifdef EVICT
#define SURVIVORS ((1 << (RANKS - 1)) - 1)
#else
#define SURVIVORS EVERYONE
#endif
#ifdef REPLACE
#define NEXT_MEMBERS (SURVIVORS | 1 << RANKS)
#else
#define NEXT_MEMBERS SURVIVORS
#endif

/* Symmetric region of each process, [owner][slot] */
byte dispatch_flag[N * N];
byte combine_flag[N * N];
byte abort_word[N * N];         /* generation + 1 */
byte recv[N * N];               /* epoch that wrote it */
byte combined[N * N];

/* On the wire, [to][from] */
byte sent_dispatch_flag[N * N];
byte sent_combine_flag[N * N];
byte sent_abort[N * N];
byte sent_recv[N * N];
byte sent_combined[N * N];

byte expiries;                  /* waits that have expired */
byte quiet;                     /* bit r: rank r's stream is empty and its host waits in recover() */

#ifndef NO_WIRE
proctype Wire(byte from, to) {
end:
    do
#ifdef SPLIT_WIRE
    :: d_step { sent_recv[AT(to, from)] != NONE ->
           recv[AT(to, SLOT(from))] = sent_recv[AT(to, from)]; sent_recv[AT(to, from)] = NONE }
    :: d_step { sent_combined[AT(to, from)] != NONE ->
           combined[AT(to, SLOT(from))] = sent_combined[AT(to, from)];
           sent_combined[AT(to, from)] = NONE }
#define RECV_LANDS sent_recv[AT(to, from)] == NONE
#define COMBINED_LANDS sent_combined[AT(to, from)] == NONE
#define LAND_RECV skip
#define LAND_COMBINED skip
#else
#define RECV_LANDS true
#define COMBINED_LANDS true
#define LAND_RECV \
    recv[AT(to, SLOT(from))] = (sent_recv[AT(to, from)] -> sent_recv[AT(to, from)] : recv[AT(to, SLOT(from))]); \
    sent_recv[AT(to, from)] = NONE
#define LAND_COMBINED \
    combined[AT(to, SLOT(from))] = (sent_combined[AT(to, from)] -> sent_combined[AT(to, from)] : combined[AT(to, SLOT(from))]); \
    sent_combined[AT(to, from)] = NONE
#endif
    :: d_step { sent_dispatch_flag[AT(to, from)] != NONE && RECV_LANDS ->
           LAND_RECV;
           dispatch_flag[AT(to, SLOT(from))] = sent_dispatch_flag[AT(to, from)];
           sent_dispatch_flag[AT(to, from)] = NONE }
    :: d_step { sent_combine_flag[AT(to, from)] != NONE && COMBINED_LANDS ->
           LAND_COMBINED;
           combine_flag[AT(to, SLOT(from))] = sent_combine_flag[AT(to, from)];
           sent_combine_flag[AT(to, from)] = NONE }
    :: d_step { sent_abort[AT(to, from)] != NONE ->
           abort_word[AT(to, SLOT(from))] = sent_abort[AT(to, from)];
           sent_abort[AT(to, from)] = NONE }
    od
}

#endif

#ifdef NO_GENERATION
#define FLAG(e) ((e) % 4)       /* the payload keeps its generation: it is what the proof watches */
#else
#define FLAG(e) (e)
#endif
#define PEER(i) ((i) < N && (i) != me && (members >> (i)) % 2 == 1)
#define WORD(words, i) words[AT(me, SLOT((i) % N))]
#ifdef WAIT_EQUAL
#define HERE(flags, i) (!PEER(i) || WORD(flags, i) == FLAG(e))
#else
#define HERE(flags, i) (!PEER(i) || WORD(flags, i) >= FLAG(e))
#endif
#define ALL_HERE(flags) (HERE(flags, 0) && HERE(flags, 1) && HERE(flags, 2) && HERE(flags, 3))
#if defined(NO_GENERATION) || defined(UNCHECKED)
#define LEVEL(flags, i) true
#elif defined(AS_IMPLEMENTED)
#define LEVEL(flags, i) (!PEER(i) || WORD(flags, i) == e || WORD(flags, i) == ABORT)
#else
#define LEVEL(flags, i) (!PEER(i) || WORD(flags, i) == e)
#endif
#define NOBODY_IS_AHEAD(flags) \
    assert(LEVEL(flags, 0) && LEVEL(flags, 1) && LEVEL(flags, 2) && LEVEL(flags, 3))

#ifdef AS_IMPLEMENTED
#define ABORTS(flags, i) (PEER(i) && !SEEN(i) && WORD(flags, i) == ABORT && HERE(flags, i))
#elif defined(ABORT_WITHOUT_GENERATION)
#define ABORTS(flags, i) (PEER(i) && WORD(abort_word, i) != 0)
#else
#define ABORTS(flags, i) (PEER(i) && WORD(abort_word, i) == generation + 1)
#endif
#define ABORTED(flags) (ABORTS(flags, 0) || ABORTS(flags, 1) || ABORTS(flags, 2) || ABORTS(flags, 3))
#ifdef AS_IMPLEMENTED
/* Thread i polls flag i until it is there, and looks no more */
#define SEEN(i) ((seen >> (i)) % 2 == 1)
#define DONE(i) (!PEER(i) || SEEN(i))
#define LOOK(flags, i) atomic { !fault && PEER(i) && !SEEN(i) && HERE(flags, i) && WORD(flags, i) != ABORT -> seen = seen | (1 << (i)) }
#define GOOD(flags) (DONE(0) && DONE(1) && DONE(2) && DONE(3))
#define ENDED(flags) ABORTED(flags)
#else
#define GOOD(flags) ALL_HERE(flags)
#define ENDED(flags) (!ALL_HERE(flags) && ABORTED(flags))
#endif
#if defined(DEATH) && EXPIRIES == 1
#define MORTAL(process) ((process) == RANKS - 1)    /* it must not use up the one expiry */
#else
#define MORTAL(process) false
#endif
#define MAY_EXPIRE(flags) (!ALL_HERE(flags) && generation == 0 && expiries < EXPIRIES && !MORTAL(me))

#ifdef NOT_SILENT
#define SENDS true
#else
#define SENDS !fault
#endif
#if defined(WRITE_TO_EVICTED)
#define TARGET(i) (i < RANKS && i != me)
#else
#define TARGET(i) PEER(i)
#endif

/* A silent rank's flags: none; as implemented, the abort epoch */
#ifdef AS_IMPLEMENTED
#define FLAG_TO_SEND(flag) (SENDS -> e : ABORT)
#else
#define FLAG_TO_SEND(flag) (SENDS -> FLAG(e) : (flag))
#endif
#ifdef NO_WIRE
#define LANDS(cell, flag, to) cell[AT(to, SLOT(me))] = (SENDS -> e : cell[AT(to, SLOT(me))]); \
    flag[AT(to, SLOT(me))] = FLAG_TO_SEND(flag[AT(to, SLOT(me))])
#define SEND(cell, flag) TO_ALL(TARGET(i), LANDS(cell, flag, i))
#define ABORT_TO(to) abort_word[AT(to, SLOT(me))] = generation + 1
#define WHOLE
#define EACH(...) atomic { __VA_ARGS__ }   /* destination; the others run in between */
#else
#define ISSUE(cell, flag, to) sent_##cell[AT(to, me)] = (SENDS -> e : sent_##cell[AT(to, me)]); \
    sent_##flag[AT(to, me)] = FLAG_TO_SEND(sent_##flag[AT(to, me)])
#define SEND(cell, flag) TO_ALL(TARGET(i), ISSUE(cell, flag, i))
#define ABORT_TO(to) sent_abort[AT(to, me)] = generation + 1
#define WHOLE d_step
#define EACH(...) __VA_ARGS__
#endif
#define TO_ALL(condition, store) \
    WHOLE { \
        i = 0; \
        do \
        :: EACH(i < N && condition -> store; i++) \
        :: EACH(i < N && !(condition) -> i++) \
        :: i >= N -> break \
        od; \
        i = 0 \
    }
/* claim_error_record: the thread that sets the fault tells the peers */
#ifdef AS_IMPLEMENTED
#define TELL_PEERS skip
#else
#define TELL_PEERS \
    if \
    :: atomic { fault && !told -> told = 1 }; TO_ALL(PEER(i), ABORT_TO(i)) \
    :: else \
    fi
#endif
/* The last read clears the cell */
#define READ_ALL(cells, last) \
    i = 0; \
    do \
    :: i < N -> assert(!PEER(i) || WORD(cells, i) == e); \
        WORD(cells, i) = (last && PEER(i) -> NONE : WORD(cells, i)); \
        i++ \
    :: else -> break \
    od; \
    i = 0

#ifdef DEATH
#define MAY_DIE if :: me == RANKS - 1 && generation == 0 -> goto dead :: true fi
#else
#define MAY_DIE skip
#endif
#define WIRE_EMPTY(i) ((i) >= N || (sent_recv[AT((i) % N, me)] == NONE && sent_combined[AT((i) % N, me)] == NONE \
    && sent_dispatch_flag[AT((i) % N, me)] == NONE && sent_combine_flag[AT((i) % N, me)] == NONE \
    && sent_abort[AT((i) % N, me)] == NONE))
#define STREAM_ENDED (WIRE_EMPTY(0) && WIRE_EMPTY(1) && WIRE_EMPTY(2) && WIRE_EMPTY(3))

#ifdef AS_IMPLEMENTED
#define FORGET_SEEN seen = 0
#else
#define FORGET_SEEN skip
#endif

/* What the host takes for the last valid step */
#ifdef VALID_AS_TOLD
#define VALID told_of
#else
#define VALID (fault && failed <= told_of -> failed - 1 : told_of)
#endif
#define FAIL fault = 1; failed = e
#ifdef AS_IMPLEMENTED
#define TELL_EARLY skip
#else
#define TELL_EARLY told_of = e
#endif

proctype Rank(byte me; byte generation) {
    byte members = (generation == 0 -> EVERYONE : NEXT_MEMBERS);
    byte e = generation * 4;
    byte told_of = 0;           /* valid_epoch of the error record */
    byte failed = 0;            /* epoch of the error record */
    byte done = 0;              /* the last step whose results were all read */
    byte step = 0;
    byte i = 0;
    bit fault = 0;              /* arrivals[kFaultClaimed] */
    bit told = 0;
#ifdef AS_IMPLEMENTED
    byte seen = 0;
#endif

next_step:
    if
    :: step == STEPS -> goto ended
    :: step < STEPS -> skip
#if !defined(AS_IMPLEMENTED) || defined(HOST_STOPS)
    :: step < STEPS && fault -> goto ended
#endif
    fi;
    MAY_DIE;
    atomic { step++; e++ }
    SEND(recv, dispatch_flag);
    MAY_DIE;
    /* moe_dispatch_recv */
    do
    :: atomic { fault -> break }
    :: d_step { !fault && GOOD(dispatch_flag) -> NOBODY_IS_AHEAD(dispatch_flag); READ_ALL(recv, 0) }; break
    :: d_step { !fault && ENDED(dispatch_flag) -> FAIL }; break
    :: d_step { !fault && MAY_EXPIRE(dispatch_flag) -> expiries++; FAIL }; break
#ifdef AS_IMPLEMENTED
    :: LOOK(dispatch_flag, 0)
    :: LOOK(dispatch_flag, 1)
    :: LOOK(dispatch_flag, 2)
#endif
    od;
    FORGET_SEEN;
    TELL_PEERS;
    MAY_DIE;
    /* GEMMs and moe_combine_send; after a fault nothing is read */
    if
    :: atomic { fault -> skip }
    :: d_step { !fault -> READ_ALL(recv, 1); TELL_EARLY }
    fi;
#ifdef ASKED_TOO_EARLY
    assert(VALID <= done);
#endif
    SEND(combined, combine_flag);
    MAY_DIE;
    /* moe_combine_recv: the wait and first read; last read */
    do
    :: atomic { fault -> break }
    :: d_step { !fault && GOOD(combine_flag) -> NOBODY_IS_AHEAD(combine_flag); READ_ALL(combined, 0) };
       d_step { READ_ALL(combined, 1); told_of = e; done = e }; break
    :: d_step { !fault && ENDED(combine_flag) -> FAIL }; break
    :: d_step { !fault && MAY_EXPIRE(combine_flag) -> expiries++; FAIL }; break
#ifdef AS_IMPLEMENTED
    :: LOOK(combine_flag, 0)
    :: LOOK(combine_flag, 1)
    :: LOOK(combine_flag, 2)
#endif
    od;
    FORGET_SEEN;
    TELL_PEERS;
    goto next_step;

ended:
#if defined(AS_IMPLEMENTED) && !defined(HOST_STOPS)
    if                          /* the host goes on: the flags of the next step */
    :: fault -> SEND(recv, dispatch_flag); SEND(combined, combine_flag)
    :: else
    fi;
#endif
    assert(fault || VALID == e);
    assert(VALID == done);
    assert(!fault || expiries > 0);
    assert(generation == 0 || !fault);
    if
    :: generation + 1 < GENERATIONS && (SURVIVORS >> me) % 2 == 1 ->
        /* recover() */
        atomic { STREAM_ENDED -> quiet = quiet | (1 << me) }
#ifndef NO_MEETING
        (quiet & SURVIVORS) == SURVIVORS;
#endif
        atomic {
            generation++;
            members = NEXT_MEMBERS;
#ifndef EPOCH_KEPT
            e = generation * 4;
#endif
#ifdef FLAGS_CLEARED
            do
            :: i < N -> dispatch_flag[AT(me, i)] = 0; combine_flag[AT(me, i)] = 0; i++
            :: else -> break
            od;
            i = 0;
#endif
            fault = 0;
            told = 0;
            step = 0;
            told_of = 0;
            done = 0;
            failed = 0
        }
        goto next_step
    :: else
    fi;
dead:
    skip
}

#ifdef REPLACE
proctype Newcomer() {
    (quiet & SURVIVORS) == SURVIVORS;
    run Rank(RANKS, 1)
}
#endif

/* Zombie and newcomer never meet */
#define TALKS(a, b) (N == RANKS || (a) + (b) != 2 * RANKS - 1)

init {
    byte r = 0;
    byte s = 0;
    atomic {
        do
        :: r < N ->
            if
            :: r < RANKS -> run Rank(r, 0)
            :: else
            fi;
#ifndef NO_WIRE
            s = 0;
            do
            :: s < N && s != r && TALKS(r, s) -> run Wire(s, r); s++
            :: s < N && !(s != r && TALKS(r, s)) -> s++
            :: s >= N -> break
            od;
#endif
            r++
        :: r >= N -> r = 0; s = 0; break
        od;
#ifdef REPLACE
        run Newcomer()
#endif
    }
}
