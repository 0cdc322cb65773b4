/* How large a rank's buckets, slots and window are: a function of the space, the rank and the
 * options alone, so that it is known before anything is opened. Invariant: equal on all ranks but
 * for what is held. */
#include "bucket_impl.h"

enum {
    /* Slots of the boundary exchange stay in the second-level cache between writer and reader. */
    BOUNDARY_SLOT_ELEMS = 128 * 1024,
    BOUNDARY_SLOTS_PER_PEER = 3,
    EARLY_SLOT_ELEMS = 256 * 1024,
    EARLY_SLOTS_AT_START = 16,
    /* What one rank sends at a time where ranks share no memory. */
    REMOTE_ELEMS = 1024 * 1024,
};

static size_t slot_elems_of(const struct dsc_space *space,
                            const struct dsc_bucket_options *options) {
    size_t cap = options->early ? EARLY_SLOT_ELEMS : BOUNDARY_SLOT_ELEMS;
    if (options->remote)
        cap = REMOTE_ELEMS / (size_t)space->n_ranks / DSC_BLOCK * DSC_BLOCK;
    cap = dsc_min(cap, dsc_space_most_owned(space));
    return dsc_round_up(dsc_max(dsc_min(options->bucket_elems, cap), 1), DSC_BLOCK);
}

size_t dsc__bucket_count(const struct dsc_space *space, int owner, size_t slot_elems) {
    return (dsc_range_size(dsc_space_owned(space, owner)) + slot_elems - 1) / slot_elems;
}

struct dsc_bucket_sizes dsc_bucket_sizes_of(const struct dsc_space *space, int rank,
                                            const struct dsc_bucket_options *options) {
    struct dsc_bucket_sizes sizes = {.slot_elems = slot_elems_of(space, options)};
    struct dsc_range own = dsc_space_owned(space, rank);
    size_t size = (size_t)space->n_ranks, n_buckets = 0, most_buckets = 0;
    size_t slot_bytes = sizes.slot_elems * sizeof(float);
    if (options->remote) {
        sizes.staging_bytes = 2 * size * slot_bytes;
        sizes.held = options->shared_sums ? (struct dsc_range){0, space->n_elems} : own;
        return sizes;
    }
    for (int r = 0; r < space->n_ranks; r++) {
        size_t n = dsc__bucket_count(space, r, sizes.slot_elems);
        most_buckets = dsc_max(most_buckets, n);
        n_buckets += n;
    }
    sizes.max_slots = options->early ? (int32_t)(DSC__MAX_ROUNDS_AHEAD * n_buckets + 1)
                                     : (int32_t)(BOUNDARY_SLOTS_PER_PEER * (size - 1));
    sizes.first_slots = sizes.max_slots;
    if (options->early && sizes.first_slots > EARLY_SLOTS_AT_START)
        sizes.first_slots = EARLY_SLOTS_AT_START;
    sizes.sums_are_shared = options->early || options->shared_sums;
    if (!sizes.sums_are_shared)
        sizes.held = own;
    sizes.record_stride = dsc_round_up(sizeof(struct dsc__record) + size * sizeof(uint64_t), 64);
    sizes.sums_offset = dsc_round_up(DSC__HEADER_BYTES + most_buckets * sizes.record_stride, 4096);
    sizes.slots_offset = sizes.sums_offset;
    if (sizes.sums_are_shared)
        sizes.slots_offset += dsc_round_up(dsc_space_most_owned(space) * sizeof(float), 4096);
    sizes.window_bytes = sizes.slots_offset + (size_t)sizes.max_slots * slot_bytes;
    return sizes;
}
