/* Control groups of both versions, through /proc and /sys. Invariant: what cannot be read is no
 * limit. */
#define _GNU_SOURCE
#include "memory_limit.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysinfo.h>
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

/* The folder of this process's group: its line of /proc/self/cgroup has `mark` before the path. */
static bool find_group(const char *mark, const char *root, char folder[PATH]) {
    char text[TEXT], path[PATH];
    if (!read_text("/proc/self/cgroup", text))
        return false;
    char *found = strstr(text, mark);
    if (!found)
        return false;
    found += strlen(mark);
    found[strcspn(found, "\n")] = '\0';
    snprintf(folder, PATH, "%s%.3000s", root, found);
    snprintf(path, sizeof path, "%.3500s/memory.stat", folder);
    if (access(path, R_OK) != 0) /* a container that sees its own group as the root */
        snprintf(folder, PATH, "%s", root);
    return true;
}

static bool read_figures(uint64_t *limit, uint64_t *used, char stat_path[PATH]) {
    char text[TEXT], folder[PATH], path[PATH];
    uint64_t memory = 0, shared = 0;
    bool first = find_group(":memory:", "/sys/fs/cgroup/memory", folder); /* version 1 */
    if (!first && !find_group("0::", "/sys/fs/cgroup", folder))
        return false;
    snprintf(path, sizeof path, "%.3500s/memory.max", folder);
    if (!first && (!read_text(path, text) || !find_number(text, "", limit)))
        return false;
    snprintf(stat_path, PATH, "%.3500s/memory.stat", folder);
    if (!read_text(stat_path, text) ||
        (first && !find_number(text, "hierarchical_memory_limit", limit)) ||
        !find_number(text, first ? "total_rss" : "anon", &memory))
        return false;
    (void)find_number(text, first ? "total_shmem" : "shmem", &shared);
    *used = memory + shared;
    return true;
}

/* Groups of two machines may have the same numbers. */
static uint64_t identify(const struct stat *place) {
    char boot[TEXT];
    uint64_t numbers[2] = {place->st_dev, place->st_ino};
    (void)read_text("/proc/sys/kernel/random/boot_id", boot);
    return dsc_hash(dsc_hash(DSC_HASH_START, boot, strlen(boot)), numbers, sizeof numbers);
}

bool dsc_memory_limit(struct dsc_memory_limit *out) {
    char path[PATH];
    struct sysinfo info;
    struct stat place;
    uint64_t used;
    if (!read_figures(&out->limit, &used, path) || sysinfo(&info) != 0 || stat(path, &place) != 0 ||
        out->limit > (uint64_t)info.totalram * info.mem_unit)
        return false; /* no limit is a very large one in version 1 */
    out->left =
        (out->limit > used ? out->limit - used : 0) + (uint64_t)info.freeswap * info.mem_unit;
    out->group = identify(&place);
    return true;
}
