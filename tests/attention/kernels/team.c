/* Calls of the team from several threads at once, and from a process that forks between them, each
 * in memory of its own that is gone behind it: what ThreadSanitizer looks at. Prints what went
 * wrong, nothing otherwise. */
#include "team.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#define CALLS 3000
#define CALLERS 3

typedef struct {
    int64_t *counts, pieces, more;
} Counting;

static void count(const void *given, uint64_t call) {
    const Counting *c = given;
    for (int phase = 0; phase < PHASES; phase++) {
        for (int64_t p; (p = take(call, phase, c->pieces)) >= 0; give(call, phase)) {
            const int64_t other =
                c->counts[phase % 2 * c->pieces +
                          (p + 1) % c->pieces]; /* of another piece, a phase ago */
            c->counts[(phase + 1) % 2 * c->pieces + p] = other + c->more;
        }
        await(call, phase, c->pieces);
    }
}

static void *call_on(void *unused) {
    for (int i = 0; i < CALLS; i++) {
        const int64_t pieces = 1 + i % 37;
        int64_t *counts = calloc(2 * pieces, sizeof *counts);
        const Counting told = { counts, pieces, i };
        together(count, &told, sizeof told, 2 + i % 4);
        for (int64_t p = 0; p < pieces; p++)
            if (counts[PHASES % 2 * pieces + p] != (int64_t)PHASES * i)
                printf("piece %ld of call %d\n", (long)p, i);
        free(counts);
    }
    return unused;
}

int main(void) {
    pthread_t callers[CALLERS];
    for (int i = 0; i < CALLERS; i++) pthread_create(callers + i, 0, call_on, 0);
    for (int i = 0; i < CALLERS; i++) pthread_join(callers[i], 0);
    const pid_t child = fork();
    call_on(0);
    if (!child) {
        fflush(stdout);
        _exit(0);
    }
    int status = 1;
    waitpid(child, &status, 0);
    if (status) printf("the child ended with %d\n", status);
    return 0;
}
