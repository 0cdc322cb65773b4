/* What the files of the manifest share; nobody else includes this. */
#ifndef DSC_MANIFEST_IMPL_H
#define DSC_MANIFEST_IMPL_H

#include "manifest.h"

/* Texts and shapes lie in chunks, so that they stay where they are. */
struct dsc_manifest_chunk {
    struct dsc_manifest_chunk *next;
    size_t used, size;
    char data[];
};

/* Numbers of items by the hash of their names, in a power of two of slots of which at least half
 * are free; 0: free, else 1 more than the number. */
struct dsc_manifest_index {
    uint32_t *slots;
    size_t n_slots, n_used;
};

struct dsc_manifest_section {
    const char *name, *json;
};

struct dsc_manifest {
    bool closed;
    struct dsc_manifest_chunk *chunks;
    struct dsc_manifest_section *sections;
    struct dsc_manifest_file *files;
    struct dsc_manifest_tensor *tensors;
    struct dsc_manifest_piece *pieces;
    uint32_t *crcs;
    size_t n_sections, n_files, n_tensors, n_pieces, n_crcs;
    size_t room_sections, room_files, room_tensors, room_pieces, room_crcs;
    struct dsc_manifest_index file_index, tensor_index;
    uint64_t n_bytes;
};

/* Room for n more items of `size` bytes behind *n_items of *items. */
enum dsc_status dsc__manifest_grow(void **items, size_t *room, size_t n_items, size_t n,
                                   size_t size);
/* n bytes, aligned to 8, for as long as the manifest lives. */
enum dsc_status dsc__manifest_keep(struct dsc_manifest *manifest, size_t n, void **out);
/* The tensor's pieces are the last ones of the manifest, from first_piece on, with checksums; its
 * texts and shapes are kept. On failure the caller drops the pieces. */
enum dsc_status dsc__manifest_take_tensor(struct dsc_manifest *manifest,
                                          const struct dsc_manifest_tensor *tensor);
/* The same for a file, whose name is kept, and for a section. */
enum dsc_status dsc__manifest_take_file(struct dsc_manifest *manifest,
                                        const struct dsc_manifest_file *file);
enum dsc_status dsc__manifest_take_section(struct dsc_manifest *manifest, const char *name,
                                           const char *json);

/* The end of the text: `,"digest":"` 8 digits `"}` newline. */
enum { DSC_MANIFEST_SUFFIX = 22 };
void dsc__manifest_suffix(const char *text, size_t n, char out[DSC_MANIFEST_SUFFIX + 1]);

#endif
