/* The engine's masters and states in files: opening, and what a step does with them; and whether
 * what is not in files fits in memory.
 *
 * Invariant: a rank that cannot read or write its files tells the others, in the open engine's
 * first meeting or by giving up the communicators, and steps no more: some of its elements have
 * been stepped then and others not. */
#include "engine_impl.h"

#include "arena.h"
#include "memory_limit.h"

#include <stdio.h>
#include <string.h>

/* What a rank is about to take, and what there is for it. */
struct room {
    uint64_t needed, n_limits;
    struct dsc_memory_limit limits[DSC_MEMORY_LIMITS];
};
_Static_assert(sizeof(struct room) <= DSC_MEET_MAX, "ranks tell each other their rooms");

/* Elements of a space whose reduced sums this rank has, in its own memory or in its window. */
static size_t n_sums(const struct dsc_space *space, int rank, const struct dsc_space_needs *needs) {
    if (!needs->shared)
        return 0;
    struct dsc_bucket_sizes sizes = dsc_bucket_sizes_of(space, rank, &needs->buckets);
    return dsc_range_size(sizes.sums_are_shared ? dsc_space_owned(space, rank) : sizes.held);
}

static uint64_t bytes_needed(const struct dsc_engine *e) {
    uint64_t sum = 0;
    for (size_t s = 0; s < e->n_spaces; s++) {
        const struct dsc_space *space = &e->spaces[s];
        struct dsc_space_needs needs = dsc__engine_needs(e, s);
        size_t n = dsc_range_size(needs.stepped), n_arrays = needs.grads;
        if (needs.n_filed == 0)
            n_arrays += needs.master + (size_t)needs.n_states;
        size_t n_elems = n_arrays * n + (needs.local ? space->n_elems : 0) +
                         n_sums(space, dsc_comm_rank(e->ranks.reduce[space->reduce].comm), &needs);
        sum += n_elems * sizeof(float);
        sum += n > 0 ? dsc_swap_private_bytes(n, needs.n_filed, needs.n_buffers) : 0;
    }
    return sum;
}

static bool is_in(const struct room *room, uint64_t group) {
    for (size_t i = 0; i < room->n_limits; i++)
        if (room->limits[i].group == group)
            return true;
    return false;
}

/* What all ranks in a control group are about to take. */
static uint64_t bytes_needed_in(const struct dsc_engine *e, uint64_t group) {
    struct room other;
    uint64_t sum = 0;
    for (int r = 0; r < e->size; r++) {
        memcpy(&other, e->meeting + (size_t)r * sizeof other, sizeof other);
        sum += is_in(&other, group) ? other.needed : 0;
    }
    return sum;
}

/* All ranks look at all, so that all fail together. */
static enum dsc_status compare_rooms(const struct dsc_engine *e) {
    struct room one;
    for (size_t at = 0; at < (size_t)e->size * DSC_MEMORY_LIMITS; at++) {
        size_t r = at / DSC_MEMORY_LIMITS, i = at % DSC_MEMORY_LIMITS;
        memcpy(&one, e->meeting + r * sizeof one, sizeof one);
        if (i >= one.n_limits)
            continue;
        const struct dsc_memory_limit *memory = &one.limits[i];
        uint64_t needed = bytes_needed_in(e, memory->group);
        if (needed > memory->left)
            return DSC_FAIL(
                DSC_ENOMEM,
                "masters, optimizer states and sums of gradients take %llu bytes on rank %zu, %llu "
                "with the ranks of its memory control group, which has %llu left of its limit of "
                "%llu; nothing has changed. zero_optimization.offload_optimizer with device "
                "\"nvme\" keeps masters and states in files",
                (unsigned long long)one.needed, r, (unsigned long long)needed,
                (unsigned long long)memory->left, (unsigned long long)memory->limit);
    }
    return DSC_OK;
}

enum dsc_status dsc__engine_check_room(struct dsc_engine *e) {
    struct room mine = {.needed = bytes_needed(e)};
    mine.n_limits = dsc_memory_limits("", mine.limits);
    memcpy(e->meeting, &mine, sizeof mine);
    if (e->size > 1)
        DSC_TRY(dsc_comm_meet(e->comm, "initialize", 8, &mine, sizeof mine, e->meeting));
    return compare_rooms(e);
}

static enum dsc_status open_file(struct dsc_engine *e, size_t s) {
    struct dsc_space_needs needs = dsc__engine_needs(e, s);
    struct dsc_swap_options options = e->options.swap;
    char name[64];
    if (needs.n_filed == 0)
        return DSC_OK;
    options.n_buffers = needs.n_buffers;
    snprintf(name, sizeof name, "rank %d, %s masters and states", e->rank,
             dsc_dtype_name(e->spaces[s].dtype));
    return dsc_swap_open(e->io, &options, name, dsc_range_size(needs.stepped),
                         needs.master ? DSC_SWAP_MASTER : DSC_SWAP_STATE, needs.n_filed,
                         &e->holdings[s].swap);
}

/* Local, and the first that may fail on one rank only: all learn of it. */
enum dsc_status dsc__engine_open_files(struct dsc_engine *e) {
    if (!e->options.swap.folder)
        return DSC_OK;
    enum dsc_status status = dsc_io_open(&e->options.swap.io, &e->io);
    for (size_t s = 0; status == DSC_OK && s < e->n_spaces; s++)
        status = open_file(e, s);
    e->options.swap.folder = NULL; /* the caller's, and from here on everything is open */
    uint32_t failed = status != DSC_OK;
    if (e->size > 1)
        DSC_TRY(dsc_comm_meet(e->comm, "initialize", 6, &failed, sizeof failed, e->meeting));
    for (int r = 0; status == DSC_OK && e->size > 1 && r < e->size; r++) {
        memcpy(&failed, e->meeting + (size_t)r * sizeof failed, sizeof failed);
        if (failed)
            return DSC_FAIL(DSC_EIO,
                            "rank %d has no files for its optimizer states (its own error "
                            "says why)",
                            r);
    }
    return status;
}

/* Masters or states: of a file, or of memory. */
enum dsc_status dsc__engine_hold(struct dsc_holding *holding, int tensor, float **out) {
    if (holding->swap)
        return dsc_swap_map(holding->swap, tensor, out);
    return dsc_arena_alloc(dsc_range_size(holding->stepped) * sizeof(float), (void **)out);
}

static bool streams(const struct dsc_engine *e, size_t s) {
    return e->holdings[s].swap && dsc_swap_memory_bytes(e->holdings[s].swap) > 0;
}

void dsc__engine_begin_files(struct dsc_engine *e) {
    for (size_t s = 0; s < e->n_spaces; s++)
        if (streams(e, s)) {
            dsc_swap_begin(e->holdings[s].swap);
            return; /* one space after the other, so that one read does not wait for another's */
        }
}

static bool any_failed(const struct dsc_engine *e) {
    for (size_t s = 0; s < e->n_spaces; s++)
        if (streams(e, s) && dsc_swap_failed(e->holdings[s].swap))
            return true;
    return false;
}

enum dsc_status dsc__engine_end_files(struct dsc_engine *e, enum dsc_status status) {
    char text[512] = "";
    int error = dsc_last_errno();
    if (status != DSC_OK && any_failed(e)) {
        e->file_failed = true;
        snprintf(text, sizeof text, "%.400s; %s is half done", dsc_last_error(), e->label);
        for (size_t g = 0; e->size > 1 && g < e->ranks.n_reduce; g++)
            dsc_comm_abort(e->ranks.reduce[g].comm, text);
        if (e->size > 1)
            dsc_comm_abort(e->comm, text);
    }
    for (size_t s = 0; s < e->n_spaces; s++)
        if (streams(e, s))
            dsc_swap_drop(e->holdings[s].swap);
    return text[0] ? DSC_FAIL_OS(error, "%s", text) : status; /* dropping may have failed too */
}
