/* The table of a checkpoint: which elements of which tensor lie in which file, and where.
 *
 * Decides: the text of manifest.json (docs/checkpoint.md has it byte by byte) and when a table is
 * right. Invariant: the pieces of every tensor cover its elements once, and the pieces of every
 * file cover its bytes once, from the first piece to the end; the bytes before the first piece (all
 * of a file that has none) are its head, under a checksum of their own. So no byte of a checkpoint
 * is without a checksum. Cost grows with the size of the table, not faster. */
#ifndef DSC_MANIFEST_H
#define DSC_MANIFEST_H

#include "dsc.h"
#include "shard.h"

enum { DSC_MANIFEST_VERSION = 1 };

struct dsc_manifest;

struct dsc_manifest_file {
    const char *name; /* inside the checkpoint's folder */
    uint64_t n_bytes;
    uint32_t head_crc;
    uint64_t head_bytes; /* known once the table is closed */
};

/* Elements [begin, begin + n) of a tensor; n > 0. */
struct dsc_manifest_piece {
    uint32_t file;     /* its number */
    uint64_t offset;   /* of its first byte in the file */
    uint64_t begin, n; /* elements, in the order of storage */
    size_t first_crc;  /* of the table's checksums: one for each DSC_SHARD_CRC_BYTES */
    size_t n_crcs;
};

struct dsc_manifest_tensor {
    const char *kind, *name;
    uint32_t place[2]; /* tensor- and pipeline-parallel rank of who has it */
    enum dsc_shard_dtype dtype;
    int n_dims;
    const uint64_t *shape, *stride; /* a permutation of C order: storage has no holes */
    int64_t group;                  /* parameter group, -1: in none */
    uint64_t n_elems;               /* filled by the table, as what follows */
    size_t first_piece, n_pieces;   /* sorted by begin */
};

/* ---- making ---- */

/* An empty table. */
enum dsc_status dsc_manifest_open(struct dsc_manifest **out);
/* From the n bytes of a text with a zero byte behind them; the table is closed. path: for texts.
 * DSC_EDAMAGED says what is wrong and where. */
enum dsc_status dsc_manifest_parse(const char *text, size_t n, const char *path,
                                   struct dsc_manifest **out);
/* NULL is fine. */
void dsc_manifest_free(struct dsc_manifest *manifest);

/* The rest is DSC_EINVAL where it would not be right, and then changes nothing; DSC_ESTATE once the
 * table is closed. What is given is copied. */

/* json: one value, any; takes the place of what the section had before. */
enum dsc_status dsc_manifest_set(struct dsc_manifest *manifest, const char *section,
                                 const char *json);
/* *number: files count from 0. head_bytes is not read. */
enum dsc_status dsc_manifest_add_file(struct dsc_manifest *manifest,
                                      const struct dsc_manifest_file *file, uint32_t *number);
/* crcs: of all pieces, one behind the other; pieces' first_crc is not read. */
enum dsc_status dsc_manifest_add_tensor(struct dsc_manifest *manifest,
                                        const struct dsc_manifest_tensor *tensor,
                                        const struct dsc_manifest_piece *pieces, size_t n_pieces,
                                        const uint32_t *crcs);
/* Looks at the table as a whole and closes it; once is enough. */
enum dsc_status dsc_manifest_close(struct dsc_manifest *manifest);
/* The text of a closed table, *n bytes for dsc_free: the same for the same calls. */
enum dsc_status dsc_manifest_text(const struct dsc_manifest *manifest, char **text, size_t *n);

/* ---- looking ---- */

/* What is given lives as long as the table. */
size_t dsc_manifest_n_files(const struct dsc_manifest *manifest);
const struct dsc_manifest_file *dsc_manifest_file(const struct dsc_manifest *manifest, size_t i);
/* Its number; -1: there is none. */
int64_t dsc_manifest_find_file(const struct dsc_manifest *manifest, const char *name);
size_t dsc_manifest_n_tensors(const struct dsc_manifest *manifest);
/* In the order in which they were added; until the next one is. */
const struct dsc_manifest_tensor *dsc_manifest_tensor(const struct dsc_manifest *manifest,
                                                      size_t i);
/* NULL where there is none. */
const struct dsc_manifest_tensor *dsc_manifest_find(const struct dsc_manifest *manifest,
                                                    const char *kind, const char *name,
                                                    const uint32_t place[2]);
/* Those of a tensor begin at its first_piece; until the next tensor is added. */
const struct dsc_manifest_piece *dsc_manifest_pieces(const struct dsc_manifest *manifest);
const uint32_t *dsc_manifest_crcs(const struct dsc_manifest *manifest);
/* Of all files. */
uint64_t dsc_manifest_n_bytes(const struct dsc_manifest *manifest);
size_t dsc_manifest_n_sections(const struct dsc_manifest *manifest);
const char *dsc_manifest_section_name(const struct dsc_manifest *manifest, size_t i);
/* Its JSON text; NULL where there is none. */
const char *dsc_manifest_section(const struct dsc_manifest *manifest, const char *name);

/* "kind/name", with the place where it is not (0, 0), cut to what fits; `out`. */
enum { DSC_MANIFEST_LABEL = 320 };
const char *dsc_manifest_label(const struct dsc_manifest_tensor *tensor,
                               char out[DSC_MANIFEST_LABEL]);
/* Whether a name can stand in a checkpoint's folder: no separator, not "." or "..", UTF-8, at most
 * 255 bytes. */
bool dsc_manifest_is_file_name(const char *name);

#endif
