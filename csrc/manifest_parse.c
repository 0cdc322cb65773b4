/* The text as a table. Keys have one order, so that a reading needs no tree and no second look. */
#include "manifest_impl.h"

#include "alloc.h"
#include "json.h"

#include <inttypes.h>
#include <string.h>

struct reading {
    struct dsc_json json;
    const char *text, *path;
    struct dsc_manifest *manifest;
};

static enum dsc_status malformed(const struct reading *r) {
    return DSC_FAIL(DSC_EDAMAGED, "%s: at byte %zu there should be %s%s%s", r->path,
                    (size_t)(r->json.at - r->text), r->json.expects_key ? "the key \"" : "",
                    r->json.expected, r->json.expects_key ? "\"" : "");
}

/* What the table refuses is damage here. */
static enum dsc_status damaged(const struct reading *r, enum dsc_status status) {
    return status == DSC_EINVAL ? DSC_FAIL(DSC_EDAMAGED, "%s: %s", r->path, dsc_last_error())
                                : status;
}

static enum dsc_status read_kept(struct reading *r, const char **out) {
    struct dsc_json_string string;
    void *copy;
    if (!dsc_json_text(&r->json, &string))
        return malformed(r);
    DSC_TRY(dsc__manifest_keep(r->manifest, string.n + 1, &copy));
    dsc_json_unescape(string, copy);
    *out = copy;
    return DSC_OK;
}

/* Eight digits, of lower case. */
static bool read_crc(const char *digits, uint32_t *out) {
    uint32_t crc = 0;
    for (int i = 0; i < 8; i++) {
        const char c = digits[i];
        if (!((c >= '0' && c <= '9') || (c >= 'a' && c <= 'f')))
            return false;
        crc = crc << 4 | (uint32_t)(c <= '9' ? c - '0' : c - 'a' + 10);
    }
    *out = crc;
    return true;
}

static enum dsc_status bad_crc(const struct reading *r, struct dsc_json_string string) {
    return DSC_FAIL(DSC_EDAMAGED,
                    "%s: at byte %zu there should be checksums, of eight hexadecimal digits each",
                    r->path, (size_t)(string.begin - r->text));
}

/* ---- the parts ---- */

/* The next key of the whole must be `name`. */
static enum dsc_status read_top_key(struct reading *r, const char *name) {
    static const char *const known[] = {"format", "version", "sections",
                                        "files",  "tensors", "digest"};
    struct dsc_json ahead = r->json;
    struct dsc_json_string string;
    if (!(dsc_json_more(&r->json, '}', strcmp(name, "format") == 0) == 1))
        return malformed(r);
    ahead = r->json;
    if (dsc_json_key(&r->json, name))
        return DSC_OK;
    if (dsc_json_text(&ahead, &string)) {
        size_t i = 0;
        while (i < sizeof known / sizeof *known &&
               !(strlen(known[i]) == string.n && memcmp(known[i], string.begin, string.n) == 0))
            i++;
        if (i == sizeof known / sizeof *known)
            return DSC_FAIL(DSC_EDAMAGED, "%s: unknown key \"%.*s\" at byte %zu", r->path,
                            (int)dsc_min(string.n, 80), string.begin,
                            (size_t)(string.begin - r->text));
    }
    return malformed(r);
}

static enum dsc_status read_version(struct reading *r) {
    struct dsc_json_string format;
    int64_t version;
    if (!dsc_json_char(&r->json, '{'))
        return malformed(r);
    DSC_TRY(read_top_key(r, "format"));
    if (!dsc_json_text(&r->json, &format))
        return malformed(r);
    if (format.n != 11 || memcmp(format.begin, "deepspeed_c", 11) != 0)
        return DSC_FAIL(DSC_EDAMAGED, "%s: its format is \"%.*s\", not \"deepspeed_c\"", r->path,
                        (int)dsc_min(format.n, 80), format.begin);
    DSC_TRY(read_top_key(r, "version"));
    if (!dsc_json_integer(&r->json, 1, &version))
        return malformed(r);
    if (version > DSC_MANIFEST_VERSION)
        return DSC_FAIL(DSC_EDAMAGED,
                        "%s: version %" PRId64 " of the format; this version of deepspeed_c reads "
                        "up to %d: a newer one wrote it",
                        r->path, version, DSC_MANIFEST_VERSION);
    return DSC_OK;
}

static enum dsc_status read_sections(struct reading *r) {
    DSC_TRY(read_top_key(r, "sections"));
    if (!dsc_json_char(&r->json, '{'))
        return malformed(r);
    for (bool first = true;; first = false) {
        const char *name = NULL;
        void *copy;
        const int more = dsc_json_more(&r->json, '}', first);
        if (more < 0)
            return malformed(r);
        if (more == 0)
            return DSC_OK;
        DSC_TRY(read_kept(r, &name));
        if (!dsc_json_char(&r->json, ':'))
            return malformed(r);
        if (dsc_manifest_section(r->manifest, name))
            return DSC_FAIL(DSC_EDAMAGED, "%s: section \"%.80s\" stands twice", r->path, name);
        const char *begin = r->json.at;
        if (!dsc_json_skip(&r->json))
            return malformed(r);
        const size_t n = (size_t)(r->json.at - begin);
        DSC_TRY(dsc__manifest_keep(r->manifest, n + 1, &copy));
        memcpy(copy, begin, n);
        DSC_TRY(damaged(r, dsc__manifest_take_section(r->manifest, name, copy)));
    }
}

static enum dsc_status read_file(struct reading *r) {
    struct dsc_manifest_file file = {0};
    struct dsc_json_string crc;
    int64_t n_bytes;
    if (!(dsc_json_char(&r->json, '{') && dsc_json_key(&r->json, "name")))
        return malformed(r);
    DSC_TRY(read_kept(r, &file.name));
    if (!(dsc_json_char(&r->json, ',') && dsc_json_key(&r->json, "n_bytes") &&
          dsc_json_integer(&r->json, 0, &n_bytes) && dsc_json_char(&r->json, ',') &&
          dsc_json_key(&r->json, "head_crc") && dsc_json_text(&r->json, &crc) &&
          dsc_json_char(&r->json, '}')))
        return malformed(r);
    if (crc.n != 8 || !read_crc(crc.begin, &file.head_crc))
        return bad_crc(r, crc);
    file.n_bytes = (uint64_t)n_bytes;
    return damaged(r, dsc__manifest_take_file(r->manifest, &file));
}

/* ,"key":[numbers]; *n of them, at most `room`. */
static bool read_numbers(struct reading *r, const char *key, uint64_t *out, int room, int *n) {
    *n = 0;
    if (!dsc_json_char(&r->json, ',') || !dsc_json_key(&r->json, key) ||
        !dsc_json_char(&r->json, '['))
        return false;
    for (;;) {
        int64_t number;
        const int more = dsc_json_more(&r->json, ']', *n == 0);
        if (more <= 0)
            return more == 0;
        if (*n == room) { /* the list should be over */
            (void)dsc_json_char(&r->json, ']');
            return false;
        }
        if (!dsc_json_integer(&r->json, 0, &number))
            return false;
        out[(*n)++] = (uint64_t)number;
    }
}

static enum dsc_status read_piece(struct reading *r) {
    struct dsc_manifest *manifest = r->manifest;
    struct dsc_json_string crcs;
    int64_t number[4];
    if (!dsc_json_char(&r->json, '['))
        return malformed(r);
    for (int i = 0; i < 4; i++)
        if (!(dsc_json_integer(&r->json, 0, &number[i]) && dsc_json_char(&r->json, ',')))
            return malformed(r);
    if (!(dsc_json_text(&r->json, &crcs) && dsc_json_char(&r->json, ']')))
        return malformed(r);
    if (crcs.n % 8 != 0 || number[0] > UINT32_MAX)
        return bad_crc(r, crcs);
    DSC_TRY(damaged(r, dsc__manifest_grow((void **)&manifest->pieces, &manifest->room_pieces,
                                          manifest->n_pieces, 1, sizeof *manifest->pieces)));
    DSC_TRY(damaged(r, dsc__manifest_grow((void **)&manifest->crcs, &manifest->room_crcs,
                                          manifest->n_crcs, crcs.n / 8, sizeof *manifest->crcs)));
    manifest->pieces[manifest->n_pieces++] = (struct dsc_manifest_piece){
        .file = (uint32_t)number[0],
        .offset = (uint64_t)number[1],
        .begin = (uint64_t)number[2],
        .n = (uint64_t)number[3],
        .first_crc = manifest->n_crcs,
        .n_crcs = crcs.n / 8,
    };
    for (size_t i = 0; i < crcs.n; i += 8)
        if (!read_crc(crcs.begin + i, &manifest->crcs[manifest->n_crcs++]))
            return bad_crc(r, crcs);
    return DSC_OK;
}

static enum dsc_status read_pieces(struct reading *r, struct dsc_manifest_tensor *tensor) {
    if (!(dsc_json_char(&r->json, ',') && dsc_json_key(&r->json, "pieces") &&
          dsc_json_char(&r->json, '[')))
        return malformed(r);
    tensor->first_piece = r->manifest->n_pieces;
    for (;;) {
        const int more = dsc_json_more(&r->json, ']', tensor->n_pieces == 0);
        if (more < 0)
            return malformed(r);
        if (more == 0)
            return DSC_OK;
        DSC_TRY(read_piece(r));
        tensor->n_pieces++;
    }
}

static enum dsc_status read_dtype(struct reading *r, enum dsc_shard_dtype *out) {
    struct dsc_json_string string;
    char name[16] = "";
    if (!(dsc_json_char(&r->json, ',') && dsc_json_key(&r->json, "dtype") &&
          dsc_json_text(&r->json, &string)))
        return malformed(r);
    if (string.n < sizeof name)
        memcpy(name, string.begin, string.n);
    *out = dsc_shard_dtype_of(name);
    if (*out == DSC_SHARD_DTYPE_COUNT)
        return DSC_FAIL(DSC_EDAMAGED, "%s: unknown dtype \"%.*s\" at byte %zu", r->path,
                        (int)dsc_min(string.n, 80), string.begin, (size_t)(string.begin - r->text));
    return DSC_OK;
}

static enum dsc_status keep_shape(struct reading *r, struct dsc_manifest_tensor *tensor) {
    uint64_t shape[DSC_SHARD_MAX_DIMS], stride[DSC_SHARD_MAX_DIMS];
    const size_t size = sizeof *shape;
    int n_strides;
    void *kept;
    if (!(read_numbers(r, "shape", shape, DSC_SHARD_MAX_DIMS, &tensor->n_dims) &&
          read_numbers(r, "stride", stride, tensor->n_dims, &n_strides)))
        return malformed(r);
    if (n_strides != tensor->n_dims)
        return DSC_FAIL(DSC_EDAMAGED, "%s: tensor %s/%s has %d dimensions and %d strides", r->path,
                        tensor->kind, tensor->name, tensor->n_dims, n_strides);
    const size_t n = (size_t)tensor->n_dims;
    DSC_TRY(dsc__manifest_keep(r->manifest, 2 * n * size, &kept));
    memcpy(kept, shape, n * size);
    memcpy((uint64_t *)kept + n, stride, n * size);
    tensor->shape = kept;
    tensor->stride = tensor->shape + n;
    return DSC_OK;
}

static enum dsc_status read_tensor(struct reading *r) {
    struct dsc_manifest_tensor tensor = {0};
    uint64_t place[2];
    int n_place;
    if (!(dsc_json_char(&r->json, '{') && dsc_json_key(&r->json, "kind")))
        return malformed(r);
    DSC_TRY(read_kept(r, &tensor.kind));
    if (!(dsc_json_char(&r->json, ',') && dsc_json_key(&r->json, "name")))
        return malformed(r);
    DSC_TRY(read_kept(r, &tensor.name));
    if (!read_numbers(r, "place", place, 2, &n_place))
        return malformed(r);
    if (n_place != 2 || place[0] > UINT32_MAX || place[1] > UINT32_MAX)
        return DSC_FAIL(DSC_EDAMAGED, "%s: the place of tensor %s/%s is not two ranks", r->path,
                        tensor.kind, tensor.name);
    tensor.place[0] = (uint32_t)place[0];
    tensor.place[1] = (uint32_t)place[1];
    DSC_TRY(read_dtype(r, &tensor.dtype));
    DSC_TRY(keep_shape(r, &tensor));
    if (!(dsc_json_char(&r->json, ',') && dsc_json_key(&r->json, "group") &&
          dsc_json_integer(&r->json, -1, &tensor.group)))
        return malformed(r);
    DSC_TRY(read_pieces(r, &tensor));
    if (!dsc_json_char(&r->json, '}'))
        return malformed(r);
    return damaged(r, dsc__manifest_take_tensor(r->manifest, &tensor));
}

static enum dsc_status read_list(struct reading *r, const char *key,
                                 enum dsc_status (*read_item)(struct reading *)) {
    DSC_TRY(read_top_key(r, key));
    if (!dsc_json_char(&r->json, '['))
        return malformed(r);
    for (bool first = true;; first = false) {
        const int more = dsc_json_more(&r->json, ']', first);
        if (more < 0)
            return malformed(r);
        if (more == 0)
            return DSC_OK;
        DSC_TRY(read_item(r));
    }
}

/* ---- the whole ---- */

static enum dsc_status check_digest(const char *text, size_t n, const char *path) {
    char suffix[DSC_MANIFEST_SUFFIX + 1];
    if (n < DSC_MANIFEST_SUFFIX)
        return DSC_FAIL(DSC_EDAMAGED, "%s: %zu bytes are not a manifest", path, n);
    dsc__manifest_suffix(text, n - DSC_MANIFEST_SUFFIX, suffix);
    if (memcmp(text + n - DSC_MANIFEST_SUFFIX, suffix, DSC_MANIFEST_SUFFIX) != 0)
        return DSC_FAIL(DSC_EDAMAGED,
                        "%s: damaged or cut off: it should end with %.*s, the digest of its other "
                        "%zu bytes",
                        path, DSC_MANIFEST_SUFFIX - 1, suffix, n - DSC_MANIFEST_SUFFIX);
    if (strlen(text) != n || !dsc_utf8_valid(text, n))
        return DSC_FAIL(DSC_EDAMAGED, "%s: not UTF-8 text", path);
    return DSC_OK;
}

static enum dsc_status read_all(struct reading *r) {
    struct dsc_json_string digest;
    DSC_TRY(read_version(r));
    DSC_TRY(read_sections(r));
    DSC_TRY(read_list(r, "files", read_file));
    DSC_TRY(read_list(r, "tensors", read_tensor));
    DSC_TRY(read_top_key(r, "digest"));
    if (!(dsc_json_text(&r->json, &digest) && dsc_json_char(&r->json, '}') &&
          dsc_json_end(&r->json)))
        return malformed(r);
    return damaged(r, dsc_manifest_close(r->manifest));
}

enum dsc_status dsc_manifest_parse(const char *text, size_t n, const char *path,
                                   struct dsc_manifest **out) {
    struct reading reading = {{text}, text, path, NULL};
    DSC_TRY(check_digest(text, n, path));
    DSC_TRY(dsc_manifest_open(&reading.manifest));
    const enum dsc_status status = read_all(&reading);
    if (status != DSC_OK)
        dsc_manifest_free(reading.manifest);
    else
        *out = reading.manifest;
    return status;
}
