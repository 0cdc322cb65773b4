/* How bytes move between ranks of one node where one rank is the root, or every pair has a part of
 * its own.
 *
 * Decides: the chunks of reduce, gather, scatter and all_to_all. The scheme and its invariant are
 * those of shm_coll.c: while chunk i is published, chunk i - 1 is consumed, and an area of one
 * parity is rewritten two steps after it was published. */
#include "shm.h"

#include <string.h>

/* One operation on its way. Lengths of parts are in bytes; a part is what one rank has for another
 * (all_to_all, scatter) or for the root. */
struct route {
    struct dsc__shm *shm;
    const struct dsc_coll *coll;
    const struct dsc__parts *parts; /* NULL: all parts have n_bytes */
    size_t n_bytes;                 /* of the longest part */
    size_t chunk;                   /* bytes of a part that travel at once */
};

static bool is_root(const struct route *r) {
    return r->shm->rank == r->coll->root;
}

/* What is left of a part of n bytes at chunk `index`, at most one chunk. */
static size_t length_at(const struct route *r, size_t n, size_t index) {
    size_t first = index * r->chunk;
    return first < n ? dsc_min(r->chunk, n - first) : 0;
}

static char *area_of(const struct route *r, int rank, size_t index) {
    return r->shm->blocks[rank]->in[index & 1];
}

static const char *small_of(const struct route *r, int rank) {
    return r->shm->blocks[rank]->small[r->shm->sequence & 1];
}

static void put(const struct route *r, void *dst, const void *src, size_t n_bytes) {
    if (r->n_bytes >= DSC__STREAM_FROM)
        dsc__stream_copy(dst, src, n_bytes);
    else if (dst != src)
        memcpy(dst, src, n_bytes);
}

typedef void (*step_fn)(const struct route *r, size_t index);

static enum dsc_status travel(const struct route *r, step_fn publish, step_fn consume) {
    size_t n_chunks = (r->n_bytes + r->chunk - 1) / r->chunk;
    for (size_t i = 0;; i++) {
        if (i < n_chunks)
            publish(r, i);
        if (i >= 1)
            consume(r, i - 1);
        if (i == n_chunks)
            return DSC_OK;
        DSC_TRY(dsc__shm_step(r->shm));
    }
}

static struct route route_of(struct dsc__shm *shm, const struct dsc_coll *coll) {
    size_t n_bytes = coll->n_elems * dsc_dtype_size(coll->dtype);
    return (struct route){
        .shm = shm, .coll = coll, .n_bytes = n_bytes, .chunk = dsc__shm_chunk(n_bytes)};
}

/* Chunks of a rank's area that holds a part for each rank, in whole cache lines where they fit. */
static size_t shared_chunk(const struct dsc__shm *shm) {
    size_t chunk = DSC__SHM_CHUNK / (size_t)shm->size;
    return chunk - chunk % 64;
}

/* ---- to the root ---- */

static void publish_to_root(const struct route *r, size_t index) {
    if (!is_root(r))
        memcpy(area_of(r, r->shm->rank, index), (const char *)r->coll->src + index * r->chunk,
               length_at(r, r->n_bytes, index));
}

static void reduce_at_root(const struct route *r, size_t index) {
    struct dsc__shm *shm = r->shm;
    size_t n = length_at(r, r->n_bytes, index) / dsc_dtype_size(r->coll->dtype);
    size_t place = index * r->chunk;
    if (!is_root(r))
        return;
    for (int k = 0; k < shm->size; k++)
        shm->sources[k] =
            k == shm->rank ? (const char *)r->coll->src + place : area_of(r, k, index);
    dsc__reduce((char *)r->coll->dst + place, shm->sources, shm->size, n, r->coll->dtype,
                r->coll->op, r->n_bytes >= DSC__STREAM_FROM && r->coll->src != r->coll->dst);
}

enum dsc_status dsc__shm_reduce(void *state, const struct dsc_coll *coll) {
    struct route r = route_of(state, coll);
    struct dsc__shm *shm = state;
    if (r.n_bytes > DSC__SHM_SMALL)
        return travel(&r, publish_to_root, reduce_at_root);
    if (!is_root(&r))
        return DSC_OK;
    for (int k = 0; k < shm->size; k++)
        shm->sources[k] = small_of(&r, k);
    dsc__reduce(coll->dst, shm->sources, shm->size, coll->n_elems, coll->dtype, coll->op, false);
    return DSC_OK;
}

static void collect_at_root(const struct route *r, size_t index) {
    size_t n = length_at(r, r->n_bytes, index), place = index * r->chunk;
    for (int k = 0; is_root(r) && k < r->shm->size; k++)
        put(r, (char *)r->coll->dst + (size_t)k * r->n_bytes + place,
            k == r->shm->rank ? (const char *)r->coll->src + place : area_of(r, k, index), n);
}

enum dsc_status dsc__shm_gather(void *state, const struct dsc_coll *coll) {
    struct route r = route_of(state, coll);
    if (r.n_bytes > DSC__SHM_SMALL)
        return travel(&r, publish_to_root, collect_at_root);
    for (int k = 0; is_root(&r) && k < r.shm->size; k++)
        memcpy((char *)coll->dst + (size_t)k * r.n_bytes, small_of(&r, k), r.n_bytes);
    return DSC_OK;
}

/* ---- from the root ---- */

static void publish_parts_of_root(const struct route *r, size_t index) {
    size_t n = length_at(r, r->n_bytes, index);
    for (int k = 0; is_root(r) && k < r->shm->size; k++) {
        const char *src = (const char *)r->coll->src + (size_t)k * r->n_bytes + index * r->chunk;
        if (k != r->shm->rank)
            memcpy(area_of(r, r->shm->rank, index) + (size_t)k * r->chunk, src, n);
        else
            put(r, (char *)r->coll->dst + index * r->chunk, src, n);
    }
}

static void take_part_of_root(const struct route *r, size_t index) {
    if (!is_root(r))
        put(r, (char *)r->coll->dst + index * r->chunk,
            area_of(r, r->coll->root, index) + (size_t)r->shm->rank * r->chunk,
            length_at(r, r->n_bytes, index));
}

enum dsc_status dsc__shm_scatter(void *state, const struct dsc_coll *coll) {
    struct route r = route_of(state, coll);
    struct dsc__shm *shm = state;
    r.chunk = shared_chunk(shm);
    if (r.n_bytes * (size_t)shm->size > DSC__SHM_SMALL)
        return travel(&r, publish_parts_of_root, take_part_of_root);
    memcpy(coll->dst, small_of(&r, coll->root) + (size_t)shm->rank * r.n_bytes, r.n_bytes);
    return DSC_OK;
}

/* ---- every pair ---- */

static size_t part_length(const struct route *r, const size_t *counts, int rank) {
    return counts ? counts[rank] * dsc_dtype_size(r->coll->dtype) : r->n_bytes;
}

static void publish_parts(const struct route *r, size_t index) {
    const size_t *counts = r->parts ? r->parts->n_send : NULL;
    const char *part = r->coll->src;
    for (int k = 0; k < r->shm->size; k++) {
        size_t n = length_at(r, part_length(r, counts, k), index);
        if (k != r->shm->rank && n > 0)
            memcpy(area_of(r, r->shm->rank, index) + (size_t)k * r->chunk, part + index * r->chunk,
                   n);
        part += part_length(r, counts, k);
    }
}

/* The own part goes from input to output directly, a chunk with each chunk of the others. */
static void take_parts(const struct route *r, size_t index) {
    const size_t *counts = r->parts ? r->parts->n_recv : NULL;
    const char *own = r->coll->src;
    char *part = r->coll->dst;
    for (int k = 0; k < r->shm->rank; k++)
        own += part_length(r, r->parts ? r->parts->n_send : NULL, k);
    for (int k = 0; k < r->shm->size; k++) {
        size_t n = length_at(r, part_length(r, counts, k), index);
        const char *from = k == r->shm->rank
                               ? own + index * r->chunk
                               : area_of(r, k, index) + (size_t)r->shm->rank * r->chunk;
        if (n > 0)
            put(r, part + index * r->chunk, from, n);
        part += part_length(r, counts, k);
    }
}

enum dsc_status dsc__shm_all_to_all(void *state, const struct dsc_coll *coll) {
    struct route r = route_of(state, coll);
    struct dsc__shm *shm = state;
    r.chunk = shared_chunk(shm);
    if (r.n_bytes * (size_t)shm->size > DSC__SHM_SMALL)
        return travel(&r, publish_parts, take_parts);
    for (int k = 0; k < shm->size; k++)
        memcpy((char *)coll->dst + (size_t)k * r.n_bytes,
               small_of(&r, k) + (size_t)shm->rank * r.n_bytes, r.n_bytes);
    return DSC_OK;
}

/* The counts filled the agreement's payload, so even small parts go by chunks. */
enum dsc_status dsc__shm_all_to_all_v(void *state, const struct dsc_coll *coll,
                                      const struct dsc__parts *parts) {
    struct route r = route_of(state, coll);
    r.parts = parts;
    r.n_bytes = parts->n_max * dsc_dtype_size(coll->dtype);
    r.chunk = shared_chunk(state);
    return travel(&r, publish_parts, take_parts);
}
