/* One file of a checkpoint in the safetensors layout: where tensors stand in it, writing, reading.
 *
 *   8 bytes, little endian: n, the length of the header
 *   n bytes: the header, one JSON object {"__metadata__": {...}, key: {"dtype": "F32", "shape":
 *            [2, 3], "data_offsets": [begin, end]}, ...}, filled up with spaces
 *   the data: tensors without gaps; offsets in the header count from here
 *
 * Decides: the order (larger element types first, then by key, so that all are aligned), the
 * padding (data begins at a multiple of 4096), the blocks whose checksums are kept. All offsets in
 * this interface count from the start of the file. Invariant: nothing of a file is believed before
 * it is checked; a file that is not as it should be is DSC_EDAMAGED, with path, tensor and offset;
 * what the operating system refuses is DSC_EIO with errno and path. A file under way has the
 * name <path>.part; <path> is whole and on the disk. */
#ifndef DSC_SHARD_H
#define DSC_SHARD_H

#include "dsc.h"
#include "pool.h"

/* The element types of the layout: name, bytes. */
#define DSC_SHARD_DTYPE_MAP(X)                                                                     \
    X(F64, 8)                                                                                      \
    X(I64, 8)                                                                                      \
    X(U64, 8)                                                                                      \
    X(C64, 8)                                                                                      \
    X(F32, 4)                                                                                      \
    X(I32, 4)                                                                                      \
    X(U32, 4)                                                                                      \
    X(F16, 2)                                                                                      \
    X(BF16, 2)                                                                                     \
    X(I16, 2)                                                                                      \
    X(U16, 2)                                                                                      \
    X(F8_E4M3, 1)                                                                                  \
    X(F8_E5M2, 1)                                                                                  \
    X(I8, 1)                                                                                       \
    X(U8, 1)                                                                                       \
    X(BOOL, 1)
enum dsc_shard_dtype {
#define X(name, bytes) DSC_SHARD_##name,
    DSC_SHARD_DTYPE_MAP(X)
#undef X
        DSC_SHARD_DTYPE_COUNT
};
/* "F32", ...; "?" for what is none. */
const char *dsc_shard_dtype_name(enum dsc_shard_dtype dtype);
/* Bytes of one element; 0 for what is none. */
size_t dsc_shard_dtype_size(enum dsc_shard_dtype dtype);
/* Of a name; DSC_SHARD_DTYPE_COUNT where there is none. */
enum dsc_shard_dtype dsc_shard_dtype_of(const char *name);

enum {
    DSC_SHARD_MAX_DIMS = 64,
    DSC_SHARD_ALIGN = 4096,           /* data of files that we write begins at a multiple */
    DSC_SHARD_CRC_BYTES = 1 << 20,    /* a checksum is kept for each so many bytes of a tensor */
    DSC_SHARD_MAX_HEADER = 100 << 20, /* a longer header is refused */
    DSC_SHARD_MAX_KEY = 1 << 16,      /* bytes */
};
/* Checksums of a tensor of so many bytes. */
static inline size_t dsc_shard_n_crcs(uint64_t n_bytes) {
    return (size_t)(n_bytes / DSC_SHARD_CRC_BYTES + (n_bytes % DSC_SHARD_CRC_BYTES != 0));
}

/* One tensor of a file. */
struct dsc_shard_tensor {
    const char *key;
    enum dsc_shard_dtype dtype;
    int n_dims;
    const uint64_t *shape;
    uint64_t offset, n_bytes; /* in the file */
};
/* *n_bytes of a tensor; DSC_EINVAL where they are more than 2^63 - 1. */
enum dsc_status dsc_shard_size(enum dsc_shard_dtype dtype, int n_dims, const uint64_t *shape,
                               uint64_t *n_bytes);

/* ---- writing ---- */

/* Where everything will stand: shard.c. Owns copies of keys and shapes. */
struct dsc_shard_layout {
    size_t n_tensors;
    struct dsc_shard_tensor *tensors; /* in the order of the file */
    size_t *source;                   /* tensors[i] was given as number source[i] */
    char *header;                     /* the first header_bytes bytes of the file */
    uint64_t header_bytes, n_bytes;
    uint32_t header_crc;
    size_t n_crcs, *first_crc; /* tensors[i] has its checksums from first_crc[i] on */
    void *memory;              /* keys and shapes */
};
/* Of tensors in any order (offset is not read). metadata: pairs of texts (key, value), NULL behind
 * the last. DSC_EINVAL names the key: two of one name, one that no header can have, too many bytes.
 */
enum dsc_status dsc_shard_layout(const struct dsc_shard_tensor *tensors, size_t n_tensors,
                                 const char *const *metadata, struct dsc_shard_layout *out);
/* A layout that is all zero is fine. */
void dsc_shard_layout_free(struct dsc_shard_layout *layout);

struct dsc_shard_writing {
    const struct dsc_shard_layout *layout;
    const void *const *data; /* of tensors[i] */
    uint32_t *crcs;          /* layout->n_crcs of them, which are filled */
    /* Called now and then with the bytes moved so far, from the calling thread; false ends the
     * write with DSC_EINTR. May be NULL. */
    bool (*progress)(void *context, uint64_t n_done);
    void *context;
    bool cached; /* through the page cache, where a load that follows finds it */
};
/* Writes <path>.part, syncs it and gives it its name. On failure neither is left, and what stood at
 * `path` before is as it was. The caller syncs the folder. */
enum dsc_status dsc_shard_write(const char *path, const struct dsc_shard_writing *writing);

/* The same in steps, so that one thread may write while another needs the tensors back. */
struct dsc_shard_job;
/* Takes the memory that a write needs, some 16 MiB; `writing` is copied, what it points to is not.
 */
enum dsc_status dsc_shard_job_open(const char *path, const struct dsc_shard_writing *writing,
                                   struct dsc_shard_job **out);
/* The write; once. */
enum dsc_status dsc_shard_job_run(struct dsc_shard_job *job);
/* From any thread, while another writes or is about to, or has: on return the tensors may change,
 * and the checksums are final, unless the write has failed. Copies what has not been read yet, on
 * the threads of `pool`, while the write goes on; where there is no memory for that, waits until
 * all has been read. */
void dsc_shard_job_detach(struct dsc_shard_job *job, struct dsc_pool *pool);
/* Nothing may be running; NULL is fine. In a forked child it frees memory only. */
void dsc_shard_job_close(struct dsc_shard_job *job);

/* ---- reading ---- */

struct dsc_shard;

/* What is known of a file before it is opened. */
struct dsc_shard_expected {
    uint64_t n_bytes;
    uint32_t header_crc;
};
/* Checks size, checksum and header of a file. expected: NULL where nothing is known (a file of
 * others). An open shard may be read by several threads at once. */
enum dsc_status dsc_shard_open(const char *path, const struct dsc_shard_expected *expected,
                               struct dsc_shard **out);
/* NULL is fine. */
void dsc_shard_close(struct dsc_shard *shard);
size_t dsc_shard_count(const struct dsc_shard *shard);
/* By number, in the order of the file. Valid until the shard is closed. */
const struct dsc_shard_tensor *dsc_shard_tensor(const struct dsc_shard *shard, size_t i);
/* By key; NULL where there is none. */
const struct dsc_shard_tensor *dsc_shard_find(const struct dsc_shard *shard, const char *key);
const char *dsc_shard_path(const struct dsc_shard *shard);
/* The value of a key of "__metadata__"; NULL where there is none. */
const char *dsc_shard_metadata(const struct dsc_shard *shard, const char *key);

/* Reads bytes [begin, begin + n) of a tensor of the shard, or of anything described as one (key,
 * for texts, offset and n_bytes are looked at; what lies outside of the data is DSC_EDAMAGED).
 * crcs: of all its blocks; every block that the range touches is read whole and checked; NULL:
 * nothing is checked. out: NULL to check only. DSC_EDAMAGED names file, tensor and the block's
 * offset; `out` is undefined then. */
enum dsc_status dsc_shard_read(const struct dsc_shard *shard, const struct dsc_shard_tensor *tensor,
                               const uint32_t *crcs, uint64_t begin, uint64_t n, void *out);

#endif
