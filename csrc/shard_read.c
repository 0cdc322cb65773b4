/* Opening and reading one file. Invariant: a table of tensors is there only if it is that of a
 * whole file (names unique, data without gap or overlap from the header to the end), and every
 * byte that a reader gets with checksums belongs to a block that was checked. */
#define _GNU_SOURCE
#include "shard.h"

#include "alloc.h"
#include "crc32c.h"
#include "json.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { LENGTH_BYTES = 8 };

struct dsc_shard {
    int fd;
    char *path;
    uint64_t n_bytes, data_begin;
    char *header; /* data_begin bytes and a 0 */
    cJSON *tree;  /* keys are its texts */
    const cJSON *metadata;
    size_t n_tensors;
    struct dsc_shard_tensor *tensors;       /* in the order of the file */
    const struct dsc_shard_tensor **by_key; /* sorted */
    uint64_t *shapes;
};

/* ---- bytes ---- */

/* what: of the text, with the offset. */
static enum dsc_status read_bytes(const struct dsc_shard *shard, const char *what, uint64_t offset,
                                  uint64_t n, char *out) {
    while (n > 0) {
        ssize_t got = pread(shard->fd, out, n, (off_t)offset);
        if (got == 0)
            return DSC_FAIL(DSC_EDAMAGED, "%s: the file ends at %" PRIu64 ", inside of %s",
                            shard->path, offset, what);
        if (got < 0 && errno != EINTR) {
            int error = errno;
            return DSC_FAIL_OS(error, "%s: could not read %s at offset %" PRIu64 ": %s",
                               shard->path, what, offset, strerror(error));
        }
        got = got > 0 ? got : 0;
        offset += (uint64_t)got;
        out += got;
        n -= (uint64_t)got;
    }
    return DSC_OK;
}

/* ---- the header ---- */

static enum dsc_status measure(struct dsc_shard *shard, const struct dsc_shard_expected *expected) {
    struct stat info;
    if (fstat(shard->fd, &info) != 0) {
        int error = errno;
        return DSC_FAIL_OS(error, "%s: %s", shard->path, strerror(error));
    }
    if (!S_ISREG(info.st_mode))
        return DSC_FAIL(DSC_EDAMAGED, "%s is not a file", shard->path);
    shard->n_bytes = (uint64_t)info.st_size;
    if (expected && expected->n_bytes != shard->n_bytes)
        return DSC_FAIL(DSC_EDAMAGED, "%s has %" PRIu64 " bytes; %" PRIu64 " were written",
                        shard->path, shard->n_bytes, expected->n_bytes);
    if (shard->n_bytes < LENGTH_BYTES)
        return DSC_FAIL(DSC_EDAMAGED, "%s has %" PRIu64 " bytes: too few for a header", shard->path,
                        shard->n_bytes);
    return DSC_OK;
}

static enum dsc_status read_header(struct dsc_shard *shard,
                                   const struct dsc_shard_expected *expected) {
    unsigned char length[LENGTH_BYTES];
    uint64_t n = 0;
    DSC_TRY(read_bytes(shard, "the header", 0, LENGTH_BYTES, (char *)length));
    for (int i = LENGTH_BYTES - 1; i >= 0; i--)
        n = n << 8 | length[i];
    if (n > shard->n_bytes - LENGTH_BYTES || n > DSC_SHARD_MAX_HEADER)
        return DSC_FAIL(DSC_EDAMAGED,
                        "%s: its header would have %" PRIu64 " bytes; the file has %" PRIu64
                        ", and at most %d are allowed",
                        shard->path, n, shard->n_bytes, DSC_SHARD_MAX_HEADER);
    shard->data_begin = LENGTH_BYTES + n;
    DSC_TRY(dsc_alloc(shard->data_begin + 1, (void **)&shard->header));
    DSC_TRY(read_bytes(shard, "the header", 0, shard->data_begin, shard->header));
    uint32_t crc = dsc_crc32c(0, shard->header, shard->data_begin);
    if (expected && crc != expected->header_crc)
        return DSC_FAIL(DSC_EDAMAGED,
                        "%s: the header (%" PRIu64 " bytes at offset 0) is damaged: its checksum "
                        "is %08x, %08x was written",
                        shard->path, shard->data_begin, crc, expected->header_crc);
    return DSC_OK;
}

static enum dsc_status bad(const struct dsc_shard *shard, const cJSON *item, const char *what) {
    return DSC_FAIL(DSC_EDAMAGED, "%s: header: tensor %.200s: %s", shard->path, item->string, what);
}

static enum dsc_status read_shape(struct dsc_shard *shard, const cJSON *item, const cJSON *shape,
                                  uint64_t *room, struct dsc_shard_tensor *out) {
    const cJSON *extent;
    cJSON_ArrayForEach(extent, shape) {
        if (out->n_dims == DSC_SHARD_MAX_DIMS)
            return bad(shard, item, "it has more than 64 dimensions");
        if (!dsc_json_count(extent, &room[out->n_dims]))
            return bad(shard, item, "a dimension of its shape is no number of elements");
        out->n_dims++;
    }
    out->shape = room;
    return DSC_OK;
}

/* One entry {"dtype": ..., "shape": ..., "data_offsets": ...}. room: for the shape. */
static enum dsc_status read_entry(struct dsc_shard *shard, const cJSON *item, uint64_t *room,
                                  struct dsc_shard_tensor *out) {
    const cJSON *dtype = cJSON_GetObjectItemCaseSensitive(item, "dtype");
    const cJSON *shape = cJSON_GetObjectItemCaseSensitive(item, "shape");
    const cJSON *offsets = cJSON_GetObjectItemCaseSensitive(item, "data_offsets");
    uint64_t begin, end, room_in_file = shard->n_bytes - shard->data_begin, n_bytes;
    if (!cJSON_IsObject(item) || cJSON_GetArraySize(item) != 3 || !cJSON_IsString(dtype) ||
        !cJSON_IsArray(shape) || !cJSON_IsArray(offsets))
        return bad(shard, item, "it is not described by dtype, shape and data_offsets");
    *out = (struct dsc_shard_tensor){.key = item->string,
                                     .dtype = dsc_shard_dtype_of(dtype->valuestring)};
    if (out->dtype == DSC_SHARD_DTYPE_COUNT)
        return bad(shard, item, "its dtype is unknown");
    DSC_TRY(read_shape(shard, item, shape, room, out));
    if (cJSON_GetArraySize(offsets) != 2 || !dsc_json_count(offsets->child, &begin) ||
        !dsc_json_count(offsets->child->next, &end) || begin > end || end > room_in_file)
        return bad(shard, item, "its data_offsets are not in the file");
    if (dsc_shard_size(out->dtype, out->n_dims, out->shape, &n_bytes) != DSC_OK ||
        n_bytes != end - begin)
        return bad(shard, item, "its data_offsets do not fit its dtype and shape");
    out->offset = shard->data_begin + begin;
    out->n_bytes = n_bytes;
    return DSC_OK;
}

static int by_offset(const void *a, const void *b) {
    const struct dsc_shard_tensor *first = a, *second = b;
    if (first->offset != second->offset)
        return first->offset < second->offset ? -1 : 1;
    return first->n_bytes < second->n_bytes ? -1 : first->n_bytes > second->n_bytes;
}

static int by_key(const void *a, const void *b) {
    const struct dsc_shard_tensor *const *first = a, *const *second = b;
    return strcmp((*first)->key, (*second)->key);
}

static enum dsc_status check_order(struct dsc_shard *shard) {
    uint64_t at = shard->data_begin;
    qsort(shard->tensors, shard->n_tensors, sizeof *shard->tensors, by_offset);
    for (size_t i = 0; i < shard->n_tensors; i++) {
        const struct dsc_shard_tensor *tensor = &shard->tensors[i];
        if (tensor->offset != at)
            return DSC_FAIL(DSC_EDAMAGED,
                            "%s: header: tensor %.200s begins at offset %" PRIu64
                            "; what is before it ends at %" PRIu64,
                            shard->path, tensor->key, tensor->offset, at);
        at += tensor->n_bytes;
        shard->by_key[i] = tensor;
    }
    if (at != shard->n_bytes)
        return DSC_FAIL(DSC_EDAMAGED,
                        "%s: header: the tensors end at offset %" PRIu64 ", the file at %" PRIu64,
                        shard->path, at, shard->n_bytes);
    qsort(shard->by_key, shard->n_tensors, sizeof *shard->by_key, by_key);
    for (size_t i = 1; i < shard->n_tensors; i++)
        if (strcmp(shard->by_key[i - 1]->key, shard->by_key[i]->key) == 0)
            return DSC_FAIL(DSC_EDAMAGED, "%s: header: two tensors have the key %.200s",
                            shard->path, shard->by_key[i]->key);
    return DSC_OK;
}

static enum dsc_status read_metadata(struct dsc_shard *shard, const cJSON *item) {
    const cJSON *text;
    if (shard->metadata || !cJSON_IsObject(item))
        return DSC_FAIL(DSC_EDAMAGED, "%s: header: __metadata__ is not one object", shard->path);
    cJSON_ArrayForEach(text, item) {
        if (!cJSON_IsString(text))
            return DSC_FAIL(DSC_EDAMAGED, "%s: header: __metadata__ holds more than texts: %.200s",
                            shard->path, text->string);
    }
    shard->metadata = item;
    return DSC_OK;
}

static size_t count_dims(const cJSON *tree) {
    const cJSON *item;
    size_t n = 0;
    cJSON_ArrayForEach(item, tree) {
        int dims = cJSON_GetArraySize(cJSON_GetObjectItemCaseSensitive(item, "shape"));
        n += dsc_min((size_t)dims, DSC_SHARD_MAX_DIMS);
    }
    return n;
}

static enum dsc_status read_table(struct dsc_shard *shard) {
    DSC_TRY(dsc_json_parse(shard->header + LENGTH_BYTES, shard->data_begin - LENGTH_BYTES,
                           shard->path, &shard->tree));
    size_t n = (size_t)cJSON_GetArraySize(shard->tree), n_dims = count_dims(shard->tree);
    const cJSON *item;
    DSC_TRY(dsc_alloc(n * sizeof *shard->tensors, (void **)&shard->tensors));
    DSC_TRY(dsc_alloc(n * sizeof *shard->by_key, (void **)&shard->by_key));
    DSC_TRY(dsc_alloc(n_dims * sizeof *shard->shapes, (void **)&shard->shapes));
    uint64_t *room = shard->shapes;
    cJSON_ArrayForEach(item, shard->tree) {
        if (strcmp(item->string, "__metadata__") == 0) {
            DSC_TRY(read_metadata(shard, item));
            continue;
        }
        struct dsc_shard_tensor *tensor = &shard->tensors[shard->n_tensors];
        DSC_TRY(read_entry(shard, item, room, tensor));
        room += tensor->n_dims;
        shard->n_tensors++;
    }
    return check_order(shard);
}

enum dsc_status dsc_shard_open(const char *path, const struct dsc_shard_expected *expected,
                               struct dsc_shard **out) {
    struct dsc_shard *shard = NULL;
    DSC_TRY(dsc_alloc(sizeof *shard, (void **)&shard));
    shard->fd = -1;
    enum dsc_status status = dsc_alloc(strlen(path) + 1, (void **)&shard->path);
    if (status == DSC_OK) {
        memcpy(shard->path, path, strlen(path) + 1);
        /* A pipe of that name must not make us wait. */
        shard->fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
        int error = errno;
        if (shard->fd < 0)
            status = DSC_FAIL_OS(error, "could not open %s: %s", path, strerror(error));
    }
    if (status == DSC_OK)
        status = measure(shard, expected);
    if (status == DSC_OK)
        status = read_header(shard, expected);
    if (status == DSC_OK)
        status = read_table(shard);
    if (status == DSC_OK)
        *out = shard;
    else
        dsc_shard_close(shard);
    return status;
}

void dsc_shard_close(struct dsc_shard *shard) {
    if (!shard)
        return;
    if (shard->fd >= 0)
        (void)close(shard->fd);
    cJSON_Delete(shard->tree);
    dsc_free(shard->shapes);
    dsc_free(shard->by_key);
    dsc_free(shard->tensors);
    dsc_free(shard->header);
    dsc_free(shard->path);
    dsc_free(shard);
}

/* ---- what it holds ---- */

size_t dsc_shard_count(const struct dsc_shard *shard) {
    return shard->n_tensors;
}

const struct dsc_shard_tensor *dsc_shard_tensor(const struct dsc_shard *shard, size_t i) {
    return i < shard->n_tensors ? &shard->tensors[i] : NULL;
}

const struct dsc_shard_tensor *dsc_shard_find(const struct dsc_shard *shard, const char *key) {
    const struct dsc_shard_tensor wanted = {.key = key}, *pointer = &wanted;
    const struct dsc_shard_tensor **found =
        bsearch(&pointer, shard->by_key, shard->n_tensors, sizeof *shard->by_key, by_key);
    return found ? *found : NULL;
}

const char *dsc_shard_path(const struct dsc_shard *shard) {
    return shard->path;
}

const char *dsc_shard_metadata(const struct dsc_shard *shard, const char *key) {
    return cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(shard->metadata, key));
}

/* ---- reading ---- */

/* One block, whole, to `to`, and its checksum against what was written. */
static enum dsc_status read_block(const struct dsc_shard *shard,
                                  const struct dsc_shard_tensor *tensor, const uint32_t *crcs,
                                  uint64_t begin, uint64_t n, char *to) {
    DSC_TRY(read_bytes(shard, tensor->key, tensor->offset + begin, n, to));
    uint32_t crc = dsc_crc32c(0, to, n);
    if (crc != crcs[begin / DSC_SHARD_CRC_BYTES])
        return DSC_FAIL(DSC_EDAMAGED,
                        "%s: %s is damaged in the %" PRIu64 " bytes at offset %" PRIu64
                        ": their checksum is %08x, %08x was written",
                        shard->path, tensor->key, n, tensor->offset + begin, crc,
                        crcs[begin / DSC_SHARD_CRC_BYTES]);
    return DSC_OK;
}

/* Blocks that lie in [begin, end) go straight to `out`; those at its edges through `edge`. */
static enum dsc_status read_blocks(const struct dsc_shard *shard,
                                   const struct dsc_shard_tensor *tensor, const uint32_t *crcs,
                                   uint64_t begin, uint64_t end, char *out, char *edge) {
    for (uint64_t at = begin / DSC_SHARD_CRC_BYTES * DSC_SHARD_CRC_BYTES; at < end;
         at += DSC_SHARD_CRC_BYTES) {
        uint64_t n = dsc_min(DSC_SHARD_CRC_BYTES, tensor->n_bytes - at);
        uint64_t from = dsc_max(at, begin), to = dsc_min(at + n, end);
        bool direct = out && to - from == n;
        char *block = direct ? out + (at - begin) : edge;
        DSC_TRY(read_block(shard, tensor, crcs, at, n, block));
        if (out && !direct)
            memcpy(out + (from - begin), block + (from - at), to - from);
    }
    return DSC_OK;
}

enum dsc_status dsc_shard_read(const struct dsc_shard *shard, const struct dsc_shard_tensor *tensor,
                               const uint32_t *crcs, uint64_t begin, uint64_t n, void *out) {
    void *edge = NULL;
    if (begin > tensor->n_bytes || n > tensor->n_bytes - begin)
        return DSC_FAIL(DSC_EINVAL,
                        "%s: %s: bytes %" PRIu64 " to %" PRIu64 " were asked for; it has %" PRIu64,
                        shard->path, tensor->key, begin, begin + n, tensor->n_bytes);
    if (tensor->offset < shard->data_begin || tensor->offset > shard->n_bytes ||
        tensor->n_bytes > shard->n_bytes - tensor->offset)
        return DSC_FAIL(DSC_EDAMAGED,
                        "%s: %s: %" PRIu64 " bytes at offset %" PRIu64
                        " do not lie in the data of the file, which has %" PRIu64 " bytes",
                        shard->path, tensor->key, tensor->n_bytes, tensor->offset, shard->n_bytes);
    if (n == 0 || (!crcs && !out))
        return DSC_OK;
    if (!crcs)
        return read_bytes(shard, tensor->key, tensor->offset + begin, n, out);
    uint64_t end = begin + n, whole = DSC_SHARD_CRC_BYTES;
    /* The disk goes on while checksums are taken. Advice. */
    (void)posix_fadvise(shard->fd, (off_t)(tensor->offset + begin), (off_t)n, POSIX_FADV_WILLNEED);
    bool edges = !out || begin % whole || (end % whole && end != tensor->n_bytes);
    if (edges)
        DSC_TRY(dsc_alloc(dsc_min(whole, tensor->n_bytes), &edge));
    enum dsc_status status = read_blocks(shard, tensor, crcs, begin, end, out, edge);
    dsc_free(edge);
    return status;
}
