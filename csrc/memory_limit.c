/* Control groups of both versions, through /proc and /sys. Invariant: what cannot be read is no
 * limit. */
#define _GNU_SOURCE
#include "memory_limit.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { TEXT = 16 * 1024, PATH = 4096 };

static bool read_text(const char *path, char text[TEXT]) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : read(fd, text, TEXT - 1);
    if (fd >= 0)
        (void)close(fd);
    text[n > 0 ? n : 0] = '\0';
    return n > 0;
}

/* The number behind a word that starts a line; false where there is none ("max" is none). */
static bool find_number(const char *text, const char *word, uint64_t *out) {
    size_t n = strlen(word);
    for (const char *line = text; line; line = strchr(line, '\n')) {
        line += *line == '\n';
        if (strncmp(line, word, n) != 0 || (n > 0 && line[n] != ' '))
            continue;
        char *end;
        *out = strtoull(line + n, &end, 10);
        return end != line + n;
    }
    return false;
}

/* Where the groups of this process are: `folder` is its own, below the first `n_mount` bytes. */
struct place {
    char folder[PATH];
    size_t n_mount;
    bool first; /* version 1 */
};

/* This process's line of /proc/self/cgroup has `mark` before the path below `mount`. */
static bool find_place(const char *root, const char *mark, const char *mount, struct place *out) {
    char text[TEXT], path[PATH];
    snprintf(path, sizeof path, "%.2000s/proc/self/cgroup", root);
    if (!read_text(path, text))
        return false;
    char *found = strstr(text, mark);
    if (!found)
        return false;
    found += strlen(mark);
    found[strcspn(found, "\n")] = '\0';
    out->n_mount = (size_t)snprintf(out->folder, PATH, "%.2000s%s", root, mount);
    snprintf(out->folder + out->n_mount, PATH - out->n_mount, "%.1500s",
             strcmp(found, "/") == 0 ? "" : found);
    snprintf(path, sizeof path, "%.3800s/memory.stat", out->folder);
    if (access(path, R_OK) != 0) /* a container that sees its own group as the root */
        out->folder[out->n_mount] = '\0';
    return true;
}

/* To the group around it; false where there is none. */
static bool go_up(struct place *place) {
    char *end = strrchr(place->folder, '/');
    if ((size_t)(end - place->folder) < place->n_mount)
        return false;
    *end = '\0';
    return true;
}

/* Groups of two machines may have the same numbers. */
static uint64_t identify(const char *root, const struct stat *file) {
    char boot[TEXT], path[PATH];
    uint64_t numbers[2] = {file->st_dev, file->st_ino};
    snprintf(path, sizeof path, "%.2000s/proc/sys/kernel/random/boot_id", root);
    (void)read_text(path, boot);
    return dsc_hash(dsc_hash(DSC_HASH_START, boot, strlen(boot)), numbers, sizeof numbers);
}

/* A line of /proc/meminfo, in bytes; 0 where it is not there. */
static uint64_t of_machine(const char *root, const char *what) {
    char text[TEXT], path[PATH];
    uint64_t kib = 0;
    snprintf(path, sizeof path, "%.2000s/proc/meminfo", root);
    return read_text(path, text) && find_number(text, what, &kib) ? kib * 1024 : 0;
}

/* The one number of a file of the group. */
static bool read_number(const struct place *place, const char *name, uint64_t *out) {
    char text[TEXT], path[PATH];
    snprintf(path, sizeof path, "%.3800s/%s", place->folder, name);
    return read_text(path, text) && find_number(text, "", out);
}

/* Free swap that the group may use. Version 1 limits memory and swap together. */
static uint64_t swap_of(const char *root, const struct place *place, uint64_t limit) {
    uint64_t swap = of_machine(root, "SwapFree:"), most;
    if (!read_number(place, place->first ? "memory.memsw.limit_in_bytes" : "memory.swap.max",
                     &most))
        return swap;
    most -= place->first ? dsc_min(limit, most) : 0;
    return dsc_min(swap, most);
}

static bool read_limit(const char *root, const struct place *place, struct dsc_memory_limit *out) {
    char text[TEXT], path[PATH];
    uint64_t memory = 0, shared = 0;
    struct stat file;
    if (!read_number(place, place->first ? "memory.limit_in_bytes" : "memory.max", &out->limit) ||
        out->limit > of_machine(root, "MemTotal:"))
        return false; /* no limit is a very large one in version 1 */
    snprintf(path, sizeof path, "%.3800s/memory.stat", place->folder);
    if (!read_text(path, text) || stat(path, &file) != 0 ||
        !find_number(text, place->first ? "total_rss" : "anon", &memory))
        return false;
    (void)find_number(text, place->first ? "total_shmem" : "shmem", &shared);
    uint64_t used = memory + shared;
    out->left = (out->limit > used ? out->limit - used : 0) + swap_of(root, place, out->limit);
    out->group = identify(root, &file);
    return true;
}

size_t dsc_memory_limits(const char *root, struct dsc_memory_limit out[DSC_MEMORY_LIMITS]) {
    struct place place = {.first = true};
    struct dsc_memory_limit one;
    size_t n = 0;
    if (!find_place(root, ":memory:", "/sys/fs/cgroup/memory", &place)) {
        place.first = false;
        if (!find_place(root, "0::", "/sys/fs/cgroup", &place))
            return 0;
    }
    do {
        if (!read_limit(root, &place, &one))
            continue;
        if (n < DSC_MEMORY_LIMITS)
            out[n++] = one;
        else if (one.left < out[n - 1].left)
            out[n - 1] = one;
    } while (go_up(&place));
    return n;
}
