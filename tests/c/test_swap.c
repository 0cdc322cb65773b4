/* Windows over a file: every pass sees what the one before left, whatever the buffers. */
#define _GNU_SOURCE
#include "swap.h"

#include "alloc.h"
#include "arena.h"
#include "case.h"

#include <errno.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

enum { N = 2 * DSC_SWAP_ELEMS + 3 * DSC_BLOCK }; /* the last window is short */

static char folder[] = "/var/tmp/dsc_test_XXXXXX";

static struct dsc_swap_options options_of(enum dsc_io_kind kind, int64_t n_buffers) {
    return (struct dsc_swap_options){folder, n_buffers, {kind, 1 << 20, 8, 1, false, false}};
}

/* One step over everything, in pieces: element i of tensor t goes from before * (t + 1) + i % 7 (at
 * first: 0) to the same with before + 1. */
static void pass(struct dsc_swap *swap, int first, float before) {
    struct dsc_swap_window window;
    for (size_t at = 0; at < N; at += 100 * DSC_BLOCK) {
        size_t end = dsc_min(at + 100 * DSC_BLOCK, N);
        for (size_t i = at; i < end; i++) {
            if (i == at || i == window.end)
                CHECK_OK(dsc_swap_take(swap, i, &window));
            CHECK(window.begin <= i && i < window.end);
            for (int t = first; t < DSC_SWAP_TENSORS; t++) {
                float *x = &window.tensors[t][i - window.begin];
                CHECK(*x == before * (float)(t + 1) + (float)(before != 0) * (float)(i % 7));
                *x = (before + 1) * (float)(t + 1) + (float)(i % 7);
            }
        }
    }
    CHECK_OK(dsc_swap_finish(swap));
}

static void run(enum dsc_io_kind kind, int64_t n_buffers, int first) {
    struct dsc_swap_options options = options_of(kind, n_buffers);
    struct dsc_io *io = NULL;
    struct dsc_swap *swap;
    float *mapped[DSC_SWAP_TENSORS] = {NULL};
    if (dsc_io_open(&options.io, &io) != DSC_OK)
        return; /* no io_uring on this machine */
    CHECK_OK(dsc_swap_open(io, &options, "test", N, first, DSC_SWAP_TENSORS - first, &swap));
    CHECK_EQ_INT(dsc_swap_memory_bytes(swap),
                 dsc_swap_private_bytes(N, DSC_SWAP_TENSORS - first, n_buffers));
    for (int t = first; t < DSC_SWAP_TENSORS; t++)
        CHECK_OK(dsc_swap_map(swap, t, &mapped[t]));
    pass(swap, first, 0);
    dsc_swap_begin(swap);
    dsc_swap_drop(swap); /* a step that was skipped */
    dsc_swap_begin(swap);
    pass(swap, first, 1);
    for (int t = first; t < DSC_SWAP_TENSORS; t++)
        for (size_t i = 0; i < N; i += 997)
            CHECK(mapped[t][i] == 2 * (float)(t + 1) + (float)(i % 7));
    for (int t = first; t < DSC_SWAP_TENSORS; t++)
        for (size_t i = 0; i < N; i++)
            mapped[t][i] += (float)(t + 1); /* somebody edits */
    pass(swap, first, 3);
    CHECK(!dsc_swap_failed(swap));
    dsc_swap_close(swap);
    dsc_io_close(io);
    for (int t = first; t < DSC_SWAP_TENSORS; t++)
        dsc_arena_free(mapped[t], N * sizeof(float));
}

static void every_pass_sees_what_the_one_before_left(void) {
    CHECK(mkdtemp(folder));
    for (int64_t n_buffers = 1; n_buffers <= 4; n_buffers++)
        run(DSC_IO_BEST, n_buffers, DSC_SWAP_MASTER);
    run(DSC_IO_THREADS, 2, DSC_SWAP_STATE);
    run(DSC_IO_THREADS, 3, DSC_SWAP_MASTER);
    CHECK_EQ_INT(rmdir(folder), 0);
    CHECK_EQ_INT(dsc_alloc_counters().n_live, 0);
}

/* In a child: its copy of a swap goes, and the memory that direct I/O reaches is not there. */
static void leave(struct dsc_swap *swap, struct dsc_io *io, const void *window) {
    int there = msync((void *)((uintptr_t)window / 4096 * 4096), 4096, MS_ASYNC) == 0;
    dsc_swap_close(swap);
    dsc_io_close(io);
    _exit(there || errno != ENOMEM);
}

static void children_forked_in_a_pass_change_nothing(void) {
    enum { N_CHILDREN = 8 };
    struct dsc_swap_options options = options_of(DSC_IO_BEST, 2);
    struct dsc_io *io;
    struct dsc_swap *swap;
    struct dsc_swap_window window;
    float *mapped;
    CHECK(mkdtemp(folder));
    CHECK_OK(dsc_io_open(&options.io, &io));
    CHECK_OK(dsc_swap_open(io, &options, "test", N, DSC_SWAP_MASTER, 1, &swap));
    CHECK_OK(dsc_swap_map(swap, DSC_SWAP_MASTER, &mapped));
    for (int i = 0; i < N_CHILDREN; i++) {
        for (size_t at = 0; at < N; at += DSC_SWAP_ELEMS) {
            CHECK_OK(dsc_swap_take(swap, at, &window)); /* the next one is being read */
            pid_t child = fork();
            if (child == 0)
                leave(swap, io, window.tensors[DSC_SWAP_MASTER]);
            for (size_t e = 0; e < window.end - window.begin; e++)
                window.tensors[DSC_SWAP_MASTER][e] += (float)(at + e);
            int how;
            CHECK_EQ_INT(waitpid(child, &how, 0), child);
            CHECK_EQ_INT(how, 0);
        }
        CHECK_OK(dsc_swap_finish(swap));
    }
    for (size_t e = 0; e < N; e++)
        CHECK(mapped[e] == N_CHILDREN * (float)e);
    dsc_swap_close(swap);
    dsc_io_close(io);
    dsc_arena_free(mapped, N * sizeof(float));
    CHECK_EQ_INT(rmdir(folder), 0);
}

static void a_pass_allocates_nothing(void) {
    struct dsc_swap_options options = options_of(DSC_IO_BEST, 4);
    struct dsc_io *io;
    struct dsc_swap *swap;
    float *mapped;
    CHECK(mkdtemp(folder));
    CHECK_OK(dsc_io_open(&options.io, &io));
    CHECK_OK(dsc_swap_open(io, &options, "test", N, DSC_SWAP_STATE + 1, 1, &swap));
    CHECK_OK(dsc_swap_map(swap, DSC_SWAP_STATE + 1, &mapped));
    uint64_t before = dsc_alloc_counters().n_calls;
    pass(swap, DSC_SWAP_STATE + 1, 0);
    CHECK_EQ_INT(dsc_alloc_counters().n_calls, before);
    dsc_swap_close(swap);
    dsc_io_close(io);
    dsc_arena_free(mapped, N * sizeof(float));
    CHECK_EQ_INT(rmdir(folder), 0);
}

static void a_write_that_fails_is_found_and_dropped(void) {
    struct dsc_swap_options options = options_of(DSC_IO_BEST, 2);
    struct dsc_io *io;
    struct dsc_swap *swap;
    struct dsc_swap_window window;
    struct rlimit before, limit;
    float *mapped;
    CHECK(mkdtemp(folder));
    (void)signal(SIGXFSZ, SIG_IGN);
    CHECK_OK(dsc_io_open(&options.io, &io));
    CHECK_OK(dsc_swap_open(io, &options, "test", N, DSC_SWAP_STATE, 1, &swap));
    CHECK_OK(dsc_swap_map(swap, DSC_SWAP_STATE, &mapped));
    CHECK_EQ_INT(getrlimit(RLIMIT_FSIZE, &before), 0);
    limit = before;
    limit.rlim_cur = 1 << 20;
    CHECK_EQ_INT(setrlimit(RLIMIT_FSIZE, &limit), 0);
    enum dsc_status status = DSC_OK;
    for (size_t at = 0; status == DSC_OK && at < N; at += DSC_SWAP_ELEMS)
        status = dsc_swap_take(swap, at, &window);
    if (status == DSC_OK)
        status = dsc_swap_finish(swap);
    CHECK_EQ_INT(status, DSC_EIO);
    CHECK(dsc_swap_failed(swap) && strstr(dsc_last_error(), "File too large"));
    CHECK_EQ_INT(setrlimit(RLIMIT_FSIZE, &before), 0);
    dsc_swap_drop(swap);
    dsc_swap_close(swap);
    dsc_io_close(io);
    dsc_arena_free(mapped, N * sizeof(float));
    CHECK_EQ_INT(rmdir(folder), 0);
    CHECK_EQ_INT(dsc_alloc_counters().n_live, 0);
}

static const struct test_case cases[] = {
    CASE(every_pass_sees_what_the_one_before_left),
    CASE(children_forked_in_a_pass_change_nothing),
    CASE(a_pass_allocates_nothing),
    CASE(a_write_that_fails_is_found_and_dropped),
};
RUN_CASES(cases)
