/* Where tensors stand in a file, and writing it. Invariant: what is written is what the layout
 * says, header and data, and has its name only once it is on the disk. */
#define _GNU_SOURCE
#include "shard.h"

#include "alloc.h"
#include "crc32c.h"
#include "json.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

/* ---- element types ---- */

static const struct {
    const char *name;
    size_t n_bytes;
} dtypes[DSC_SHARD_DTYPE_COUNT] = {
#define X(name, bytes) {#name, bytes},
    DSC_SHARD_DTYPE_MAP(X)
#undef X
};

const char *dsc_shard_dtype_name(enum dsc_shard_dtype dtype) {
    return dtype < DSC_SHARD_DTYPE_COUNT ? dtypes[dtype].name : "?";
}

size_t dsc_shard_dtype_size(enum dsc_shard_dtype dtype) {
    return dtype < DSC_SHARD_DTYPE_COUNT ? dtypes[dtype].n_bytes : 0;
}

enum dsc_shard_dtype dsc_shard_dtype_of(const char *name) {
    int i = 0;
    while (i < DSC_SHARD_DTYPE_COUNT && strcmp(dtypes[i].name, name) != 0)
        i++;
    return (enum dsc_shard_dtype)i;
}

enum dsc_status dsc_shard_size(enum dsc_shard_dtype dtype, int n_dims, const uint64_t *shape,
                               uint64_t *n_bytes) {
    uint64_t n = dsc_shard_dtype_size(dtype);
    bool empty = false, too_many = false;
    for (int i = 0; i < n_dims; i++) {
        too_many |= shape[i] > INT64_MAX;
        if (shape[i] == 0)
            empty = true;
        else if (n > INT64_MAX / shape[i])
            too_many = true;
        else
            n *= shape[i];
    }
    /* Without its zeros a shape must still be one that strides can count. */
    if (too_many)
        return DSC_FAIL(DSC_EINVAL, "a shape has more than 2^63 - 1 bytes");
    *n_bytes = empty ? 0 : n;
    return DSC_OK;
}

/* ---- layout ---- */

struct entry {
    struct dsc_shard_tensor tensor;
    size_t source;
};

static int by_key(const void *a, const void *b) {
    return strcmp(((const struct entry *)a)->tensor.key, ((const struct entry *)b)->tensor.key);
}

static int by_size_and_key(const void *a, const void *b) {
    size_t first = dsc_shard_dtype_size(((const struct entry *)a)->tensor.dtype);
    size_t second = dsc_shard_dtype_size(((const struct entry *)b)->tensor.dtype);
    return first != second ? (first < second ? 1 : -1) : by_key(a, b);
}

static enum dsc_status check_entry(struct dsc_shard_tensor *tensor) {
    size_t n = strlen(tensor->key);
    if (n == 0 || n > DSC_SHARD_MAX_KEY)
        return DSC_FAIL(DSC_EINVAL, "a tensor's key has %zu bytes; allowed: 1 to %d", n,
                        DSC_SHARD_MAX_KEY);
    if (strcmp(tensor->key, "__metadata__") == 0)
        return DSC_FAIL(DSC_EINVAL, "a tensor cannot have the key __metadata__, which the layout "
                                    "keeps for itself");
    if (tensor->dtype >= DSC_SHARD_DTYPE_COUNT || tensor->n_dims < 0 ||
        tensor->n_dims > DSC_SHARD_MAX_DIMS)
        return DSC_FAIL(DSC_EINVAL, "tensor %s: element type %d, %d dimensions; allowed: 0 to %d",
                        tensor->key, (int)tensor->dtype, tensor->n_dims, DSC_SHARD_MAX_DIMS);
    enum dsc_status status =
        dsc_shard_size(tensor->dtype, tensor->n_dims, tensor->shape, &tensor->n_bytes);
    if (status != DSC_OK)
        return DSC_FAIL(status, "tensor %s: more than 2^63 - 1 bytes", tensor->key);
    return DSC_OK;
}

/* Sorts copies of what was given, which still borrow keys and shapes. */
static enum dsc_status sort_entries(const struct dsc_shard_tensor *tensors, size_t n,
                                    struct entry *entries) {
    for (size_t i = 0; i < n; i++) {
        entries[i] = (struct entry){tensors[i], i};
        DSC_TRY(check_entry(&entries[i].tensor));
    }
    qsort(entries, n, sizeof *entries, by_key);
    for (size_t i = 1; i < n; i++)
        if (by_key(&entries[i - 1], &entries[i]) == 0)
            return DSC_FAIL(DSC_EINVAL, "two tensors have the key %s", entries[i].tensor.key);
    qsort(entries, n, sizeof *entries, by_size_and_key);
    return DSC_OK;
}

/* Text that is first counted, then written: `out` is NULL in the first pass. */
struct text {
    char *out;
    size_t n;
};

static void put_raw(struct text *text, const char *raw) {
    size_t n = strlen(raw);
    if (text->out)
        memcpy(text->out + text->n, raw, n);
    text->n += n;
}

static void put_string(struct text *text, const char *string) {
    put_raw(text, "\"");
    text->n += dsc_json_quote(text->out ? text->out + text->n : NULL, string);
    put_raw(text, "\"");
}

static void put_number(struct text *text, uint64_t number) {
    char digits[24];
    snprintf(digits, sizeof digits, "%" PRIu64, number);
    put_raw(text, digits);
}

/* `begin`: of the data. */
static void put_tensor(struct text *text, const struct dsc_shard_tensor *tensor, uint64_t begin) {
    put_string(text, tensor->key);
    put_raw(text, ":{\"dtype\":\"");
    put_raw(text, dsc_shard_dtype_name(tensor->dtype));
    put_raw(text, "\",\"shape\":[");
    for (int i = 0; i < tensor->n_dims; i++) {
        put_raw(text, i ? "," : "");
        put_number(text, tensor->shape[i]);
    }
    put_raw(text, "],\"data_offsets\":[");
    put_number(text, begin);
    put_raw(text, ",");
    put_number(text, begin + tensor->n_bytes);
    put_raw(text, "]}");
}

static void put_header(struct text *text, const struct dsc_shard_layout *layout,
                       const char *const *metadata) {
    uint64_t at = 0;
    put_raw(text, "{\"__metadata__\":{");
    for (size_t i = 0; metadata && metadata[i]; i += 2) {
        put_raw(text, i ? "," : "");
        put_string(text, metadata[i]);
        put_raw(text, ":");
        put_string(text, metadata[i + 1]);
    }
    put_raw(text, "}");
    for (size_t i = 0; i < layout->n_tensors; i++) {
        put_raw(text, ",");
        put_tensor(text, &layout->tensors[i], at);
        at += layout->tensors[i].n_bytes;
    }
    put_raw(text, "}");
}

static enum dsc_status make_header(struct dsc_shard_layout *layout, const char *const *metadata) {
    enum { LENGTH = 8 };
    struct text text = {NULL, 0};
    put_header(&text, layout, metadata);
    layout->header_bytes = dsc_round_up(LENGTH + text.n, DSC_SHARD_ALIGN);
    if (layout->header_bytes > DSC_SHARD_MAX_HEADER)
        return DSC_FAIL(DSC_EINVAL, "the header of %zu tensors has %zu bytes; allowed: %d",
                        layout->n_tensors, text.n, DSC_SHARD_MAX_HEADER);
    DSC_TRY(dsc_alloc(layout->header_bytes, (void **)&layout->header));
    uint64_t length = layout->header_bytes - LENGTH;
    for (int i = 0; i < LENGTH; i++)
        layout->header[i] = (char)(length >> 8 * i & 255);
    memset(layout->header + LENGTH, ' ', length);
    text = (struct text){layout->header + LENGTH, 0};
    put_header(&text, layout, metadata);
    layout->header_crc = dsc_crc32c(0, layout->header, layout->header_bytes);
    return DSC_OK;
}

/* Copies keys and shapes to the layout's own memory. */
static void own(struct dsc_shard_layout *layout, const struct entry *entries) {
    uint64_t *shapes = layout->memory;
    for (size_t i = 0; i < layout->n_tensors; i++) {
        struct dsc_shard_tensor *tensor = &layout->tensors[i];
        *tensor = entries[i].tensor;
        layout->source[i] = entries[i].source;
        for (int k = 0; k < tensor->n_dims; k++)
            shapes[k] = tensor->shape[k];
        tensor->shape = shapes;
        shapes += tensor->n_dims;
    }
    char *keys = (char *)shapes;
    for (size_t i = 0; i < layout->n_tensors; i++) {
        size_t n = strlen(layout->tensors[i].key) + 1;
        memcpy(keys, layout->tensors[i].key, n);
        layout->tensors[i].key = keys;
        keys += n;
    }
}

static enum dsc_status fill_layout(const struct entry *entries, const char *const *metadata,
                                   struct dsc_shard_layout *layout) {
    size_t n = layout->n_tensors, n_memory = 0;
    for (size_t i = 0; i < n; i++)
        n_memory +=
            strlen(entries[i].tensor.key) + 1 + (size_t)entries[i].tensor.n_dims * sizeof(uint64_t);
    DSC_TRY(dsc_alloc(n * sizeof *layout->tensors, (void **)&layout->tensors));
    DSC_TRY(dsc_alloc(n * sizeof *layout->source, (void **)&layout->source));
    DSC_TRY(dsc_alloc((n + 1) * sizeof *layout->first_crc, (void **)&layout->first_crc));
    DSC_TRY(dsc_alloc(n_memory, &layout->memory));
    own(layout, entries);
    DSC_TRY(make_header(layout, metadata));
    uint64_t at = layout->header_bytes;
    for (size_t i = 0; i < n; i++) {
        struct dsc_shard_tensor *tensor = &layout->tensors[i];
        tensor->offset = at;
        if (tensor->n_bytes > INT64_MAX - at)
            return DSC_FAIL(DSC_EINVAL, "%s ends a file of more than 2^63 - 1 bytes", tensor->key);
        at += tensor->n_bytes;
        layout->first_crc[i] = layout->n_crcs;
        layout->n_crcs += dsc_shard_n_crcs(tensor->n_bytes);
    }
    layout->first_crc[n] = layout->n_crcs;
    layout->n_bytes = at;
    return DSC_OK;
}

enum dsc_status dsc_shard_layout(const struct dsc_shard_tensor *tensors, size_t n_tensors,
                                 const char *const *metadata, struct dsc_shard_layout *out) {
    struct dsc_shard_layout layout = {.n_tensors = n_tensors};
    struct entry *entries;
    DSC_TRY(dsc_alloc(n_tensors * sizeof *entries, (void **)&entries));
    enum dsc_status status = sort_entries(tensors, n_tensors, entries);
    if (status == DSC_OK)
        status = fill_layout(entries, metadata, &layout);
    dsc_free(entries);
    if (status == DSC_OK)
        *out = layout;
    else
        dsc_shard_layout_free(&layout);
    return status;
}

void dsc_shard_layout_free(struct dsc_shard_layout *layout) {
    dsc_free(layout->tensors);
    dsc_free(layout->source);
    dsc_free(layout->first_crc);
    dsc_free(layout->memory);
    dsc_free(layout->header);
    *layout = (struct dsc_shard_layout){0};
}

/* ---- writing ---- */

enum { MOST_PARTS = 64, WRITE_BYTES = 1 << 20, PUSH_BYTES = 8 << 20, PATH_BYTES = 4096 };

/* Parts of memory that follow each other in the file go to the kernel together. */
struct stream {
    int fd;
    const char *path;
    const struct dsc_shard_writing *writing;
    const char *now; /* the key of what is being written, for texts */
    struct iovec parts[MOST_PARTS];
    int n_parts;
    size_t n_pending;
    uint64_t offset; /* of the first pending byte */
    uint64_t pushed; /* the kernel was told to write what is before this to the disk */
};

static enum dsc_status failed(const struct stream *stream, const char *what, int error) {
    return DSC_FAIL_OS(error, "%s: could not %s (%s, offset %" PRIu64 "): %s", stream->path, what,
                       stream->now, stream->offset, strerror(error));
}

/* Drops what a short write took from the front. */
static void advance(struct stream *stream, size_t n) {
    int first = 0;
    stream->offset += n;
    stream->n_pending -= n;
    while (first < stream->n_parts && n >= stream->parts[first].iov_len)
        n -= stream->parts[first++].iov_len;
    stream->n_parts -= first;
    memmove(stream->parts, stream->parts + first, (size_t)stream->n_parts * sizeof *stream->parts);
    if (stream->n_parts > 0) {
        stream->parts[0].iov_base = (char *)stream->parts[0].iov_base + n;
        stream->parts[0].iov_len -= n;
    }
}

static enum dsc_status flush(struct stream *stream) {
    while (stream->n_pending > 0) {
        ssize_t n = pwritev(stream->fd, stream->parts, stream->n_parts, (off_t)stream->offset);
        if (n == 0)
            return failed(stream, "write", ENOSPC);
        if (n < 0 && errno != EINTR)
            return failed(stream, "write", errno);
        advance(stream, n > 0 ? (size_t)n : 0);
    }
    stream->n_parts = 0;
    if (stream->offset - stream->pushed < PUSH_BYTES)
        return DSC_OK;
    /* The disk is at work from here on, and the sync at the end is short. Advice: never fails us.
     */
    (void)sync_file_range(stream->fd, (off_t)stream->pushed,
                          (off_t)(stream->offset - stream->pushed), SYNC_FILE_RANGE_WRITE);
    stream->pushed = stream->offset;
    const struct dsc_shard_writing *writing = stream->writing;
    if (writing->progress && !writing->progress(writing->context, stream->offset))
        return DSC_FAIL(DSC_EINTR, "%s: writing was interrupted", stream->path);
    return DSC_OK;
}

static enum dsc_status put(struct stream *stream, const void *data, size_t n) {
    struct iovec *last = stream->n_parts > 0 ? &stream->parts[stream->n_parts - 1] : NULL;
    if (n == 0)
        return DSC_OK;
    if (last && (const char *)last->iov_base + last->iov_len == data)
        last->iov_len += n;
    else
        stream->parts[stream->n_parts++] = (struct iovec){(void *)data, n};
    stream->n_pending += n;
    return stream->n_parts == MOST_PARTS || stream->n_pending >= WRITE_BYTES ? flush(stream)
                                                                             : DSC_OK;
}

static enum dsc_status put_all(struct stream *stream) {
    const struct dsc_shard_writing *writing = stream->writing;
    const struct dsc_shard_layout *layout = writing->layout;
    DSC_TRY(put(stream, layout->header, layout->header_bytes));
    for (size_t i = 0; i < layout->n_tensors; i++) {
        uint32_t *crc = writing->crcs + layout->first_crc[i];
        const char *data = writing->data[i];
        stream->now = layout->tensors[i].key;
        for (uint64_t left = layout->tensors[i].n_bytes; left > 0; crc++) {
            size_t n = dsc_min(DSC_SHARD_CRC_BYTES, left);
            if (!writing->has_crcs)
                *crc = dsc_crc32c(0, data, n);
            DSC_TRY(put(stream, data, n));
            data += n;
            left -= n;
        }
    }
    return flush(stream);
}

/* All of its space at once: a full disk is known before anything is written. */
static int reserve(int fd, uint64_t n_bytes) {
    int error;
    do
        error = fallocate(fd, 0, 0, (off_t)n_bytes) == 0 ? 0 : errno;
    while (error == EINTR);
    return error == EOPNOTSUPP || error == ENOSYS ? 0 : error;
}

static enum dsc_status write_file(struct stream *stream) {
    int error = reserve(stream->fd, stream->writing->layout->n_bytes);
    if (error)
        return DSC_FAIL_OS(error, "%s: could not reserve %" PRIu64 " bytes: %s", stream->path,
                           stream->writing->layout->n_bytes, strerror(error));
    DSC_TRY(put_all(stream));
    if (fdatasync(stream->fd) != 0)
        return failed(stream, "sync", errno);
    return DSC_OK;
}

enum dsc_status dsc_shard_write(const char *path, const struct dsc_shard_writing *writing) {
    char part[PATH_BYTES];
    struct stream stream = {.path = path, .writing = writing, .now = "the header"};
    if ((size_t)snprintf(part, sizeof part, "%s.part", path) >= sizeof part)
        return DSC_FAIL(DSC_EINVAL, "a path has more than %d bytes: %.200s...", PATH_BYTES - 6,
                        path);
    stream.fd = open(part, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (stream.fd < 0) {
        int error = errno;
        return DSC_FAIL_OS(error, "could not make the file %s: %s", part, strerror(error));
    }
    enum dsc_status status = write_file(&stream);
    if (close(stream.fd) != 0 && status == DSC_OK)
        status = failed(&stream, "close", errno);
    if (status == DSC_OK && rename(part, path) != 0)
        status = failed(&stream, "rename", errno);
    if (status != DSC_OK)
        (void)unlink(part);
    return status;
}
