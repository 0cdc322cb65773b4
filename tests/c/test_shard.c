/* One file of a checkpoint: layout, writing, reading in ranges, damage, what the system refuses. */
#define _GNU_SOURCE
#include "shard.h"

#include "alloc.h"
#include "crc32c.h"
#include "shard_case.h"

#include <errno.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>

/* ---- a file and its tensors ---- */

enum { N = 5, BIG = 2 * MIB + MIB / 2 + 7 };
static const uint64_t shapes[N][2] = {{BIG, 0}, {2, 3}, {0, 5}, {0, 0}, {3, 0}};
static const struct dsc_shard_tensor given[N] = {
    {"b/bytes", DSC_SHARD_U8, 1, shapes[0]},
    {"model/x", DSC_SHARD_F32, 2, shapes[1]},
    {"model/none", DSC_SHARD_BF16, 2, shapes[2]},
    {"state/one", DSC_SHARD_F64, 0, shapes[3]},
    {"a \"q\\\n\xC3\xA9", DSC_SHARD_I16, 1, shapes[4]},
};
static char big[BIG];
static const float six[6] = {1, -2, 3.5f, 0, 5, 6};
static const double one = 0.1;
static const int16_t three[3] = {1, -2, 3};
static const void *const memory[N] = {big, six, NULL, &one, three};
static const char *const metadata[] = {"format", "deepspeed_c", "version", "1", NULL};

struct written {
    struct dsc_shard_layout layout;
    uint32_t crcs[8];
};

static enum dsc_status try_write(struct written *out, bool (*progress)(void *, uint64_t)) {
    const void *data[N];
    CHECK_OK(dsc_shard_layout(given, N, metadata, &out->layout));
    CHECK(out->layout.n_crcs <= 8);
    for (int i = 0; i < N; i++)
        data[i] = memory[out->layout.source[i]];
    const struct dsc_shard_writing writing = {
        .layout = &out->layout, .data = data, .crcs = out->crcs, .progress = progress};
    return dsc_shard_write(path, &writing);
}

static void write_given(struct written *out) {
    fill_with(big, BIG, 3);
    CHECK_OK(try_write(out, NULL));
}

static struct dsc_shard_expected expected_of(const struct written *written) {
    return (struct dsc_shard_expected){written->layout.n_bytes, written->layout.header_crc};
}

static const uint32_t *crcs_of(const struct written *written, const char *key) {
    size_t i = 0;
    while (strcmp(written->layout.tensors[i].key, key) != 0)
        i++;
    return written->crcs + written->layout.first_crc[i];
}

static void a_file_has_the_layout(void) {
    static const char text[] =
        "{\"__metadata__\":{\"format\":\"deepspeed_c\",\"version\":\"1\"},"
        "\"state/one\":{\"dtype\":\"F64\",\"shape\":[],\"data_offsets\":[0,8]},"
        "\"model/x\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[8,32]},"
        "\"a \\\"q\\\\\\u000a\xC3\xA9\":{\"dtype\":\"I16\",\"shape\":[3],\"data_offsets\":[32,38]},"
        "\"model/none\":{\"dtype\":\"BF16\",\"shape\":[0,5],\"data_offsets\":[38,38]},"
        "\"b/bytes\":{\"dtype\":\"U8\",\"shape\":[2621447],\"data_offsets\":[38,2621485]}}";
    static char file[4096 + 38];
    struct written written;
    make_test_folder();
    write_given(&written);
    CHECK(!is_there(part));
    CHECK_EQ_INT(size_of(path), 4096 + 38 + BIG);
    CHECK_EQ_INT(written.layout.n_bytes, 4096 + 38 + BIG);
    int fd = open(path, O_RDONLY);
    CHECK_EQ_INT(read(fd, file, sizeof file), sizeof file);
    (void)close(fd);
    CHECK(memcmp(file, "\xF8\x0F\0\0\0\0\0\0", 8) == 0);
    CHECK(memcmp(file + 8, text, sizeof text - 1) == 0);
    for (size_t i = 8 + sizeof text - 1; i < 4096; i++)
        CHECK(file[i] == ' ');
    CHECK(memcmp(file + 4096, &one, 8) == 0 && memcmp(file + 4096 + 8, six, 24) == 0);
    CHECK_EQ_INT(written.layout.header_crc, dsc_crc32c(0, file, 4096));
    dsc_shard_layout_free(&written.layout);
    drop_test_folder(true);
    CHECK_EQ_INT(dsc_alloc_counters().n_live, 0);
}

static void what_is_written_is_found_by_key_and_read(void) {
    struct written written;
    struct dsc_shard *shard;
    float x[6];
    make_test_folder();
    write_given(&written);
    struct dsc_shard_expected expected = expected_of(&written);
    CHECK_OK(dsc_shard_open(path, &expected, &shard));
    CHECK_EQ_INT(dsc_shard_count(shard), N);
    for (int i = 0; i < N; i++) {
        const struct dsc_shard_tensor *found = dsc_shard_find(shard, given[i].key);
        CHECK(found && found->dtype == given[i].dtype && found->n_dims == given[i].n_dims);
        for (int k = 0; k < found->n_dims; k++)
            CHECK_EQ_INT(found->shape[k], given[i].shape[k]);
    }
    for (size_t i = 0; i < N; i++)
        CHECK_EQ_INT(dsc_shard_tensor(shard, i)->offset, written.layout.tensors[i].offset);
    CHECK(!dsc_shard_tensor(shard, N) && !dsc_shard_find(shard, "model"));
    CHECK(strcmp(dsc_shard_metadata(shard, "version"), "1") == 0);
    CHECK(!dsc_shard_metadata(shard, "none"));
    const struct dsc_shard_tensor *found = dsc_shard_find(shard, "model/x");
    CHECK_OK(dsc_shard_read(shard, found, crcs_of(&written, "model/x"), 0, 24, x));
    CHECK(memcmp(x, six, 24) == 0);
    CHECK_EQ_INT(dsc_shard_read(shard, found, NULL, 20, 5, x), DSC_EINVAL);
    CHECK_EQ_INT(dsc_shard_read(shard, found, NULL, 25, 0, x), DSC_EINVAL);
    CHECK_EQ_INT(dsc_shard_read(shard, found, NULL, 1, UINT64_MAX, x), DSC_EINVAL);
    struct dsc_shard_tensor outside = *found;
    outside.offset = written.layout.n_bytes - 23;
    CHECK_EQ_INT(dsc_shard_read(shard, &outside, NULL, 0, 1, x), DSC_EDAMAGED);
    outside.offset = 4095;
    CHECK_EQ_INT(dsc_shard_read(shard, &outside, NULL, 0, 1, x), DSC_EDAMAGED);
    dsc_shard_close(shard);
    dsc_shard_layout_free(&written.layout);
    drop_test_folder(true);
    CHECK_EQ_INT(dsc_alloc_counters().n_live, 0);
}

static void any_range_is_read_and_checked(void) {
    static const uint64_t ends[] = {0,           1,       5000,        MIB - 1, MIB, MIB + 1,
                                    2 * MIB - 1, 2 * MIB, 2 * MIB + 1, BIG - 1, BIG};
    enum { M = sizeof ends / sizeof *ends };
    static char out[BIG + 2];
    struct written written;
    struct dsc_shard *shard;
    make_test_folder();
    write_given(&written);
    CHECK_OK(dsc_shard_open(path, NULL, &shard));
    const struct dsc_shard_tensor *found = dsc_shard_find(shard, "b/bytes");
    const uint32_t *crcs = crcs_of(&written, "b/bytes");
    for (int i = 0; i < M; i++)
        for (int k = i; k < M; k++) {
            size_t n = ends[k] - ends[i];
            memset(out, 0x55, n + 2);
            CHECK_OK(dsc_shard_read(shard, found, crcs, ends[i], n, out + 1));
            CHECK(memcmp(out + 1, big + ends[i], n) == 0 && out[0] == 0x55 && out[n + 1] == 0x55);
            CHECK_OK(dsc_shard_read(shard, found, crcs, ends[i], n, NULL));
        }
    CHECK_OK(dsc_shard_read(shard, found, NULL, 3, BIG - 3, out));
    CHECK(memcmp(out, big + 3, BIG - 3) == 0);
    dsc_shard_close(shard);
    dsc_shard_layout_free(&written.layout);
    drop_test_folder(true);
}

/* ---- damage ---- */

/* Opens and reads everything, as a load does. */
static enum dsc_status check_all(const struct written *written) {
    struct dsc_shard_expected expected = expected_of(written);
    struct dsc_shard *shard;
    enum dsc_status status = dsc_shard_open(path, &expected, &shard);
    if (status != DSC_OK)
        return status;
    for (size_t i = 0; status == DSC_OK && i < N; i++) {
        const struct dsc_shard_tensor *tensor = dsc_shard_tensor(shard, i);
        status = dsc_shard_read(shard, tensor, written->crcs + written->layout.first_crc[i], 0,
                                tensor->n_bytes, NULL);
    }
    dsc_shard_close(shard);
    return status;
}

static void a_flipped_bit_anywhere_is_found_and_named(void) {
    struct written written;
    make_test_folder();
    write_given(&written);
    CHECK_OK(check_all(&written));
    for (size_t at = 0; at < written.layout.n_bytes; at += at < 4200 ? 1 : 100003) {
        poke(path, at, (unsigned char)(1 << at % 8));
        CHECK_EQ_INT(check_all(&written), DSC_EDAMAGED);
        CHECK(strstr(dsc_last_error(), path));
        CHECK(strstr(dsc_last_error(), at < 4096        ? "header"
                                       : at < 4096 + 8  ? "state/one"
                                       : at < 4096 + 32 ? "model/x"
                                       : at < 4096 + 38 ? "a \"q"
                                                        : "b/bytes"));
        poke(path, at, (unsigned char)(1 << at % 8));
    }
    poke(path, 4096 + 38 + MIB + 5, 1);
    CHECK_EQ_INT(check_all(&written), DSC_EDAMAGED);
    CHECK(strstr(dsc_last_error(), "in the 1048576 bytes at offset 1052710"));
    poke(path, 4096 + 38 + MIB + 5, 1);
    CHECK_OK(check_all(&written));
    dsc_shard_layout_free(&written.layout);
    drop_test_folder(true);
    CHECK_EQ_INT(dsc_alloc_counters().n_live, 0);
}

/* Only the blocks that a range touches are read. */
static void damage_elsewhere_does_not_matter(void) {
    static char out[MIB];
    struct written written;
    struct dsc_shard *shard;
    make_test_folder();
    write_given(&written);
    poke(path, 4096 + 38 + MIB, 1);
    CHECK_OK(dsc_shard_open(path, NULL, &shard));
    const struct dsc_shard_tensor *found = dsc_shard_find(shard, "b/bytes");
    const uint32_t *crcs = crcs_of(&written, "b/bytes");
    CHECK_OK(dsc_shard_read(shard, found, crcs, 5, MIB - 5, out));
    CHECK_OK(dsc_shard_read(shard, found, crcs, 2 * MIB, 100, out));
    CHECK_EQ_INT(dsc_shard_read(shard, found, crcs, 5, MIB - 4, out), DSC_EDAMAGED);
    CHECK_EQ_INT(dsc_shard_read(shard, found, crcs, 2 * MIB - 1, 1, out), DSC_EDAMAGED);
    dsc_shard_close(shard);
    dsc_shard_layout_free(&written.layout);
    drop_test_folder(true);
}

static void a_file_of_another_length_is_found(void) {
    struct written written;
    make_test_folder();
    write_given(&written);
    CHECK_EQ_INT(truncate(path, (off_t)written.layout.n_bytes + 1), 0);
    CHECK_EQ_INT(check_all(&written), DSC_EDAMAGED);
    struct dsc_shard *shard;
    CHECK_EQ_INT(dsc_shard_open(path, NULL, &shard), DSC_EDAMAGED);
    for (off_t n = (off_t)written.layout.n_bytes; n > 0; n = n > 5000 ? n / 2 : n - 311) {
        CHECK_EQ_INT(truncate(path, n - 1), 0);
        CHECK_EQ_INT(check_all(&written), DSC_EDAMAGED);
        CHECK(strstr(dsc_last_error(), path) && strstr(dsc_last_error(), "were written"));
        CHECK_EQ_INT(dsc_shard_open(path, NULL, &shard), DSC_EDAMAGED);
    }
    dsc_shard_layout_free(&written.layout);
    drop_test_folder(true);
    CHECK_EQ_INT(dsc_alloc_counters().n_live, 0);
}

/* Cut while it is open: an error, not what memory held. */
static void a_file_that_shrinks_under_a_reader_is_damage(void) {
    static char out[BIG];
    struct written written;
    struct dsc_shard *shard;
    make_test_folder();
    write_given(&written);
    CHECK_OK(dsc_shard_open(path, NULL, &shard));
    CHECK_EQ_INT(truncate(path, 5000), 0);
    const struct dsc_shard_tensor *found = dsc_shard_find(shard, "b/bytes");
    CHECK_EQ_INT(dsc_shard_read(shard, found, NULL, 0, BIG, out), DSC_EDAMAGED);
    CHECK(strstr(dsc_last_error(), "the file ends at 5000, inside of b/bytes"));
    dsc_shard_close(shard);
    dsc_shard_layout_free(&written.layout);
    drop_test_folder(true);
}

/* ---- headers of others ---- */

/* A file of this header text (padded to `n`, 0: not) and n_data bytes behind it. */
static enum dsc_status open_text(const char *text, size_t n, size_t n_data,
                                 struct dsc_shard **out) {
    static char file[8 + 20000];
    size_t length = strlen(text);
    CHECK(length + n_data < 20000 && n < 15000);
    memset(file, ' ', sizeof file);
    memcpy(file + 8, text, length);
    length = dsc_max(length, n);
    for (int i = 0; i < 8; i++)
        file[i] = (char)(length >> 8 * i & 255);
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    CHECK_EQ_INT(write(fd, file, 8 + length + n_data), 8 + length + n_data);
    CHECK_EQ_INT(close(fd), 0);
    return dsc_shard_open(path, NULL, out);
}

static void files_of_others_are_read(void) {
    static const struct {
        const char *text;
        size_t n_data, n_tensors;
    } files[] = {
        {"{}", 0, 0},
        {"{\"__metadata__\":{}}", 0, 0},
        {"{\"x\":{\"dtype\":\"BOOL\",\"shape\":[3],\"data_offsets\":[0,3]}}", 3, 1},
        {"{ \"x\" : { \"data_offsets\" : [ 4 , 6 ],\t\"shape\" : [ ], \"dtype\" : \"BF16\" } ,\r\n"
         "\"w\":{\"shape\":[1,1],\"dtype\":\"F8_E4M3\",\"data_offsets\":[6,7]},"
         "\"\\u0079\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}  ",
         7, 3},
        {"{\"\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}", 0, 1},
    };
    struct dsc_shard *shard;
    make_test_folder();
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        CHECK_OK(open_text(files[i].text, 0, files[i].n_data, &shard));
        CHECK_EQ_INT(dsc_shard_count(shard), files[i].n_tensors);
        dsc_shard_close(shard);
        CHECK_OK(open_text(files[i].text, 1000, files[i].n_data, &shard));
        dsc_shard_close(shard);
    }
    drop_test_folder(true);
    CHECK_EQ_INT(dsc_alloc_counters().n_live, 0);
}

#define ONE(dtype, shape, offsets)                                                                 \
    "{\"x\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":" offsets "}}"

static void a_header_that_lies_is_refused(void) {
    static const struct {
        const char *text;
        size_t n_data;
        const char *says;
    } files[] = {
        {"", 0, "expected '{'"},
        {" {}", 0, "expected '{'"},
        {"[]", 0, "expected '{'"},
        {"{", 0, "a key in double quotes"},
        {"{}x", 0, "nothing more"},
        {"{}", 1, "the tensors end at offset 10, the file at 11"},
        {"{\"x\":1}", 0, "tensor x: it is not described"},
        {"{\"x\":{}}", 0, "it is not described"},
        {"{\"x\":{\"dtype\":\"U8\",\"dtype\":\"U8\",\"shape\":[0]}}", 0, "it is not described"},
        {"{\"x\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0],\"more\":1}}", 0,
         "it is not described"},
        {ONE("U9", "[1]", "[0,1]"), 1, "its dtype is unknown"},
        {ONE("f32", "[1]", "[0,4]"), 4, "its dtype is unknown"},
        {ONE("U8", "{}", "[0,1]"), 1, "it is not described"},
        {ONE("U8", "[-1]", "[0,1]"), 1, "a dimension"},
        {ONE("U8", "[1.5]", "[0,1]"), 1, "a dimension"},
        {ONE("U8", "[\"1\"]", "[0,1]"), 1, "a dimension"},
        {ONE("U8", "[01]", "[0,1]"), 1, "',' or ']'"},
        {ONE("U8", "[1]", "[0]"), 1, "its data_offsets are not in the file"},
        {ONE("U8", "[1]", "[0,1,2]"), 1, "its data_offsets are not in the file"},
        {ONE("U8", "[1]", "[1,0]"), 1, "its data_offsets are not in the file"},
        {ONE("U8", "[1]", "[-1,0]"), 1, "its data_offsets are not in the file"},
        {ONE("U8", "[2]", "[0,2]"), 1, "its data_offsets are not in the file"},
        {ONE("U8", "[1]", "[1,2]"), 2, "begins at offset"},
        {ONE("U8", "[1]", "[0,1]"), 2, "the tensors end at offset"},
        {ONE("U8", "[2]", "[0,1]"), 1, "do not fit its dtype and shape"},
        {ONE("F16", "[1]", "[0,1]"), 1, "do not fit its dtype and shape"},
        {ONE("F32", "[4294967296,4294967296]", "[0,1]"), 1, "do not fit its dtype and shape"},
        {ONE("F32", "[9007199254740992,9007199254740992,0]", "[0,0]"), 0, "do not fit"},
        {ONE("U8", "[1e300]", "[0,1]"), 1, "a dimension"},
        {ONE("U8", "[1]", "[0,18446744073709551617]"), 1, "its data_offsets are not in the file"},
        {"{\"x\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},"
         "\"x\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[1,2]}}",
         2, "two tensors have the key x"},
        {"{\"x\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]},"
         "\"y\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[1,3]}}",
         3, "tensor y begins at offset"},
        {"{\"__metadata__\":{},\"__metadata__\":{}}", 0, "__metadata__ is not one object"},
        {"{\"__metadata__\":[]}", 0, "__metadata__ is not one object"},
        {"{\"__metadata__\":{\"a\":1}}", 0, "__metadata__ holds more than texts"},
        {"{\"x\\u0000\":1}", 0, "a character before this"},
        {ONE("U8",
             "[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,"
             "1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1]",
             "[0,1]"),
         1, "64 dimensions"},
    };
    struct dsc_shard *shard;
    make_test_folder();
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        CHECK_EQ_INT(open_text(files[i].text, 0, files[i].n_data, &shard), DSC_EDAMAGED);
        if (!strstr(dsc_last_error(), files[i].says) || !strstr(dsc_last_error(), path)) {
            fprintf(stderr, "%s: %s, not: %s\n", files[i].text, dsc_last_error(), files[i].says);
            exit(1);
        }
    }
    CHECK_OK(open_text(ONE("U8", "[1]", "[0,1]"), 0, 1, &shard));
    dsc_shard_close(shard);
    poke(path, 7, 0x80); /* the length's highest byte */
    CHECK_EQ_INT(dsc_shard_open(path, NULL, &shard), DSC_EDAMAGED);
    CHECK(strstr(dsc_last_error(), "its header would have"));
    drop_test_folder(true);
    CHECK_EQ_INT(dsc_alloc_counters().n_live, 0);
}

static void what_is_no_file_is_an_error_with_the_path(void) {
    struct dsc_shard *shard;
    make_test_folder();
    CHECK_EQ_INT(dsc_shard_open(path, NULL, &shard), DSC_EIO);
    CHECK_EQ_INT(dsc_last_errno(), ENOENT);
    CHECK(strstr(dsc_last_error(), path));
    CHECK_EQ_INT(dsc_shard_open(folder, NULL, &shard), DSC_EDAMAGED);
    CHECK_EQ_INT(mkfifo(path, 0600), 0);
    CHECK_EQ_INT(dsc_shard_open(path, NULL, &shard), DSC_EDAMAGED); /* and does not wait */
    drop_test_folder(true);
    CHECK_EQ_INT(dsc_alloc_counters().n_live, 0);
}

/* ---- what cannot be written ---- */

static void tensors_that_no_file_can_hold_are_refused(void) {
    static const uint64_t most[] = {INT64_MAX, INT64_MAX, 0};
    static const uint64_t large[] = {INT64_MAX};
    static char long_key[DSC_SHARD_MAX_KEY + 2];
    memset(long_key, 'k', sizeof long_key - 1);
    const struct dsc_shard_tensor bad[][2] = {
        {{"x", DSC_SHARD_U8, 0, NULL}, {"x", DSC_SHARD_F64, 0, NULL}},
        {{"x", DSC_SHARD_U8, 0, NULL}, {"__metadata__", DSC_SHARD_U8, 0, NULL}},
        {{"x", DSC_SHARD_U8, 0, NULL}, {"", DSC_SHARD_U8, 0, NULL}},
        {{"x", DSC_SHARD_U8, 0, NULL}, {long_key, DSC_SHARD_U8, 0, NULL}},
        {{"x", DSC_SHARD_U8, 0, NULL}, {"y", DSC_SHARD_DTYPE_COUNT, 0, NULL}},
        {{"x", DSC_SHARD_U8, 0, NULL}, {"y", DSC_SHARD_U8, DSC_SHARD_MAX_DIMS + 1, most}},
        {{"x", DSC_SHARD_U8, 0, NULL}, {"y", DSC_SHARD_U8, 3, most}},
        {{"x", DSC_SHARD_U8, 0, NULL}, {"y", DSC_SHARD_F32, 1, large}},
        {{"x", DSC_SHARD_U8, 1, large}, {"y", DSC_SHARD_U8, 1, large}},
    };
    struct dsc_shard_layout layout;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        CHECK_EQ_INT(dsc_shard_layout(bad[i], 2, NULL, &layout), DSC_EINVAL);
    CHECK_EQ_INT(dsc_alloc_counters().n_live, 0);
}

/* The file that was there is as it was. */
static void check_old_file(void) {
    struct dsc_shard *shard;
    CHECK(!is_there(part));
    CHECK_OK(dsc_shard_open(path, NULL, &shard));
    CHECK_EQ_INT(dsc_shard_count(shard), 1);
    dsc_shard_close(shard);
}

static void write_old_file(void) {
    struct dsc_shard *shard;
    CHECK_OK(open_text(ONE("U8", "[1]", "[0,1]"), 0, 1, &shard));
    dsc_shard_close(shard);
}

static bool stops(void *context, uint64_t n_done) {
    (void)context;
    CHECK(n_done > 0);
    return false;
}

static void a_write_that_fails_leaves_what_was_there(void) {
    struct rlimit before, limit;
    struct written written;
    make_test_folder();
    write_old_file();
    (void)signal(SIGXFSZ, SIG_IGN); /* as Python does */
    CHECK_EQ_INT(getrlimit(RLIMIT_FSIZE, &before), 0);
    limit = before;
    limit.rlim_cur = 2 * MIB;
    CHECK_EQ_INT(setrlimit(RLIMIT_FSIZE, &limit), 0);
    CHECK_EQ_INT(try_write(&written, NULL), DSC_EIO);
    CHECK_EQ_INT(dsc_last_errno(), EFBIG);
    CHECK(strstr(dsc_last_error(), path) && strstr(dsc_last_error(), "File too large"));
    CHECK_EQ_INT(setrlimit(RLIMIT_FSIZE, &before), 0);
    dsc_shard_layout_free(&written.layout);
    check_old_file();
    CHECK_EQ_INT(chmod(folder, 0500), 0);
    if (geteuid() != 0) {
        CHECK_EQ_INT(try_write(&written, NULL), DSC_EIO);
        CHECK_EQ_INT(dsc_last_errno(), EACCES);
        dsc_shard_layout_free(&written.layout);
    }
    CHECK_EQ_INT(chmod(folder, 0700), 0);
    check_old_file();
    drop_test_folder(true);
    CHECK_EQ_INT(dsc_alloc_counters().n_live, 0);
}

static void an_interrupted_write_leaves_nothing(void) {
    static char huge[20 * MIB];
    static const uint64_t shape[] = {sizeof huge};
    const struct dsc_shard_tensor tensor = {"x", DSC_SHARD_U8, 1, shape};
    const void *data[] = {huge};
    uint32_t crcs[20];
    struct dsc_shard_layout layout;
    make_test_folder();
    CHECK_OK(dsc_shard_layout(&tensor, 1, NULL, &layout));
    const struct dsc_shard_writing writing = {&layout, data, crcs, stops, NULL};
    CHECK_EQ_INT(dsc_shard_write(path, &writing), DSC_EINTR);
    CHECK(!is_there(part));
    dsc_shard_layout_free(&layout);
    drop_test_folder(false);
}

static void a_full_disk_is_an_error_with_the_path(void) {
    struct written written;
    make_test_folder();
    if (mount("none", folder, "tmpfs", 0, "size=2m") == 0) { /* needs root */
        write_old_file();
        CHECK_EQ_INT(try_write(&written, NULL), DSC_EIO);
        CHECK_EQ_INT(dsc_last_errno(), ENOSPC);
        CHECK(strstr(dsc_last_error(), path) && strstr(dsc_last_error(), "No space left"));
        dsc_shard_layout_free(&written.layout);
        check_old_file();
        CHECK_EQ_INT(umount(folder), 0);
    }
    drop_test_folder(false);
    CHECK_EQ_INT(dsc_alloc_counters().n_live, 0);
}

/* A child writes until it is killed; what has the name is whole. */
static void a_killed_writer_leaves_the_old_file_or_the_new_one(void) {
    int how;
    make_test_folder();
    fill_with(big, BIG, 3);
    for (int i = 0; i < 12; i++) {
        struct written written;
        write_old_file();
        pid_t child = fork();
        if (child == 0) {
            _exit(try_write(&written, NULL) != DSC_OK);
        }
        const struct timespec wait = {0, i * 400000};
        (void)nanosleep(&wait, NULL);
        (void)kill(child, SIGKILL);
        CHECK_EQ_INT(waitpid(child, &how, 0), child);
        if (size_of(path) > 1000) {
            CHECK_OK(dsc_shard_layout(given, N, metadata, &written.layout));
            for (size_t t = 0; t < N; t++) {
                const char *data = memory[written.layout.source[t]];
                for (size_t b = written.layout.first_crc[t]; b < written.layout.first_crc[t + 1];
                     b++) {
                    size_t at = (b - written.layout.first_crc[t]) * MIB;
                    written.crcs[b] = dsc_crc32c(
                        0, data + at, dsc_min(MIB, written.layout.tensors[t].n_bytes - at));
                }
            }
            CHECK_OK(check_all(&written));
            dsc_shard_layout_free(&written.layout);
        } else {
            struct dsc_shard *shard;
            CHECK_OK(dsc_shard_open(path, NULL, &shard));
            dsc_shard_close(shard);
        }
        (void)unlink(part);
    }
    drop_test_folder(true);
}

static const struct test_case cases[] = {
    CASE(a_file_has_the_layout),
    CASE(what_is_written_is_found_by_key_and_read),
    CASE(any_range_is_read_and_checked),
    CASE(a_flipped_bit_anywhere_is_found_and_named),
    CASE(damage_elsewhere_does_not_matter),
    CASE(a_file_of_another_length_is_found),
    CASE(a_file_that_shrinks_under_a_reader_is_damage),
    CASE(files_of_others_are_read),
    CASE(a_header_that_lies_is_refused),
    CASE(what_is_no_file_is_an_error_with_the_path),
    CASE(tensors_that_no_file_can_hold_are_refused),
    CASE(a_write_that_fails_leaves_what_was_there),
    CASE(an_interrupted_write_leaves_nothing),
    CASE(a_full_disk_is_an_error_with_the_path),
    CASE(a_killed_writer_leaves_the_old_file_or_the_new_one),
};
RUN_CASES(cases)
