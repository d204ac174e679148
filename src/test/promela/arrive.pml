/* arrive_is_last of signal.cuh: the last block of a kernel raises the flag for all of them.
 *
 * Blocks store, fence, add to the counter; the one whose add is the last sets it back to zero and
 * stores the flag with release. A block's stores land when they like, at the latest at its fence. A
 * peer that sees the flag of a step must see the stores of every block of it. STEPS kernels in stream
 * order use the same counter.
 *
 * -DBLOCKS=n   -DSTEPS=n
 * Mutants: NO_FENCE FIRST_BLOCK_FLAGS COUNTER_NOT_CLEARED
 */
#ifndef BLOCKS
#define BLOCKS 3
#endif
#ifndef STEPS
#define STEPS 3
#endif

byte counter;
byte flag;
byte stored[BLOCKS];            /* step of the newest store that has been issued */
byte landed[BLOCKS];            /* and that peers can see */
byte ended;                     /* blocks of the running kernel that have ended */
byte kernel = 1;

proctype Memory(byte block) {
end:
    do
    :: d_step { landed[block] != stored[block] -> landed[block] = stored[block] }
    od
}

proctype Block(byte me) {
    byte step = 1;
    bit last = 0;
    do
    :: step > STEPS -> break
    :: atomic { step <= STEPS && kernel == step -> stored[me] = step }
#ifndef NO_FENCE
        landed[me] == stored[me];
#endif
        atomic {
            counter++;
#ifdef FIRST_BLOCK_FLAGS
            last = (counter == 1);
            counter = (counter == BLOCKS -> 0 : counter)
#else
            last = (counter == BLOCKS)
#endif
        }
        if
        :: last ->
#if !defined(COUNTER_NOT_CLEARED) && !defined(FIRST_BLOCK_FLAGS)
            counter = 0;
#endif
            /* release: this block's own stores, and those of others that were fenced */
            atomic { landed[me] == stored[me] -> flag = step }
        :: else
        fi;
        d_step {
            last = 0;
            step++;
            ended++;
            if
            :: ended == BLOCKS -> ended = 0; kernel++
            :: else
            fi
        }
    od
}

proctype Peer() {
    byte step = 1;
    byte b = 0;
    do
    :: step > STEPS -> break
    :: step <= STEPS ->
        flag >= step;
        do
        :: b < BLOCKS -> assert(landed[b] >= step); b++
        :: b >= BLOCKS -> b = 0; break
        od;
        step++
    od
}

init {
    byte b = 0;
    atomic {
        run Peer();
        do
        :: b < BLOCKS -> run Block(b); run Memory(b); b++
        :: b >= BLOCKS -> b = 0; break
        od
    }
}
