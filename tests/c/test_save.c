/* Saves: a copy is written while tensors change, memory comes back, failures stay, forks are safe.
 */
#define _GNU_SOURCE
#include "save.h"

#include "alloc.h"
#include "crc32c.h"
#include "shard_case.h"

#include <errno.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>

enum { N = 4, BIG = 9 * MIB + 5 };
static const uint64_t shapes[N][1] = {{BIG}, {3 * MIB / 4}, {0}, {1000}};
static const struct dsc_shard_tensor given[N] = {
    {"bytes", DSC_SHARD_U8, 1, shapes[0]},
    {"floats", DSC_SHARD_F32, 1, shapes[1]},
    {"none", DSC_SHARD_F64, 1, shapes[2]},
    {"halves", DSC_SHARD_F16, 1, shapes[3]},
};
static char bytes[BIG], floats[3 * MIB], halves[2000], before[BIG];
static const void *const data[N] = {bytes, floats, NULL, halves};

static void fill_all(unsigned seed) {
    fill_with(bytes, sizeof bytes, seed);
    fill_with(floats, sizeof floats, seed + 1);
    fill_with(halves, sizeof halves, seed + 2);
}

static struct dsc_save *open_save(void) {
    struct dsc_save *save = NULL;
    CHECK_OK(dsc_save_open(path, given, data, N, NULL, &save));
    return save;
}

/* The file holds what fill_all(seed) gave, and the save's checksums are right. */
static void check_file(const struct dsc_save *save, unsigned seed) {
    static char out[BIG];
    static const size_t sizes[N] = {BIG, 3 * MIB, 0, 2000};
    const struct dsc_shard_layout *layout = dsc_save_layout(save);
    const struct dsc_shard_expected expected = {layout->n_bytes, layout->header_crc};
    struct dsc_shard *shard;
    CHECK(!is_there(part));
    CHECK_OK(dsc_shard_open(path, &expected, &shard));
    for (size_t i = 0; i < N; i++) {
        size_t n = sizes[layout->source[i]];
        const uint32_t *crcs = dsc_save_crcs(save) + layout->first_crc[i];
        CHECK_OK(dsc_shard_read(shard, dsc_shard_tensor(shard, i), crcs, 0, n, out));
        fill_with(before, n, seed + (layout->source[i] == 3 ? 2 : (unsigned)layout->source[i]));
        CHECK(memcmp(out, before, n) == 0);
    }
    dsc_shard_close(shard);
}

static void a_write_in_the_callers_thread_gives_the_file(void) {
    make_test_folder();
    fill_all(1);
    struct dsc_save *save = open_save();
    CHECK(!dsc_save_crcs(save) && dsc_save_done(save));
    CHECK_EQ_INT(dsc_save_wait(save, NULL, NULL), DSC_ESTATE);
    CHECK_OK(dsc_save_write(save, NULL, NULL));
    CHECK(dsc_save_done(save));
    CHECK_OK(dsc_save_wait(save, NULL, NULL));
    check_file(save, 1);
    CHECK_EQ_INT(dsc_save_write(save, NULL, NULL), DSC_ESTATE);
    CHECK_EQ_INT(dsc_save_start(save), DSC_ESTATE);
    dsc_save_close(save);
    drop_test_folder(true);
    CHECK_EQ_INT(dsc_alloc_counters().n_live, 0);
}

static void a_copy_is_written_while_the_tensors_change(void) {
    struct dsc_pool *pool;
    make_test_folder();
    for (int n_threads = 1; n_threads <= 3; n_threads++) {
        CHECK_OK(dsc_pool_open(n_threads, (struct dsc_team){0}, &pool));
        fill_all(2);
        struct dsc_save *save = open_save();
        CHECK_OK(dsc_save_start(save));
        CHECK_OK(dsc_save_detach(save, pool));
        dsc_pool_close(pool);
        uint32_t first = dsc_save_crcs(save)[0];
        fill_all(100);
        CHECK_OK(dsc_save_wait(save, NULL, NULL));
        CHECK(dsc_save_done(save) && first == dsc_save_crcs(save)[0]);
        check_file(save, 2);
        dsc_save_close(save);
        CHECK_EQ_INT(unlink(path), 0);
    }
    drop_test_folder(false);
    CHECK_EQ_INT(dsc_alloc_counters().n_live, 0);
}

/* At any moment: before the thread has read anything, in the middle, after the end; from two calls.
 */
static void tensors_may_change_once_they_are_detached(void) {
    struct dsc_pool *pool;
    make_test_folder();
    CHECK_OK(dsc_pool_open(2, (struct dsc_team){0}, &pool));
    for (int i = 0; i < 12; i++) {
        fill_all(5);
        struct dsc_save *save = open_save();
        CHECK_EQ_INT(dsc_save_detach(save, pool), DSC_ESTATE);
        CHECK_OK(dsc_save_start(save));
        const struct timespec wait = {0, i * 300000};
        (void)nanosleep(&wait, NULL);
        if (i == 11)
            CHECK_OK(dsc_save_wait(save, NULL, NULL));
        CHECK_OK(dsc_save_detach(save, i % 2 ? pool : NULL));
        fill_all(100);
        uint32_t last = dsc_save_crcs(save)[dsc_save_layout(save)->n_crcs - 1];
        CHECK_OK(dsc_save_detach(save, pool));
        CHECK_OK(dsc_save_wait(save, NULL, NULL));
        CHECK(last == dsc_save_crcs(save)[dsc_save_layout(save)->n_crcs - 1]);
        check_file(save, 5);
        dsc_save_close(save);
        CHECK_EQ_INT(unlink(path), 0);
    }
    dsc_pool_close(pool);
    drop_test_folder(false);
    CHECK_EQ_INT(dsc_alloc_counters().n_live, 0);
}

/* Undetached: the tensors are read to the end, and checksums are there at the end. */
static void a_started_write_needs_no_detaching(void) {
    make_test_folder();
    fill_all(6);
    struct dsc_save *save = open_save();
    CHECK_OK(dsc_save_start(save));
    CHECK_OK(dsc_save_wait(save, NULL, NULL));
    check_file(save, 6);
    dsc_save_close(save);
    drop_test_folder(true);
    CHECK_EQ_INT(dsc_alloc_counters().n_live, 0);
}

static void the_copy_is_given_back_before_the_save_is_closed(void) {
    make_test_folder();
    struct dsc_save *save = open_save();
    int64_t least = dsc_alloc_counters().n_bytes;
    CHECK_OK(dsc_save_start(save));
    CHECK_OK(dsc_save_wait(save, NULL, NULL));
    CHECK(dsc_alloc_counters().n_bytes < least + 64 * 1024);
    dsc_save_close(save);
    drop_test_folder(true);
    CHECK_EQ_INT(dsc_alloc_counters().n_live, 0);
}

static void closing_waits_for_the_file(void) {
    make_test_folder();
    struct dsc_save *save = open_save();
    CHECK_OK(dsc_save_start(save));
    dsc_save_close(save);
    CHECK(is_there(path) && !is_there(part));
    drop_test_folder(true);
    CHECK_EQ_INT(dsc_alloc_counters().n_live, 0);
}

static void an_empty_file_is_one(void) {
    struct dsc_save *save;
    struct dsc_shard *shard;
    make_test_folder();
    for (int threaded = 0; threaded < 2; threaded++) {
        CHECK_OK(dsc_save_open(path, NULL, NULL, 0, NULL, &save));
        CHECK_OK(threaded ? dsc_save_start(save) : dsc_save_write(save, NULL, NULL));
        CHECK_OK(dsc_save_wait(save, NULL, NULL));
        dsc_save_close(save);
        CHECK_OK(dsc_shard_open(path, NULL, &shard));
        CHECK_EQ_INT(dsc_shard_count(shard), 0);
        dsc_shard_close(shard);
    }
    drop_test_folder(true);
    CHECK_EQ_INT(dsc_alloc_counters().n_live, 0);
}

static void a_failure_stays_and_has_path_and_errno(void) {
    struct rlimit was, limit;
    make_test_folder();
    CHECK_EQ_INT(getrlimit(RLIMIT_FSIZE, &was), 0);
    (void)signal(SIGXFSZ, SIG_IGN); /* as Python does */
    for (int threaded = 0; threaded < 2; threaded++) {
        struct dsc_save *save = open_save();
        int64_t least = dsc_alloc_counters().n_bytes;
        limit = was;
        limit.rlim_cur = 4 * MIB;
        CHECK_EQ_INT(setrlimit(RLIMIT_FSIZE, &limit), 0);
        if (threaded)
            CHECK_OK(dsc_save_start(save));
        else
            CHECK_EQ_INT(dsc_save_write(save, NULL, NULL), DSC_EIO);
        for (int i = 0; i < 2; i++) {
            CHECK_EQ_INT(dsc_save_wait(save, NULL, NULL), DSC_EIO);
            CHECK_EQ_INT(dsc_last_errno(), EFBIG);
            CHECK(strstr(dsc_last_error(), path));
        }
        CHECK_EQ_INT(setrlimit(RLIMIT_FSIZE, &was), 0);
        CHECK(dsc_alloc_counters().n_bytes < least + 64 * 1024);
        dsc_save_close(save);
        CHECK(!is_there(part));
    }
    drop_test_folder(false);
    CHECK_EQ_INT(dsc_alloc_counters().n_live, 0);
}

static bool always(void *context) {
    ++*(int *)context;
    return true;
}

/* A FIFO holds the thread up: opening it for writing waits for a reader. */
static void a_wait_can_be_interrupted_and_the_write_goes_on(void) {
    int n_asked = 0;
    make_test_folder();
    CHECK_EQ_INT(mkfifo(part, 0600), 0);
    struct dsc_save *save = open_save();
    CHECK_OK(dsc_save_start(save));
    CHECK_EQ_INT(dsc_save_wait(save, always, &n_asked), DSC_EINTR);
    CHECK(n_asked == 1 && !dsc_save_done(save));
    int fd = open(part, O_RDONLY);
    CHECK(fd >= 0);
    CHECK_EQ_INT(dsc_save_wait(save, NULL, NULL), DSC_EIO); /* no place to write at an offset */
    (void)close(fd);
    dsc_save_close(save);
    drop_test_folder(false);
    CHECK_EQ_INT(dsc_alloc_counters().n_live, 0);
}

static void a_forked_child_may_close_and_nothing_else(void) {
    int how;
    make_test_folder();
    fill_all(4);
    struct dsc_save *save = open_save();
    CHECK_OK(dsc_save_start(save));
    pid_t child = fork();
    if (child == 0) {
        if (dsc_save_wait(save, NULL, NULL) != DSC_ESTATE)
            _exit(1);
        dsc_save_close(save);
        _exit(0);
    }
    CHECK_EQ_INT(waitpid(child, &how, 0), child);
    CHECK_EQ_INT(how, 0);
    CHECK_OK(dsc_save_wait(save, NULL, NULL));
    check_file(save, 4);
    dsc_save_close(save);
    drop_test_folder(true);
    CHECK_EQ_INT(dsc_alloc_counters().n_live, 0);
}

static const struct test_case cases[] = {
    CASE(a_write_in_the_callers_thread_gives_the_file),
    CASE(a_copy_is_written_while_the_tensors_change),
    CASE(tensors_may_change_once_they_are_detached),
    CASE(a_started_write_needs_no_detaching),
    CASE(the_copy_is_given_back_before_the_save_is_closed),
    CASE(closing_waits_for_the_file),
    CASE(an_empty_file_is_one),
    CASE(a_failure_stays_and_has_path_and_errno),
    CASE(a_wait_can_be_interrupted_and_the_write_goes_on),
    CASE(a_forked_child_may_close_and_nothing_else),
};
RUN_CASES(cases)
