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
