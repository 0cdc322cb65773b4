/* Fuzzing the reader of manifests: whatever a text says, parsing is clean; one that is taken is
 * right, and its own text is taken again and says the same. */
#include "alloc.h"
#include "crc32c.h"
#include "fuzz.h"
#include "manifest.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUFFIX = 22 };

static void demand(bool condition) {
    if (!condition)
        abort();
}

/* What the head of manifest.h promises. */
static void check_tensors(const struct dsc_manifest *manifest) {
    const struct dsc_manifest_piece *pieces = dsc_manifest_pieces(manifest);
    uint64_t sum = 0;
    for (size_t t = 0; t < dsc_manifest_n_tensors(manifest); t++) {
        const struct dsc_manifest_tensor *tensor = dsc_manifest_tensor(manifest, t);
        uint64_t n_bytes, at = 0;
        demand(dsc_shard_size(tensor->dtype, tensor->n_dims, tensor->shape, &n_bytes) == DSC_OK);
        for (size_t i = 0; i < tensor->n_pieces; i++) {
            const struct dsc_manifest_piece *piece = &pieces[tensor->first_piece + i];
            const uint64_t bytes = piece->n * dsc_shard_dtype_size(tensor->dtype);
            demand(piece->begin == at && piece->file < dsc_manifest_n_files(manifest));
            demand(piece->offset + bytes <= dsc_manifest_file(manifest, piece->file)->n_bytes);
            demand(piece->n_crcs == dsc_shard_n_crcs(bytes));
            for (size_t k = 0; k < piece->n_crcs; k++)
                sum += dsc_manifest_crcs(manifest)[piece->first_crc + k];
            at += piece->n;
        }
        demand(at == tensor->n_elems && n_bytes == at * dsc_shard_dtype_size(tensor->dtype));
        demand(dsc_manifest_find(manifest, tensor->kind, tensor->name, tensor->place) == tensor);
    }
    /* A use, so that the reads stay. */
    demand(sum != UINT64_MAX);
}

static void check_again(const struct dsc_manifest *manifest) {
    struct dsc_manifest *again;
    char *text, *terminated, *second;
    size_t n, n_second;
    demand(dsc_manifest_text(manifest, &text, &n) == DSC_OK);
    demand(dsc_alloc(n + 1, (void **)&terminated) == DSC_OK);
    memcpy(terminated, text, n);
    demand(dsc_manifest_parse(terminated, n, "again", &again) == DSC_OK);
    demand(dsc_manifest_text(again, &second, &n_second) == DSC_OK);
    demand(n == n_second && memcmp(text, second, n) == 0);
    dsc_manifest_free(again);
    dsc_free(text);
    dsc_free(terminated);
    dsc_free(second);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct dsc_manifest *manifest;
    char *text;
    demand(dsc_alloc(size + 1, (void **)&text) == DSC_OK);
    memcpy(text, data, size);
    const enum dsc_status status = dsc_manifest_parse(text, size, "input", &manifest);
    demand(status == DSC_OK || status == DSC_EDAMAGED);
    if (status == DSC_OK) {
        check_tensors(manifest);
        check_again(manifest);
        dsc_manifest_free(manifest);
    }
    dsc_free(text);
    return 0;
}

/* ---- inputs to start from ---- */

#define START "{\"format\":\"deepspeed_c\",\"version\":1,\n"
static const char *const seeds[] = {
    START "\"sections\":{},\n\"files\":[],\n\"tensors\":[]\n",
    START
    "\"sections\":{\n\"counters\":{\"global_steps\":10,\"x\":[1.5e-3,null,true,\"\\u20ac\"]},\n"
    "\"client\":{}},\n\"files\":[\n"
    "{\"name\":\"rank_00000.safetensors\",\"n_bytes\":4129,\"head_crc\":\"deadbeef\"},\n"
    "{\"name\":\"rank_00001.safetensors\",\"n_bytes\":4108,\"head_crc\":\"00000000\"},\n"
    "{\"name\":\"objects.pt\",\"n_bytes\":77,\"head_crc\":\"01234567\"}],\n\"tensors\":[\n"
    "{\"kind\":\"model\",\"name\":\"layer.w\",\"place\":[0,3],\"dtype\":\"F32\",\"shape\":[3,3],"
    "\"stride\":[1,3],\"group\":5,\"pieces\":[[0,4096,0,6,\"00000000\"],[1,4096,6,3,"
    "\"ffffffff\"]]},\n"
    "{\"kind\":\"state.step\",\"name\":\"a\",\"place\":[0,0],\"dtype\":\"I64\",\"shape\":[],"
    "\"stride\":[],\"group\":-1,\"pieces\":[[0,4120,0,1,\"0a0b0c0d\"]]},\n"
    "{\"kind\":\"buffer\",\"name\":\"f\",\"place\":[0,0],\"dtype\":\"BOOL\",\"shape\":[1],"
    "\"stride\":[7],\"group\":-1,\"pieces\":[[0,4128,0,1,\"00000001\"]]},\n"
    "{\"kind\":\"model\",\"name\":\"e\",\"place\":[0,0],\"dtype\":\"BF16\",\"shape\":[0,4],"
    "\"stride\":[4,1],\"group\":0,\"pieces\":[]}]\n",
    START "\"sections\":{},\n\"files\":[\n"
          "{\"name\":\"r\",\"n_bytes\":2097162,\"head_crc\":\"00000001\"}],\n\"tensors\":[\n"
          "{\"kind\":\"k\",\"name\":\"a\",\"place\":[0,0],\"dtype\":\"U8\",\"shape\":[2,524288,2],"
          "\"stride\":[524288,1,1048576],\"group\":0,\"pieces\":[[0,10,0,1048577,"
          "\"0000000100000002\"],[0,1048587,1048577,1048575,\"00000003\"]]}]\n",
};

size_t fuzz_seed(size_t i, uint8_t *to, size_t room) {
    if (i >= sizeof seeds / sizeof *seeds)
        return 0;
    const size_t n = strlen(seeds[i]);
    demand(n + SUFFIX <= room);
    memcpy(to, seeds[i], n);
    return fuzz_repair(to, n, room);
}

/* Puts the right end behind the text, in the place of one that is there. */
size_t fuzz_repair(uint8_t *data, size_t size, size_t room) {
    char suffix[SUFFIX + 1];
    if (size >= SUFFIX && memcmp(data + size - SUFFIX, ",\"digest\":\"", 11) == 0)
        size -= SUFFIX;
    size = dsc_min(size, room - SUFFIX);
    snprintf(suffix, sizeof suffix, ",\"digest\":\"%08" PRIx32 "\"}\n", dsc_crc32c(0, data, size));
    memcpy(data + size, suffix, SUFFIX);
    return size + SUFFIX;
}

const char *const fuzz_words[] = {
    "\"format\"",
    "\"version\"",
    "\"sections\"",
    "\"files\"",
    "\"tensors\"",
    "\"digest\"",
    "\"name\"",
    "\"n_bytes\"",
    "\"head_crc\"",
    "\"kind\"",
    "\"place\"",
    "\"dtype\"",
    "\"shape\"",
    "\"stride\"",
    "\"group\"",
    "\"pieces\"",
    "\"F32\"",
    "\"U8\"",
    "\"00000000\"",
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
    "9223372036854775807",
    "9223372036854775808",
    "1e308",
    "\\u0000",
    "\\ud800",
    "\"",
    "null",
    "..",
    "/",
    NULL,
};
