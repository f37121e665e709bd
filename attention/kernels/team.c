/* The team of team.h: threads of our own beside OpenMP's, for calls of microseconds.
 *
 * OpenMP's threads all have to arrive at the end of a region, which beside a busy process takes as
 * long as the scheduler lets one of them wait. Here a piece is taken by a compare-and-swap on a
 * counter that names its call, so that a thread that comes late takes none of another call. Waiting
 * threads spin for some ten microseconds, then sleep.
 */
#define _GNU_SOURCE
#include "team.h"

#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MEMBERS 256
#define SPINS 3000  /* looks before a thread sleeps */
#define NAP 1000000 /* nanoseconds, after which a sleeper looks again */

typedef struct { /* a phase's pieces: the call in the upper half, their number in the lower */
    uint64_t dealt __attribute__((aligned(64)));
    uint64_t done __attribute__((aligned(64)));
    int32_t is_awaited;
} Phase;

static struct {
    uint64_t call __attribute__((aligned(64))); /* 0 while it is being told */
    int32_t sleeping, is_taken;
    int members, threads;
    Task task;
    uint64_t given[GIVEN / 8] __attribute__((aligned(64)));
    Phase phases[PHASES];
} team;

static __thread int64_t
    alone[PHASES]; /* pieces that are dealt of a call by one thread, which is number 0 */

#if defined(__x86_64__)
static inline void rest(void) { __builtin_ia32_pause(); }
#else
static inline void rest(void) {}
#endif

/* The lower half of a word, for the futex. */
static inline uint32_t *half(uint64_t *at) { return (uint32_t *)at; }

static void nap(uint64_t *at, uint64_t seen) {
    const struct timespec most = { 0, NAP };
    syscall(SYS_futex, half(at), FUTEX_WAIT_PRIVATE, (uint32_t)seen, &most, 0, 0);
}

static void wake(uint64_t *at) {
    syscall(SYS_futex, half(at), FUTEX_WAKE_PRIVATE, INT_MAX, 0, 0, 0);
}

int64_t take(uint64_t call, int phase, int64_t pieces) {
    if (!call) return alone[phase] < pieces ? alone[phase]++ : -1;
    uint64_t *dealt = &team.phases[phase].dealt, next = __atomic_load_n(dealt, __ATOMIC_RELAXED);
    while (next >> 32 == call && (int64_t)(uint32_t)next < pieces)
        if (__atomic_compare_exchange_n(dealt, &next, next + 1, 0, __ATOMIC_ACQ_REL,
                                        __ATOMIC_RELAXED))
            return (int64_t)(uint32_t)next;
    return -1;
}

void give(uint64_t call, int phase) {
    if (!call) return;
    Phase *at = team.phases + phase;
    __atomic_fetch_add(&at->done, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&at->is_awaited, __ATOMIC_SEQ_CST)) wake(&at->done);
}

void await(uint64_t call, int phase, int64_t pieces) {
    if (!call) return;
    Phase *at = team.phases + phase;
    for (int i = 0;; i++) {
        const uint64_t done = __atomic_load_n(&at->done, __ATOMIC_SEQ_CST);
        if (done >> 32 != call || (int64_t)(uint32_t)done >= pieces) return;
        if (i < SPINS) rest();
        else {
            __atomic_store_n(&at->is_awaited, 1, __ATOMIC_SEQ_CST);
            if (__atomic_load_n(&at->done, __ATOMIC_SEQ_CST) == done) nap(&at->done, done);
        }
    }
}

/* The number of the call that comes after one. */
static uint64_t next_call(uint64_t seen) {
    for (int i = 0;; i++) {
        const uint64_t now = __atomic_load_n(&team.call, __ATOMIC_SEQ_CST);
        if (now && now != seen) return now;
        if (i < SPINS) rest();
        else {
            __atomic_fetch_add(&team.sleeping, 1, __ATOMIC_SEQ_CST);
            syscall(SYS_futex, half(&team.call), FUTEX_WAIT_PRIVATE, (uint32_t)now, 0, 0, 0);
            __atomic_fetch_sub(&team.sleeping, 1, __ATOMIC_SEQ_CST);
        }
    }
}

/* What is told may be told anew meanwhile: it is read a word at a time, and counts only if the call
 * is the same afterwards. */
static void *serve(void *own) {
    uint64_t given[GIVEN / 8] __attribute__((aligned(64)));
    for (uint64_t call = 0;;) {
        call = next_call(call);
        const Task task = __atomic_load_n(&team.task, __ATOMIC_RELAXED);
        const int is_asked = (intptr_t)own < __atomic_load_n(&team.threads, __ATOMIC_RELAXED);
        for (int i = 0; i < GIVEN / 8; i++)
            given[i] = __atomic_load_n(team.given + i, __ATOMIC_RELAXED);
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        if (is_asked && __atomic_load_n(&team.call, __ATOMIC_SEQ_CST) == call) task(given, call);
    }
    return 0;
}

/* Members for so many threads, or as many as the system gives. Called by one thread at a time. */
static void gather(int threads) {
    while (team.members < threads - 1 && team.members < MEMBERS) {
        pthread_t thread;
        if (pthread_create(&thread, 0, serve, (void *)(intptr_t)(team.members + 1))) return;
        pthread_detach(thread);
        team.members++;
    }
}

void together(Task task, const void *given, size_t bytes, int threads) {
    if (threads <= 1 || bytes > GIVEN || __atomic_exchange_n(&team.is_taken, 1, __ATOMIC_ACQUIRE)) {
        memset(alone, 0, sizeof alone);
        task(given, 0);
        return;
    }
    static uint64_t last;
    last = last % UINT32_MAX + 1;
    gather(threads);
    __atomic_store_n(&team.call, 0, __ATOMIC_SEQ_CST);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    for (int i = 0; i < PHASES; i++) {
        __atomic_store_n(&team.phases[i].is_awaited, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&team.phases[i].done, last << 32, __ATOMIC_RELAXED);
        __atomic_store_n(&team.phases[i].dealt, last << 32, __ATOMIC_RELEASE);
    }
    __atomic_store_n(&team.task, task, __ATOMIC_RELAXED);
    __atomic_store_n(&team.threads, threads, __ATOMIC_RELAXED);
    for (size_t i = 0; i < (bytes + 7) / 8; i++) {
        uint64_t word = 0;
        memcpy(&word, (const char *)given + 8 * i, bytes - 8 * i < 8 ? bytes - 8 * i : 8);
        __atomic_store_n(team.given + i, word, __ATOMIC_RELAXED);
    }
    __atomic_store_n(&team.call, last, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&team.sleeping, __ATOMIC_SEQ_CST)) wake(&team.call);
    task(given, last);
    __atomic_store_n(&team.is_taken, 0, __ATOMIC_RELEASE);
}

/* Let the team come to be, so that its members can be told from other threads. */
const char *gather_team(int threads) {
    if (threads < 1) return "there must be threads";
    if (__atomic_exchange_n(&team.is_taken, 1, __ATOMIC_ACQUIRE)) return 0;
    gather(threads);
    __atomic_store_n(&team.is_taken, 0, __ATOMIC_RELEASE);
    return 0;
}

/* No struct is told from outside. */
const int64_t team_layout[] = { -1 };
