/* Limits of memory control groups, below a folder that stands for the machine. */
#define _GNU_SOURCE
#include "memory_limit.h"

#include "case.h"

#include <stdarg.h>
#include <sys/stat.h>
#include <unistd.h>

static char root[] = "/tmp/dsc_test_XXXXXX";

/* A file below root, and the folders that it is in. */
static void write_file(const char *path, const char *format, ...) {
    char full[512];
    int n = snprintf(full, sizeof full, "%s", root);
    snprintf(full + n, sizeof full - (size_t)n, "%s", path);
    for (char *at = full + n + 1; (at = strchr(at, '/')); *at++ = '/') {
        *at = '\0';
        (void)mkdir(full, 0700);
    }
    FILE *file = fopen(full, "w");
    CHECK(file);
    va_list args;
    va_start(args, format);
    CHECK(vfprintf(file, format, args) >= 0);
    va_end(args);
    CHECK_EQ_INT(fclose(file), 0);
}

static void open_root(const char *groups) {
    CHECK(mkdtemp(root));
    write_file("/proc/self/cgroup", "%s", groups);
    write_file("/proc/sys/kernel/random/boot_id", "a boot\n");
    write_file("/proc/meminfo", "MemTotal:       1000000 kB\nMemFree:  5 kB\nSwapFree:    0 kB\n");
}

static void drop_root(void) {
    char command[128];
    snprintf(command, sizeof command, "rm -r %s", root);
    CHECK_EQ_INT(system(command), 0);
}

static void limits_of_all_groups_around_a_process_count(void) {
    struct dsc_memory_limit found[DSC_MEMORY_LIMITS];
    open_root("1:name=systemd:/\n0::/user/job/task\n");
    write_file("/sys/fs/cgroup/user/job/task/memory.max", "max\n");
    write_file("/sys/fs/cgroup/user/job/task/memory.stat", "anon 1000\nfile 9000\nshmem 500\n");
    write_file("/sys/fs/cgroup/user/job/memory.max", "5000\n");
    write_file("/sys/fs/cgroup/user/job/memory.stat", "anon 3000\nfile 9000\nshmem 500\n");
    write_file("/sys/fs/cgroup/user/memory.max", "100000\n");
    write_file("/sys/fs/cgroup/user/memory.stat", "anon 99000\nfile 9000\nshmem 2000\n");
    write_file("/sys/fs/cgroup/memory.stat", "anon 1\n"); /* the root group has no limit */
    CHECK_EQ_INT(dsc_memory_limits(root, found), 2);
    CHECK_EQ_INT(found[0].limit, 5000);
    CHECK_EQ_INT(found[0].left, 1500);
    CHECK_EQ_INT(found[1].limit, 100000);
    CHECK_EQ_INT(found[1].left, 0); /* it has more than it may */
    CHECK(found[0].group != found[1].group);
    write_file("/sys/fs/cgroup/user/job/task/memory.max", "2000\n");
    CHECK_EQ_INT(dsc_memory_limits(root, found), 3);
    CHECK_EQ_INT(found[0].left, 500);
    drop_root();
}

static void groups_are_equal_on_one_machine_only(void) {
    struct dsc_memory_limit one[DSC_MEMORY_LIMITS], other[DSC_MEMORY_LIMITS];
    open_root("0::/a\n");
    write_file("/sys/fs/cgroup/a/memory.max", "2000\n");
    write_file("/sys/fs/cgroup/a/memory.stat", "anon 0\n");
    CHECK_EQ_INT(dsc_memory_limits(root, one), 1);
    CHECK_EQ_INT(dsc_memory_limits(root, other), 1);
    CHECK(one[0].group == other[0].group);
    write_file("/proc/sys/kernel/random/boot_id", "another one\n");
    CHECK_EQ_INT(dsc_memory_limits(root, other), 1);
    CHECK(one[0].group != other[0].group);
    drop_root();
}

static void swap_counts_as_far_as_a_group_may_use_it(void) {
    struct dsc_memory_limit found[DSC_MEMORY_LIMITS];
    open_root("0::/a\n");
    write_file("/proc/meminfo", "MemTotal:       1000000 kB\nSwapFree:    2 kB\n");
    write_file("/sys/fs/cgroup/a/memory.max", "5000\n");
    write_file("/sys/fs/cgroup/a/memory.stat", "anon 1000\n");
    CHECK_EQ_INT(dsc_memory_limits(root, found), 1);
    CHECK_EQ_INT(found[0].left, 4000 + 2048);
    write_file("/sys/fs/cgroup/a/memory.swap.max", "max\n");
    CHECK_EQ_INT(dsc_memory_limits(root, found), 1);
    CHECK_EQ_INT(found[0].left, 4000 + 2048);
    write_file("/sys/fs/cgroup/a/memory.swap.max", "100\n");
    CHECK_EQ_INT(dsc_memory_limits(root, found), 1);
    CHECK_EQ_INT(found[0].left, 4000 + 100);
    write_file("/proc/self/cgroup", "4:memory:/b\n");
    write_file("/sys/fs/cgroup/memory/b/memory.limit_in_bytes", "5000\n");
    write_file("/sys/fs/cgroup/memory/b/memory.memsw.limit_in_bytes", "5300\n");
    write_file("/sys/fs/cgroup/memory/b/memory.stat", "total_rss 1000\n");
    CHECK_EQ_INT(dsc_memory_limits(root, found), 1);
    CHECK_EQ_INT(found[0].left, 4000 + 300);
    drop_root();
}

static void version_1_has_other_names(void) {
    struct dsc_memory_limit found[DSC_MEMORY_LIMITS];
    open_root("4:memory:/job\n0::/elsewhere\n");
    write_file("/sys/fs/cgroup/memory/job/memory.limit_in_bytes", "7000\n");
    write_file("/sys/fs/cgroup/memory/job/memory.stat",
               "cache 1\nrss 1\ntotal_cache 5\ntotal_rss 1500\ntotal_shmem 500\n");
    write_file("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
    write_file("/sys/fs/cgroup/memory/memory.stat", "total_rss 0\n");
    CHECK_EQ_INT(dsc_memory_limits(root, found), 1);
    CHECK_EQ_INT(found[0].limit, 7000);
    CHECK_EQ_INT(found[0].left, 5000);
    drop_root();
}

static void a_container_sees_its_group_as_the_root(void) {
    struct dsc_memory_limit found[DSC_MEMORY_LIMITS];
    open_root("0::/not/to/be/seen\n");
    write_file("/sys/fs/cgroup/memory.max", "4000\n");
    write_file("/sys/fs/cgroup/memory.stat", "anon 1000\n");
    CHECK_EQ_INT(dsc_memory_limits(root, found), 1);
    CHECK_EQ_INT(found[0].left, 3000);
    write_file("/proc/self/cgroup", "0::/\n");
    CHECK_EQ_INT(dsc_memory_limits(root, found), 1);
    CHECK_EQ_INT(found[0].limit, 4000);
    drop_root();
}

static void of_very_many_limits_the_tightest_of_the_outer_ones_counts(void) {
    struct dsc_memory_limit found[DSC_MEMORY_LIMITS];
    static const int limits[] = {900, 800, 700, 400, 500, 600}; /* from the outermost on */
    char folder[256] = "/sys/fs/cgroup", path[300];
    open_root("0::/a/a/a/a/a/a\n");
    for (size_t i = 0; i < sizeof limits / sizeof *limits; i++) {
        strcat(folder, "/a");
        snprintf(path, sizeof path, "%s/memory.max", folder);
        write_file(path, "%d\n", limits[i]);
        snprintf(path, sizeof path, "%s/memory.stat", folder);
        write_file(path, "anon %d\n", i == 0 ? 850 : 0);
    }
    CHECK_EQ_INT(dsc_memory_limits(root, found), DSC_MEMORY_LIMITS);
    CHECK_EQ_INT(found[0].limit, 600);
    CHECK_EQ_INT(found[2].limit, 400);
    CHECK_EQ_INT(found[3].limit, 900);
    CHECK_EQ_INT(found[3].left, 50);
    drop_root();
}

static void what_cannot_be_read_is_no_limit(void) {
    struct dsc_memory_limit found[DSC_MEMORY_LIMITS];
    CHECK_EQ_INT(dsc_memory_limits("/nowhere", found), 0);
    open_root("0::/a\n");
    CHECK_EQ_INT(dsc_memory_limits(root, found), 0);
    write_file("/sys/fs/cgroup/a/memory.max", "2000\n");
    CHECK_EQ_INT(dsc_memory_limits(root, found), 0);
    write_file("/sys/fs/cgroup/a/memory.stat", "file 3\n");
    CHECK_EQ_INT(dsc_memory_limits(root, found), 0);
    write_file("/proc/self/cgroup", "");
    CHECK_EQ_INT(dsc_memory_limits(root, found), 0);
    drop_root();
}

static const struct test_case cases[] = {
    CASE(limits_of_all_groups_around_a_process_count),
    CASE(groups_are_equal_on_one_machine_only),
    CASE(swap_counts_as_far_as_a_group_may_use_it),
    CASE(version_1_has_other_names),
    CASE(a_container_sees_its_group_as_the_root),
    CASE(of_very_many_limits_the_tightest_of_the_outer_ones_counts),
    CASE(what_cannot_be_read_is_no_limit),
};
RUN_CASES(cases)
