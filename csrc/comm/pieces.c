/* Gathering pieces: runs of bytes that lie anywhere, each of which one rank has and all get.
 *
 * Decides: that what one rank has travels as one strand of bytes, so that a gathering of many
 * pieces is one operation; and what of it is compared. Invariant: a strand is read once and stored
 * once, from front to back, straight from and to the caller's memory. */
#include "backend.h"

#include "../alloc.h"

#include <string.h>

/* ---- strands ---- */

/* The run of at most n bytes that comes next; zero at the end of a strand. */
static size_t next_run(const struct dsc_piece *pieces, struct dsc__strand *strand, size_t n) {
    while (n > 0 && strand->offset == pieces[strand->piece].n_bytes) {
        strand->piece++;
        strand->offset = 0;
    }
    return n > 0 ? dsc_min(n, pieces[strand->piece].n_bytes - strand->offset) : 0;
}

void dsc__strand_read(struct dsc__strands *strands, char *to, size_t n) {
    struct dsc__strand *strand = &strands->own;
    while (n > 0) {
        size_t run = next_run(strands->pieces, strand, n);
        memcpy(to, (const char *)strands->pieces[strand->piece].src + strand->offset, run);
        strand->offset += run;
        to += run;
        n -= run;
    }
}

void dsc__strand_write(struct dsc__strands *strands, int rank, const char *from, size_t n) {
    struct dsc__strand *strand = &strands->of[rank];
    while (n > 0) {
        size_t run = next_run(strands->pieces, strand, n);
        memcpy((char *)strands->pieces[strand->piece].dst + strand->offset, from, run);
        strand->offset += run;
        from += run;
        n -= run;
    }
}

/* ---- the operation ---- */

static enum dsc_status check(const struct dsc_comm *comm, const struct dsc_piece *pieces,
                             size_t n_pieces, size_t *n_bytes) {
    size_t total = 0;
    for (size_t i = 0; i < n_pieces; i++) {
        const struct dsc_piece *piece = &pieces[i];
        if (piece->owner < (i > 0 ? pieces[i - 1].owner : 0) || piece->owner >= comm->size)
            return DSC_FAIL(DSC_EINVAL,
                            "gather of parts: piece %zu is rank %d's; ranks of 0 to %d in "
                            "ascending order are allowed",
                            i, piece->owner, comm->size - 1);
        if (piece->n_bytes > PTRDIFF_MAX - total)
            return DSC_FAIL(DSC_EINVAL, "gather of parts: the pieces exceed the address space");
        if (piece->n_bytes > 0 && (!piece->dst || (piece->owner == comm->rank && !piece->src)))
            return DSC_FAIL(DSC_EINVAL, "gather of parts: piece %zu has no memory", i);
        total += piece->n_bytes;
    }
    *n_bytes = total;
    return DSC_OK;
}

uint64_t dsc__pieces_tag(const char *label, const struct dsc_piece *pieces, size_t n_pieces) {
    uint64_t hash = dsc_hash(DSC_HASH_START, label ? label : "", label ? strlen(label) : 0);
    for (size_t i = 0; i < n_pieces; i++) {
        uint64_t words[2] = {(uint64_t)pieces[i].owner, pieces[i].n_bytes};
        hash = dsc_hash(hash, words, sizeof words);
    }
    return hash;
}

static void begin_strands(struct dsc__strands *strands, int rank, const struct dsc_piece *pieces,
                          size_t n_pieces) {
    strands->pieces = pieces;
    for (size_t i = n_pieces; i-- > 0;) {
        struct dsc__strand *strand = &strands->of[pieces[i].owner];
        strand->piece = i;
        strand->n_bytes += pieces[i].n_bytes;
        strands->n_max = dsc_max(strands->n_max, strand->n_bytes);
    }
    strands->own = strands->of[rank];
}

static void store_own(const struct dsc_comm *comm, const struct dsc_piece *pieces,
                      size_t n_pieces) {
    for (size_t i = 0; i < n_pieces; i++)
        if (pieces[i].owner == comm->rank && pieces[i].n_bytes > 0 &&
            pieces[i].src != pieces[i].dst)
            memcpy(pieces[i].dst, pieces[i].src, pieces[i].n_bytes);
}

/* For back ends without a way of their own; what is broadcast has been agreed on. */
static enum dsc_status broadcast_pieces(struct dsc_comm *comm, const struct dsc_piece *pieces,
                                        size_t n_pieces) {
    for (size_t i = 0; i < n_pieces; i++) {
        const struct dsc_coll coll = {.dst = pieces[i].dst,
                                      .n_elems = pieces[i].n_bytes,
                                      .dtype = DSC_U8,
                                      .root = pieces[i].owner};
        DSC_TRY(dsc_comm_broadcast(comm, &coll));
    }
    return DSC_OK;
}

enum dsc_status dsc__gather_pieces(struct dsc_comm *comm, const char *label, uint64_t tag,
                                   const struct dsc_piece *pieces, size_t n_pieces) {
    struct dsc__strands *strands = NULL;
    size_t n_bytes = 0, size = (size_t)comm->size;
    struct dsc__print print = dsc__print_of(comm, DSC_COMM_GATHER_PIECES, label);
    DSC_TRY(dsc__check_usable(comm));
    DSC_TRY(check(comm, pieces, n_pieces, &n_bytes));
    DSC_TRY(dsc_alloc(sizeof *strands + size * sizeof strands->of[0], (void **)&strands));
    begin_strands(strands, comm->rank, pieces, n_pieces);
    print.tag = tag;
    print.n_elems = n_bytes;
    enum dsc_status status = dsc__enter(comm);
    if (status == DSC_OK) {
        status = dsc__agree(comm, &print, NULL, 0);
        if (status == DSC_OK)
            store_own(comm, pieces, n_pieces);
        if (status == DSC_OK && strands->n_max > 0 && comm->backend->gather_pieces)
            status = comm->backend->gather_pieces(comm->state, strands);
        status = dsc__leave(comm, status);
    }
    dsc_free(strands);
    return status == DSC_OK && !comm->backend->gather_pieces
               ? broadcast_pieces(comm, pieces, n_pieces)
               : status;
}

enum dsc_status dsc_comm_gather_pieces(struct dsc_comm *comm, const char *label,
                                       const struct dsc_piece *pieces, size_t n_pieces) {
    return dsc__gather_pieces(comm, label, dsc__pieces_tag(label, pieces, n_pieces), pieces,
                              n_pieces);
}
