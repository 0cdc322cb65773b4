/* The shared-memory back end: ranks of one node, a memfd each, mapped by all.
 *
 * Decides: what a state holds and how it goes; the table of entries stands at the end. Waiting is
 * in shm_sync.c, algorithms in shm_coll.c, the first meeting in shm_rendezvous.c. No thread of its
 * own. Invariant: nothing outlives the processes: memory is memfds without a name, sockets have
 * abstract names. */
#include "shm.h"

#include "../alloc.h"

#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum dsc_status dsc__shm_check_world(int rank, int size) {
    if (size < 1 || size > DSC__SHM_RANKS_MAX)
        return DSC_FAIL(DSC_EINVAL, "a world of %d ranks; 1 to %d are allowed on a node", size,
                        (int)DSC__SHM_RANKS_MAX);
    if (rank < 0 || rank >= size)
        return DSC_FAIL(DSC_EINVAL, "rank is %d; 0 to %d are allowed in a world of %d", rank,
                        size - 1, size);
    return DSC_OK;
}

/* ---- the node ---- */

enum dsc_status dsc__shm_node_new(int rank, int size, struct dsc__shm_node **out) {
    void *block = NULL;
    size_t n = (size_t)size;
    DSC_TRY(dsc_alloc(sizeof(struct dsc__shm_node) + n * sizeof(struct dsc__shm_region *), &block));
    struct dsc__shm_node *node = block;
    atomic_store(&node->n_refs, 1);
    node->rank = rank;
    node->size = size;
    *out = node;
    return DSC_OK;
}

static void close_fds(struct dsc__shm_node *node) {
    for (int r = 0; node->pidfds && r < node->size; r++) {
        if (node->pidfds[r] >= 0)
            (void)close(node->pidfds[r]);
        node->pidfds[r] = -1;
    }
}

void dsc__shm_node_unref(struct dsc__shm_node *node) {
    if (!node || atomic_fetch_sub(&node->n_refs, 1) != 1)
        return;
    close_fds(node);
    for (int r = 0; !node->world && r < node->size; r++)
        if (node->regions[r])
            (void)munmap(node->regions[r], dsc__shm_region_size(node->size));
    dsc__shm_world_unref(node->world);
    dsc_free(node->pidfds);
    dsc_free(node);
}

/* ---- a channel ---- */

enum dsc_status dsc__shm_prepare(struct dsc__shm *shm, int rank, int size,
                                 const struct dsc_comm_options *options,
                                 struct dsc__shm_node *node) {
    void *array = NULL;
    size_t n = (size_t)size;
    shm->rank = rank;
    shm->size = size;
    shm->options = options;
    shm->node = node;
    atomic_fetch_add(&node->n_refs, 1);
    DSC_TRY(dsc_alloc(n * sizeof *shm->blocks, &array));
    shm->blocks = array;
    DSC_TRY(dsc_alloc(n * sizeof *shm->sources, &array));
    shm->sources = array;
    DSC_TRY(dsc_alloc(n * sizeof *shm->members, &array));
    shm->members = array;
    DSC_TRY(dsc_alloc(n * sizeof *shm->slots, &array));
    shm->slots = array;
    return DSC_OK;
}

void dsc__shm_use_world(struct dsc__shm *shm) {
    for (int r = 0; r < shm->size; r++) {
        shm->members[r] = r;
        shm->slots[r] = 0;
        shm->blocks[r] = &shm->node->regions[r]->blocks[0];
    }
    dsc__shm_settle_spins(shm);
}

/* Spinning pays only where every rank has a core. Ranks bound to a core each see one CPU, so the
 * union of all ranks' CPUs counts. */
void dsc__shm_settle_spins(struct dsc__shm *shm) {
    enum { SPINS_FREE = 2500, SPINS_CROWDED = 10 }; /* about 60 us and 0.3 us */
    cpu_set_t all;
    CPU_ZERO(&all);
    for (int r = 0; r < shm->size; r++)
        CPU_OR(&all, &all, &dsc__shm_region_of(shm, r)->cpus);
    shm->n_spins_max = CPU_COUNT(&all) >= shm->size ? SPINS_FREE : SPINS_CROWDED;
    for (int kind = 0; kind < DSC__SHM_AWAITED_COUNT; kind++)
        shm->spins[kind].budget = shm->n_spins_max;
}

void dsc__shm_release(struct dsc__shm *shm) {
    dsc__shm_node_unref(shm->node);
    dsc_free(shm->blocks);
    dsc_free(shm->sources);
    dsc_free(shm->members);
    dsc_free(shm->slots);
    memset(shm, 0, sizeof *shm);
}

static void close_shm(void *state) {
    dsc__shm_leave(state);
    dsc__shm_close_group(state);
    dsc__shm_release(state);
}

/* A forked child has no business with the other ranks. */
static void forked(void *state) {
    close_fds(((struct dsc__shm *)state)->node);
}

static enum dsc_status agree(void *state, const struct dsc__print *mine, const void *payload,
                             size_t n_payload) {
    struct dsc__shm *shm = state;
    struct dsc__shm_wait wait = {.kind = DSC__SHM_PRINT, .target = mine->sequence};
    /* The data of a rank that gave up must not be taken for an answer, even where it came in time.
     */
    DSC_TRY(dsc__shm_check_broken(shm));
    shm->sequence = mine->sequence;
    shm->current = *mine;
    if (n_payload > 0 && n_payload <= DSC__SHM_SMALL)
        memcpy(shm->blocks[shm->rank]->small[shm->sequence & 1], payload, n_payload);
    dsc__shm_publish(shm, mine);
    return dsc__shm_wait(shm, &wait);
}

static void print_of(void *state, int rank, struct dsc__print *out) {
    struct dsc__shm *shm = state;
    dsc__shm_read_print(shm, rank, shm->sequence, out);
}

static const void *payload_of(void *state, int rank) {
    struct dsc__shm *shm = state;
    return shm->blocks[rank]->small[shm->sequence & 1];
}

static void posted(void *state, enum dsc_comm_op op, int change) {
    struct dsc__shm *shm = state;
    bool is_message = op == DSC_COMM_SEND || op == DSC_COMM_RECV;
    _Atomic uint32_t *count = is_message ? &shm->node->regions[shm->node->rank]->n_messages
                                         : &shm->blocks[shm->rank]->n_posted;
    atomic_fetch_add(count, (uint32_t)change);
}

const struct dsc_comm_backend dsc__shm_backend = {
    .name = "shm",
    .state_size = sizeof(struct dsc__shm),
    .close = close_shm,
    .forked = forked,
    .agree = agree,
    .print_of = print_of,
    .payload_of = payload_of,
    .all_reduce = dsc__shm_all_reduce,
    .reduce_scatter = dsc__shm_reduce_scatter,
    .all_gather = dsc__shm_all_gather,
    .broadcast = dsc__shm_broadcast,
    .reduce = dsc__shm_reduce,
    .gather = dsc__shm_gather,
    .scatter = dsc__shm_scatter,
    .all_to_all = dsc__shm_all_to_all,
    .all_to_all_v = dsc__shm_all_to_all_v,
    .message_advance = dsc__shm_message_advance,
    .mail = dsc__shm_mail,
    .message_wait = dsc__shm_message_wait,
    .message_check = dsc__shm_message_check,
    .message_end = dsc__shm_message_end,
    .ring_mail = dsc__shm_ring_mail,
    .posted = posted,
    .open_group = dsc__shm_open_group,
    .opened = dsc__shm_group_opened,
    .window_open = dsc__shm_window_open,
    .window_close = dsc__shm_window_close,
    .window_keep = dsc__shm_window_keep,
    .ring = dsc__shm_ring,
    .bell = dsc__shm_bell,
    .wait_bell = dsc__shm_wait_bell,
    .give_up = dsc__shm_give_up,
    .leave = dsc__shm_leave,
};
