/* The table as text, and the digest at its end. */
#include "manifest_impl.h"

#include "alloc.h"
#include "crc32c.h"
#include "json.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

struct out {
    char *text;
    size_t n, room;
};

enum { NUMBER = 24 }; /* bytes that a number and what stands around it take at most */

static enum dsc_status reserve(struct out *out, size_t n) {
    if (n <= out->room - out->n)
        return DSC_OK;
    const size_t wanted = dsc_max(out->n + n, out->room * 2);
    DSC_TRY(dsc_realloc((void **)&out->text, wanted));
    out->room = wanted;
    return DSC_OK;
}

/* What follows writes into reserved room. */

static void put(struct out *out, const char *text) {
    const size_t n = strlen(text);
    memcpy(out->text + out->n, text, n);
    out->n += n;
}

static void put_string(struct out *out, const char *text) {
    put(out, "\"");
    out->n += dsc_json_quote(out->text + out->n, text);
    put(out, "\"");
}

static void put_number(struct out *out, uint64_t number) {
    char digits[NUMBER];
    size_t at = sizeof digits;
    do {
        digits[--at] = (char)('0' + number % 10);
        number /= 10;
    } while (number > 0);
    memcpy(out->text + out->n, digits + at, sizeof digits - at);
    out->n += sizeof digits - at;
}

static void put_crc(struct out *out, uint32_t crc) {
    static const char digits[] = "0123456789abcdef";
    for (int shift = 28; shift >= 0; shift -= 4)
        out->text[out->n++] = digits[crc >> shift & 15];
}

static void put_numbers(struct out *out, const char *key, const uint64_t *numbers, int n) {
    put(out, key);
    for (int i = 0; i < n; i++) {
        put(out, i ? "," : "");
        put_number(out, numbers[i]);
    }
    put(out, "]");
}

static enum dsc_status put_section(struct out *out, const struct dsc_manifest_section *section) {
    DSC_TRY(reserve(out, 6 * strlen(section->name) + strlen(section->json) + 16));
    put_string(out, section->name);
    put(out, ":");
    put(out, section->json);
    return DSC_OK;
}

static enum dsc_status put_file(struct out *out, const struct dsc_manifest_file *file) {
    DSC_TRY(reserve(out, 6 * strlen(file->name) + 80 + NUMBER));
    put(out, "{\"name\":");
    put_string(out, file->name);
    put(out, ",\"n_bytes\":");
    put_number(out, file->n_bytes);
    put(out, ",\"head_crc\":\"");
    put_crc(out, file->head_crc);
    put(out, "\"}");
    return DSC_OK;
}

static enum dsc_status put_piece(struct out *out, const struct dsc_manifest *manifest,
                                 const struct dsc_manifest_piece *piece) {
    DSC_TRY(reserve(out, 5 * NUMBER + 8 * piece->n_crcs));
    const uint64_t numbers[] = {piece->file, piece->offset, piece->begin, piece->n};
    put(out, "[");
    for (int i = 0; i < 4; i++) {
        put_number(out, numbers[i]);
        put(out, ",");
    }
    put(out, "\"");
    for (size_t i = 0; i < piece->n_crcs; i++)
        put_crc(out, manifest->crcs[piece->first_crc + i]);
    put(out, "\"]");
    return DSC_OK;
}

static enum dsc_status put_tensor(struct out *out, const struct dsc_manifest *manifest,
                                  const struct dsc_manifest_tensor *tensor) {
    DSC_TRY(reserve(out, 6 * (strlen(tensor->kind) + strlen(tensor->name)) + 128 +
                             (size_t)(2 * tensor->n_dims + 3) * NUMBER));
    const uint64_t place[2] = {tensor->place[0], tensor->place[1]};
    put(out, "{\"kind\":");
    put_string(out, tensor->kind);
    put(out, ",\"name\":");
    put_string(out, tensor->name);
    put_numbers(out, ",\"place\":[", place, 2);
    put(out, ",\"dtype\":");
    put_string(out, dsc_shard_dtype_name(tensor->dtype));
    put_numbers(out, ",\"shape\":[", tensor->shape, tensor->n_dims);
    put_numbers(out, ",\"stride\":[", tensor->stride, tensor->n_dims);
    put(out, tensor->group < 0 ? ",\"group\":-" : ",\"group\":");
    put_number(out, (uint64_t)(tensor->group < 0 ? -tensor->group : tensor->group));
    put(out, ",\"pieces\":[");
    for (size_t i = 0; i < tensor->n_pieces; i++) {
        if (i > 0)
            put(out, ",");
        DSC_TRY(put_piece(out, manifest, &manifest->pieces[tensor->first_piece + i]));
        DSC_TRY(reserve(out, 8));
    }
    put(out, "]}");
    return DSC_OK;
}

/* Behind "[" or "{", between items, and behind the last one. */
static enum dsc_status put_between(struct out *out, size_t i) {
    DSC_TRY(reserve(out, 8));
    put(out, i ? ",\n" : "\n");
    return DSC_OK;
}

static enum dsc_status put_all(struct out *out, const struct dsc_manifest *manifest) {
    char start[80];
    snprintf(start, sizeof start, "{\"format\":\"deepspeed_c\",\"version\":%d,\n\"sections\":{",
             DSC_MANIFEST_VERSION);
    DSC_TRY(reserve(out, sizeof start));
    put(out, start);
    for (size_t i = 0; i < manifest->n_sections; i++) {
        DSC_TRY(put_between(out, i));
        DSC_TRY(put_section(out, &manifest->sections[i]));
    }
    DSC_TRY(reserve(out, 32));
    put(out, "},\n\"files\":[");
    for (size_t i = 0; i < manifest->n_files; i++) {
        DSC_TRY(put_between(out, i));
        DSC_TRY(put_file(out, &manifest->files[i]));
    }
    DSC_TRY(reserve(out, 32));
    put(out, "],\n\"tensors\":[");
    for (size_t i = 0; i < manifest->n_tensors; i++) {
        DSC_TRY(put_between(out, i));
        DSC_TRY(put_tensor(out, manifest, &manifest->tensors[i]));
    }
    DSC_TRY(reserve(out, 32 + DSC_MANIFEST_SUFFIX));
    put(out, "]\n");
    dsc__manifest_suffix(out->text, out->n, out->text + out->n);
    out->n += DSC_MANIFEST_SUFFIX;
    return DSC_OK;
}

enum dsc_status dsc_manifest_text(const struct dsc_manifest *manifest, char **text, size_t *n) {
    struct out out = {NULL, 0, 0};
    if (!manifest->closed)
        return DSC_FAIL(DSC_ESTATE, "a manifest has a text once it is closed");
    const enum dsc_status status = put_all(&out, manifest);
    if (status != DSC_OK) {
        dsc_free(out.text);
        return status;
    }
    *text = out.text;
    *n = out.n;
    return DSC_OK;
}

void dsc__manifest_suffix(const char *text, size_t n, char out[DSC_MANIFEST_SUFFIX + 1]) {
    snprintf(out, DSC_MANIFEST_SUFFIX + 1, ",\"digest\":\"%08" PRIx32 "\"}\n",
             dsc_crc32c(0, text, n));
}
