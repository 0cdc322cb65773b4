/* Fingerprints as text, and their comparison.
 *
 * Decides: what people read when ranks diverge. Invariant: every rank compares with rank 0 in rank
 * order, so all ranks report the same pair in the same words. A fingerprint may come from another
 * process: its fields are bounded before they are used. */
#include "backend.h"

#include <stdio.h>
#include <string.h>

static const char *const op_names[DSC_COMM_OP_COUNT] = {
    [DSC_COMM_ALL_REDUCE] = "all_reduce",
    [DSC_COMM_REDUCE_SCATTER] = "reduce_scatter",
    [DSC_COMM_ALL_GATHER] = "all_gather",
    [DSC_COMM_BROADCAST] = "broadcast",
    [DSC_COMM_REDUCE] = "reduce",
    [DSC_COMM_GATHER] = "gather",
    [DSC_COMM_SCATTER] = "scatter",
    [DSC_COMM_ALL_TO_ALL] = "all_to_all",
    [DSC_COMM_ALL_TO_ALL_V] = "all_to_all with splits",
    [DSC_COMM_SEND] = "send",
    [DSC_COMM_RECV] = "recv",
    [DSC_COMM_BARRIER] = "barrier",
    [DSC_COMM_WINDOW] = "window",
    [DSC_COMM_PART_SUMS] = "part_sums",
    [DSC_COMM_GATHER_PIECES] = "gather of parts",
    [DSC_COMM_MEET] = "meet",
};

/* The arguments that matter for this operation, without parentheses. */
static void arguments(const struct dsc__print *p, char *text, size_t size) {
    const char *dtype = dsc_dtype_name((enum dsc_dtype)p->dtype);
    const char *reduce = dsc_op_name((enum dsc_op)p->reduce);
    unsigned long long n = p->n_elems;

    text[0] = '\0';
    switch (p->op) {
    case DSC_COMM_ALL_REDUCE:
        snprintf(text, size, "%s x %llu, %s", dtype, n, reduce);
        break;
    case DSC_COMM_REDUCE_SCATTER:
        snprintf(text, size, "%s x %llu per rank, %s", dtype, n, reduce);
        break;
    case DSC_COMM_ALL_GATHER:
    case DSC_COMM_ALL_TO_ALL:
    case DSC_COMM_PART_SUMS:
        snprintf(text, size, "%s x %llu per rank", dtype, n);
        break;
    case DSC_COMM_REDUCE:
        snprintf(text, size, "%s x %llu, %s, root %u", dtype, n, reduce, (unsigned)p->root);
        break;
    case DSC_COMM_GATHER:
    case DSC_COMM_SCATTER:
        snprintf(text, size, "%s x %llu per rank, root %u", dtype, n, (unsigned)p->root);
        break;
    case DSC_COMM_ALL_TO_ALL_V:
        snprintf(text, size, "%s", dtype);
        break;
    case DSC_COMM_SEND:
        snprintf(text, size, "%s x %llu, to rank %u, tag %llu", dtype, n, (unsigned)p->root,
                 (unsigned long long)p->tag);
        break;
    case DSC_COMM_RECV:
        snprintf(text, size, "%s x %llu, from rank %d, tag %llu", dtype, n, (int)p->root,
                 (unsigned long long)p->tag);
        break;
    case DSC_COMM_BROADCAST:
        snprintf(text, size, "%s x %llu, root %u", dtype, n, (unsigned)p->root);
        break;
    case DSC_COMM_GATHER_PIECES:
    case DSC_COMM_WINDOW:
        snprintf(text, size, "%llu bytes", n);
        break;
    case DSC_COMM_MEET:
        snprintf(text, size, "tag %llu, %llu bytes", (unsigned long long)p->tag, n);
        break;
    default:
        break;
    }
}

void dsc__print_call(const struct dsc__print *p, char text[DSC__CALL_TEXT_MAX]) {
    char args[96];
    const char *name = p->op < DSC_COMM_OP_COUNT ? op_names[p->op] : "?";

    arguments(p, args, sizeof args);
    if (p->label[0])
        snprintf(text, DSC__CALL_TEXT_MAX, "%s(%s) [%.*s]", name, args, DSC__LABEL_MAX - 1,
                 p->label);
    else
        snprintf(text, DSC__CALL_TEXT_MAX, "%s(%s)", name, args);
}

void dsc__print_operation(const struct dsc__print *p, char text[DSC__CALL_TEXT_MAX]) {
    if (p->sequence == 0) {
        snprintf(text, DSC__CALL_TEXT_MAX, "nothing yet");
        return;
    }
    dsc__print_call(p, text);
    size_t used = strlen(text);
    snprintf(text + used, DSC__CALL_TEXT_MAX - used, " as operation %llu",
             (unsigned long long)p->sequence);
}

static enum dsc_status diverged(const struct dsc__print *first, int rank,
                                const struct dsc__print *other) {
    char calls[2][DSC__CALL_TEXT_MAX];
    dsc__print_call(first, calls[0]);
    dsc__print_call(other, calls[1]);
    if (first->size != other->size)
        return DSC_FAIL(DSC_EDIVERGED,
                        "rank 0 called %s as operation %llu in a world of %u ranks while rank %d "
                        "called %s in a world of %u",
                        calls[0], (unsigned long long)first->sequence, (unsigned)first->size, rank,
                        calls[1], (unsigned)other->size);
    return DSC_FAIL(DSC_EDIVERGED, "rank 0 called %s as operation %llu while rank %d called %s",
                    calls[0], (unsigned long long)first->sequence, rank, calls[1]);
}

enum dsc_status dsc__print_compare(struct dsc_comm *comm, const struct dsc__print *mine) {
    struct dsc__print first = *mine, other;
    if (comm->rank != 0)
        comm->backend->print_of(comm->state, 0, &first);
    for (int rank = 1; rank < comm->size; rank++) {
        if (rank == comm->rank)
            other = *mine;
        else
            comm->backend->print_of(comm->state, rank, &other);
        if (memcmp(&first, &other, sizeof first) != 0)
            return diverged(&first, rank, &other);
    }
    return DSC_OK;
}
