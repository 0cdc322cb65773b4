/* How bytes move between ranks of one node where one rank is the root, or every pair has a part of
 * its own.
 *
 * Decides: the stages of reduce, gather, scatter and all_to_all, whose chunks travel as
 * shm_travel.c says. Invariant: as in shm_coll.c, sums are taken in rank order from the same
 * inputs, and small operations end with the agreement. */
#include "shm.h"

#include <string.h>

typedef const struct dsc__shm_route route;

static bool is_root(route *r) {
    return r->shm->rank == r->coll->root;
}

/* ---- to the root ---- */

static void publish_to_root(route *r, size_t index) {
    if (!is_root(r))
        memcpy(dsc__shm_in(r, r->shm->rank, index), (const char *)r->coll->src + index * r->chunk,
               dsc__shm_length_at(r, r->n_bytes, index));
}

static void reduce_at_root(route *r, size_t index) {
    struct dsc__shm *shm = r->shm;
    size_t n = dsc__shm_length_at(r, r->n_bytes, index) / dsc_dtype_size(r->coll->dtype);
    size_t place = index * r->chunk;
    if (!is_root(r))
        return;
    for (int k = 0; k < shm->size; k++)
        shm->sources[k] =
            k == shm->rank ? (const char *)r->coll->src + place : dsc__shm_in(r, k, index);
    dsc__reduce((char *)r->coll->dst + place, shm->sources, shm->size, n, r->coll->dtype,
                r->coll->op, r->n_bytes >= DSC__STREAM_FROM && r->coll->src != r->coll->dst);
}

enum dsc_status dsc__shm_reduce(void *state, const struct dsc_coll *coll) {
    static const dsc__shm_stage stages[] = {publish_to_root, reduce_at_root};
    struct dsc__shm_route r = dsc__shm_route_of(state, coll, dsc__shm_bytes_of(coll), false);
    struct dsc__shm *shm = state;
    if (r.n_bytes > DSC__SHM_SMALL)
        return dsc__shm_travel(&r, stages, 2);
    if (!is_root(&r))
        return DSC_OK;
    for (int k = 0; k < shm->size; k++)
        shm->sources[k] = dsc__shm_small(shm, k);
    dsc__reduce(coll->dst, shm->sources, shm->size, coll->n_elems, coll->dtype, coll->op, false);
    return DSC_OK;
}

static void collect_at_root(route *r, size_t index) {
    size_t n = dsc__shm_length_at(r, r->n_bytes, index), place = index * r->chunk;
    for (int k = 0; is_root(r) && k < r->shm->size; k++)
        dsc__shm_put((char *)r->coll->dst + (size_t)k * r->n_bytes + place,
                     k == r->shm->rank ? (const char *)r->coll->src + place
                                       : dsc__shm_in(r, k, index),
                     n, r->n_bytes);
}

enum dsc_status dsc__shm_gather(void *state, const struct dsc_coll *coll) {
    static const dsc__shm_stage stages[] = {publish_to_root, collect_at_root};
    struct dsc__shm_route r = dsc__shm_route_of(state, coll, dsc__shm_bytes_of(coll), false);
    if (r.n_bytes > DSC__SHM_SMALL)
        return dsc__shm_travel(&r, stages, 2);
    for (int k = 0; is_root(&r) && k < r.shm->size; k++)
        memcpy((char *)coll->dst + (size_t)k * r.n_bytes, dsc__shm_small(r.shm, k), r.n_bytes);
    return DSC_OK;
}

/* ---- from the root ---- */

static void publish_parts_of_root(route *r, size_t index) {
    size_t n = dsc__shm_length_at(r, r->n_bytes, index);
    for (int k = 0; is_root(r) && k < r->shm->size; k++) {
        const char *src = (const char *)r->coll->src + (size_t)k * r->n_bytes + index * r->chunk;
        if (k != r->shm->rank)
            memcpy(dsc__shm_in_for(r, r->shm->rank, k, index), src, n);
        else
            dsc__shm_put((char *)r->coll->dst + index * r->chunk, src, n, r->n_bytes);
    }
}

static void take_part_of_root(route *r, size_t index) {
    if (!is_root(r))
        dsc__shm_put((char *)r->coll->dst + index * r->chunk,
                     dsc__shm_in_for(r, r->coll->root, r->shm->rank, index),
                     dsc__shm_length_at(r, r->n_bytes, index), r->n_bytes);
}

enum dsc_status dsc__shm_scatter(void *state, const struct dsc_coll *coll) {
    static const dsc__shm_stage stages[] = {publish_parts_of_root, take_part_of_root};
    struct dsc__shm_route r = dsc__shm_route_of(state, coll, dsc__shm_bytes_of(coll), true);
    if (r.n_bytes * (size_t)r.shm->size > DSC__SHM_SMALL)
        return dsc__shm_travel(&r, stages, 2);
    memcpy(coll->dst, dsc__shm_small(r.shm, coll->root) + (size_t)r.shm->rank * r.n_bytes,
           r.n_bytes);
    return DSC_OK;
}

/* ---- every pair ---- */

static size_t part_length(route *r, const size_t *counts, int rank) {
    return counts ? counts[rank] * dsc_dtype_size(r->coll->dtype) : r->n_bytes;
}

static void publish_parts(route *r, size_t index) {
    const size_t *counts = r->parts ? r->parts->n_send : NULL;
    const char *part = r->coll->src;
    int me = r->shm->rank;
    for (int k = 0; k < r->shm->size; k++) {
        size_t n = dsc__shm_length_at(r, part_length(r, counts, k), index);
        if (k != me && n > 0)
            memcpy(dsc__shm_in_for(r, me, k, index), part + index * r->chunk, n);
        part += part_length(r, counts, k);
    }
}

/* The own part goes from input to output directly, a chunk with each chunk of the others. */
static void take_parts(route *r, size_t index) {
    const size_t *counts = r->parts ? r->parts->n_recv : NULL;
    const char *own = r->coll->src;
    char *part = r->coll->dst;
    int me = r->shm->rank;
    for (int k = 0; k < me; k++)
        own += part_length(r, r->parts ? r->parts->n_send : NULL, k);
    for (int k = 0; k < r->shm->size; k++) {
        size_t n = dsc__shm_length_at(r, part_length(r, counts, k), index);
        const char *from = own + index * r->chunk;
        if (k != me)
            from = dsc__shm_in_for(r, k, me, index);
        if (n > 0)
            dsc__shm_put(part + index * r->chunk, from, n, r->n_bytes);
        part += part_length(r, counts, k);
    }
}

static const dsc__shm_stage all_to_all_stages[] = {publish_parts, take_parts};

enum dsc_status dsc__shm_all_to_all(void *state, const struct dsc_coll *coll) {
    struct dsc__shm_route r = dsc__shm_route_of(state, coll, dsc__shm_bytes_of(coll), true);
    if (r.n_bytes * (size_t)r.shm->size > DSC__SHM_SMALL)
        return dsc__shm_travel(&r, all_to_all_stages, 2);
    for (int k = 0; k < r.shm->size; k++)
        memcpy((char *)coll->dst + (size_t)k * r.n_bytes,
               dsc__shm_small(r.shm, k) + (size_t)r.shm->rank * r.n_bytes, r.n_bytes);
    return DSC_OK;
}

/* The counts filled the agreement's payload, so even small parts go by chunks. These are the first
 * that travel since the agreement, because the counts of any world did not. */
_Static_assert(2 * sizeof(uint64_t) * DSC__SHM_RANKS_MAX <= DSC__SHM_SMALL, "see exchange.c");
enum dsc_status dsc__shm_all_to_all_v(void *state, const struct dsc_coll *coll,
                                      const struct dsc__parts *parts) {
    size_t n_bytes = parts->n_max * dsc_dtype_size(coll->dtype);
    struct dsc__shm_route r = dsc__shm_route_of(state, coll, n_bytes, true);
    r.parts = parts;
    return dsc__shm_travel(&r, all_to_all_stages, 2);
}
