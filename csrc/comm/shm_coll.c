/* How bytes move between ranks of one node where every rank has the same part in it, and in a
 * broadcast.
 *
 * Decides: small operations ride on the agreement (data is published with the fingerprint,
 * everybody reads it after the one wait); large ones go in chunks through the areas of
 * shm_travel.c. The agreement of the next operation closes the last chunk, so none ends with a step
 * of its own. Invariant: every rank's result of a sum is the same bits: each element is reduced
 * once, by one rank, or by all from the same inputs in the same order. */
#include "shm.h"

#include <string.h>

typedef const struct dsc__shm_route route;

/* The reduction of n elements that lie at `offset` bytes of every rank's small area. */
static void reduce_small(struct dsc__shm *shm, const struct dsc_coll *coll, size_t offset) {
    for (int r = 0; r < shm->size; r++)
        shm->sources[r] = dsc__shm_small(shm, r) + offset;
    dsc__reduce(coll->dst, shm->sources, shm->size, coll->n_elems, coll->dtype, coll->op, false);
}

/* ---- all_reduce ---- */

/* A chunk is cut into one slice per rank, in whole cache lines, so that two ranks never write one;
 * r->chunk is the longest slice. */
struct span {
    size_t at, n; /* bytes of the buffer */
};

static struct span slice_of(route *r, size_t index, int rank) {
    size_t size = (size_t)r->shm->size, first = index * r->chunk * size;
    size_t n = dsc_min(r->chunk * size, dsc__shm_bytes_of(r->coll) - first);
    size_t slice = dsc_round_up((n + size - 1) / size, 64);
    size_t begin = dsc_min(slice * (size_t)rank, n);
    return (struct span){first + begin, dsc_min(slice * ((size_t)rank + 1), n) - begin};
}

/* In place, the lines to be written are in the caches already, because they were just read. */
static size_t all_reduce_whole(route *r) {
    return r->coll->src == r->coll->dst ? 0 : dsc__shm_bytes_of(r->coll);
}

/* All but the own slice, which its owner reads where it lies. */
static void all_reduce_publish(route *r, size_t index) {
    int me = r->shm->rank;
    for (int k = 0; k < r->shm->size; k++) {
        struct span slice = slice_of(r, index, k);
        if (k != me)
            memcpy(dsc__shm_in_for(r, me, k, index), (const char *)r->coll->src + slice.at,
                   slice.n);
    }
}

static void all_reduce_own_slice(route *r, size_t index) {
    struct dsc__shm *shm = r->shm;
    int me = shm->rank;
    struct span slice = slice_of(r, index, me);
    for (int k = 0; k < shm->size; k++)
        shm->sources[k] =
            k == me ? (const char *)r->coll->src + slice.at : dsc__shm_in_for(r, k, me, index);
    char *result = dsc__shm_result(r, me, index);
    dsc__reduce(result, shm->sources, shm->size, slice.n / dsc_dtype_size(r->coll->dtype),
                r->coll->dtype, r->coll->op, false);
    dsc__shm_put((char *)r->coll->dst + slice.at, result, slice.n, all_reduce_whole(r));
}

static void all_reduce_collect(route *r, size_t index) {
    for (int k = 0; k < r->shm->size; k++) {
        struct span slice = slice_of(r, index, k);
        if (k != r->shm->rank)
            dsc__shm_put((char *)r->coll->dst + slice.at, dsc__shm_result(r, k, index), slice.n,
                         all_reduce_whole(r));
    }
}

enum dsc_status dsc__shm_all_reduce(void *state, const struct dsc_coll *coll) {
    static const dsc__shm_stage stages[] = {all_reduce_publish, all_reduce_own_slice,
                                            all_reduce_collect};
    struct dsc__shm *shm = state;
    size_t n_bytes = dsc__shm_bytes_of(coll), size = (size_t)shm->size;
    if (n_bytes <= DSC__SHM_SMALL) {
        reduce_small(shm, coll, 0);
        return DSC_OK;
    }
    struct dsc__shm_route r = dsc__shm_route_of(shm, coll, (n_bytes + size - 1) / size, true);
    return dsc__shm_travel(&r, stages, 3);
}

/* ---- reduce_scatter ---- */

static void scatter_publish(route *r, size_t index) {
    int me = r->shm->rank;
    for (int k = 0; k < r->shm->size; k++)
        if (k != me)
            memcpy(dsc__shm_in_for(r, me, k, index),
                   (const char *)r->coll->src + (size_t)k * r->n_bytes + index * r->chunk,
                   dsc__shm_length_at(r, r->n_bytes, index));
}

static void scatter_reduce(route *r, size_t index) {
    struct dsc__shm *shm = r->shm;
    int me = shm->rank;
    size_t place = index * r->chunk;
    size_t n = dsc__shm_length_at(r, r->n_bytes, index) / dsc_dtype_size(r->coll->dtype);
    for (int k = 0; k < shm->size; k++)
        shm->sources[k] = k == me ? (const char *)r->coll->src + (size_t)me * r->n_bytes + place
                                  : dsc__shm_in_for(r, k, me, index);
    dsc__reduce((char *)r->coll->dst + place, shm->sources, shm->size, n, r->coll->dtype,
                r->coll->op, r->n_bytes >= DSC__STREAM_FROM);
}

enum dsc_status dsc__shm_reduce_scatter(void *state, const struct dsc_coll *coll) {
    static const dsc__shm_stage stages[] = {scatter_publish, scatter_reduce};
    struct dsc__shm_route r = dsc__shm_route_of(state, coll, dsc__shm_bytes_of(coll), true);
    if (r.n_bytes * (size_t)r.shm->size <= DSC__SHM_SMALL) {
        reduce_small(state, coll, (size_t)r.shm->rank * r.n_bytes);
        return DSC_OK;
    }
    return dsc__shm_travel(&r, stages, 2);
}

/* ---- all_gather ---- */

/* Publishes a chunk and, while it is in the cache, puts it into the own part of dst. */
static void gather_publish(route *r, size_t index) {
    size_t n = dsc__shm_length_at(r, r->n_bytes, index), place = index * r->chunk;
    const char *src = (const char *)r->coll->src + place;
    char *own = (char *)r->coll->dst + (size_t)r->shm->rank * r->n_bytes + place;
    memcpy(dsc__shm_in(r, r->shm->rank, index), src, n);
    if (own != src)
        dsc__shm_put(own, src, n, r->n_bytes * (size_t)r->shm->size);
}

static void gather_collect(route *r, size_t index) {
    for (int k = 0; k < r->shm->size; k++)
        if (k != r->shm->rank)
            dsc__shm_put((char *)r->coll->dst + (size_t)k * r->n_bytes + index * r->chunk,
                         dsc__shm_in(r, k, index), dsc__shm_length_at(r, r->n_bytes, index),
                         r->n_bytes * (size_t)r->shm->size);
}

enum dsc_status dsc__shm_all_gather(void *state, const struct dsc_coll *coll) {
    static const dsc__shm_stage stages[] = {gather_publish, gather_collect};
    struct dsc__shm_route r = dsc__shm_route_of(state, coll, dsc__shm_bytes_of(coll), false);
    if (r.n_bytes > DSC__SHM_SMALL)
        return dsc__shm_travel(&r, stages, 2);
    for (int k = 0; k < r.shm->size; k++)
        memcpy((char *)coll->dst + (size_t)k * r.n_bytes, dsc__shm_small(r.shm, k), r.n_bytes);
    return DSC_OK;
}

/* ---- broadcast ---- */

static void broadcast_publish(route *r, size_t index) {
    if (r->shm->rank == r->coll->root)
        memcpy(dsc__shm_in(r, r->coll->root, index), (char *)r->coll->dst + index * r->chunk,
               dsc__shm_length_at(r, r->n_bytes, index));
}

static void broadcast_take(route *r, size_t index) {
    if (r->shm->rank != r->coll->root)
        memcpy((char *)r->coll->dst + index * r->chunk, dsc__shm_in(r, r->coll->root, index),
               dsc__shm_length_at(r, r->n_bytes, index));
}

enum dsc_status dsc__shm_broadcast(void *state, const struct dsc_coll *coll) {
    static const dsc__shm_stage stages[] = {broadcast_publish, broadcast_take};
    struct dsc__shm_route r = dsc__shm_route_of(state, coll, dsc__shm_bytes_of(coll), false);
    if (r.n_bytes > DSC__SHM_SMALL)
        return dsc__shm_travel(&r, stages, 2);
    if (r.shm->rank != coll->root)
        memcpy(coll->dst, dsc__shm_small(r.shm, coll->root), r.n_bytes);
    return DSC_OK;
}
