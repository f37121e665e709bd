/* Threads that compute a call together, each taking the next piece of it when it comes free.
 *
 * Nobody ever waits for a thread that holds no piece: on a machine that is shared, a thread may not
 * run for milliseconds, and the others then do its part. So a thread may come late to a call that
 * is over, and what it was told may be gone. It has a copy of `given`, and follows pointers in it
 * only while it holds a piece.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

#define HIDDEN __attribute__((visibility("hidden")))
#define GIVEN 512                 /* bytes that a thread is told, at most */
#define PHASES 6                  /* of a call, at most */
#define PIECES ((int64_t)1 << 31) /* of a phase, fewer */

/* What each thread runs; call: to be handed on to the functions below. */
typedef void (*Task)(const void *given, uint64_t call);

/* Run a task by so many threads, this one among them. Returns when it has waited for all its
 * phases. `given` is of up to GIVEN bytes. The team is one for all: while another thread has it,
 * the task is run by this one. */
HIDDEN void together(Task task, const void *given, size_t bytes, int threads);

/* The next piece of a phase, -1 when there are no more. */
HIDDEN int64_t take(uint64_t call, int phase, int64_t pieces);

/* A piece that was taken is done. */
HIDDEN void give(uint64_t call, int phase);

/* Wait until all pieces of a phase are done. A task waits for each of its phases. */
HIDDEN void await(uint64_t call, int phase, int64_t pieces);
