/* How the chunks of an operation pass through memory that others see.
 *
 * Decides: cells and pace. A chunk takes the next cell of its rank's area, through all operations
 * of a channel: so a line is written again only after the whole area was, and has left the reader's
 * own cache by then (to take it out of there costs four times of what the shared cache does). An
 * operation is a number of stages; at step i a rank does its share of chunk i in the first stage,
 * of chunk i - LAG in the second, and so on, and waits only for what the others did LAG steps
 * before: nobody waits for a rank that is a little late.
 *
 * Invariant: nobody writes what somebody may still read. At step i all have ended step i - LAG, so
 * what is not read to its end yet are at most the 2 LAG chunks before; these and the next 2 LAG
 * have room in an area, of whatever two operations they are. */
#include "shm.h"

#include "../kernels/kernels.h"

#include <string.h>

enum { LAG = 4 };
_Static_assert(4 * LAG * DSC__SHM_CELL_MAX <= DSC__SHM_AREA, "see the invariant");
_Static_assert(DSC__SHM_CELL_MAX / DSC__SHM_RANKS_MAX >= 64, "a part of a cell is a cache line");

/* A quarter of what a rank publishes: it does so without a wait, and one's writing overlaps
 * another's reading. A power of 2, so that no cell crosses the end of an area. */
static size_t cell_for(size_t n_bytes, size_t n_parts) {
    size_t all = dsc_min(n_bytes, 4 * (size_t)DSC__SHM_CELL_MAX) * n_parts;
    size_t cell = DSC__SHM_CELL_MIN;
    while (cell < DSC__SHM_CELL_MAX && (4 * cell < all || cell < 64 * n_parts))
        cell *= 2;
    return cell;
}

struct dsc__shm_route dsc__shm_route_of(struct dsc__shm *shm, const struct dsc_coll *coll,
                                        size_t n_bytes, bool shared) {
    size_t n_parts = shared ? (size_t)dsc_max(shm->size - 1, 1) : 1;
    size_t cell = cell_for(n_bytes, n_parts);
    return (struct dsc__shm_route){.shm = shm,
                                   .coll = coll,
                                   .n_bytes = n_bytes,
                                   .cell = cell,
                                   .chunk = cell / n_parts / 64 * 64,
                                   .first = dsc_round_up(shm->used, cell)};
}

enum dsc_status dsc__shm_travel(const struct dsc__shm_route *r, const dsc__shm_stage *stages,
                                size_t n_stages) {
    size_t n_chunks = (r->n_bytes + r->chunk - 1) / r->chunk;
    size_t last = n_chunks - 1 + (n_stages - 1) * LAG;
    r->shm->used = r->first + n_chunks * r->cell;
    for (size_t i = 0;; i++) {
        for (size_t k = 0; k < n_stages; k++)
            if (i >= k * LAG && i - k * LAG < n_chunks)
                stages[k](r, i - k * LAG);
        if (i == last)
            return DSC_OK;
        DSC_TRY(dsc__shm_step(r->shm, LAG));
    }
}

void dsc__shm_put(void *dst, const void *src, size_t n_bytes, size_t n_whole) {
    if (n_whole >= DSC__STREAM_FROM)
        dsc__stream_copy(dst, src, n_bytes);
    else if (dst != src)
        memcpy(dst, src, n_bytes);
}
