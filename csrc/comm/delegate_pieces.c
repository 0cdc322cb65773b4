/* Gathering pieces over a delegate: strands travel in exchanges, chunk by chunk.
 *
 * Decides: that every rank sends its strand to each other one, and as many bytes as it has: with
 * strands of very different lengths, as a layer that one rank holds has them, equal parts would
 * carry padding of the longest. While one chunk travels the next is read and the one before is
 * stored. Invariant: all ranks walk the same chunks. */
#include "delegate_impl.h"

#include <string.h>

enum { ALIGN = 64 };

static size_t cut(size_t n, size_t at, size_t step) {
    return dsc__delegate_cut(n, at, step);
}

void dsc__delegate_copies(struct dsc__strands *strands, char *to, size_t n, int size) {
    dsc__strand_read(strands, to, n);
    for (size_t i = 1; n > 0 && i + 1 < (size_t)size; i++)
        memcpy(to + i * n, to, n);
}

static struct dsc_move move_of(struct dsc__delegate *d, const struct dsc__strands *strands,
                               size_t k, size_t step) {
    int rank = d->comm->rank, size = d->comm->size;
    for (int r = 0; r < size; r++) {
        d->counts[r] = r == rank ? 0 : cut(strands->own.n_bytes, k * step, step);
        d->counts[size + r] = r == rank ? 0 : cut(strands->of[r].n_bytes, k * step, step);
    }
    return (struct dsc_move){.kind = DSC_MOVE_EXCHANGE,
                             .src = dsc__delegate_send_area(d, k),
                             .dst = dsc__delegate_fill_area(d, k),
                             .n_send = d->counts,
                             .n_recv = d->counts + size};
}

static void store(struct dsc__delegate *d, struct dsc__strands *strands, size_t k, size_t step) {
    const char *from = d->ops.staging + dsc__delegate_fill_area(d, k);
    for (int r = 0; r < d->comm->size; r++) {
        size_t n = r == d->comm->rank ? 0 : cut(strands->of[r].n_bytes, k * step, step);
        dsc__strand_write(strands, r, from, n);
        from += n;
    }
}

enum dsc_status dsc__delegate_gather_pieces(void *state, struct dsc__strands *strands) {
    struct dsc__delegate *d = state;
    if (d->nodes)
        return dsc__nodes_gather_pieces(d, strands);
    size_t step = d->area / (size_t)d->comm->size / ALIGN * ALIGN;
    size_t n_chunks = (strands->n_max + step - 1) / step;
    for (size_t k = 0; k <= n_chunks; k++) {
        if (k < n_chunks)
            dsc__delegate_copies(strands, d->ops.staging + dsc__delegate_send_area(d, k),
                                 cut(strands->own.n_bytes, k * step, step), d->comm->size);
        if (k > 0)
            DSC_TRY(dsc__delegate_finish(d));
        if (k < n_chunks) {
            struct dsc_move move = move_of(d, strands, k, step);
            DSC_TRY(dsc__delegate_start(d, d->ops.context, &move));
        }
        if (k > 0)
            store(d, strands, k - 1, step);
    }
    return DSC_OK;
}
