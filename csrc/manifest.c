/* The table in memory: what goes in, and whether it may. */
#include "manifest_impl.h"

#include "alloc.h"
#include "json.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { CHUNK_BYTES = 16 << 10, MAX_ITEMS = INT32_MAX, MAX_SECTIONS = 1000 };

/* ---- memory ---- */

enum dsc_status dsc__manifest_grow(void **items, size_t *room, size_t n_items, size_t n,
                                   size_t size) {
    if (n > MAX_ITEMS || n_items + n > MAX_ITEMS)
        return DSC_FAIL(DSC_EINVAL, "a manifest of more than %d items of a kind", MAX_ITEMS);
    if (n_items + n <= *room)
        return DSC_OK;
    const size_t wanted = dsc_max(n_items + n, dsc_max(16, *room * 2));
    DSC_TRY(dsc_realloc(items, wanted * size));
    *room = wanted;
    return DSC_OK;
}

enum dsc_status dsc__manifest_keep(struct dsc_manifest *manifest, size_t n, void **out) {
    struct dsc_manifest_chunk *chunk = manifest->chunks;
    n = dsc_round_up(n, 8);
    if (!chunk || chunk->size - chunk->used < n) {
        const size_t size = dsc_max(n, CHUNK_BYTES);
        DSC_TRY(dsc_alloc(sizeof *chunk + size, (void **)&chunk));
        chunk->size = size;
        chunk->next = manifest->chunks;
        manifest->chunks = chunk;
    }
    *out = chunk->data + chunk->used;
    chunk->used += n;
    return DSC_OK;
}

static enum dsc_status keep_text(struct dsc_manifest *manifest, const char *text,
                                 const char **out) {
    const size_t n = strlen(text) + 1;
    void *copy;
    DSC_TRY(dsc__manifest_keep(manifest, n, &copy));
    memcpy(copy, text, n);
    *out = copy;
    return DSC_OK;
}

static enum dsc_status keep_numbers(struct dsc_manifest *manifest, const uint64_t *numbers, int n,
                                    const uint64_t **out) {
    void *copy;
    DSC_TRY(dsc__manifest_keep(manifest, (size_t)n * sizeof *numbers, &copy));
    if (n > 0)
        memcpy(copy, numbers, (size_t)n * sizeof *numbers);
    *out = copy;
    return DSC_OK;
}

enum dsc_status dsc_manifest_open(struct dsc_manifest **out) {
    return dsc_alloc(sizeof **out, (void **)out);
}

void dsc_manifest_free(struct dsc_manifest *manifest) {
    if (!manifest)
        return;
    while (manifest->chunks) {
        struct dsc_manifest_chunk *next = manifest->chunks->next;
        dsc_free(manifest->chunks);
        manifest->chunks = next;
    }
    dsc_free(manifest->sections);
    dsc_free(manifest->files);
    dsc_free(manifest->tensors);
    dsc_free(manifest->pieces);
    dsc_free(manifest->crcs);
    dsc_free(manifest->file_index.slots);
    dsc_free(manifest->tensor_index.slots);
    dsc_free(manifest);
}

static enum dsc_status check_open(const struct dsc_manifest *manifest) {
    return manifest->closed ? DSC_FAIL(DSC_ESTATE, "a manifest that is closed takes nothing more")
                            : DSC_OK;
}

/* ---- finding by name ---- */

static uint64_t hash_file(const struct dsc_manifest_file *file) {
    return dsc_hash(DSC_HASH_START, file->name, strlen(file->name));
}

static uint64_t hash_tensor(const struct dsc_manifest_tensor *tensor) {
    uint64_t hash = dsc_hash(DSC_HASH_START, tensor->kind, strlen(tensor->kind) + 1);
    hash = dsc_hash(hash, tensor->name, strlen(tensor->name) + 1);
    return dsc_hash(hash, tensor->place, sizeof tensor->place);
}

static bool same_tensor(const struct dsc_manifest_tensor *a, const struct dsc_manifest_tensor *b) {
    return a->place[0] == b->place[0] && a->place[1] == b->place[1] &&
           strcmp(a->kind, b->kind) == 0 && strcmp(a->name, b->name) == 0;
}

static void put_slot(struct dsc_manifest_index *index, uint64_t hash, uint32_t value) {
    size_t i = (size_t)hash & (index->n_slots - 1);
    while (index->slots[i])
        i = (i + 1) & (index->n_slots - 1);
    index->slots[i] = value;
}

/* Makes sure that one more fits. The items are files or tensors. */
static enum dsc_status grow_index(struct dsc_manifest *manifest, struct dsc_manifest_index *index) {
    struct dsc_manifest_index grown = {NULL, dsc_max(64, index->n_slots * 2), index->n_used};
    if (2 * (index->n_used + 1) <= index->n_slots)
        return DSC_OK;
    DSC_TRY(dsc_alloc(grown.n_slots * sizeof *grown.slots, (void **)&grown.slots));
    for (size_t i = 0; i < index->n_used; i++)
        put_slot(&grown,
                 index == &manifest->file_index ? hash_file(&manifest->files[i])
                                                : hash_tensor(&manifest->tensors[i]),
                 (uint32_t)i + 1);
    dsc_free(index->slots);
    *index = grown;
    return DSC_OK;
}

static const struct dsc_manifest_file *find_file(const struct dsc_manifest *manifest,
                                                 const struct dsc_manifest_file *wanted) {
    const struct dsc_manifest_index *index = &manifest->file_index;
    size_t i = (size_t)hash_file(wanted) & (index->n_slots - 1);
    for (; index->n_slots && index->slots[i]; i = (i + 1) & (index->n_slots - 1))
        if (strcmp(manifest->files[index->slots[i] - 1].name, wanted->name) == 0)
            return &manifest->files[index->slots[i] - 1];
    return NULL;
}

static const struct dsc_manifest_tensor *find_tensor(const struct dsc_manifest *manifest,
                                                     const struct dsc_manifest_tensor *wanted) {
    const struct dsc_manifest_index *index = &manifest->tensor_index;
    size_t i = (size_t)hash_tensor(wanted) & (index->n_slots - 1);
    for (; index->n_slots && index->slots[i]; i = (i + 1) & (index->n_slots - 1))
        if (same_tensor(&manifest->tensors[index->slots[i] - 1], wanted))
            return &manifest->tensors[index->slots[i] - 1];
    return NULL;
}

/* ---- sections ---- */

enum dsc_status dsc__manifest_take_section(struct dsc_manifest *manifest, const char *name,
                                           const char *json) {
    if (manifest->n_sections == MAX_SECTIONS)
        return DSC_FAIL(DSC_EINVAL, "section \"%s\": a manifest has at most %d", name,
                        MAX_SECTIONS);
    DSC_TRY(dsc__manifest_grow((void **)&manifest->sections, &manifest->room_sections,
                               manifest->n_sections, 1, sizeof *manifest->sections));
    manifest->sections[manifest->n_sections++] = (struct dsc_manifest_section){name, json};
    return DSC_OK;
}

static struct dsc_manifest_section *find_section(const struct dsc_manifest *manifest,
                                                 const char *name) {
    for (size_t i = 0; i < manifest->n_sections; i++)
        if (strcmp(manifest->sections[i].name, name) == 0)
            return &manifest->sections[i];
    return NULL;
}

enum dsc_status dsc_manifest_set(struct dsc_manifest *manifest, const char *section,
                                 const char *json) {
    const char *wrong, *expected, *name, *copy;
    DSC_TRY(check_open(manifest));
    if (!dsc_utf8_valid(section, strlen(section)) || !dsc_utf8_valid(json, strlen(json)))
        return DSC_FAIL(DSC_EINVAL, "section \"%s\": not UTF-8", section);
    wrong = dsc_json_syntax(json, &expected);
    if (wrong)
        return DSC_FAIL(DSC_EINVAL, "section \"%s\": not JSON at byte %zu: expected %s", section,
                        (size_t)(wrong - json), expected);
    DSC_TRY(keep_text(manifest, json, &copy));
    struct dsc_manifest_section *before = find_section(manifest, section);
    if (before) {
        before->json = copy;
        return DSC_OK;
    }
    DSC_TRY(keep_text(manifest, section, &name));
    return dsc__manifest_take_section(manifest, name, copy);
}

/* ---- files ---- */

bool dsc_manifest_is_file_name(const char *name) {
    const size_t n = strlen(name);
    return n > 0 && n <= 255 && !strchr(name, '/') && strcmp(name, ".") != 0 &&
           strcmp(name, "..") != 0 && dsc_utf8_valid(name, n);
}

static enum dsc_status check_file(const struct dsc_manifest *manifest,
                                  const struct dsc_manifest_file *file) {
    if (!dsc_manifest_is_file_name(file->name) || strcmp(file->name, "manifest.json") == 0)
        return DSC_FAIL(DSC_EINVAL,
                        "\"%s\" is no name of a file of a checkpoint: allowed are UTF-8 texts of 1 "
                        "to 255 bytes without '/', other than \".\", \"..\" and \"manifest.json\"",
                        file->name);
    if (find_file(manifest, file))
        return DSC_FAIL(DSC_EINVAL, "the file %s stands twice", file->name);
    if (file->n_bytes > INT64_MAX - manifest->n_bytes)
        return DSC_FAIL(DSC_EINVAL, "the file %s has %" PRIu64 " bytes: more than can be counted",
                        file->name, file->n_bytes);
    return DSC_OK;
}

enum dsc_status dsc__manifest_take_file(struct dsc_manifest *manifest,
                                        const struct dsc_manifest_file *file) {
    DSC_TRY(check_file(manifest, file));
    DSC_TRY(grow_index(manifest, &manifest->file_index));
    DSC_TRY(dsc__manifest_grow((void **)&manifest->files, &manifest->room_files, manifest->n_files,
                               1, sizeof *manifest->files));
    manifest->files[manifest->n_files++] = *file;
    put_slot(&manifest->file_index, hash_file(file), (uint32_t)manifest->n_files);
    manifest->file_index.n_used++;
    manifest->n_bytes += file->n_bytes;
    return DSC_OK;
}

enum dsc_status dsc_manifest_add_file(struct dsc_manifest *manifest,
                                      const struct dsc_manifest_file *file, uint32_t *number) {
    struct dsc_manifest_file copy = *file;
    DSC_TRY(check_open(manifest));
    DSC_TRY(keep_text(manifest, file->name, &copy.name));
    DSC_TRY(dsc__manifest_take_file(manifest, &copy));
    *number = (uint32_t)manifest->n_files - 1;
    return DSC_OK;
}

/* ---- tensors ---- */

const char *dsc_manifest_label(const struct dsc_manifest_tensor *tensor,
                               char out[DSC_MANIFEST_LABEL]) {
    const int n = snprintf(out, DSC_MANIFEST_LABEL - 40, "%s/%s", tensor->kind, tensor->name);
    size_t used = dsc_min((size_t)n, DSC_MANIFEST_LABEL - 41);
    if (tensor->place[0] || tensor->place[1])
        snprintf(out + used, 40, " of place (%" PRIu32 ", %" PRIu32 ")", tensor->place[0],
                 tensor->place[1]);
    return out;
}

static enum dsc_status check_name(const struct dsc_manifest *manifest,
                                  const struct dsc_manifest_tensor *tensor) {
    const size_t n_kind = strlen(tensor->kind), n_name = strlen(tensor->name);
    char label[DSC_MANIFEST_LABEL];
    if (n_kind == 0 || n_name == 0 || strchr(tensor->kind, '/') ||
        n_kind + n_name > DSC_SHARD_MAX_KEY - 32 || !dsc_utf8_valid(tensor->kind, n_kind) ||
        !dsc_utf8_valid(tensor->name, n_name))
        return DSC_FAIL(DSC_EINVAL,
                        "tensor %s: kind and name must be UTF-8 texts that are not empty, of at "
                        "most %d bytes together, the kind without '/'",
                        dsc_manifest_label(tensor, label), DSC_SHARD_MAX_KEY - 32);
    if (find_tensor(manifest, tensor))
        return DSC_FAIL(DSC_EINVAL, "tensor %s stands twice", dsc_manifest_label(tensor, label));
    if (tensor->group < -1 || tensor->group > MAX_ITEMS)
        return DSC_FAIL(DSC_EINVAL,
                        "tensor %s: group is %" PRId64 "; allowed: -1 (in none), 0, ...",
                        dsc_manifest_label(tensor, label), tensor->group);
    return DSC_OK;
}

/* Whether some order of the dimensions makes the strides those of C order. Where a dimension has
 * one index, or there is no element, strides say nothing. */
static bool is_dense(const struct dsc_manifest_tensor *tensor) {
    bool used[DSC_SHARD_MAX_DIMS] = {false};
    uint64_t run = 1;
    for (int i = 0; i < tensor->n_dims; i++) {
        if (tensor->shape[i] == 0)
            return true;
        used[i] = tensor->shape[i] == 1;
    }
    for (;;) {
        int next = -1, n_left = 0;
        for (int i = 0; i < tensor->n_dims; i++) {
            n_left += !used[i];
            if (!used[i] && tensor->stride[i] == run)
                next = i;
        }
        if (n_left == 0)
            return true;
        if (next < 0)
            return false;
        used[next] = true;
        run *= tensor->shape[next];
    }
}

/* Every piece lies in its file, and together they are the elements [0, n_elems). */
static enum dsc_status check_pieces(const struct dsc_manifest *manifest,
                                    const struct dsc_manifest_tensor *tensor) {
    const uint64_t size = dsc_shard_dtype_size(tensor->dtype);
    char label[DSC_MANIFEST_LABEL];
    uint64_t at = 0;
    for (size_t i = 0; i < tensor->n_pieces; i++) {
        const struct dsc_manifest_piece *piece = &manifest->pieces[tensor->first_piece + i];
        if (piece->file >= manifest->n_files)
            return DSC_FAIL(DSC_EINVAL, "tensor %s: piece %zu lies in file %" PRIu32 " of %zu",
                            dsc_manifest_label(tensor, label), i, piece->file, manifest->n_files);
        const struct dsc_manifest_file *file = &manifest->files[piece->file];
        if (piece->begin != at)
            return DSC_FAIL(DSC_EINVAL,
                            "tensor %s: piece %zu begins at element %" PRIu64 ", where %" PRIu64
                            " %s",
                            dsc_manifest_label(tensor, label), i, piece->begin, at,
                            piece->begin < at ? "elements stand already" : "would be the next");
        if (piece->n == 0 || piece->n > tensor->n_elems - at)
            return DSC_FAIL(DSC_EINVAL,
                            "tensor %s: piece %zu has %" PRIu64 " elements; allowed: 1 to %" PRIu64
                            " (none of a tensor without elements)",
                            dsc_manifest_label(tensor, label), i, piece->n, tensor->n_elems - at);
        const uint64_t n_bytes = piece->n * size;
        if (piece->offset > file->n_bytes || n_bytes > file->n_bytes - piece->offset)
            return DSC_FAIL(DSC_EINVAL,
                            "tensor %s: piece %zu has %" PRIu64 " bytes at offset %" PRIu64
                            " of %s, which has %" PRIu64,
                            dsc_manifest_label(tensor, label), i, n_bytes, piece->offset,
                            file->name, file->n_bytes);
        if (piece->n_crcs != dsc_shard_n_crcs(n_bytes))
            return DSC_FAIL(DSC_EINVAL,
                            "tensor %s: piece %zu has %zu checksums; %zu belong to %" PRIu64
                            " bytes",
                            dsc_manifest_label(tensor, label), i, piece->n_crcs,
                            dsc_shard_n_crcs(n_bytes), n_bytes);
        at += piece->n;
    }
    if (at != tensor->n_elems)
        return DSC_FAIL(DSC_EINVAL, "tensor %s: its pieces end at element %" PRIu64 " of %" PRIu64,
                        dsc_manifest_label(tensor, label), at, tensor->n_elems);
    return DSC_OK;
}

enum dsc_status dsc__manifest_take_tensor(struct dsc_manifest *manifest,
                                          const struct dsc_manifest_tensor *tensor) {
    struct dsc_manifest_tensor taken = *tensor;
    char label[DSC_MANIFEST_LABEL];
    uint64_t n_bytes;
    DSC_TRY(check_name(manifest, &taken));
    if (dsc_shard_size(taken.dtype, taken.n_dims, taken.shape, &n_bytes) != DSC_OK)
        return DSC_FAIL(DSC_EINVAL, "tensor %s: %s", dsc_manifest_label(&taken, label),
                        dsc_last_error());
    if (!is_dense(&taken))
        return DSC_FAIL(DSC_EINVAL,
                        "tensor %s: its strides are not those of C order in some order of the "
                        "dimensions",
                        dsc_manifest_label(&taken, label));
    taken.n_elems = n_bytes / dsc_shard_dtype_size(taken.dtype);
    DSC_TRY(check_pieces(manifest, &taken));
    DSC_TRY(grow_index(manifest, &manifest->tensor_index));
    DSC_TRY(dsc__manifest_grow((void **)&manifest->tensors, &manifest->room_tensors,
                               manifest->n_tensors, 1, sizeof *manifest->tensors));
    manifest->tensors[manifest->n_tensors++] = taken;
    put_slot(&manifest->tensor_index, hash_tensor(&taken), (uint32_t)manifest->n_tensors);
    manifest->tensor_index.n_used++;
    return DSC_OK;
}

/* Copies of the pieces, behind those that are there. */
static enum dsc_status add_pieces(struct dsc_manifest *manifest,
                                  const struct dsc_manifest_piece *pieces, size_t n_pieces,
                                  const uint32_t *crcs) {
    size_t n_crcs = 0;
    for (size_t i = 0; i < n_pieces; i++)
        n_crcs += pieces[i].n_crcs;
    DSC_TRY(dsc__manifest_grow((void **)&manifest->pieces, &manifest->room_pieces,
                               manifest->n_pieces, n_pieces, sizeof *pieces));
    DSC_TRY(dsc__manifest_grow((void **)&manifest->crcs, &manifest->room_crcs, manifest->n_crcs,
                               n_crcs, sizeof *crcs));
    for (size_t i = 0, at = manifest->n_crcs; i < n_pieces; at += pieces[i++].n_crcs) {
        manifest->pieces[manifest->n_pieces + i] = pieces[i];
        manifest->pieces[manifest->n_pieces + i].first_crc = at;
    }
    if (n_crcs > 0)
        memcpy(manifest->crcs + manifest->n_crcs, crcs, n_crcs * sizeof *crcs);
    manifest->n_pieces += n_pieces;
    manifest->n_crcs += n_crcs;
    return DSC_OK;
}

enum dsc_status dsc_manifest_add_tensor(struct dsc_manifest *manifest,
                                        const struct dsc_manifest_tensor *tensor,
                                        const struct dsc_manifest_piece *pieces, size_t n_pieces,
                                        const uint32_t *crcs) {
    struct dsc_manifest_tensor copy = *tensor;
    const size_t n_before = manifest->n_pieces, n_crcs_before = manifest->n_crcs;
    DSC_TRY(check_open(manifest));
    if (copy.n_dims < 0 || copy.n_dims > DSC_SHARD_MAX_DIMS)
        return DSC_FAIL(DSC_EINVAL, "tensor %s/%s has %d dimensions; allowed: 0 to %d", copy.kind,
                        copy.name, copy.n_dims, DSC_SHARD_MAX_DIMS);
    DSC_TRY(keep_text(manifest, tensor->kind, &copy.kind));
    DSC_TRY(keep_text(manifest, tensor->name, &copy.name));
    DSC_TRY(keep_numbers(manifest, tensor->shape, copy.n_dims, &copy.shape));
    DSC_TRY(keep_numbers(manifest, tensor->stride, copy.n_dims, &copy.stride));
    DSC_TRY(add_pieces(manifest, pieces, n_pieces, crcs));
    copy.first_piece = n_before;
    copy.n_pieces = n_pieces;
    const enum dsc_status status = dsc__manifest_take_tensor(manifest, &copy);
    if (status != DSC_OK) {
        manifest->n_pieces = n_before;
        manifest->n_crcs = n_crcs_before;
    }
    return status;
}

/* ---- the whole ---- */

struct extent {
    uint32_t file, tensor;
    uint64_t offset, end;
};

static int by_offset(const void *a, const void *b) {
    const struct extent *x = a, *y = b;
    if (x->file != y->file)
        return x->file < y->file ? -1 : 1;
    return (x->offset > y->offset) - (x->offset < y->offset);
}

static void list_extents(const struct dsc_manifest *manifest, struct extent *extents) {
    for (size_t t = 0; t < manifest->n_tensors; t++) {
        const struct dsc_manifest_tensor *tensor = &manifest->tensors[t];
        const uint64_t size = dsc_shard_dtype_size(tensor->dtype);
        for (size_t i = 0; i < tensor->n_pieces; i++) {
            const struct dsc_manifest_piece *piece = &manifest->pieces[tensor->first_piece + i];
            *extents++ = (struct extent){piece->file, (uint32_t)t, piece->offset,
                                         piece->offset + piece->n * size};
        }
    }
}

/* Pieces of a file lie one behind the other, the last one up to its end. */
static enum dsc_status check_extents(struct dsc_manifest *manifest, const struct extent *extents,
                                     size_t n) {
    char label[DSC_MANIFEST_LABEL];
    for (size_t i = 0; i < manifest->n_files; i++)
        manifest->files[i].head_bytes = manifest->files[i].n_bytes;
    for (size_t i = 0; i < n; i++) {
        const struct extent *this = &extents[i];
        struct dsc_manifest_file *file = &manifest->files[this->file];
        const bool first = i == 0 || extents[i - 1].file != this->file;
        const bool last = i + 1 == n || extents[i + 1].file != this->file;
        (void)dsc_manifest_label(&manifest->tensors[this->tensor], label);
        if (first)
            file->head_bytes = this->offset;
        else if (extents[i - 1].end != this->offset)
            return DSC_FAIL(DSC_EINVAL,
                            "tensor %s: a piece begins at offset %" PRIu64
                            " of %s, where the one before it ends at %" PRIu64,
                            label, this->offset, file->name, extents[i - 1].end);
        if (last && this->end != file->n_bytes)
            return DSC_FAIL(DSC_EINVAL,
                            "tensor %s: the last piece of %s ends at %" PRIu64 " of %" PRIu64
                            " bytes",
                            label, file->name, this->end, file->n_bytes);
    }
    return DSC_OK;
}

enum dsc_status dsc_manifest_close(struct dsc_manifest *manifest) {
    struct extent *extents = NULL;
    if (manifest->closed)
        return DSC_OK;
    DSC_TRY(dsc_alloc(manifest->n_pieces * sizeof *extents, (void **)&extents));
    list_extents(manifest, extents);
    qsort(extents, manifest->n_pieces, sizeof *extents, by_offset);
    const enum dsc_status status = check_extents(manifest, extents, manifest->n_pieces);
    dsc_free(extents);
    manifest->closed = status == DSC_OK;
    return status;
}

/* ---- looking ---- */

size_t dsc_manifest_n_files(const struct dsc_manifest *manifest) {
    return manifest->n_files;
}

const struct dsc_manifest_file *dsc_manifest_file(const struct dsc_manifest *manifest, size_t i) {
    return &manifest->files[i];
}

int64_t dsc_manifest_find_file(const struct dsc_manifest *manifest, const char *name) {
    const struct dsc_manifest_file wanted = {name};
    const struct dsc_manifest_file *found = find_file(manifest, &wanted);
    return found ? found - manifest->files : -1;
}

size_t dsc_manifest_n_tensors(const struct dsc_manifest *manifest) {
    return manifest->n_tensors;
}

const struct dsc_manifest_tensor *dsc_manifest_tensor(const struct dsc_manifest *manifest,
                                                      size_t i) {
    return &manifest->tensors[i];
}

const struct dsc_manifest_tensor *dsc_manifest_find(const struct dsc_manifest *manifest,
                                                    const char *kind, const char *name,
                                                    const uint32_t place[2]) {
    const struct dsc_manifest_tensor wanted = {kind, name, {place[0], place[1]}};
    return find_tensor(manifest, &wanted);
}

const struct dsc_manifest_piece *dsc_manifest_pieces(const struct dsc_manifest *manifest) {
    return manifest->pieces;
}

const uint32_t *dsc_manifest_crcs(const struct dsc_manifest *manifest) {
    return manifest->crcs;
}

uint64_t dsc_manifest_n_bytes(const struct dsc_manifest *manifest) {
    return manifest->n_bytes;
}

size_t dsc_manifest_n_sections(const struct dsc_manifest *manifest) {
    return manifest->n_sections;
}

const char *dsc_manifest_section_name(const struct dsc_manifest *manifest, size_t i) {
    return manifest->sections[i].name;
}

const char *dsc_manifest_section(const struct dsc_manifest *manifest, const char *name) {
    const struct dsc_manifest_section *section = find_section(manifest, name);
    return section ? section->json : NULL;
}
