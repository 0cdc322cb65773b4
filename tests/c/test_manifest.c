/* The table of a checkpoint: its text there and back, what is refused, and reading through it. */
#define _GNU_SOURCE
#include "case.h"
#include "crc32c.h"
#include "manifest.h"
#include "reader.h"

#include "alloc.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <sys/stat.h>
#include <unistd.h>

static struct dsc_manifest *new_manifest(void) {
    struct dsc_manifest *manifest;
    CHECK_OK(dsc_manifest_open(&manifest));
    return manifest;
}

static uint32_t add_file(struct dsc_manifest *manifest, const char *name, uint64_t n_bytes) {
    const struct dsc_manifest_file file = {name, n_bytes, 0xDEADBEEF};
    uint32_t number;
    CHECK_OK(dsc_manifest_add_file(manifest, &file, &number));
    return number;
}

/* A one-dimensional tensor of float32 in pieces. */
static enum dsc_status add_flat(struct dsc_manifest *manifest, const char *name, uint64_t n,
                                struct dsc_manifest_piece *pieces, size_t n_pieces) {
    static const uint32_t crcs[64] = {1, 2, 3};
    const uint64_t stride = 1;
    const struct dsc_manifest_tensor tensor = {"model", name, {0, 0},  DSC_SHARD_F32,
                                               1,       &n,   &stride, 0};
    return dsc_manifest_add_tensor(manifest, &tensor, pieces, n_pieces, crcs);
}

/* Two files, sections, tensors with every kind of field. */
static struct dsc_manifest *sample(void) {
    struct dsc_manifest *manifest = new_manifest();
    const uint32_t first = add_file(manifest, "rank_00000.safetensors", 4096 + 24 + 8 + 1);
    const uint32_t second = add_file(manifest, "rank_00001.safetensors", 4096 + 12);
    const uint32_t crcs[] = {0, 0xFFFFFFFF, 0x0A0B0C0D};
    CHECK_OK(dsc_manifest_set(manifest, "counters", "{\"global_steps\": 10, \"x\": [1.5, null]}"));
    CHECK_OK(dsc_manifest_set(manifest, "\"odd\\\n\xC3\xA9", "3"));
    CHECK_OK(dsc_manifest_set(manifest, "counters", "{\"global_steps\": 11}"));
    (void)add_file(manifest, "objects.pt", 77);
    const struct dsc_manifest_piece two[] = {{first, 4096, 0, 6, 0, 1}, {second, 4096, 6, 3, 0, 1}};
    const struct dsc_manifest_tensor matrix = {"model",
                                               "layer.\"w\"\xE2\x82\xAC",
                                               {0, 3},
                                               DSC_SHARD_F32,
                                               2,
                                               (uint64_t[]){3, 3},
                                               (uint64_t[]){1, 3},
                                               5};
    CHECK_OK(dsc_manifest_add_tensor(manifest, &matrix, two, 2, crcs));
    const struct dsc_manifest_piece one[] = {{first, 4096 + 24, 0, 1, 0, 1}};
    const struct dsc_manifest_tensor scalar = {"state.step", "a",  {0, 0}, DSC_SHARD_I64, 0,
                                               NULL,         NULL, -1};
    CHECK_OK(dsc_manifest_add_tensor(manifest, &scalar, one, 1, crcs + 2));
    const struct dsc_manifest_piece byte[] = {{first, 4096 + 32, 0, 1, 0, 1}};
    const struct dsc_manifest_tensor flag = {
        "buffer", "flag", {0, 0}, DSC_SHARD_BOOL, 1, (uint64_t[]){1}, (uint64_t[]){7}, -1};
    CHECK_OK(dsc_manifest_add_tensor(manifest, &flag, byte, 1, crcs));
    const struct dsc_manifest_tensor nothing = {
        "model", "empty", {0, 0}, DSC_SHARD_BF16, 2, (uint64_t[]){0, 4}, (uint64_t[]){4, 1}, 0};
    CHECK_OK(dsc_manifest_add_tensor(manifest, &nothing, NULL, 0, NULL));
    return manifest;
}

static char *text_of(struct dsc_manifest *manifest, size_t *n) {
    char *text;
    CHECK_OK(dsc_manifest_close(manifest));
    CHECK_OK(dsc_manifest_text(manifest, &text, n));
    return text;
}

/* With a zero byte behind it. */
static char *terminated(const char *text, size_t n) {
    void *copy;
    CHECK_OK(dsc_alloc(n + 1, &copy));
    memcpy(copy, text, n);
    return copy;
}

static void a_table_comes_back_as_it_was(void) {
    struct dsc_manifest *manifest = sample(), *again;
    size_t n, n_again;
    char *text = text_of(manifest, &n), *copy = terminated(text, n);
    CHECK_OK(dsc_manifest_parse(copy, n, "m", &again));
    char *text_again = text_of(again, &n_again);
    CHECK_EQ_INT(n, n_again);
    CHECK(memcmp(text, text_again, n) == 0);
    CHECK_EQ_INT(dsc_manifest_n_sections(again), 2);
    CHECK(strcmp(dsc_manifest_section(again, "counters"), "{\"global_steps\": 11}") == 0);
    CHECK(strcmp(dsc_manifest_section(again, "\"odd\\\n\xC3\xA9"), "3") == 0);
    CHECK(!dsc_manifest_section(again, "other"));
    CHECK_EQ_INT(dsc_manifest_n_bytes(again), 4096 + 33 + 4096 + 12 + 77);
    CHECK_EQ_INT(dsc_manifest_file(again, 0)->head_bytes, 4096);
    CHECK_EQ_INT(dsc_manifest_file(again, 2)->head_bytes, 77);
    CHECK_EQ_INT(dsc_manifest_file(again, 1)->head_crc, 0xDEADBEEF);
    const uint32_t place[] = {0, 3};
    const struct dsc_manifest_tensor *matrix =
        dsc_manifest_find(again, "model", "layer.\"w\"\xE2\x82\xAC", place);
    CHECK(matrix && matrix->n_dims == 2 && matrix->stride[1] == 3 && matrix->n_elems == 9);
    CHECK_EQ_INT(matrix->group, 5);
    const struct dsc_manifest_piece *piece = dsc_manifest_pieces(again) + matrix->first_piece + 1;
    CHECK_EQ_INT(piece->begin, 6);
    CHECK_EQ_INT(dsc_manifest_crcs(again)[piece->first_crc], 0xFFFFFFFF);
    CHECK(!dsc_manifest_find(again, "model", "layer.\"w\"\xE2\x82\xAC", (uint32_t[]){0, 0}));
    dsc_free(text);
    dsc_free(text_again);
    dsc_free(copy);
    dsc_manifest_free(manifest);
    dsc_manifest_free(again);
}

static void any_changed_byte_is_found(void) {
    struct dsc_manifest *manifest = sample(), *again;
    size_t n;
    char *text = text_of(manifest, &n), *copy = terminated(text, n);
    for (size_t i = 0; i < n; i++)
        for (int flip = 1; flip < 256; flip++) {
            copy[i] = (char)(text[i] ^ flip);
            CHECK_EQ_INT(dsc_manifest_parse(copy, n, "m", &again), DSC_EDAMAGED);
            copy[i] = text[i];
        }
    for (size_t i = 0; i < n; i++) {
        copy[i] = '\0';
        CHECK_EQ_INT(dsc_manifest_parse(copy, i, "m", &again), DSC_EDAMAGED);
        copy[i] = text[i];
    }
    CHECK_OK(dsc_manifest_parse(copy, n, "m", &again));
    dsc_free(text);
    dsc_free(copy);
    dsc_manifest_free(manifest);
    dsc_manifest_free(again);
}

/* ---- what a text may not say, under a digest that is right ---- */

#define START "{\"format\":\"deepspeed_c\",\"version\":1,"
#define FILES "\"files\":[{\"name\":\"r\",\"n_bytes\":26,\"head_crc\":\"00000001\"}],"
#define TENSOR(name, shape, stride, pieces)                                                        \
    "{\"kind\":\"k\",\"name\":\"" name "\",\"place\":[0,0],\"dtype\":\"F32\",\"shape\":" shape     \
    ",\"stride\":" stride ",\"group\":0,\"pieces\":" pieces "}"
#define WHOLE "[[0,10,0,4,\"00000001\"]]"
#define REST(tensors) START "\"sections\":{}," FILES "\"tensors\":[" tensors "]"

static const struct {
    const char *text, *says;
} refused[] = {
    {"[]", "'{'"},
    {START "\"sections\":{},\"fils\":[]", "unknown key \"fils\""},
    {START "\"files\":[]", "the key \"sections\""},
    {START "\"sections\":{}", "the key \"files\""},
    {"{\"format\":\"deepspeed_c\",\"version\":2,\"new\":3", "a newer one wrote it"},
    {"{\"format\":\"deepspeed\",\"version\":1", "not \"deepspeed_c\""},
    {"{\"format\":\"deepspeed_c\",\"version\":1.0", "a whole number"},
    {START "\"sections\":{\"a\":1,\"a\":2}", "section \"a\" stands twice"},
    {START "\"sections\":{\"a\":01}", "',' or '}'"},
    {START "\"sections\":{\"a\":}", "a value"},
    {START
     "\"sections\":{},\"files\":[{\"name\":\"../x\",\"n_bytes\":1,\"head_crc\":\"00000000\"}]",
     "\"../x\" is no name of a file"},
    {START "\"sections\":{},\"files\":[{\"name\":\"..\",\"n_bytes\":1,\"head_crc\":\"00000000\"}]",
     "\"..\" is no name of a file"},
    {START "\"sections\":{},\"files\":[{\"name\":\"a\",\"n_bytes\":-1,\"head_crc\":\"00000000\"}]",
     "a whole number that is not negative"},
    {START "\"sections\":{},\"files\":[{\"name\":\"a\",\"n_bytes\":9223372036854775808,"
           "\"head_crc\":\"00000000\"}]",
     "a whole number that is not negative"},
    {START "\"sections\":{},\"files\":[{\"name\":\"a\",\"n_bytes\":1,\"head_crc\":\"0000000A\"}]",
     "checksums"},
    {START "\"sections\":{},\"files\":[{\"name\":\"a\",\"n_bytes\":1,\"head_crc\":\"00000000\"},"
           "{\"name\":\"a\",\"n_bytes\":1,\"head_crc\":\"00000000\"}]",
     "the file a stands twice"},
    {START "\"sections\":{},\"files\":[{\"name\":\"a\",\"n_bytes\":9223372036854775807,"
           "\"head_crc\":\"00000000\"},{\"name\":\"b\",\"n_bytes\":9,\"head_crc\":\"00000000\"}]",
     "more than can be counted"},
    {REST(TENSOR("a", "[4]", "[1]", "[]")), "its pieces end at element 0 of 4"},
    {REST(TENSOR("a", "[4]", "[1]", "[[0,10,1,3,\"00000001\"]]")), "0 would be the next"},
    {REST(TENSOR("a", "[4]", "[1]", "[[0,10,0,2,\"00000001\"],[0,18,1,2,\"00000001\"]]")),
     "2 elements stand already"},
    {REST(TENSOR("a", "[4]", "[1]", "[[0,10,0,5,\"00000001\"]]")), "allowed: 1 to 4"},
    {REST(TENSOR("a", "[4]", "[1]", "[[0,10,0,0,\"\"],[0,10,0,4,\"00000001\"]]")),
     "has 0 elements"},
    {REST(TENSOR("a", "[4]", "[1]", "[[1,10,0,4,\"00000001\"]]")), "lies in file 1 of 1"},
    {REST(TENSOR("a", "[4]", "[1]", "[[0,11,0,4,\"00000001\"]]")), "of r, which has 26"},
    {REST(TENSOR("a", "[4]", "[1]", "[[0,9223372036854775807,0,4,\"00000001\"]]")),
     "of r, which has 26"},
    {REST(TENSOR("a", "[4]", "[1]", "[[0,10,0,4,\"0000000100000001\"]]")), "has 2 checksums; 1"},
    {REST(TENSOR("a", "[4]", "[1]", "[[0,10,0,4,\"000001\"]]")), "eight hexadecimal digits"},
    {REST(TENSOR("a", "[4]", "[1]", "[[0,10,0,4,\"0000000g\"]]")), "eight hexadecimal digits"},
    {REST(TENSOR("a", "[4294967296,4294967296]", "[4294967296,1]", WHOLE)), "tensor k/a"},
    {REST(TENSOR("a", "[2,2]", "[1,1]", WHOLE)), "strides"},
    {REST(TENSOR("a", "[2,2]", "[4,1]", WHOLE)), "strides"},
    {REST(TENSOR("a", "[2,2]", "[2]", WHOLE)), "2 dimensions and 1 strides"},
    {REST(TENSOR("a", "[2,2]", "[2,1,1]", WHOLE)), "']'"},
    {REST(TENSOR("", "[4]", "[1]", WHOLE)), "not empty"},
    {REST(TENSOR("a", "[4]", "[1]", WHOLE) "," TENSOR("a", "[4]", "[1]", WHOLE)), "stands twice"},
    {REST(TENSOR("a", "[4]", "[1]", WHOLE) "," TENSOR("b", "[4]", "[1]", WHOLE)),
     "where the one before it ends at 26"},
    {REST(TENSOR("a", "[2]", "[1]", "[[0,10,0,2,\"00000001\"]]")), "ends at 18 of 26 bytes"},
    {REST("{\"kind\":\"k/k\",\"name\":\"a\",\"place\":[0,0],\"dtype\":\"F32\",\"shape\":[4],"
          "\"stride\":[1],\"group\":0,\"pieces\":" WHOLE "}"),
     "the kind without '/'"},
    {REST("{\"kind\":\"k\",\"name\":\"a\",\"place\":[0],\"dtype\":\"F32\",\"shape\":[4],"
          "\"stride\":[1],\"group\":0,\"pieces\":" WHOLE "}"),
     "is not two ranks"},
    {REST("{\"kind\":\"k\",\"name\":\"a\",\"place\":[0,0],\"dtype\":\"F31\",\"shape\":[4],"
          "\"stride\":[1],\"group\":0,\"pieces\":" WHOLE "}"),
     "unknown dtype \"F31\""},
    {REST("{\"kind\":\"k\",\"name\":\"a\",\"place\":[0,0],\"dtype\":\"F32\",\"shape\":[4],"
          "\"stride\":[1],\"group\":-2,\"pieces\":" WHOLE "}"),
     "a whole number"},
    {REST("{\"kind\":\"k\",\"name\":\"a\",\"place\":[0,0],\"dtype\":\"F32\",\"shape\":[4],"
          "\"stride\":[1],\"group\":-9223372036854775808,\"pieces\":" WHOLE "}"),
     "a whole number"},
    {REST("{\"kind\":\"k\",\"name\":\"\\ud800\"}"), "surrogate"},
    {REST("{\"kind\":\"k\",\"name\":\"\\ud800\\u0061\"}"), "surrogate"},
    {REST("{\"kind\":\"k\",\"name\":\"\\u0000\"}"), "a character before this"},
    {REST("{\"kind\":\"k\",\"name\":\"\\u00g0\"}"), "four hexadecimal digits"},
    {REST("{\"kind\":\"k\",\"name\":\"\\x\"}"), "an escape that JSON has"},
    {REST("{\"kind\":\"k\",\"name\":\"a\nb\"}"), "no control character"},
    {REST("{\"kind\":\"k\",\"name\":7}"), "a string"},
    {REST("\xED\xA0\x80"), "not UTF-8"},
    {REST("\xF4\x90\x80\x80"), "not UTF-8"},
    {START "\"sections\":{\"a\":[1,[2,[3,}", "a value"},
    {START "\"sections\":{\"a\":-x}", "a digit"},
    {REST("{\"kind\":\"k\",\"name\":\"\xC0\x80\"}"), "not UTF-8"},
    {REST("") ",\"more\":1", "unknown key \"more\""},
};

static char *with_digest(const char *text, size_t *n) {
    const size_t room = strlen(text) + 32;
    void *out;
    CHECK_OK(dsc_alloc(room, &out));
    *n = (size_t)snprintf(out, room, "%s,\"digest\":\"%08" PRIx32 "\"}\n", text,
                          dsc_crc32c(0, text, strlen(text)));
    return out;
}

static void what_is_not_right_is_refused_and_named(void) {
    struct dsc_manifest *manifest;
    size_t n;
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++) {
        char *text = with_digest(refused[i].text, &n);
        CHECK_EQ_INT(dsc_manifest_parse(text, n, "here", &manifest), DSC_EDAMAGED);
        if (strncmp(dsc_last_error(), "here: ", 6) != 0 ||
            !strstr(dsc_last_error(), refused[i].says)) {
            fprintf(stderr, "%s\nsaid: %s\nnot: %s\n", text, dsc_last_error(), refused[i].says);
            exit(1);
        }
        dsc_free(text);
    }
    /* The parts of which those are made are right. */
    char *text = with_digest(REST(TENSOR("a", "[4]", "[1]", WHOLE)), &n);
    CHECK_OK(dsc_manifest_parse(text, n, "here", &manifest));
    dsc_free(text);
    dsc_manifest_free(manifest);
}

/* Spaces and escapes as other writers may have them. */
static void a_text_may_be_written_in_other_ways(void) {
    struct dsc_manifest *manifest;
    size_t n;
    char *text = with_digest("{ \"format\" :\t\"deepspeed_c\",\r\n\"version\" : 1 , \"sections\" : "
                             "{ \"\\u0061\" : [ 1E+2 , -0.5e1, {} ] } , " FILES
                             " \"tensors\" : [ " TENSOR("\\u20ac\\uD83d\\uDE00\\n\\/\\\"\\u00e9",
                                                        "[4]", "[1]", WHOLE) " ] ",
                             &n);
    CHECK_OK(dsc_manifest_parse(text, n, "here", &manifest));
    CHECK(strcmp(dsc_manifest_section(manifest, "a"), " [ 1E+2 , -0.5e1, {} ]") == 0);
    CHECK(dsc_manifest_find(manifest, "k", "\xE2\x82\xAC\xF0\x9F\x98\x80\n/\"\xC3\xA9",
                            (uint32_t[]){0, 0}));
    dsc_manifest_free(manifest);
    dsc_free(text);
}

static void a_call_that_is_refused_changes_nothing(void) {
    struct dsc_manifest *manifest = new_manifest();
    char label[DSC_MANIFEST_LABEL];
    (void)add_file(manifest, "r", 4096 + 16);
    struct dsc_manifest_piece gap[] = {{0, 4096, 0, 2, 0, 1}, {0, 4104, 3, 1, 0, 1}};
    CHECK_EQ_INT(add_flat(manifest, "a", 4, gap, 2), DSC_EINVAL);
    gap[1].begin = 2;
    gap[1].n = 2;
    CHECK_OK(add_flat(manifest, "a", 4, gap, 2));
    CHECK_EQ_INT(add_flat(manifest, "a", 4, gap, 2), DSC_EINVAL);
    CHECK(strstr(dsc_last_error(), "model/a stands twice"));
    CHECK_EQ_INT(dsc_manifest_set(manifest, "s", "{"), DSC_EINVAL);
    CHECK_EQ_INT(dsc_manifest_n_tensors(manifest), 1);
    CHECK_EQ_INT(dsc_manifest_n_sections(manifest), 0);
    CHECK_OK(dsc_manifest_close(manifest));
    CHECK_EQ_INT(add_flat(manifest, "b", 4, gap, 2), DSC_ESTATE);
    CHECK_EQ_INT(dsc_manifest_set(manifest, "s", "1"), DSC_ESTATE);
    const struct dsc_manifest_tensor here = {"model", "w", {2, 1}};
    CHECK(strcmp(dsc_manifest_label(&here, label), "model/w of place (2, 1)") == 0);
    dsc_manifest_free(manifest);
}

/* Quadratic time anywhere would not end within a case's limit. */
static void a_hundred_thousand_pieces_of_many_files_are_quick(void) {
    enum { FILES_ = 2000, TENSORS = 50, PIECE = 8 };
    struct dsc_manifest *manifest = new_manifest(), *again;
    struct dsc_manifest_piece *pieces;
    size_t n;
    char name[32];
    for (int i = 0; i < FILES_; i++) {
        snprintf(name, sizeof name, "rank_%05d.safetensors", i);
        (void)add_file(manifest, name, 4096 + TENSORS * PIECE * 4);
    }
    CHECK_OK(dsc_alloc(FILES_ * sizeof *pieces, (void **)&pieces));
    void *crcs;
    CHECK_OK(dsc_alloc(FILES_ * sizeof(uint32_t), &crcs));
    for (uint32_t t = 0; t < TENSORS; t++) {
        for (uint32_t i = 0; i < FILES_; i++)
            pieces[i] =
                (struct dsc_manifest_piece){i, 4096 + t * PIECE * 4, i * PIECE, PIECE, 0, 1};
        const uint64_t n_elems = FILES_ * PIECE, stride = 1;
        snprintf(name, sizeof name, "layer.%u", t);
        const struct dsc_manifest_tensor tensor = {"model", name,     {0, 0},  DSC_SHARD_F32,
                                                   1,       &n_elems, &stride, 0};
        CHECK_OK(dsc_manifest_add_tensor(manifest, &tensor, pieces, FILES_, crcs));
    }
    char *text = text_of(manifest, &n), *copy = terminated(text, n);
    CHECK_OK(dsc_manifest_parse(copy, n, "m", &again));
    CHECK_EQ_INT(dsc_manifest_n_tensors(again), TENSORS);
    dsc_free(pieces);
    dsc_free(crcs);
    dsc_free(text);
    dsc_free(copy);
    dsc_manifest_free(manifest);
    dsc_manifest_free(again);
}

/* ---- reading ---- */

enum { N_RANKS = 100, PER_RANK = 7 }; /* more files than are open at a time */

struct checkpoint {
    char folder[64];
    struct dsc_manifest *manifest;
    struct dsc_reader *reader;
};

/* Element i of tensor "w" is i, of "big" a hash of i; rank r has its part of "w", rank 0 "big". */
static void write_checkpoint(struct checkpoint *c, uint64_t n_big) {
    snprintf(c->folder, sizeof c->folder, "%s/dsc_manifest_XXXXXX",
             access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp"); /* where syncing costs nothing */
    CHECK(mkdtemp(c->folder));
    c->manifest = new_manifest();
    struct dsc_manifest_piece pieces[N_RANKS], big_piece;
    uint32_t crcs[N_RANKS], *big_crcs = NULL, *big, number;
    CHECK_OK(dsc_alloc(n_big * 4, (void **)&big));
    for (uint64_t i = 0; i < n_big; i++)
        big[i] = (uint32_t)i * 2654435761u;
    for (int r = 0; r < N_RANKS; r++) {
        float data[PER_RANK];
        char path[128], name[32];
        const uint64_t n = PER_RANK;
        for (int i = 0; i < PER_RANK; i++)
            data[i] = (float)(r * PER_RANK + i);
        const struct dsc_shard_tensor tensors[] = {
            {.key = "model/w", .dtype = DSC_SHARD_F32, .n_dims = 1, .shape = &n},
            {.key = "model/big", .dtype = DSC_SHARD_I32, .n_dims = 1, .shape = &n_big}};
        struct dsc_shard_layout layout;
        CHECK_OK(dsc_shard_layout(tensors, r == 0 ? 2 : 1, NULL, &layout));
        uint32_t *written;
        CHECK_OK(dsc_alloc(layout.n_crcs * sizeof *written, (void **)&written));
        const void *sources[2] = {data, big}, *ordered[2];
        for (size_t i = 0; i < layout.n_tensors; i++)
            ordered[i] = sources[layout.source[i]];
        const struct dsc_shard_writing writing = {
            .layout = &layout, .data = ordered, .crcs = written};
        snprintf(name, sizeof name, "rank_%05d.safetensors", r);
        snprintf(path, sizeof path, "%s/%s", c->folder, name);
        CHECK_OK(dsc_shard_write(path, &writing));
        const struct dsc_manifest_file file = {name, layout.n_bytes, layout.header_crc};
        CHECK_OK(dsc_manifest_add_file(c->manifest, &file, &number));
        for (size_t i = 0; i < layout.n_tensors; i++) {
            const size_t n_crcs = dsc_shard_n_crcs(layout.tensors[i].n_bytes);
            const struct dsc_manifest_piece piece = {number,
                                                     layout.tensors[i].offset,
                                                     layout.source[i] ? 0 : (uint64_t)r * PER_RANK,
                                                     layout.source[i] ? n_big : PER_RANK,
                                                     0,
                                                     n_crcs};
            if (layout.source[i] == 0) {
                pieces[r] = piece;
                crcs[r] = written[layout.first_crc[i]];
            } else {
                big_piece = piece;
                CHECK_OK(dsc_alloc(n_crcs * sizeof *big_crcs, (void **)&big_crcs));
                memcpy(big_crcs, written + layout.first_crc[i], n_crcs * sizeof *big_crcs);
            }
        }
        dsc_free(written);
        dsc_shard_layout_free(&layout);
    }
    const uint64_t n_all = N_RANKS * PER_RANK, stride = 1;
    const struct dsc_manifest_tensor w = {"model", "w",    {0, 0},  DSC_SHARD_F32,
                                          1,       &n_all, &stride, 0};
    const struct dsc_manifest_tensor large = {"model", "big",  {0, 0},  DSC_SHARD_I32,
                                              1,       &n_big, &stride, -1};
    CHECK_OK(dsc_manifest_add_tensor(c->manifest, &w, pieces, N_RANKS, crcs));
    CHECK_OK(dsc_manifest_add_tensor(c->manifest, &large, &big_piece, 1, big_crcs));
    CHECK_OK(dsc_manifest_close(c->manifest));
    CHECK_OK(dsc_reader_open(c->manifest, c->folder, &c->reader));
    dsc_free(big_crcs);
    dsc_free(big);
}

static void remove_checkpoint(struct checkpoint *c) {
    char command[128];
    dsc_reader_close(c->reader);
    dsc_manifest_free(c->manifest);
    snprintf(command, sizeof command, "rm -rf %s", c->folder);
    CHECK(system(command) == 0);
}

static const struct dsc_manifest_tensor *tensor_of(const struct checkpoint *c, const char *name) {
    const struct dsc_manifest_tensor *found =
        dsc_manifest_find(c->manifest, "model", name, (uint32_t[]){0, 0});
    CHECK(found);
    return found;
}

static void ranges_are_read_across_pieces_and_files(void) {
    enum { N = N_RANKS * PER_RANK };
    struct checkpoint c;
    float out[N];
    write_checkpoint(&c, 10);
    const struct dsc_manifest_tensor *w = tensor_of(&c, "w");
    for (uint64_t begin = 0; begin <= N; begin += 13)
        for (uint64_t n = 0; begin + n <= N; n = 2 * n + 1) {
            CHECK_OK(dsc_reader_read(c.reader, w, begin, n, out));
            for (uint64_t i = 0; i < n; i++)
                CHECK(out[i] == (float)(begin + i));
        }
    CHECK_OK(dsc_reader_read(c.reader, w, 0, N, NULL));
    CHECK_EQ_INT(dsc_reader_read(c.reader, w, 1, N, out), DSC_EINVAL);
    CHECK_EQ_INT(dsc_reader_read(c.reader, w, UINT64_MAX, 2, out), DSC_EINVAL);
    remove_checkpoint(&c);
}

static void parts_of_large_tensors_are_read_and_checked(void) {
    enum { N = 700 * 1000 }; /* two blocks and some */
    struct checkpoint c;
    uint32_t *out;
    CHECK_OK(dsc_alloc(N * 4, (void **)&out));
    write_checkpoint(&c, N);
    const struct dsc_manifest_tensor *big = tensor_of(&c, "big");
    const uint64_t begins[] = {0, 1, 262143, 262144, 400000, N - 1};
    for (size_t i = 0; i < sizeof begins / sizeof *begins; i++)
        for (uint64_t n = 1; begins[i] + n <= N; n = 3 * n + 7) {
            CHECK_OK(dsc_reader_read(c.reader, big, begins[i], n, out));
            for (uint64_t k = 0; k < n; k++)
                CHECK(out[k] == (uint32_t)(begins[i] + k) * 2654435761u);
        }
    dsc_free(out);
    remove_checkpoint(&c);
}

/* Changes one byte of a file; puts it back when called again. */
static void flip(const struct checkpoint *c, int rank, uint64_t offset) {
    char path[128], byte;
    snprintf(path, sizeof path, "%s/rank_%05d.safetensors", c->folder, rank);
    const int file = open(path, O_RDWR);
    CHECK(file >= 0 && pread(file, &byte, 1, (off_t)offset) == 1);
    byte = (char)(byte ^ 0x10);
    CHECK(pwrite(file, &byte, 1, (off_t)offset) == 1 && close(file) == 0);
}

static bool report(void *context, uint64_t n_done) {
    *(uint64_t *)context = n_done;
    return true;
}

static bool refuse(void *context, uint64_t n_done) {
    (void)n_done;
    return ++*(int *)context < 3;
}

static void verifying_sees_every_byte_and_names_file_and_tensor(void) {
    struct checkpoint c;
    uint64_t n_done = 0;
    int n_calls = 0;
    write_checkpoint(&c, 300);
    CHECK_OK(dsc_reader_verify(c.reader, report, &n_done));
    CHECK_EQ_INT(n_done, dsc_manifest_n_bytes(c.manifest));
    CHECK_EQ_INT(dsc_reader_verify(c.reader, refuse, &n_calls), DSC_EINTR);
    const uint64_t n = dsc_manifest_file(c.manifest, 70)->n_bytes;
    for (uint64_t offset = 0; offset < n; offset += offset < 4090 ? 61 : 1) {
        struct dsc_reader *fresh;
        flip(&c, 70, offset);
        CHECK_OK(dsc_reader_open(c.manifest, c.folder, &fresh));
        CHECK_EQ_INT(dsc_reader_verify(fresh, NULL, NULL), DSC_EDAMAGED);
        CHECK(strstr(dsc_last_error(), "rank_00070.safetensors"));
        CHECK(offset < 4096 || strstr(dsc_last_error(), "model/w"));
        dsc_reader_close(fresh);
        flip(&c, 70, offset);
    }
    remove_checkpoint(&c);
}

static void what_is_not_read_is_not_looked_at(void) {
    struct checkpoint c;
    float out[PER_RANK];
    char path[128];
    write_checkpoint(&c, 3);
    const struct dsc_manifest_tensor *w = tensor_of(&c, "w");
    snprintf(path, sizeof path, "%s/rank_00001.safetensors", c.folder);
    CHECK(unlink(path) == 0);
    CHECK_OK(dsc_reader_read(c.reader, w, 0, PER_RANK, out));
    CHECK_EQ_INT(dsc_reader_read(c.reader, w, PER_RANK, 1, out), DSC_EIO);
    CHECK_EQ_INT(dsc_last_errno(), ENOENT);
    CHECK(strstr(dsc_last_error(), "model/w") && strstr(dsc_last_error(), path));
    snprintf(path, sizeof path, "%s/rank_00002.safetensors", c.folder);
    CHECK(truncate(path, 4096 + 4) == 0);
    CHECK_EQ_INT(dsc_reader_read(c.reader, w, 2 * PER_RANK, 1, out), DSC_EDAMAGED);
    CHECK(strstr(dsc_last_error(), "model/w") && strstr(dsc_last_error(), path));
    remove_checkpoint(&c);
}

static const struct test_case cases[] = {
    CASE(a_table_comes_back_as_it_was),
    CASE(any_changed_byte_is_found),
    CASE(what_is_not_right_is_refused_and_named),
    CASE(a_text_may_be_written_in_other_ways),
    CASE(a_call_that_is_refused_changes_nothing),
    CASE(a_hundred_thousand_pieces_of_many_files_are_quick),
    CASE(ranges_are_read_across_pieces_and_files),
    CASE(parts_of_large_tensors_are_read_and_checked),
    CASE(verifying_sees_every_byte_and_names_file_and_tensor),
    CASE(what_is_not_read_is_not_looked_at),
};
RUN_CASES(cases)
