/* Two levels: the ranks of a node add up through their window, then nodes add up over rails.
 *
 * Decides: what a rank brings to its node's window, and what to its rail, which are the ranks with
 * the same place on all nodes. A chunk of a reduction is published in the window; after one step of
 * the node each rank adds its slice of it, in rank order from +0.0 (fp32 for 16-bit floats); the
 * rails, all at the same time, exchange the slices; what nodes bring is added in node order,
 * divided and rounded once. Results for all go back through the window. As in delegate.c one chunk
 * travels while the next is prepared. What combines nothing and has no gain here stays as it is
 * there. Invariants: an area of the window is written again only after a step of the node that
 * every rank enters when it has read it; areas are counted over all operations, since covered ones
 * do not meet in between. A wait in the node sees what a wait for a move sees (delegate_watch.c).
 */
#define _GNU_SOURCE
#include "delegate_impl.h"

#include "../alloc.h"

#include <stdio.h>
#include <string.h>

enum { ALIGN = 64, SLICE_ELEMS = 64, PART_ELEMS = 16 };

struct dsc__nodes {
    struct dsc_comm *node;
    struct dsc_window *window; /* per rank two areas to publish in and two for results */
    void *rail;
    int n_nodes, n_local;
    int index, place;                /* this rank's node, and its place there */
    size_t *counts;                  /* 2 * n_nodes: bytes to and from each node */
    uint64_t n_published, n_results; /* chunks so far: their parity is the area */
    double since;                    /* of the wait that runs, and what ended it */
    enum dsc_status verdict;
    char reason[DSC__REASON_MAX];
};

int dsc__nodes_count(const struct dsc__nodes *nodes) {
    return nodes->n_nodes;
}

/* ---- a step of the node ---- */

/* dsc_interrupt_fn of the node's communicator. */
static bool look_around(void *context) {
    struct dsc__delegate *d = context;
    struct dsc__nodes *nodes = d->nodes;
    atomic_store(&nodes->node->silent, atomic_load(&d->comm->silent));
    nodes->verdict = dsc__delegate_look_around(d, nodes->since);
    if (nodes->verdict != DSC_OK)
        snprintf(nodes->reason, sizeof nodes->reason, "%s", dsc_last_error());
    return nodes->verdict != DSC_OK;
}

/* The node counts its ranks from 0: what it found out is said again by who knows the job's. */
static enum dsc_status step(struct dsc__delegate *d) {
    struct dsc__nodes *nodes = d->nodes;
    nodes->verdict = DSC_OK;
    nodes->since = dsc_comm_now();
    dsc__delegate_begin_wait(d);
    enum dsc_status status = dsc_comm_barrier(nodes->node, "inside a node");
    if (status != DSC_OK && nodes->verdict != DSC_OK)
        status = DSC_FAIL(nodes->verdict, "%s", nodes->reason);
    else if (status != DSC_OK)
        status = dsc__delegate_lost(d, status);
    dsc__delegate_end_wait(d);
    return status;
}

/* ---- walking chunks ---- */

/* An operation on its way. Chunks are counted from 0; `at` is a chunk's first element. */
struct tour {
    struct dsc__delegate *d;
    struct dsc__nodes *nodes;
    const struct dsc_coll *coll;
    size_t n_elems, step; /* of the longest part, or of the buffer; equal on all ranks */
    size_t elem_size, sum_size;
    size_t n_mine;  /* of this rank's own part, where every rank owns one (d->parts) */
    bool combines;  /* sums of nodes become a result; else they are handed over as they are */
    bool alone;     /* what arrives makes a second move, so nothing else travels meanwhile */
    bool in_flight; /* a move runs */
    struct dsc__strands *strands; /* of a gathering of pieces, in bytes; else NULL */
};

struct stops {
    void (*publish)(const struct tour *t, size_t at, char *to); /* may be NULL */
    void (*pack)(const struct tour *t, size_t at, size_t k, char *to);
    struct dsc_move (*move)(const struct tour *t, size_t at);
    enum dsc_status (*take)(const struct tour *t, size_t at, size_t k, char *from);
    void (*collect)(const struct tour *t, size_t at, size_t k); /* results; may be NULL */
};

static size_t cut(size_t n, size_t at, size_t step) {
    return dsc__delegate_cut(n, at, step);
}

static char *in_area(const struct tour *t, int place, size_t k) {
    return t->nodes->window->base[place] + ((t->nodes->n_published + k) & 1) * t->d->area;
}

static char *out_area(const struct tour *t, int place, size_t k) {
    return t->nodes->window->base[place] + (2 + ((t->nodes->n_results + k) & 1)) * t->d->area;
}

static bool is_root(const struct tour *t) {
    return t->d->comm->rank == t->coll->root;
}

static bool is_root_node(const struct tour *t) {
    return t->nodes->index == t->coll->root / t->nodes->n_local;
}

static struct tour tour_of(struct dsc__delegate *d, const struct dsc_coll *coll) {
    return (struct tour){.d = d,
                         .nodes = d->nodes,
                         .coll = coll,
                         .n_elems = coll->n_elems,
                         .elem_size = dsc_dtype_size(coll->dtype),
                         .sum_size = dsc_dtype_size(dsc__sum_dtype(coll->dtype)),
                         .combines = true};
}

static enum dsc_status finish(struct tour *t) {
    bool in_flight = t->in_flight;
    t->in_flight = false;
    return in_flight ? dsc__delegate_finish(t->d) : DSC_OK;
}

/* A slice that is empty on one rank of a rail is empty on all. */
static enum dsc_status start(struct tour *t, const struct stops *stops, size_t k) {
    struct dsc_move move = stops->move(t, k * t->step);
    move.src = dsc__delegate_send_area(t->d, k);
    move.dst = dsc__delegate_fill_area(t->d, k);
    t->in_flight = move.n_bytes > 0;
    return t->in_flight ? dsc__delegate_start(t->d, t->nodes->rail, &move) : DSC_OK;
}

static enum dsc_status take(struct tour *t, const struct stops *stops, size_t k) {
    char *from = t->d->ops.staging + dsc__delegate_fill_area(t->d, k);
    return stops->take(t, k * t->step, k, from);
}

/* One chunk further: k is published and starts, k - 1 arrives, and what arrived before is
 * collected. */
static enum dsc_status go(struct tour *t, const struct stops *stops, size_t k, size_t n_chunks) {
    bool is_here = k < n_chunks, is_next = !t->alone && k >= 1 && k - 1 < n_chunks;
    size_t lag = t->alone ? 1 : 2;
    bool collects = stops->collect && k >= lag;
    if (is_here && stops->publish)
        stops->publish(t, k * t->step, in_area(t, t->nodes->place, k));
    if ((is_here && stops->publish) || collects)
        DSC_TRY(step(t->d));
    if (collects)
        stops->collect(t, (k - lag) * t->step, k - lag);
    if (is_here)
        stops->pack(t, k * t->step, k, t->d->ops.staging + dsc__delegate_send_area(t->d, k));
    if (is_next)
        DSC_TRY(finish(t));
    if (is_here)
        DSC_TRY(start(t, stops, k));
    if (is_here && t->alone) {
        DSC_TRY(finish(t));
        return take(t, stops, k);
    }
    return is_next ? take(t, stops, k - 1) : DSC_OK;
}

static enum dsc_status travel(struct tour *t, const struct stops *stops) {
    size_t n_chunks = (t->n_elems + t->step - 1) / t->step;
    size_t n_turns = n_chunks + !t->alone + (stops->collect != NULL);
    for (size_t k = 0; k < n_turns; k++)
        DSC_TRY(go(t, stops, k, n_chunks));
    t->nodes->n_published += stops->publish ? n_chunks : 0;
    t->nodes->n_results += stops->collect ? n_chunks : 0;
    return DSC_OK;
}

/* What nodes brought, n elements each, one after the other. */
static void combine_nodes(const struct tour *t, void *dst, const char *from, size_t n) {
    struct dsc__delegate *d = t->d;
    for (int j = 0; j < t->nodes->n_nodes; j++)
        d->srcs[j] = from + (size_t)j * n * t->sum_size;
    dsc__reduce_nodes(dst, d->srcs, t->nodes->n_nodes, n, t->coll->dtype, t->coll->op,
                      d->comm->size);
}

static struct dsc_move exchange_of(const struct tour *t) {
    return (struct dsc_move){.kind = DSC_MOVE_EXCHANGE,
                             .n_send = t->nodes->counts,
                             .n_recv = t->nodes->counts + t->nodes->n_nodes};
}

/* ---- every rank owns a part: reduce_scatter, part_sums ---- */

/* What owners with this rank's place get goes to them from here: it need not be published. */
static void publish_parts(const struct tour *t, size_t at, char *to) {
    const struct dsc__nodes *nodes = t->nodes;
    const char *src = t->coll->src;
    for (int r = 0; r < t->d->comm->size; r++) {
        const struct dsc__delegate_part *part = &t->d->parts[r];
        size_t n = cut(part->n_send, at, t->step);
        if (r % nodes->n_local != nodes->place && n > 0)
            memcpy(to + (size_t)r * t->step * t->elem_size,
                   src + (part->send_at + at) * t->elem_size, n * t->elem_size);
    }
}

static void pack_parts(const struct tour *t, size_t at, size_t k, char *to) {
    const struct dsc__nodes *nodes = t->nodes;
    const char *src = t->coll->src;
    for (int r = nodes->place; r < t->d->comm->size; r += nodes->n_local) {
        const struct dsc__delegate_part *part = &t->d->parts[r];
        size_t n = cut(part->n_send, at, t->step);
        for (int q = 0; q < nodes->n_local; q++)
            t->d->srcs[q] = q == nodes->place
                                ? src + (part->send_at + at) * t->elem_size
                                : in_area(t, q, k) + (size_t)r * t->step * t->elem_size;
        dsc__reduce_ranks(to, t->d->srcs, nodes->n_local, n, t->coll->dtype, t->coll->op);
        to += n * t->sum_size;
    }
}

static struct dsc_move move_parts(const struct tour *t, size_t at) {
    struct dsc__nodes *nodes = t->nodes;
    struct dsc_move move = exchange_of(t);
    move.n_bytes = cut(t->n_elems, at, t->step) * t->sum_size;
    for (int j = 0; j < nodes->n_nodes; j++) {
        const struct dsc__delegate_part *part = &t->d->parts[j * nodes->n_local + nodes->place];
        nodes->counts[j] = cut(part->n_send, at, t->step) * t->sum_size;
        nodes->counts[nodes->n_nodes + j] = cut(t->n_mine, at, t->step) * t->sum_size;
    }
    return move;
}

static enum dsc_status take_part(const struct tour *t, size_t at, size_t k, char *from) {
    size_t n = cut(t->n_mine, at, t->step);
    char *dst = t->coll->dst;
    (void)k;
    if (t->combines) {
        combine_nodes(t, dst + at * t->elem_size, from, n);
        return DSC_OK;
    }
    for (size_t j = 0; n > 0 && j < (size_t)t->nodes->n_nodes; j++)
        memcpy(dst + (j * t->n_mine + at) * t->sum_size, from + j * n * t->sum_size,
               n * t->sum_size);
    return DSC_OK;
}

static enum dsc_status travel_parts(struct tour *t) {
    static const struct stops stops = {
        .publish = publish_parts, .pack = pack_parts, .move = move_parts, .take = take_part};
    size_t per_rank = t->d->area / ((size_t)t->d->comm->size * t->elem_size);
    size_t per_node = t->d->area / ((size_t)t->nodes->n_nodes * t->sum_size);
    t->step = dsc_max(dsc_min(per_rank, per_node) / PART_ELEMS, 1) * PART_ELEMS;
    return travel(t, &stops);
}

enum dsc_status dsc__nodes_reduce_scatter(struct dsc__delegate *d, const struct dsc_coll *coll) {
    struct tour t = tour_of(d, coll);
    size_t n = coll->n_elems;
    for (size_t r = 0; r < (size_t)d->comm->size; r++)
        d->parts[r] = (struct dsc__delegate_part){.send_at = r * n, .n_send = n};
    t.n_mine = n;
    return travel_parts(&t);
}

enum dsc_status dsc__nodes_part_sums(struct dsc__delegate *d, const struct dsc_coll *coll,
                                     const size_t *n_send, size_t n_mine) {
    struct dsc_coll sum = *coll;
    struct tour t = tour_of(d, &sum);
    size_t send_at = 0;
    sum.op = DSC_SUM;
    for (int r = 0; r < d->comm->size; r++) {
        d->parts[r] = (struct dsc__delegate_part){.send_at = send_at, .n_send = n_send[r]};
        send_at += n_send[r];
    }
    t.n_mine = n_mine;
    t.combines = false;
    return travel_parts(&t);
}

/* ---- all_gather: each rail gathers, the node shares what its rails have ---- */

static void pack_own(const struct tour *t, size_t at, size_t k, char *to) {
    (void)k;
    memcpy(to, (const char *)t->coll->src + at * t->elem_size,
           cut(t->n_elems, at, t->step) * t->elem_size);
}

static struct dsc_move move_own(const struct tour *t, size_t at) {
    return (struct dsc_move){.kind = DSC_MOVE_GATHER,
                             .n_bytes = cut(t->n_elems, at, t->step) * t->elem_size};
}

static enum dsc_status show_gathered(const struct tour *t, size_t at, size_t k, char *from) {
    size_t n_bytes = cut(t->n_elems, at, t->step) * t->elem_size;
    memcpy(out_area(t, t->nodes->place, k), from, (size_t)t->nodes->n_nodes * n_bytes);
    return DSC_OK;
}

static void collect_gathered(const struct tour *t, size_t at, size_t k) {
    const struct dsc__nodes *nodes = t->nodes;
    size_t n_bytes = cut(t->n_elems, at, t->step) * t->elem_size;
    for (int r = 0; r < t->d->comm->size; r++)
        memcpy((char *)t->coll->dst + ((size_t)r * t->n_elems + at) * t->elem_size,
               out_area(t, r % nodes->n_local, k) + (size_t)(r / nodes->n_local) * n_bytes,
               n_bytes);
}

enum dsc_status dsc__nodes_all_gather(struct dsc__delegate *d, const struct dsc_coll *coll) {
    static const struct stops stops = {
        .pack = pack_own, .move = move_own, .take = show_gathered, .collect = collect_gathered};
    struct tour t = tour_of(d, coll);
    size_t room = d->area / (size_t)d->nodes->n_nodes / ALIGN * ALIGN;
    t.step = room / t.elem_size;
    return travel(&t, &stops);
}

/* ---- pieces: each rail exchanges strands, the node shares what its rails have ---- */

static void pack_strand(const struct tour *t, size_t at, size_t k, char *to) {
    (void)k;
    dsc__delegate_copies(t->strands, to, cut(t->strands->own.n_bytes, at, t->step),
                         t->nodes->n_nodes);
}

/* Of the rank of this one's rail on a node, what is in the chunk at `at`. */
static size_t strand_of(const struct tour *t, int node, size_t at) {
    return cut(t->strands->of[node * t->nodes->n_local + t->nodes->place].n_bytes, at, t->step);
}

static struct dsc_move move_strands(const struct tour *t, size_t at) {
    struct dsc__nodes *nodes = t->nodes;
    struct dsc_move move = exchange_of(t);
    for (int j = 0; j < nodes->n_nodes; j++) {
        size_t n = strand_of(t, j, at);
        nodes->counts[j] = j == nodes->index ? 0 : strand_of(t, nodes->index, at);
        nodes->counts[nodes->n_nodes + j] = j == nodes->index ? 0 : n;
        move.n_bytes = dsc_max(move.n_bytes, n);
    }
    return move;
}

/* Its own bytes are still where they were sent from. */
static enum dsc_status show_strands(const struct tour *t, size_t at, size_t k, char *from) {
    const char *own = t->d->ops.staging + dsc__delegate_send_area(t->d, k);
    for (int j = 0; j < t->nodes->n_nodes; j++) {
        size_t n = strand_of(t, j, at);
        char *to = out_area(t, t->nodes->place, k) + (size_t)j * t->step;
        if (n > 0)
            memcpy(to, j == t->nodes->index ? own : from, n);
        from += j == t->nodes->index ? 0 : n;
    }
    return DSC_OK;
}

static void collect_strands(const struct tour *t, size_t at, size_t k) {
    int n_local = t->nodes->n_local;
    for (int r = 0; r < t->d->comm->size; r++)
        if (r != t->d->comm->rank)
            dsc__strand_write(t->strands, r,
                              out_area(t, r % n_local, k) + (size_t)(r / n_local) * t->step,
                              cut(t->strands->of[r].n_bytes, at, t->step));
}

enum dsc_status dsc__nodes_gather_pieces(struct dsc__delegate *d, struct dsc__strands *strands) {
    static const struct stops stops = {.pack = pack_strand,
                                       .move = move_strands,
                                       .take = show_strands,
                                       .collect = collect_strands};
    struct tour t = {.d = d, .nodes = d->nodes, .n_elems = strands->n_max, .strands = strands};
    t.step = d->area / (size_t)d->nodes->n_nodes / ALIGN * ALIGN;
    return travel(&t, &stops);
}

/* ---- the buffer is the ranks' slices: broadcast, reduce, all_reduce ---- */

/* The slice of a place in the chunk at `at`. */
static struct dsc__delegate_part slice_of(const struct tour *t, size_t at, int place) {
    size_t n = cut(t->n_elems, at, t->step), n_local = (size_t)t->nodes->n_local;
    size_t slice = dsc_round_up((n + n_local - 1) / n_local, SLICE_ELEMS);
    size_t first = (size_t)place * slice;
    return (struct dsc__delegate_part){.send_at = first, .n_send = cut(n, first, slice)};
}

/* Chunks whose slices take at most `room` bytes each, as `size` per element. */
static size_t sliced_step(const struct tour *t, size_t room, size_t size) {
    size_t slice = room / size / SLICE_ELEMS * SLICE_ELEMS;
    return dsc_min(t->d->area / t->elem_size, slice * (size_t)t->nodes->n_local);
}

static void collect_slices(const struct tour *t, size_t at, size_t k) {
    for (int q = 0; q < t->nodes->n_local; q++) {
        struct dsc__delegate_part slice = slice_of(t, at, q);
        if (slice.n_send > 0)
            memcpy((char *)t->coll->dst + (at + slice.send_at) * t->elem_size, out_area(t, q, k),
                   slice.n_send * t->elem_size);
    }
}

/* All but the own slice, which is read where it lies. */
static void publish_slices(const struct tour *t, size_t at, char *to) {
    struct dsc__delegate_part own = slice_of(t, at, t->nodes->place);
    size_t n_bytes = cut(t->n_elems, at, t->step) * t->elem_size;
    size_t head = dsc_min(own.send_at * t->elem_size, n_bytes);
    size_t tail = dsc_min(head + own.n_send * t->elem_size, n_bytes);
    const char *src = (const char *)t->coll->src + at * t->elem_size;
    memcpy(to, src, head);
    memcpy(to + tail, src + tail, n_bytes - tail);
}

static void pack_slice(const struct tour *t, size_t at, size_t k, char *to) {
    const struct dsc__nodes *nodes = t->nodes;
    struct dsc__delegate_part own = slice_of(t, at, nodes->place);
    for (int q = 0; q < nodes->n_local; q++)
        t->d->srcs[q] = q == nodes->place
                            ? (const char *)t->coll->src + (at + own.send_at) * t->elem_size
                            : in_area(t, q, k) + own.send_at * t->elem_size;
    dsc__reduce_ranks(to, t->d->srcs, nodes->n_local, own.n_send, t->coll->dtype, t->coll->op);
}

static void publish_of_root(const struct tour *t, size_t at, char *to) {
    if (is_root(t))
        memcpy(to, (const char *)t->coll->dst + at * t->elem_size,
               cut(t->n_elems, at, t->step) * t->elem_size);
}

/* A broadcast travels in place, in the area that it fills. */
static void pack_of_root(const struct tour *t, size_t at, size_t k, char *to) {
    struct dsc__delegate_part own = slice_of(t, at, t->nodes->place);
    (void)to;
    if (is_root_node(t) && own.n_send > 0)
        memcpy(t->d->ops.staging + dsc__delegate_fill_area(t->d, k),
               in_area(t, t->coll->root % t->nodes->n_local, k) + own.send_at * t->elem_size,
               own.n_send * t->elem_size);
}

static struct dsc_move move_of_root(const struct tour *t, size_t at) {
    return (struct dsc_move){.kind = DSC_MOVE_BROADCAST,
                             .n_bytes = slice_of(t, at, t->nodes->place).n_send * t->elem_size,
                             .root = t->coll->root / t->nodes->n_local};
}

static enum dsc_status show_slice(const struct tour *t, size_t at, size_t k, char *from) {
    memcpy(out_area(t, t->nodes->place, k), from,
           slice_of(t, at, t->nodes->place).n_send * t->elem_size);
    return DSC_OK;
}

static void collect_unless_root(const struct tour *t, size_t at, size_t k) {
    if (!is_root(t))
        collect_slices(t, at, k);
}

enum dsc_status dsc__nodes_broadcast(struct dsc__delegate *d, const struct dsc_coll *coll) {
    static const struct stops stops = {.publish = publish_of_root,
                                       .pack = pack_of_root,
                                       .move = move_of_root,
                                       .take = show_slice,
                                       .collect = collect_unless_root};
    struct tour t = tour_of(d, coll);
    t.step = sliced_step(&t, d->area, t.elem_size);
    return travel(&t, &stops);
}

/* Every node's sum of the slice to the root's. */
static struct dsc_move move_to_root(const struct tour *t, size_t at) {
    struct dsc__nodes *nodes = t->nodes;
    struct dsc_move move = exchange_of(t);
    move.n_bytes = slice_of(t, at, nodes->place).n_send * t->sum_size;
    for (int j = 0; j < nodes->n_nodes; j++) {
        nodes->counts[j] = j == t->coll->root / nodes->n_local ? move.n_bytes : 0;
        nodes->counts[nodes->n_nodes + j] = is_root_node(t) ? move.n_bytes : 0;
    }
    return move;
}

static enum dsc_status show_sum(const struct tour *t, size_t at, size_t k, char *from) {
    if (is_root_node(t))
        combine_nodes(t, out_area(t, t->nodes->place, k), from,
                      slice_of(t, at, t->nodes->place).n_send);
    return DSC_OK;
}

static void collect_at_root(const struct tour *t, size_t at, size_t k) {
    if (is_root(t))
        collect_slices(t, at, k);
}

enum dsc_status dsc__nodes_reduce(struct dsc__delegate *d, const struct dsc_coll *coll) {
    static const struct stops stops = {.publish = publish_slices,
                                       .pack = pack_slice,
                                       .move = move_to_root,
                                       .take = show_sum,
                                       .collect = collect_at_root};
    struct tour t = tour_of(d, coll);
    t.step = sliced_step(&t, d->area / (size_t)d->nodes->n_nodes, t.sum_size);
    return travel(&t, &stops);
}

/* ---- all_reduce: node j adds part j of each slice ---- */

static size_t part_of_slice(const struct tour *t, size_t at) {
    size_t n = slice_of(t, at, t->nodes->place).n_send, n_nodes = (size_t)t->nodes->n_nodes;
    return dsc_round_up((n + n_nodes - 1) / n_nodes, PART_ELEMS);
}

static struct dsc_move move_slice(const struct tour *t, size_t at) {
    struct dsc__nodes *nodes = t->nodes;
    struct dsc_move move = exchange_of(t);
    size_t n = slice_of(t, at, nodes->place).n_send, part = part_of_slice(t, at);
    move.n_bytes = n * t->sum_size;
    for (size_t j = 0; j < (size_t)nodes->n_nodes; j++) {
        nodes->counts[j] = cut(n, j * part, part) * t->sum_size;
        nodes->counts[(size_t)nodes->n_nodes + j] =
            cut(n, (size_t)nodes->index * part, part) * t->sum_size;
    }
    return move;
}

static enum dsc_status add_and_show(const struct tour *t, size_t at, size_t k, char *from) {
    struct dsc__delegate *d = t->d;
    struct dsc__nodes *nodes = t->nodes;
    size_t n = slice_of(t, at, nodes->place).n_send, part = part_of_slice(t, at);
    struct dsc_move back = {.kind = DSC_MOVE_GATHER,
                            .src = dsc__delegate_send_area(d, k + 1),
                            .dst = dsc__delegate_fill_area(d, k + 1),
                            .n_bytes = part * t->elem_size};
    if (n == 0)
        return DSC_OK;
    combine_nodes(t, d->ops.staging + back.src, from, cut(n, (size_t)nodes->index * part, part));
    DSC_TRY(dsc__delegate_start(d, nodes->rail, &back));
    DSC_TRY(dsc__delegate_finish(d));
    memcpy(out_area(t, nodes->place, k), d->ops.staging + back.dst, n * t->elem_size);
    return DSC_OK;
}

enum dsc_status dsc__nodes_all_reduce(struct dsc__delegate *d, const struct dsc_coll *coll) {
    static const struct stops stops = {.publish = publish_slices,
                                       .pack = pack_slice,
                                       .move = move_slice,
                                       .take = add_and_show,
                                       .collect = collect_slices};
    struct tour t = tour_of(d, coll);
    t.alone = true;
    /* Half an area: the parts of a slice together are somewhat longer than the slice. */
    t.step = sliced_step(&t, d->area / 2, t.sum_size);
    return travel(&t, &stops);
}

void dsc__nodes_reduce_here(struct dsc__delegate *d, const struct dsc_coll *coll, const char *all,
                            size_t n_bytes) {
    struct tour t = tour_of(d, coll);
    char *sums = d->ops.staging + dsc__delegate_send_area(d, 1);
    for (int j = 0; j < t.nodes->n_nodes; j++) {
        for (int q = 0; q < t.nodes->n_local; q++)
            d->srcs[q] = all + (size_t)(j * t.nodes->n_local + q) * n_bytes;
        dsc__reduce_ranks(sums + (size_t)j * coll->n_elems * t.sum_size, d->srcs, t.nodes->n_local,
                          coll->n_elems, coll->dtype, coll->op);
    }
    combine_nodes(&t, coll->dst, sums, coll->n_elems);
}

/* ---- groups inside the node ---- */

enum dsc_status dsc__nodes_open_group(struct dsc__delegate *d, const struct dsc__group *group,
                                      struct dsc_comm **out) {
    struct dsc__nodes *nodes = d->nodes;
    struct dsc__group inside = *group;
    void *places = NULL;
    DSC_TRY(dsc_alloc((size_t)group->size * sizeof(int), &places));
    enum dsc_status status = DSC_OK;
    inside.ranks = places;
    for (int i = 0; i < group->size && status == DSC_OK; i++) {
        ((int *)places)[i] = group->ranks[i] % nodes->n_local;
        if (group->ranks[i] / nodes->n_local != nodes->index)
            status = DSC_FAIL(DSC_ENOTYET,
                              "group \"%s\": rank %d is on another node than rank %d; a group that "
                              "spans nodes is a delegate of its own",
                              group->name, group->ranks[i], d->comm->rank);
    }
    if (status == DSC_OK)
        status = nodes->node->backend->open_group(nodes->node->state, &inside, out);
    dsc_free(places);
    return status;
}

/* ---- life ---- */

void dsc__nodes_give_up(struct dsc__delegate *d, const char *reason) {
    dsc_comm_abort(d->nodes->node, reason);
}

void dsc__nodes_leave(struct dsc__delegate *d) {
    dsc_comm_leave(d->nodes->node);
    d->ops.leave(d->nodes->rail);
}

void dsc__nodes_close(struct dsc__delegate *d) {
    struct dsc__nodes *nodes = d->nodes;
    d->nodes = NULL;
    dsc_comm_window_close(nodes->node, nodes->window);
    dsc_comm_close(nodes->node);
    d->ops.release(nodes->rail);
    dsc_free(nodes->counts);
    dsc_free(nodes);
}

static enum dsc_status open_window(struct dsc__delegate *d) {
    struct dsc__nodes *nodes = d->nodes;
    int size = d->comm->size;
    nodes->n_local = dsc_comm_size(nodes->node);
    nodes->n_nodes = size / nodes->n_local;
    nodes->place = dsc_comm_rank(nodes->node);
    nodes->index = d->comm->rank / nodes->n_local;
    if (nodes->n_local < 2 || nodes->n_nodes < 2 || nodes->n_local * nodes->n_nodes != size ||
        d->comm->rank % nodes->n_local != nodes->place || !dsc_comm_has_windows(nodes->node))
        return DSC_FAIL(DSC_EINVAL,
                        "delegate: rank %d of %d is place %d of a node of %d; nodes of equally "
                        "many ranks, at least two, one after the other, are expected",
                        d->comm->rank, size, nodes->place, nodes->n_local);
    DSC_TRY(dsc_alloc(2 * (size_t)nodes->n_nodes * sizeof *nodes->counts, (void **)&nodes->counts));
    DSC_TRY(dsc_comm_window_open(nodes->node, 4 * d->area, "delegate: what a node adds",
                                 &nodes->window));
    /* From here on its waits are the delegate's, which keeps the time and knows who is where. */
    nodes->node->given =
        (struct dsc_comm_options){.interrupted = look_around, .interrupt_context = d};
    nodes->node->options.timeout_s = 0;
    return DSC_OK;
}

enum dsc_status dsc_comm_delegate_use_nodes(struct dsc_comm *comm, struct dsc_comm *node,
                                            void *rail) {
    struct dsc__delegate *d = comm->state;
    enum dsc_status status = dsc_alloc(sizeof *d->nodes, (void **)&d->nodes);
    if (status != DSC_OK) {
        dsc_comm_close(node);
        d->ops.leave(rail);
        d->ops.release(rail);
        return status;
    }
    d->nodes->node = node;
    d->nodes->rail = rail;
    if ((status = open_window(d)) != DSC_OK) {
        dsc__nodes_leave(d);
        dsc__nodes_close(d);
    }
    return status;
}
