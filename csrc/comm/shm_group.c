/* Channels of some of the node's ranks.
 *
 * Decides: where a group's memory comes from: a free block in the region that every rank of the
 * node has mapped already, so that opening takes a few looks into memory and concerns its members
 * only. A member claims a block of its own region, writes the group's key beside it, and finds the
 * other members' blocks by that key. Invariant: a block is claimed again only when all members of
 * its last group have let go of it; keys are gone before any member can open the next group. */
#include "shm.h"

#include <stddef.h>
#include <stdio.h>

/* As after mapping; who looks from outside (shm_standstill.c) reads words, so words are stored. */
static void reset_block(struct dsc__shm_block *block) {
    for (int i = 0; i < DSC__SHM_RING; i++)
        for (int k = 0; k < 16; k++)
            atomic_store_explicit(&block->ring[i].words[k], 0, memory_order_relaxed);
    atomic_store_explicit(&block->phase, 0, memory_order_relaxed);
    atomic_store_explicit(&block->asleep, 0, memory_order_relaxed);
    atomic_store_explicit(&block->bell, 0, memory_order_relaxed);
    atomic_store_explicit(&block->left, 0, memory_order_relaxed);
    atomic_store_explicit(&block->n_posted, 0, memory_order_relaxed);
}

/* A free block of this rank, from now on referred to by every member. */
static enum dsc_status claim_block(struct dsc__shm *shm, const struct dsc__group *group) {
    struct dsc__shm_region *region = shm->node->regions[shm->node->rank];
    for (uint32_t slot = 1; slot < DSC__SHM_CHANNELS; slot++) {
        uint32_t nobody = 0;
        if (!atomic_compare_exchange_strong(&region->entries[slot].n_refs, &nobody,
                                            (uint32_t)group->size))
            continue;
        reset_block(&region->blocks[slot]);
        shm->slots[shm->rank] = slot;
        shm->blocks[shm->rank] = &region->blocks[slot];
        atomic_store(&region->entries[slot].key, group->key);
        return DSC_OK;
    }
    return DSC_FAIL(DSC_ENOMEM, "group %s: this rank has %d groups open already; destroy some",
                    group->name, (int)DSC__SHM_CHANNELS - 1);
}

uint32_t dsc__shm_find_key(struct dsc__shm_region *region, uint64_t key) {
    for (uint32_t slot = 1; slot < DSC__SHM_CHANNELS; slot++)
        if (atomic_load(&region->entries[slot].key) == key)
            return slot;
    return 0;
}

static bool find_block(struct dsc__shm *shm, int rank, uint64_t key) {
    struct dsc__shm_region *region = dsc__shm_region_of(shm, rank);
    uint32_t slot = dsc__shm_find_key(region, key);
    if (slot == 0)
        return false;
    shm->slots[rank] = slot;
    shm->blocks[rank] = &region->blocks[slot];
    return true;
}

/* Members that will not come. `patience` counts the whole opening. */
static enum dsc_status check_member(struct dsc__shm *shm, int rank, const struct dsc__group *group,
                                    double since) {
    const char *name = group->name;
    const struct dsc_comm_options *options = shm->options;
    struct dsc__shm_region *region = dsc__shm_region_of(shm, rank);
    bool left = atomic_load(&region->blocks[0].left);
    DSC_TRY(dsc__shm_check_broken(shm));
    if (left || dsc__shm_is_dead(shm, rank))
        return DSC_FAIL(DSC_EDEAD, "rank %d (pid %d) %s before it opened group %s",
                        shm->members[rank], (int)region->pid,
                        left ? "closed its communicator" : "died or ended", name);
    if (options->interrupted && options->interrupted(options->interrupt_context))
        return DSC_FAIL(DSC_EINTR, "interrupted while opening group %s", name);
    if (options->timeout_s > 0 && dsc_comm_now() - since >= options->timeout_s)
        return DSC_FAIL(DSC_ETIMEDOUT, "waited %.1f s for rank %d (pid %d) to open group %s",
                        options->timeout_s, shm->members[rank], (int)region->pid, name);
    struct dsc__shm_wait wait = {
        .kind = DSC__SHM_OPEN, .target = group->key, .label = "the opening"};
    return dsc__shm_look_for_standstill(shm, &wait, rank);
}

/* Members come together or not at all soon, so a short wait yields and a long one naps. */
static enum dsc_status await_member(struct dsc__shm *shm, int rank, const struct dsc__group *group,
                                    double since) {
    enum { YIELDS = 1000 };
    double checked = dsc_comm_now();
    for (unsigned n = 0; !find_block(shm, rank, group->key); n++) {
        if (n < YIELDS)
            (void)sched_yield();
        else
            (void)poll(NULL, 0, 1);
        if (dsc_comm_now() - checked < 0.09)
            continue;
        checked = dsc_comm_now();
        DSC_TRY(check_member(shm, rank, group, since));
    }
    return DSC_OK;
}

static enum dsc_status join(struct dsc__shm *shm, const struct dsc__group *group) {
    double since = dsc_comm_now();
    DSC_TRY(claim_block(shm, group));
    for (int r = 0; r < shm->size; r++)
        if (r != shm->rank)
            DSC_TRY(await_member(shm, r, group, since));
    dsc__shm_settle_spins(shm);
    return DSC_OK;
}

enum dsc_status dsc__shm_open_group(void *state, const struct dsc__group *group,
                                    struct dsc_comm **out) {
    const struct dsc__shm *parent = state;
    struct dsc_comm *comm = NULL;
    DSC_TRY(dsc__comm_new(&dsc__shm_backend, group->options, group->rank, group->size, &comm));
    struct dsc__shm *shm = comm->state;
    enum dsc_status status =
        dsc__shm_prepare(shm, group->rank, group->size, &comm->options, parent->node);
    for (int r = 0; status == DSC_OK && r < group->size; r++)
        shm->members[r] = parent->members[group->ranks[r]];
    snprintf(shm->name, sizeof shm->name, "%s", group->name);
    if (status == DSC_OK) {
        status = join(shm, group);
        dsc__shm_end_look(shm);
    }
    if (status != DSC_OK) {
        /* A member that did not come leaves the world broken, and blocks as they are. */
        dsc__shm_give_up(state, status, dsc_last_error());
        dsc__shm_release(shm);
        dsc__comm_delete(comm);
        return status;
    }
    *out = comm;
    return DSC_OK;
}

/* All members have found each other: the name is free for the next group. */
void dsc__shm_group_opened(void *state) {
    struct dsc__shm *shm = state;
    struct dsc__shm_region *region = shm->node->regions[shm->node->rank];
    atomic_store(&region->entries[shm->slots[shm->rank]].key, 0);
}

void dsc__shm_close_group(struct dsc__shm *shm) {
    for (int r = 0; r < shm->size && shm->slots[r] != 0; r++)
        (void)atomic_fetch_sub(&dsc__shm_region_of(shm, r)->entries[shm->slots[r]].n_refs, 1);
}
