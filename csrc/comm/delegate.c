/* Collectives over a delegate (delegate.h): everything is a walk over chunks that fit the staging.
 *
 * Decides: which moves an operation becomes. While one chunk travels, the next is packed and the
 * one before is used. Sums are taken here, by dsc__reduce in rank order, never by the delegate.
 * Invariant: all ranks walk the same chunks, which depend on arguments that were agreed on. No
 * thread of its own: the caller starts a move, and waits for it in slices (delegate_watch.c). */
#define _GNU_SOURCE
#include "delegate_impl.h"

#include "../alloc.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* Up to here an all_reduce is one gathering of everything. */
enum { SMALL_BYTES = 64 * 1024, ALIGN = 64 };

static size_t send_area(const struct dsc__delegate *d, size_t chunk) {
    return dsc__delegate_send_area(d, chunk);
}

static size_t fill_area(const struct dsc__delegate *d, size_t chunk) {
    return dsc__delegate_fill_area(d, chunk);
}

static size_t cut(size_t n, size_t at, size_t step) {
    return dsc__delegate_cut(n, at, step);
}

enum dsc_status dsc__delegate_start(struct dsc__delegate *d, void *context,
                                    const struct dsc_move *move) {
    d->moving = context;
    enum dsc_status status = d->ops.start(context, move);
    return status == DSC_OK ? DSC_OK : dsc__delegate_lost(d, status);
}

static enum dsc_status start(struct dsc__delegate *d, const struct dsc_move *move) {
    return dsc__delegate_start(d, d->ops.context, move);
}

static enum dsc_status run_move(struct dsc__delegate *d, const struct dsc_move *move) {
    DSC_TRY(start(d, move));
    return dsc__delegate_finish(d);
}

/* ---- agreement ---- */

static enum dsc_status gather(struct dsc__delegate *d, const void *mine, size_t n_bytes,
                              void *all) {
    struct dsc_move move = {
        .kind = DSC_MOVE_GATHER, .src = 0, .dst = fill_area(d, 0), .n_bytes = n_bytes};
    memcpy(d->ops.staging, mine, n_bytes);
    DSC_TRY(run_move(d, &move));
    memcpy(all, d->ops.staging + move.dst, (size_t)d->comm->size * n_bytes);
    return DSC_OK;
}

/* The least h and the least ~h, that is the greatest h, are both this rank's only where all are
 * equal. What differs travels only if something does. */
static enum dsc_status agree(void *state, const struct dsc__print *mine, const void *payload,
                             size_t n_payload) {
    struct dsc__delegate *d = state;
    int64_t hash = (int64_t)dsc_hash(DSC_HASH_START, mine, sizeof *mine), least[2] = {hash, ~hash};
    struct dsc_move move = {
        .kind = DSC_MOVE_MINIMUM, .dst = fill_area(d, 0), .n_bytes = sizeof least};
    d->current = *mine;
    d->differ = false;
    memcpy(d->ops.staging + move.dst, least, sizeof least);
    DSC_TRY(run_move(d, &move));
    memcpy(least, d->ops.staging + move.dst, sizeof least);
    if (least[0] != hash || least[1] != ~hash) {
        d->differ = true;
        return gather(d, mine, sizeof *mine, d->prints);
    }
    d->n_payload = mine->op == DSC_COMM_MEET ? n_payload : 0;
    return d->n_payload > 0 ? gather(d, payload, n_payload, d->payloads) : DSC_OK;
}

static void print_of(void *state, int rank, struct dsc__print *out) {
    const struct dsc__delegate *d = state;
    *out = d->differ ? d->prints[rank] : d->current;
}

static const void *payload_of(void *state, int rank) {
    const struct dsc__delegate *d = state;
    return d->payloads + (size_t)rank * d->n_payload;
}

/* ---- walking chunks ---- */

struct walk {
    struct dsc__delegate *d;
    const struct dsc_coll *coll;
    const struct dsc__delegate_part *parts; /* exchanges: per rank */
    enum dsc_move_kind kind;
    size_t n_elems; /* the longest part; equal on all ranks */
    size_t step;    /* elements of a part in one chunk */
    size_t elem_size;
    bool combines; /* what arrives is combined instead of stored */
};

/* Fills chunk k's staging, and says how it moves. */
static void pack(const struct walk *w, size_t k, char *to) {
    const char *src = w->coll->src;
    size_t at = k * w->step, es = w->elem_size;
    if (w->kind != DSC_MOVE_EXCHANGE) {
        memcpy(to, src + at * es, cut(w->n_elems, at, w->step) * es);
        return;
    }
    for (int r = 0; r < w->d->comm->size; r++) {
        size_t n_bytes = cut(w->parts[r].n_send, at, w->step) * es;
        if (n_bytes > 0)
            memcpy(to, src + (w->parts[r].send_at + at) * es, n_bytes);
        to += n_bytes;
    }
}

static struct dsc_move move_of(const struct walk *w, size_t k) {
    struct dsc__delegate *d = w->d;
    size_t at = k * w->step, size = (size_t)d->comm->size;
    struct dsc_move move = {.kind = w->kind,
                            .src = send_area(d, k),
                            .dst = fill_area(d, k),
                            .n_bytes = cut(w->n_elems, at, w->step) * w->elem_size,
                            .n_send = d->counts,
                            .n_recv = d->counts + size,
                            .root = w->coll->root};
    for (size_t r = 0; w->kind == DSC_MOVE_EXCHANGE && r < size; r++) {
        d->counts[r] = cut(w->parts[r].n_send, at, w->step) * w->elem_size;
        d->counts[size + r] = cut(w->parts[r].n_fill, at, w->step) * w->elem_size;
    }
    return move;
}

/* Where an exchange brings one part per rank, all of the same length. */
static void combine(const struct walk *w, size_t at, const char *from) {
    struct dsc__delegate *d = w->d;
    const struct dsc_coll *coll = w->coll;
    size_t n = cut(w->parts[0].n_fill, at, w->step);
    for (int r = 0; r < d->comm->size; r++)
        d->srcs[r] = from + (size_t)r * n * w->elem_size;
    dsc__reduce((char *)coll->dst + at * w->elem_size, d->srcs, d->comm->size, n, coll->dtype,
                coll->op, false);
}

static void take(const struct walk *w, size_t k, const char *from) {
    size_t at = k * w->step, es = w->elem_size;
    char *dst = w->coll->dst;
    if (w->combines) {
        combine(w, at, from);
        return;
    }
    if (w->kind == DSC_MOVE_BROADCAST) {
        memcpy(dst + at * es, from, cut(w->n_elems, at, w->step) * es);
        return;
    }
    for (int r = 0; r < w->d->comm->size; r++) {
        size_t n = w->kind == DSC_MOVE_GATHER ? w->n_elems : w->parts[r].n_fill;
        size_t fill_at = w->kind == DSC_MOVE_GATHER ? (size_t)r * n : w->parts[r].fill_at;
        size_t n_bytes = cut(n, at, w->step) * es;
        if (n_bytes > 0)
            memcpy(dst + (fill_at + at) * es, from, n_bytes);
        from += n_bytes;
    }
}

static enum dsc_status walk(struct walk *w) {
    struct dsc__delegate *d = w->d;
    bool is_broadcast = w->kind == DSC_MOVE_BROADCAST;
    bool is_root = d->comm->rank == w->coll->root;
    w->elem_size = dsc_dtype_size(w->coll->dtype);
    size_t room = is_broadcast ? d->area : d->area / (size_t)d->comm->size;
    w->step = dsc_max(room / ALIGN * ALIGN, ALIGN) / w->elem_size;
    size_t n_chunks = (w->n_elems + w->step - 1) / w->step;
    for (size_t k = 0; k <= n_chunks; k++) {
        if (k < n_chunks && (!is_broadcast || is_root))
            pack(w, k, d->ops.staging + (is_broadcast ? fill_area(d, k) : send_area(d, k)));
        if (k > 0)
            DSC_TRY(dsc__delegate_finish(d));
        if (k < n_chunks) {
            struct dsc_move move = move_of(w, k);
            DSC_TRY(start(d, &move));
        }
        if (k > 0 && !(is_broadcast && is_root))
            take(w, k - 1, d->ops.staging + fill_area(d, k - 1));
    }
    return DSC_OK;
}

/* ---- operations ---- */

/* Every rank's part r is for rank r. */
static struct walk exchange_of(struct dsc__delegate *d, const struct dsc_coll *coll) {
    for (size_t r = 0; r < (size_t)d->comm->size; r++)
        d->parts[r] = (struct dsc__delegate_part){r * coll->n_elems, coll->n_elems,
                                                  r * coll->n_elems, coll->n_elems};
    return (struct walk){.d = d,
                         .coll = coll,
                         .parts = d->parts,
                         .kind = DSC_MOVE_EXCHANGE,
                         .n_elems = coll->n_elems};
}

static enum dsc_status all_to_all(void *state, const struct dsc_coll *coll) {
    struct walk w = exchange_of(state, coll);
    return walk(&w);
}

static enum dsc_status all_to_all_v(void *state, const struct dsc_coll *coll,
                                    const struct dsc__parts *parts) {
    struct dsc__delegate *d = state;
    struct walk w = exchange_of(d, coll);
    size_t send_at = 0, fill_at = 0;
    for (int r = 0; r < d->comm->size; r++) {
        d->parts[r] =
            (struct dsc__delegate_part){send_at, parts->n_send[r], fill_at, parts->n_recv[r]};
        send_at += parts->n_send[r];
        fill_at += parts->n_recv[r];
    }
    w.n_elems = parts->n_max;
    return walk(&w);
}

static int n_parts(void *state) {
    const struct dsc__delegate *d = state;
    return d->nodes ? dsc__nodes_count(d->nodes) : d->comm->size;
}

/* Without nodes every rank's contribution is a part. */
static enum dsc_status part_sums(void *state, const struct dsc_coll *coll, const size_t *n_send,
                                 size_t n_mine) {
    struct dsc__delegate *d = state;
    if (d->nodes)
        return dsc__nodes_part_sums(d, coll, n_send, n_mine);
    struct walk w = exchange_of(d, coll);
    size_t send_at = 0;
    for (int r = 0; r < d->comm->size; r++) {
        d->parts[r] = (struct dsc__delegate_part){send_at, n_send[r], (size_t)r * n_mine, n_mine};
        send_at += n_send[r];
    }
    return walk(&w);
}

static enum dsc_status reduce_scatter(void *state, const struct dsc_coll *coll) {
    if (((struct dsc__delegate *)state)->nodes)
        return dsc__nodes_reduce_scatter(state, coll);
    struct walk w = exchange_of(state, coll);
    w.combines = true;
    return walk(&w);
}

/* Everybody's src to the root: part r of what it gets is rank r's. */
static struct walk to_root(struct dsc__delegate *d, const struct dsc_coll *coll) {
    struct walk w = exchange_of(d, coll);
    for (int r = 0; r < d->comm->size; r++) {
        d->parts[r].send_at = 0;
        d->parts[r].n_send = r == coll->root ? coll->n_elems : 0;
        d->parts[r].n_fill = d->comm->rank == coll->root ? coll->n_elems : 0;
    }
    return w;
}

static enum dsc_status gather_to_root(void *state, const struct dsc_coll *coll) {
    struct walk w = to_root(state, coll);
    return walk(&w);
}

static enum dsc_status reduce(void *state, const struct dsc_coll *coll) {
    if (((struct dsc__delegate *)state)->nodes)
        return dsc__nodes_reduce(state, coll);
    struct walk w = to_root(state, coll);
    w.combines = true;
    return walk(&w);
}

static enum dsc_status scatter(void *state, const struct dsc_coll *coll) {
    struct dsc__delegate *d = state;
    struct walk w = exchange_of(d, coll);
    for (int r = 0; r < d->comm->size; r++) {
        d->parts[r].n_send = d->comm->rank == coll->root ? coll->n_elems : 0;
        d->parts[r].fill_at = 0;
        d->parts[r].n_fill = r == coll->root ? coll->n_elems : 0;
    }
    return walk(&w);
}

static enum dsc_status all_gather(void *state, const struct dsc_coll *coll) {
    if (((struct dsc__delegate *)state)->nodes)
        return dsc__nodes_all_gather(state, coll);
    struct walk w = {.d = state, .coll = coll, .kind = DSC_MOVE_GATHER, .n_elems = coll->n_elems};
    return walk(&w);
}

static enum dsc_status broadcast(void *state, const struct dsc_coll *coll) {
    if (((struct dsc__delegate *)state)->nodes)
        return dsc__nodes_broadcast(state, coll);
    struct dsc_coll in_place = *coll;
    in_place.src = coll->dst;
    struct walk w = {
        .d = state, .coll = &in_place, .kind = DSC_MOVE_BROADCAST, .n_elems = coll->n_elems};
    return walk(&w);
}

static enum dsc_status all_reduce_small(struct dsc__delegate *d, const struct dsc_coll *coll) {
    size_t n_bytes = coll->n_elems * dsc_dtype_size(coll->dtype);
    struct dsc_move move = {
        .kind = DSC_MOVE_GATHER, .src = 0, .dst = fill_area(d, 0), .n_bytes = n_bytes};
    memcpy(d->ops.staging, coll->src, n_bytes);
    DSC_TRY(run_move(d, &move));
    if (d->nodes) {
        dsc__nodes_reduce_here(d, coll, d->ops.staging + move.dst, n_bytes);
        return DSC_OK;
    }
    for (int r = 0; r < d->comm->size; r++)
        d->srcs[r] = d->ops.staging + move.dst + (size_t)r * n_bytes;
    dsc__reduce(coll->dst, d->srcs, d->comm->size, coll->n_elems, coll->dtype, coll->op, false);
    return DSC_OK;
}

/* The tail of a long one is short on the last ranks; its parts are as long on all ranks. */
static enum dsc_status all_reduce(void *state, const struct dsc_coll *coll) {
    struct dsc__delegate *d = state;
    size_t es = dsc_dtype_size(coll->dtype), size = (size_t)d->comm->size, at = 0;
    size_t room = d->area / size / ALIGN * ALIGN;
    if (coll->n_elems * es <= dsc_min(SMALL_BYTES, room))
        return all_reduce_small(d, coll);
    if (d->nodes)
        return dsc__nodes_all_reduce(d, coll);
    while (at < coll->n_elems) {
        size_t n = dsc_min(coll->n_elems - at, size * (room / es));
        size_t part = dsc_round_up((n + size - 1) / size, ALIGN / es);
        char *mine = d->ops.staging + send_area(d, 1);
        for (size_t r = 0; r < size; r++) {
            d->counts[r] = cut(n, r * part, part) * es;
            d->counts[size + r] = cut(n, (size_t)d->comm->rank * part, part) * es;
        }
        struct dsc_move there = {.kind = DSC_MOVE_EXCHANGE,
                                 .src = send_area(d, 0),
                                 .dst = fill_area(d, 0),
                                 .n_send = d->counts,
                                 .n_recv = d->counts + size};
        struct dsc_move back = {.kind = DSC_MOVE_GATHER,
                                .src = send_area(d, 1),
                                .dst = fill_area(d, 1),
                                .n_bytes = part * es};
        memcpy(d->ops.staging + there.src, (const char *)coll->src + at * es, n * es);
        DSC_TRY(run_move(d, &there));
        size_t n_mine = d->counts[size] / es;
        for (size_t r = 0; r < size; r++)
            d->srcs[r] = d->ops.staging + there.dst + r * n_mine * es;
        dsc__reduce(mine, d->srcs, d->comm->size, n_mine, coll->dtype, coll->op, false);
        DSC_TRY(run_move(d, &back));
        memcpy((char *)coll->dst + at * es, d->ops.staging + back.dst, n * es);
        at += n;
    }
    return DSC_OK;
}

/* ---- life ---- */

static void halt(void *state) {
    struct dsc__delegate *d = state;
    if (d->mail)
        dsc__mail_finish(d->mail);
}

static void leave(void *state) {
    struct dsc__delegate *d = state;
    if (d->left)
        return;
    d->left = true;
    halt(d);
    dsc__delegate_tell(d, "left", false, DSC_EDEAD, "it closed its communicator");
    if (d->nodes)
        dsc__nodes_leave(d);
    d->ops.leave(d->ops.context);
}

static void give_up(void *state, enum dsc_status status, const char *reason) {
    struct dsc__delegate *d = state;
    if (d->mail)
        dsc__mail_break(d->mail, status, reason);
    dsc__delegate_tell(d, "broken", true, status, reason);
    if (d->nodes)
        dsc__nodes_give_up(d, reason);
    dsc__delegate_linger(state, status, reason);
}

static void free_parts(struct dsc__delegate *d) {
    dsc_free(d->prints);
    dsc_free(d->payloads);
    dsc_free(d->counts);
    dsc_free(d->parts);
    dsc_free(d->srcs);
}

static void close_delegate(void *state) {
    struct dsc__delegate *d = state;
    leave(d);
    dsc__mail_close(d->mail);
    if (d->nodes)
        dsc__nodes_close(d);
    d->ops.release(d->ops.context);
    free_parts(d);
}

static enum dsc_status open_group(void *state, const struct dsc__group *group,
                                  struct dsc_comm **out) {
    struct dsc__delegate *d = state;
    if (d->nodes)
        return dsc__nodes_open_group(d, group, out);
    return DSC_FAIL(DSC_ENOTYET,
                    "group \"%s\": every rank of this communicator is its own node, "
                    "and it opens groups inside nodes only",
                    group->name);
}

/* The other connections are the delegate's, which knows of forks itself. */
static void forked(void *state) {
    const struct dsc__delegate *d = state;
    if (d->mail)
        dsc__mail_forked(d->mail);
}

static const struct dsc_comm_backend delegate_backend = {
    .name = "delegate",
    .state_size = sizeof(struct dsc__delegate),
    .agrees_by_message = true,
    .close = close_delegate,
    .forked = forked,
    .agree = agree,
    .print_of = print_of,
    .payload_of = payload_of,
    .all_reduce = all_reduce,
    .reduce_scatter = reduce_scatter,
    .all_gather = all_gather,
    .broadcast = broadcast,
    .reduce = reduce,
    .gather = gather_to_root,
    .scatter = scatter,
    .all_to_all = all_to_all,
    .all_to_all_v = all_to_all_v,
    .n_parts = n_parts,
    .part_sums = part_sums,
    .gather_pieces = dsc__delegate_gather_pieces,
    .open_group = open_group,
    .has_messages = dsc__delegate_has_messages,
    .message_advance = dsc__delegate_message_advance,
    .mail = dsc__delegate_mail,
    .message_wait = dsc__delegate_message_wait,
    .message_check = dsc__delegate_message_check,
    .message_drop = dsc__delegate_message_drop,
    .ring_mail = dsc__delegate_ring_mail,
    .give_up = give_up,
    .leave = leave,
    .halt = halt,
};

/* A long name keeps its beginning, and stays apart from others. */
static void name_channel(struct dsc__delegate *d, const char *name) {
    if (strlen(name) < sizeof d->channel)
        snprintf(d->channel, sizeof d->channel, "%s", name);
    else
        snprintf(d->channel, sizeof d->channel, "%.28s~%016llx", name,
                 (unsigned long long)dsc_hash(DSC_HASH_START, name, strlen(name)));
}

static enum dsc_status allocate(struct dsc__delegate *d, size_t size) {
    DSC_TRY(dsc_alloc(size * sizeof *d->prints, (void **)&d->prints));
    DSC_TRY(dsc_alloc(size * DSC_MEET_MAX, (void **)&d->payloads));
    DSC_TRY(dsc_alloc(2 * size * sizeof *d->counts, (void **)&d->counts));
    DSC_TRY(dsc_alloc(size * sizeof *d->parts, (void **)&d->parts));
    return dsc_alloc(size * sizeof *d->srcs, (void **)&d->srcs);
}

enum dsc_status dsc_comm_open_delegate(const struct dsc_comm_options *options,
                                       const struct dsc_delegate *delegate, int rank, int size,
                                       struct dsc_comm **out) {
    struct dsc_comm *comm = NULL;
    struct dsc__delegate *d = NULL;
    size_t least = dsc_round_up(dsc_max(sizeof(struct dsc__print), DSC_MEET_MAX), ALIGN);
    enum dsc_status status = DSC_OK;
    if (size < 2 || rank < 0 || rank >= size || delegate->n_staging / 4 < least * (size_t)size)
        status =
            DSC_FAIL(DSC_EINVAL,
                     "delegate: rank %d of %d with %zu bytes of staging; two ranks or more, and "
                     "%zu bytes for each, are expected",
                     rank, size, delegate->n_staging, 4 * least);
    if (status == DSC_OK)
        status = dsc__comm_new(&delegate_backend, options, rank, size, &comm);
    if (status != DSC_OK) {
        if (delegate->token)
            (void)close(delegate->listener);
        delegate->release(delegate->context);
        return status;
    }
    d = comm->state;
    d->comm = comm;
    d->ops = *delegate;
    d->moving = d->ops.context;
    name_channel(d, delegate->channel);
    d->area = delegate->n_staging / 4 / ALIGN * ALIGN;
    d->watch.seen = -1;
    if (delegate->token)
        status = dsc__mail_open(delegate->listener, delegate->token, rank, size, &d->mail);
    if (status == DSC_OK)
        status = allocate(d, (size_t)size);
    if (status != DSC_OK) {
        if (d->mail)
            dsc__mail_finish(d->mail);
        dsc__mail_close(d->mail);
        delegate->release(delegate->context);
        free_parts(d);
        dsc__comm_delete(comm);
        return status;
    }
    *out = comm;
    return DSC_OK;
}
