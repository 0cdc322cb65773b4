/* How bytes move between ranks of one node.
 *
 * Decides: small operations ride on the agreement (data is published with the fingerprint,
 * everybody reads it after the one wait); large ones go in chunks through each rank's
 * double-buffered area, one step (dsc__shm_step) per chunk: while chunk i is published, chunk i - 1
 * is consumed. Invariant: an area of parity p is rewritten two steps after it was published, when
 * every rank has passed a step that it enters only after it read it. The agreement of the next
 * operation closes the last chunk, so none ends with a step of its own. Every rank's result of a
 * sum is the same bits: each element is reduced once, by one rank, or by all from the same inputs
 * in the same order. */
#include "shm.h"

#include <string.h>

static char *in_area(const struct dsc__shm *shm, int rank, size_t chunk) {
    return shm->blocks[rank]->in[chunk & 1];
}

static char *result_area(const struct dsc__shm *shm, int rank, size_t chunk) {
    return shm->blocks[rank]->result[chunk & 1];
}

static const char *small_area(const struct dsc__shm *shm, int rank) {
    return shm->blocks[rank]->small[shm->sequence & 1];
}

static bool is_small(size_t n_bytes) {
    return n_bytes <= DSC__SHM_SMALL;
}

/* A piece of a result: past the caches if the whole is larger than they are. */
static void put(void *dst, const void *src, size_t n_bytes, bool large) {
    if (large)
        dsc__stream_copy(dst, src, n_bytes);
    else
        memcpy(dst, src, n_bytes);
}

static bool is_large(size_t n_bytes) {
    return n_bytes >= DSC__STREAM_FROM;
}

/* In place, the lines to be written are in the caches already, because they were just read. */
static bool all_reduce_is_large(const struct dsc_coll *coll) {
    return coll->src != coll->dst && is_large(coll->n_elems * dsc_dtype_size(coll->dtype));
}

/* The reduction of n elements that lie at `offset` bytes of every rank's small area. */
static void reduce_small(struct dsc__shm *shm, const struct dsc_coll *coll, size_t offset) {
    for (int r = 0; r < shm->size; r++)
        shm->sources[r] = small_area(shm, r) + offset;
    dsc__reduce(coll->dst, shm->sources, shm->size, coll->n_elems, coll->dtype, coll->op, false);
}

/* ---- all_reduce ---- */

/* A chunk of an all_reduce: elements [first, first + n), cut into one slice per rank. */
struct piece {
    size_t index, first, n, slice;
};

static struct piece piece_of(const struct dsc__shm *shm, const struct dsc_coll *coll,
                             size_t index) {
    size_t chunk = DSC__SHM_CHUNK / dsc_dtype_size(coll->dtype);
    struct piece p = {.index = index, .first = index * chunk};
    p.n = dsc_min(chunk, coll->n_elems - p.first);
    /* Slices start at whole cache lines: two ranks never write one. */
    p.slice = dsc_round_up((p.n + (size_t)shm->size - 1) / (size_t)shm->size, 64);
    return p;
}

/* The slice of `rank` as offset and length, in elements of the chunk. */
static size_t slice_start(const struct piece *p, int rank) {
    return dsc_min(p->slice * (size_t)rank, p->n);
}

static size_t slice_length(const struct piece *p, int rank) {
    return dsc_min(p->slice * ((size_t)rank + 1), p->n) - slice_start(p, rank);
}

/* All but the own slice, which its owner reads where it lies. */
static void all_reduce_publish(struct dsc__shm *shm, const struct dsc_coll *coll, size_t index) {
    struct piece p = piece_of(shm, coll, index);
    size_t size = dsc_dtype_size(coll->dtype);
    size_t head = slice_start(&p, shm->rank), own = slice_length(&p, shm->rank);
    const char *src = (const char *)coll->src + p.first * size;
    char *area = in_area(shm, shm->rank, index);
    memcpy(area, src, head * size);
    memcpy(area + (head + own) * size, src + (head + own) * size, (p.n - head - own) * size);
}

static void all_reduce_own_slice(struct dsc__shm *shm, const struct dsc_coll *coll, size_t index) {
    struct piece p = piece_of(shm, coll, index);
    size_t size = dsc_dtype_size(coll->dtype);
    size_t start = slice_start(&p, shm->rank) * size, n = slice_length(&p, shm->rank);
    size_t place = p.first * size + start;
    for (int r = 0; r < shm->size; r++)
        shm->sources[r] =
            r == shm->rank ? (const char *)coll->src + place : in_area(shm, r, index) + start;
    char *result = result_area(shm, shm->rank, index) + start;
    dsc__reduce(result, shm->sources, shm->size, n, coll->dtype, coll->op, false);
    put((char *)coll->dst + place, result, n * size, all_reduce_is_large(coll));
}

static void all_reduce_collect(struct dsc__shm *shm, const struct dsc_coll *coll, size_t index) {
    struct piece p = piece_of(shm, coll, index);
    size_t size = dsc_dtype_size(coll->dtype);
    for (int r = 0; r < shm->size; r++) {
        size_t start = slice_start(&p, r) * size;
        if (r != shm->rank)
            put((char *)coll->dst + p.first * size + start, result_area(shm, r, index) + start,
                slice_length(&p, r) * size, all_reduce_is_large(coll));
    }
}

enum dsc_status dsc__shm_all_reduce(void *state, const struct dsc_coll *coll) {
    struct dsc__shm *shm = state;
    size_t n_bytes = coll->n_elems * dsc_dtype_size(coll->dtype);
    size_t n_chunks = (n_bytes + DSC__SHM_CHUNK - 1) / DSC__SHM_CHUNK;

    if (is_small(n_bytes)) {
        reduce_small(shm, coll, 0);
        return DSC_OK;
    }
    for (size_t i = 0;; i++) {
        if (i < n_chunks)
            all_reduce_publish(shm, coll, i);
        if (i >= 1 && i - 1 < n_chunks)
            all_reduce_own_slice(shm, coll, i - 1);
        if (i >= 2)
            all_reduce_collect(shm, coll, i - 2);
        if (i == n_chunks + 1)
            return DSC_OK;
        DSC_TRY(dsc__shm_step(shm));
    }
}

/* ---- reduce_scatter ---- */

/* Elements per rank and chunk: the parts of all ranks share one area. */
static size_t scatter_chunk(const struct dsc__shm *shm, const struct dsc_coll *coll) {
    size_t chunk = DSC__SHM_CHUNK / dsc_dtype_size(coll->dtype) / (size_t)shm->size;
    return chunk - (chunk > 16 ? chunk % 16 : 0);
}

static void scatter_publish(struct dsc__shm *shm, const struct dsc_coll *coll, size_t index) {
    size_t size = dsc_dtype_size(coll->dtype), chunk = scatter_chunk(shm, coll);
    size_t first = index * chunk, n = dsc_min(chunk, coll->n_elems - first);
    for (int r = 0; r < shm->size; r++)
        if (r != shm->rank)
            memcpy(in_area(shm, shm->rank, index) + (size_t)r * chunk * size,
                   (const char *)coll->src + ((size_t)r * coll->n_elems + first) * size, n * size);
}

static void scatter_reduce(struct dsc__shm *shm, const struct dsc_coll *coll, size_t index) {
    size_t size = dsc_dtype_size(coll->dtype), chunk = scatter_chunk(shm, coll);
    size_t first = index * chunk, n = dsc_min(chunk, coll->n_elems - first);
    size_t me = (size_t)shm->rank;
    for (int r = 0; r < shm->size; r++)
        shm->sources[r] = r == shm->rank
                              ? (const char *)coll->src + (me * coll->n_elems + first) * size
                              : in_area(shm, r, index) + me * chunk * size;
    dsc__reduce((char *)coll->dst + first * size, shm->sources, shm->size, n, coll->dtype, coll->op,
                is_large(coll->n_elems * size));
}

enum dsc_status dsc__shm_reduce_scatter(void *state, const struct dsc_coll *coll) {
    struct dsc__shm *shm = state;
    size_t n_bytes = coll->n_elems * dsc_dtype_size(coll->dtype);
    size_t chunk = scatter_chunk(shm, coll);
    size_t n_chunks = (coll->n_elems + chunk - 1) / chunk;

    if (is_small(n_bytes * (size_t)shm->size)) {
        reduce_small(shm, coll, (size_t)shm->rank * n_bytes);
        return DSC_OK;
    }
    for (size_t i = 0;; i++) {
        if (i < n_chunks)
            scatter_publish(shm, coll, i);
        if (i >= 1)
            scatter_reduce(shm, coll, i - 1);
        if (i == n_chunks)
            return DSC_OK;
        DSC_TRY(dsc__shm_step(shm));
    }
}

/* ---- all_gather ---- */

/* Publishes a chunk and, while it is in the cache, puts it into the own part of dst. */
static void gather_publish(struct dsc__shm *shm, const struct dsc_coll *coll, size_t n_bytes,
                           size_t first) {
    size_t n = dsc_min(DSC__SHM_CHUNK, n_bytes - first);
    const char *src = (const char *)coll->src + first;
    char *own = (char *)coll->dst + (size_t)shm->rank * n_bytes + first;
    memcpy(in_area(shm, shm->rank, first / DSC__SHM_CHUNK), src, n);
    if (own != src)
        put(own, src, n, is_large(n_bytes * (size_t)shm->size));
}

static void gather_collect(struct dsc__shm *shm, const struct dsc_coll *coll, size_t n_bytes,
                           size_t first) {
    size_t n = dsc_min(DSC__SHM_CHUNK, n_bytes - first);
    for (int r = 0; r < shm->size; r++)
        if (r != shm->rank)
            put((char *)coll->dst + (size_t)r * n_bytes + first,
                in_area(shm, r, first / DSC__SHM_CHUNK), n, is_large(n_bytes * (size_t)shm->size));
}

enum dsc_status dsc__shm_all_gather(void *state, const struct dsc_coll *coll) {
    struct dsc__shm *shm = state;
    size_t n_bytes = coll->n_elems * dsc_dtype_size(coll->dtype);
    size_t n_chunks = (n_bytes + DSC__SHM_CHUNK - 1) / DSC__SHM_CHUNK;

    if (is_small(n_bytes)) {
        for (int r = 0; r < shm->size; r++)
            memcpy((char *)coll->dst + (size_t)r * n_bytes, small_area(shm, r), n_bytes);
        return DSC_OK;
    }
    for (size_t i = 0;; i++) {
        if (i < n_chunks)
            gather_publish(shm, coll, n_bytes, i * DSC__SHM_CHUNK);
        if (i >= 1)
            gather_collect(shm, coll, n_bytes, (i - 1) * DSC__SHM_CHUNK);
        if (i == n_chunks)
            return DSC_OK;
        DSC_TRY(dsc__shm_step(shm));
    }
}

/* ---- broadcast ---- */

enum dsc_status dsc__shm_broadcast(void *state, const struct dsc_coll *coll) {
    struct dsc__shm *shm = state;
    size_t n_bytes = coll->n_elems * dsc_dtype_size(coll->dtype);
    size_t chunk = dsc__shm_chunk(n_bytes), n_chunks = (n_bytes + chunk - 1) / chunk;
    bool is_root = shm->rank == coll->root;
    char *data = coll->dst;

    if (is_small(n_bytes)) {
        if (!is_root)
            memcpy(data, small_area(shm, coll->root), n_bytes);
        return DSC_OK;
    }
    for (size_t i = 0;; i++) {
        size_t first = i * chunk;
        if (is_root && i < n_chunks)
            memcpy(in_area(shm, shm->rank, i), data + first, dsc_min(chunk, n_bytes - first));
        if (!is_root && i >= 1) {
            first -= chunk;
            memcpy(data + first, in_area(shm, coll->root, i - 1), dsc_min(chunk, n_bytes - first));
        }
        if (i == n_chunks)
            return DSC_OK;
        DSC_TRY(dsc__shm_step(shm));
    }
}
