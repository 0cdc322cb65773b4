/* Files and queues of requests: what is written is read, on both movers, and faults say where. */
#define _GNU_SOURCE
#include "file_io.h"

#include "alloc.h"
#include "arena.h"
#include "case.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = DSC_FILE_ALIGN, MIB = 1 << 20 };

static char folder[] = "/var/tmp/dsc_test_XXXXXX";

static void make_test_folder(void) {
    CHECK(mkdtemp(folder));
}

/* Nothing may have been left in it. */
static void drop_test_folder(void) {
    CHECK_EQ_INT(rmdir(folder), 0);
}

static struct dsc_io *open_io(enum dsc_io_kind kind, size_t block, size_t depth) {
    struct dsc_io_options options = {kind, block, depth, 2, false, false};
    struct dsc_io *io = NULL;
    enum dsc_status status = dsc_io_open(&options, &io);
    CHECK(status == DSC_OK || (status == DSC_ENOTYET && kind == DSC_IO_RING));
    return io;
}

static char *memory(size_t n_bytes) {
    void *block;
    CHECK_OK(dsc_arena_alloc(n_bytes, &block));
    return block;
}

static void fill_with(char *data, size_t n, size_t begin) {
    for (size_t i = 0; i < n; i++)
        data[i] = (char)((begin + i) * 31 % 251);
}

static void move(struct dsc_io *io, struct dsc_file *file, bool writes, size_t offset, size_t n,
                 char *data) {
    struct dsc_transfer transfer = {
        .file = file, .writes = writes, .offset = offset, .n_bytes = n, .data = data};
    dsc_io_start(io, &transfer);
    CHECK_OK(dsc_io_wait(io, &transfer));
}

/* Transfers that overlap in time, cut into more requests than the queue takes. */
static void round_trips(const struct dsc_io_options *options) {
    enum { N = 5 };
    size_t n = 3 * MIB + 5 * PAGE;
    struct dsc_io *io = NULL;
    struct dsc_file *file;
    struct dsc_transfer transfers[N];
    enum dsc_status status = dsc_io_open(options, &io);
    if (status == DSC_ENOTYET)
        return; /* no io_uring on this machine */
    CHECK_OK(status);
    CHECK_OK(dsc_file_open(folder, "round trip", N * n, &file));
    char *data = memory(N * n), *read = memory(N * n);
    fill_with(data, N * n, 7);
    for (int writes = 1; writes >= 0; writes--) {
        for (int i = 0; i < N; i++) {
            transfers[i] = (struct dsc_transfer){.file = file,
                                                 .writes = writes,
                                                 .offset = i * n,
                                                 .n_bytes = n,
                                                 .data = (writes ? data : read) + i * n};
            dsc_io_start(io, &transfers[i]);
        }
        for (int i = N - 1; i >= 0; i--)
            CHECK_OK(dsc_io_wait(io, &transfers[i]));
    }
    CHECK_EQ_INT(memcmp(data, read, N * n), 0);
    dsc_io_close(io);
    dsc_file_close(file);
    dsc_arena_free(data, N * n);
    dsc_arena_free(read, N * n);
}

static void what_is_written_is_read_by_every_mover_and_setting(void) {
    static const struct dsc_io_options settings[] = {
        {DSC_IO_BEST, MIB, 8, 1, false, false},    {DSC_IO_RING, MIB, 8, 1, false, false},
        {DSC_IO_RING, 100, 3, 1, true, false},     {DSC_IO_RING, 2 * PAGE, 4, 1, false, true},
        {DSC_IO_RING, PAGE, 1, 1, false, false},   {DSC_IO_RING, PAGE, 2, 1, true, false},
        {DSC_IO_THREADS, MIB, 8, 1, false, false}, {DSC_IO_THREADS, 64 * 1024, 1, 9, true, true},
        {DSC_IO_THREADS, 0, 0, 0, false, false},
    };
    make_test_folder();
    for (size_t i = 0; i < sizeof settings / sizeof *settings; i++)
        round_trips(&settings[i]);
    drop_test_folder();
    CHECK_EQ_INT(dsc_alloc_counters().n_live, 0);
}

static void a_new_file_is_zero_and_has_its_space_and_no_name(void) {
    struct stat info;
    struct dsc_file *file;
    make_test_folder();
    CHECK_OK(dsc_file_open(folder, "zeros", MIB, &file));
    CHECK_EQ_INT(fstat(dsc_file_descriptor(file), &info), 0);
    CHECK_EQ_INT(info.st_nlink, 0);
    CHECK_EQ_INT(info.st_size, MIB);
    CHECK(info.st_blocks * 512 >= MIB);
    drop_test_folder(); /* an empty folder, with the file still open */
    struct dsc_io *io = open_io(DSC_IO_BEST, MIB, 8);
    char *data = memory(MIB);
    memset(data, 1, MIB);
    move(io, file, false, 0, MIB, data);
    for (size_t i = 0; i < MIB; i++)
        CHECK(data[i] == 0);
    dsc_arena_free(data, MIB);
    dsc_io_close(io);
    dsc_file_close(file);
}

static void folders_are_made_and_what_cannot_be_made_says_why(void) {
    struct dsc_file *file;
    char path[256];
    make_test_folder();
    snprintf(path, sizeof path, "%s/a/b/", folder);
    CHECK_OK(dsc_file_open(path, "x", PAGE, &file));
    dsc_file_close(file);
    CHECK_EQ_INT(rmdir(path), 0);
    snprintf(path, sizeof path, "%s/a", folder);
    CHECK_EQ_INT(rmdir(path), 0);
    CHECK_EQ_INT(dsc_file_open("/proc/nowhere", "x", PAGE, &file), DSC_EIO);
    CHECK(strstr(dsc_last_error(), "/proc/nowhere") && strstr(dsc_last_error(), "No such file"));
    CHECK_EQ_INT(dsc_file_open("/dev/null", "x", PAGE, &file), DSC_EIO);
    CHECK(strstr(dsc_last_error(), "/dev/null") && strstr(dsc_last_error(), "Not a directory"));
    CHECK_EQ_INT(dsc_file_open("", "x", PAGE, &file), DSC_EINVAL);
    drop_test_folder();
    CHECK_EQ_INT(dsc_alloc_counters().n_live, 0);
}

static void a_full_disk_is_an_error_before_anything_is_written(void) {
    struct dsc_file *file;
    make_test_folder();
    if (mount("none", folder, "tmpfs", 0, "size=1m") == 0) { /* needs root */
        CHECK_EQ_INT(dsc_file_open(folder, "states", 64 * MIB, &file), DSC_EIO);
        CHECK(strstr(dsc_last_error(), folder) && strstr(dsc_last_error(), "No space left"));
        CHECK(strstr(dsc_last_error(), "67108864 bytes"));
        CHECK_EQ_INT(umount(folder), 0);
    }
    drop_test_folder();
    CHECK_EQ_INT(dsc_alloc_counters().n_live, 0);
}

/* The kernel moves what the limit allows, and refuses the rest. */
static void a_short_write_says_where(void) {
    static const enum dsc_io_kind kinds[] = {DSC_IO_RING, DSC_IO_THREADS};
    struct rlimit before, limit;
    struct dsc_file *file;
    char *data = memory(4 * MIB);
    make_test_folder();
    (void)signal(SIGXFSZ, SIG_IGN); /* as Python does */
    CHECK_EQ_INT(getrlimit(RLIMIT_FSIZE, &before), 0);
    for (int k = 0; k < 2; k++) {
        struct dsc_io *io = open_io(kinds[k], MIB, 4);
        if (!io)
            continue;
        CHECK_OK(dsc_file_open(folder, "states", 4 * MIB, &file));
        limit = before;
        limit.rlim_cur = 2 * MIB + MIB / 2;
        CHECK_EQ_INT(setrlimit(RLIMIT_FSIZE, &limit), 0);
        struct dsc_transfer bad = {
            .file = file, .writes = true, .offset = 0, .n_bytes = 4 * MIB, .data = data};
        dsc_io_start(io, &bad);
        CHECK_EQ_INT(dsc_io_wait(io, &bad), DSC_EIO);
        CHECK(strstr(dsc_last_error(), "write of 4194304 bytes at offset 0 of "));
        CHECK(strstr(dsc_last_error(), folder) && strstr(dsc_last_error(), "File too large"));
        CHECK(bad.failed_at >= 2 * MIB && bad.failed_at < 4 * MIB);
        CHECK_EQ_INT(setrlimit(RLIMIT_FSIZE, &before), 0);
        move(io, file, true, 0, 4 * MIB, data); /* the queue goes on */
        struct dsc_transfer past = {
            .file = file, .offset = 3 * MIB, .n_bytes = 2 * MIB, .data = data};
        dsc_io_start(io, &past);
        CHECK_EQ_INT(dsc_io_wait(io, &past), DSC_EIO);
        CHECK(strstr(dsc_last_error(), "nothing more could be moved"));
        CHECK(strstr(dsc_last_error(), "failed at offset 4194304"));
        dsc_io_close(io);
        dsc_file_close(file);
    }
    drop_test_folder();
    dsc_arena_free(data, 4 * MIB);
}

static void closing_waits_for_what_is_under_way(void) {
    static const enum dsc_io_kind kinds[] = {DSC_IO_RING, DSC_IO_THREADS};
    make_test_folder();
    for (int k = 0; k < 2; k++) {
        struct dsc_io *io = open_io(kinds[k], 16 * 1024, 2);
        struct dsc_file *file;
        if (!io)
            continue;
        CHECK_OK(dsc_file_open(folder, "states", 4 * MIB, &file));
        char *data = memory(4 * MIB);
        struct dsc_transfer transfer = {
            .file = file, .writes = true, .n_bytes = 4 * MIB, .data = data};
        dsc_io_start(io, &transfer);
        dsc_io_close(io);
        dsc_file_close(file);
        dsc_arena_free(data, 4 * MIB);
    }
    drop_test_folder();
    CHECK_EQ_INT(dsc_alloc_counters().n_live, 0);
}

/* Its first request ends short, then fails, while the rest still waits for room in the queue. */
static void closing_gives_up_a_transfer_that_fails(void) {
    enum { N = 32 * MIB };
    static const enum dsc_io_kind kinds[] = {DSC_IO_RING, DSC_IO_THREADS};
    make_test_folder();
    for (int k = 0; k < 2; k++) {
        struct dsc_io *io = open_io(kinds[k], N, 1);
        struct dsc_file *file;
        if (!io)
            continue;
        CHECK_OK(dsc_file_open(folder, "states", N, &file));
        char *data = memory(2 * N);
        struct dsc_transfer past = {.file = file, .offset = N / 2, .n_bytes = 2 * N, .data = data};
        dsc_io_start(io, &past);
        dsc_io_close(io);
        CHECK(dsc_transfer_done(&past));
        dsc_file_close(file);
        dsc_arena_free(data, 2 * N);
    }
    drop_test_folder();
    CHECK_EQ_INT(dsc_alloc_counters().n_live, 0);
}

/* Puts /dev/null in the ring's place. */
static void break_ring(void) {
    char path[64], target[64];
    int null = open("/dev/null", O_RDWR), n_broken = 0;
    for (int fd = 3; fd < 256; fd++) {
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
        ssize_t n = readlink(path, target, sizeof target - 1);
        target[n > 0 ? n : 0] = '\0';
        if (strstr(target, "io_uring"))
            n_broken += dup2(null, fd) == fd;
    }
    CHECK_EQ_INT(n_broken, 1);
    CHECK_EQ_INT(close(null), 0);
}

static void what_the_kernel_does_not_take_is_an_error(void) {
    struct dsc_file *file;
    make_test_folder();
    struct dsc_io *io = open_io(DSC_IO_RING, 16 * 1024, 4);
    if (!io)
        return;
    CHECK_OK(dsc_file_open(folder, "states", 4 * MIB, &file));
    char *data = memory(4 * MIB);
    struct dsc_transfer under_way = {
        .file = file, .writes = true, .n_bytes = 4 * MIB, .data = data};
    dsc_io_start(io, &under_way);
    break_ring();
    for (int i = 0; i < 2; i++) {
        struct dsc_transfer next = {.file = file, .n_bytes = MIB, .data = data};
        dsc_io_start(io, &next);
        CHECK_EQ_INT(dsc_io_wait(io, &next), DSC_EIO);
        CHECK(strstr(dsc_last_error(), "read of 1048576 bytes") &&
              strstr(dsc_last_error(), folder) && strstr(dsc_last_error(), strerror(EOPNOTSUPP)));
        CHECK_EQ_INT(dsc_last_errno(), EOPNOTSUPP);
    }
    CHECK_EQ_INT(dsc_io_wait(io, &under_way), DSC_EIO);
    dsc_io_close(io);
    dsc_file_close(file);
    dsc_arena_free(data, 4 * MIB);
    drop_test_folder();
    CHECK_EQ_INT(dsc_alloc_counters().n_live, 0);
}

static void a_forked_child_closes_safely(void) {
    static const enum dsc_io_kind kinds[] = {DSC_IO_RING, DSC_IO_THREADS};
    make_test_folder();
    for (int k = 0; k < 2; k++) {
        struct dsc_io *io = open_io(kinds[k], MIB, 4);
        struct dsc_file *file;
        int how;
        if (!io)
            continue;
        CHECK_OK(dsc_file_open(folder, "states", MIB, &file));
        pid_t child = fork();
        if (child == 0) {
            dsc_io_close(io);
            dsc_file_close(file);
            _exit(0);
        }
        CHECK_EQ_INT(waitpid(child, &how, 0), child);
        CHECK_EQ_INT(how, 0);
        char *data = memory(MIB);
        move(io, file, true, 0, MIB, data);
        dsc_arena_free(data, MIB);
        dsc_io_close(io);
        dsc_file_close(file);
    }
    drop_test_folder();
}

static void a_mapping_shows_what_requests_wrote_and_they_read_what_it_holds(void) {
    struct dsc_file *file;
    void *mapped;
    make_test_folder();
    CHECK_OK(dsc_file_open(folder, "states", 8 * MIB, &file));
    CHECK_OK(dsc_arena_map(dsc_file_descriptor(file), 4 * MIB, 4 * MIB, &mapped));
    struct dsc_io *io = open_io(DSC_IO_BEST, MIB, 4);
    char *data = memory(4 * MIB), *found = mapped;
    for (size_t round = 0; round < 3; round++) {
        fill_with(data, 4 * MIB, round);
        move(io, file, true, 4 * MIB, 4 * MIB, data);
        CHECK_EQ_INT(memcmp(found, data, 4 * MIB), 0);
        for (size_t i = 0; i < 4 * MIB; i += 1000)
            found[i] = (char)round;
        move(io, file, false, 4 * MIB, 4 * MIB, data);
        CHECK_EQ_INT(memcmp(found, data, 4 * MIB), 0);
        CHECK_EQ_INT(data[1000], round);
    }
    dsc_io_close(io);
    dsc_file_close(file);
    CHECK_EQ_INT(found[2000], 2); /* outlives the file */
    dsc_arena_retain(mapped, 4 * MIB);
    dsc_arena_free(mapped, 4 * MIB);
    CHECK_EQ_INT(found[2000], 2);
    dsc_arena_free(mapped, 4 * MIB);
    dsc_arena_free(data, 4 * MIB);
    drop_test_folder();
    CHECK_EQ_INT(dsc_alloc_counters().n_live, 0);
}

static const struct test_case cases[] = {
    CASE(what_is_written_is_read_by_every_mover_and_setting),
    CASE(a_new_file_is_zero_and_has_its_space_and_no_name),
    CASE(folders_are_made_and_what_cannot_be_made_says_why),
    CASE(a_full_disk_is_an_error_before_anything_is_written),
    CASE(a_short_write_says_where),
    CASE(closing_waits_for_what_is_under_way),
    CASE(closing_gives_up_a_transfer_that_fails),
    CASE(what_the_kernel_does_not_take_is_an_error),
    CASE(a_forked_child_closes_safely),
    CASE(a_mapping_shows_what_requests_wrote_and_they_read_what_it_holds),
};
RUN_CASES(cases)
