/* Fuzzing the reader of one file: whatever bytes a file has, opening and reading it is clean, and
 * what it gives out is consistent. The input is 4 bytes (how many zeros follow the file, and where
 * ranges begin) and the file. */
#define _GNU_SOURCE
#include "crc32c.h"
#include "fuzz.h"
#include "shard.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { ZEROS = 2 * 4096, MOST_BYTES = 3 << 20, CRCS = MOST_BYTES / DSC_SHARD_CRC_BYTES + 2 };

static char out[MOST_BYTES + (1 << 17)];

static void demand(bool condition) {
    if (!condition)
        abort();
}

/* With the right checksums a range reads what is there; with a wrong one it is damage. */
static void read_tensor(const struct dsc_shard *shard, const struct dsc_shard_tensor *tensor,
                        uint64_t seed) {
    uint32_t crcs[CRCS];
    size_t n_crcs = dsc_shard_n_crcs(tensor->n_bytes);
    uint64_t begin = seed % (tensor->n_bytes + 1), n = seed / 7 % (tensor->n_bytes - begin + 1);
    demand(tensor->n_bytes <= sizeof out && n_crcs <= CRCS);
    demand(dsc_shard_read(shard, tensor, NULL, 0, tensor->n_bytes, out) == DSC_OK);
    for (size_t i = 0; i < n_crcs; i++) {
        size_t at = i * DSC_SHARD_CRC_BYTES;
        crcs[i] = dsc_crc32c(0, out + at, dsc_min(DSC_SHARD_CRC_BYTES, tensor->n_bytes - at));
    }
    demand(dsc_shard_read(shard, tensor, crcs, begin, n, out) == DSC_OK);
    if (n > 0) {
        crcs[begin / DSC_SHARD_CRC_BYTES] ^= 1;
        demand(dsc_shard_read(shard, tensor, crcs, begin, n, NULL) == DSC_EDAMAGED);
    }
    struct dsc_shard_tensor moved = *tensor; /* anything may be asked for */
    moved.offset += seed * 0x9E3779B97F4A7C15u;
    moved.n_bytes ^= seed << 7;
    (void)dsc_shard_read(shard, &moved, NULL, begin, dsc_min(n, sizeof out), out);
}

static void read_all(const struct dsc_shard *shard, uint64_t seed) {
    uint64_t end = 0;
    for (size_t i = 0; i < dsc_shard_count(shard); i++) {
        const struct dsc_shard_tensor *tensor = dsc_shard_tensor(shard, i);
        uint64_t n_bytes;
        demand(dsc_shard_find(shard, tensor->key) == tensor);
        demand(dsc_shard_size(tensor->dtype, tensor->n_dims, tensor->shape, &n_bytes) == DSC_OK);
        demand(n_bytes == tensor->n_bytes && tensor->offset >= end);
        end = tensor->offset + tensor->n_bytes;
        if (i < 16)
            read_tensor(shard, tensor, seed + i);
    }
    (void)dsc_shard_metadata(shard, "format");
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static int file = -1;
    static char path[64];
    struct dsc_shard *shard;
    uint32_t seed;
    if (file < 0) {
        file = memfd_create("fuzz_shard", MFD_CLOEXEC);
        snprintf(path, sizeof path, "/proc/self/fd/%d", file);
    }
    if (size < 4 || size > 1 << 16)
        return 0;
    memcpy(&seed, data, 4);
    size -= 4;
    size_t n_zeros = (seed & 255) * ZEROS;
    demand(ftruncate(file, 0) == 0 && pwrite(file, data + 4, size, 0) == (ssize_t)size);
    demand(ftruncate(file, (off_t)(size + n_zeros)) == 0);
    const struct dsc_shard_expected wrong = {size + n_zeros, seed};
    enum dsc_status status = dsc_shard_open(path, NULL, &shard);
    demand(status == DSC_OK || status == DSC_EDAMAGED);
    if (status != DSC_OK)
        return 0;
    read_all(shard, seed);
    dsc_shard_close(shard);
    if (dsc_shard_open(path, &wrong, &shard) == DSC_OK)
        dsc_shard_close(shard);
    return 0;
}

/* ---- inputs to start from ---- */

static const struct {
    const char *text;
    size_t n_data;
    unsigned char zeros; /* so many times ZEROS follow */
} seeds[] = {
    {"{}", 0, 0},
    {"{\"__metadata__\":{\"format\":\"pt\"},\"x\":{\"dtype\":\"F32\",\"shape\":[2,3],"
     "\"data_offsets\":[0,24]}}   ",
     24, 0},
    {"{\"a\":{\"dtype\":\"BF16\",\"shape\":[4],\"data_offsets\":[8,16]},\"b\":{\"dtype\":\"I64\","
     "\"shape\":[],\"data_offsets\":[0,8]},\"c\":{\"dtype\":\"BOOL\",\"shape\":[0,7],"
     "\"data_offsets\":[16,16]}}",
     16, 0},
    {"{\"big\":{\"dtype\":\"U8\",\"shape\":[1064960],\"data_offsets\":[0,1064960]}}", 0, 130},
};

size_t fuzz_seed(size_t i, uint8_t *to, size_t room) {
    if (i >= sizeof seeds / sizeof *seeds)
        return 0;
    size_t n = strlen(seeds[i].text);
    demand(12 + n + seeds[i].n_data <= room);
    memset(to, 0, 12 + n + seeds[i].n_data);
    to[0] = seeds[i].zeros;
    to[4] = (uint8_t)n;
    to[5] = (uint8_t)(n >> 8);
    memcpy(to + 12, seeds[i].text, n);
    return 12 + n + seeds[i].n_data;
}

/* The header ends with the last brace. */
size_t fuzz_repair(uint8_t *data, size_t size, size_t room) {
    size_t end = size;
    (void)room;
    while (end > 12 && data[end - 1] != '}')
        end--;
    for (int i = 0; i < 8 && end > 12; i++)
        data[4 + i] = (uint8_t)((end - 12) >> 8 * i & 255);
    return size;
}

const char *const fuzz_words[] = {
    "\"dtype\"",
    "\"shape\"",
    "\"data_offsets\"",
    "\"__metadata__\"",
    "\"F32\"",
    "\"U8\"",
    "[",
    "]",
    "{",
    "}",
    ",",
    ":",
    "0",
    "1",
    "-1",
    "4294967296",
    "9007199254740992",
    "18446744073709551616",
    "1e308",
    "\\u0000",
    "\\ud800",
    "\"",
    "null",
    NULL,
};
