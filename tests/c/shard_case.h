/* What the tests of files of a checkpoint share: a folder of their own, tensors, bytes of files. */
#ifndef DSC_TEST_SHARD_CASE_H
#define DSC_TEST_SHARD_CASE_H

#include "case.h"
#include "shard.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

enum { MIB = 1 << 20 };

static char folder[] = "/var/tmp/dsc_test_XXXXXX";
static char path[64], part[80];

static void make_test_folder(void) {
    CHECK(mkdtemp(folder));
    snprintf(path, sizeof path, "%s/a.safetensors", folder);
    snprintf(part, sizeof part, "%s.part", path);
}

/* With the file, which must be there, if so asked; nothing else may be in it. */
static void drop_test_folder(bool with_file) {
    CHECK_EQ_INT(unlink(path), with_file ? 0 : -1);
    CHECK_EQ_INT(rmdir(folder), 0);
}

static inline bool is_there(const char *name) {
    struct stat info;
    return stat(name, &info) == 0;
}

static inline size_t size_of(const char *name) {
    struct stat info;
    CHECK_EQ_INT(stat(name, &info), 0);
    return (size_t)info.st_size;
}

static inline void poke(const char *name, size_t at, unsigned char flip) {
    unsigned char byte;
    int fd = open(name, O_RDWR);
    CHECK(fd >= 0);
    CHECK_EQ_INT(pread(fd, &byte, 1, (off_t)at), 1);
    byte ^= flip;
    CHECK_EQ_INT(pwrite(fd, &byte, 1, (off_t)at), 1);
    CHECK_EQ_INT(close(fd), 0);
}

static inline void fill_with(void *data, size_t n, unsigned seed) {
    for (size_t i = 0; i < n; i++)
        ((unsigned char *)data)[i] = (unsigned char)((i ^ i >> 7) * 31 + seed);
}

#endif
