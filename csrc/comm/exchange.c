/* Exchanges of parts of any lengths: all_to_all, and the engine's sums in parts.
 *
 * Decides: how lengths are compared: everybody gathers everybody's counts, so that all ranks find
 * the same contradiction. Invariant: as in comm.c, no data moves before the lengths agree (those of
 * part_sums follow from what was agreed on before). */
#include "backend.h"

#include "../alloc.h"

#include <string.h>

/* counts: per rank, its n_send and then its n_recv. The first pair that disagrees, in rank order,
 * so that every rank names the same one. */
static enum dsc_status compare_counts(const uint64_t *counts, size_t size, size_t *n_max) {
    size_t longest = 0;
    for (size_t from = 0; from < size; from++)
        for (size_t to = 0; to < size; to++) {
            uint64_t sent = counts[2 * size * from + to];
            uint64_t expected = counts[2 * size * to + size + from];
            if (sent != expected)
                return DSC_FAIL(DSC_EDIVERGED,
                                "all_to_all with splits: rank %zu sends %llu elements to rank %zu, "
                                "which expects %llu",
                                from, (unsigned long long)sent, to, (unsigned long long)expected);
            longest = dsc_max(longest, (size_t)sent);
        }
    *n_max = longest;
    return DSC_OK;
}

/* Agreement, the ranks' counts, then the data. */
static enum dsc_status exchange(struct dsc_comm *comm, const struct dsc_coll *coll,
                                struct dsc__parts *parts, uint64_t *counts) {
    size_t size = (size_t)comm->size;
    uint64_t *mine = counts + 2 * size * size;
    for (size_t r = 0; r < size; r++) {
        mine[r] = parts->n_send[r];
        mine[size + r] = parts->n_recv[r];
    }
    struct dsc_coll lengths = {
        .src = mine, .dst = counts, .n_elems = 2 * size, .dtype = DSC_I64, .label = coll->label};
    struct dsc__print print = dsc__print_of(comm, DSC_COMM_ALL_TO_ALL_V, coll->label);
    print.dtype = coll->dtype;
    DSC_TRY(dsc__agree(comm, &print, mine, 2 * size * sizeof *mine));
    DSC_TRY(comm->backend->all_gather(comm->state, &lengths));
    DSC_TRY(compare_counts(counts, size, &parts->n_max));
    return parts->n_max > 0 ? comm->backend->all_to_all_v(comm->state, coll, parts) : DSC_OK;
}

/* What was agreed on as a whole includes the counts. */
static enum dsc_status covered_exchange(struct dsc_comm *comm, const struct dsc_coll *coll,
                                        struct dsc__parts *parts) {
    struct dsc__print print = dsc__print_of(comm, DSC_COMM_ALL_TO_ALL_V, coll->label);
    parts->n_max = coll->n_elems;
    DSC_TRY(dsc__enter(comm));
    enum dsc_status status = dsc__agree(comm, &print, NULL, 0);
    if (status == DSC_OK && parts->n_max > 0)
        status = comm->backend->all_to_all_v(comm->state, coll, parts);
    return dsc__leave(comm, status);
}

enum dsc_status dsc_comm_all_to_all_v(struct dsc_comm *comm, const struct dsc_coll *coll,
                                      const size_t *n_send, const size_t *n_recv) {
    size_t size = (size_t)comm->size, n_in = 0, n_out = 0;
    struct dsc__parts parts = {.n_send = n_send, .n_recv = n_recv};
    void *counts = NULL;
    for (size_t r = 0; r < size; r++) {
        if (n_send[r] > PTRDIFF_MAX / 8 - n_in || n_recv[r] > PTRDIFF_MAX / 8 - n_out)
            return DSC_FAIL(DSC_EINVAL, "all_to_all: the splits exceed the address space");
        n_in += n_send[r];
        n_out += n_recv[r];
    }
    DSC_TRY(dsc__check_pair(comm, "all_to_all", coll, n_in, n_out));
    if (comm->covered && comm->backend->agrees_by_message)
        return covered_exchange(comm, coll, &parts);
    DSC_TRY(dsc_alloc(2 * size * (size + 1) * sizeof(uint64_t), &counts));
    enum dsc_status status = dsc__enter(comm);
    if (status == DSC_OK)
        status = dsc__leave(comm, exchange(comm, coll, &parts, counts));
    dsc_free(counts);
    return status;
}

/* ---- sums in parts ---- */

int dsc_comm_n_parts(const struct dsc_comm *comm) {
    return comm->backend->n_parts ? comm->backend->n_parts(comm->state) : comm->size;
}

enum dsc_dtype dsc_comm_part_dtype(const struct dsc_comm *comm, enum dsc_dtype dtype) {
    return dsc_comm_n_parts(comm) < comm->size ? dsc__sum_dtype(dtype) : dtype;
}

/* Every rank's contribution is a part. */
static enum dsc_status exchange_parts(struct dsc_comm *comm, const struct dsc_coll *coll,
                                      const size_t *n_send, size_t n_mine) {
    size_t *n_recv = NULL;
    DSC_TRY(dsc_alloc((size_t)comm->size * sizeof *n_recv, (void **)&n_recv));
    for (int r = 0; r < comm->size; r++)
        n_recv[r] = n_mine;
    struct dsc__parts parts = {.n_send = n_send, .n_recv = n_recv, .n_max = coll->n_elems};
    enum dsc_status status = comm->backend->all_to_all_v(comm->state, coll, &parts);
    dsc_free(n_recv);
    return status;
}

enum dsc_status dsc_comm_part_sums(struct dsc_comm *comm, const struct dsc_coll *coll,
                                   const size_t *n_send, size_t n_mine) {
    size_t n_src = 0, n_parts = (size_t)dsc_comm_n_parts(comm);
    size_t width = dsc_dtype_size(dsc_comm_part_dtype(comm, coll->dtype));
    struct dsc__print print = dsc__print_of(comm, DSC_COMM_PART_SUMS, coll->label);
    for (int r = 0; r < comm->size; r++)
        n_src += n_send[r];
    DSC_TRY(dsc__check_pair(comm, "part_sums", coll, n_src,
                            n_parts * n_mine * width / dsc_dtype_size(coll->dtype)));
    print.n_elems = coll->n_elems;
    print.dtype = coll->dtype;
    DSC_TRY(dsc__enter(comm));
    enum dsc_status status = dsc__agree(comm, &print, NULL, 0);
    if (status == DSC_OK && coll->n_elems > 0)
        status = comm->backend->part_sums
                     ? comm->backend->part_sums(comm->state, coll, n_send, n_mine)
                     : exchange_parts(comm, coll, n_send, n_mine);
    return dsc__leave(comm, status);
}
