/* Rounds of stage 2 where ranks share no memory: they are exchanged by all ranks together.
 *
 * Decides: when. A rank comes to the gate at the end of each backward pass, and at the boundary of
 * its step. While any rank comes from a backward pass, all exchange a round, those at the boundary
 * with nothing; so ranks may run backward unequally often, as elsewhere. Invariant: a round is
 * exchanged by all ranks or by none, and they have the same number of them. */
#include "engine_impl.h"

#include <stdio.h>
#include <string.h>

enum { AT_ROUND = 1, AT_BOUNDARY = 2 };

struct place {
    uint32_t where, folded;
};

void dsc__engine_remote_set_dtypes(struct dsc_engine *e) {
    for (size_t s = 0; s < e->n_spaces; s++)
        if (e->holdings[s].buckets)
            dsc_buckets_set_dtype(e->holdings[s].buckets,
                                  e->any_folded ? DSC_F32 : e->spaces[s].dtype);
}

/* Where all ranks are: whether any of them brings a round. */
static enum dsc_status meet_at_gate(struct dsc_engine *e, uint32_t where, bool *any_round) {
    struct place mine = {where, dsc__engine_any_folded(e)}, other;
    char label[64];
    snprintf(label, sizeof label, "engine: backward passes and step %llu",
             (unsigned long long)e->n_boundaries + 1);
    DSC_TRY(dsc_comm_meet(e->comm, label, 6, &mine, sizeof mine, e->meeting));
    *any_round = e->any_folded = false;
    for (int r = 0; r < e->size; r++) {
        memcpy(&other, e->meeting + (size_t)r * sizeof other, sizeof other);
        *any_round |= other.where == AT_ROUND;
        e->any_folded |= other.folded != 0;
    }
    return DSC_OK;
}

/* sources NULL: nothing. */
static enum dsc_status exchange(struct dsc_engine *e, const struct dsc_source *sources) {
    enum dsc_status status = DSC_OK;
    dsc__engine_remote_set_dtypes(e);
    bool before = dsc__engine_cover(e, true);
    for (size_t s = 0; status == DSC_OK && s < e->n_spaces; s++)
        if (e->holdings[s].buckets)
            status = dsc_buckets_exchange(e->holdings[s].buckets, sources ? &sources[s] : NULL,
                                          NULL, "engine: gradients");
    (void)dsc__engine_cover(e, before);
    e->n_rounds++;
    return status;
}

enum dsc_status dsc__engine_remote_round(struct dsc_engine *e, struct dsc_view *views) {
    bool any_round;
    DSC_TRY(meet_at_gate(e, AT_ROUND, &any_round));
    DSC_TRY(exchange(e, e->sources));
    dsc__engine_forget_sources(e, views);
    return DSC_OK;
}

enum dsc_status dsc__engine_remote_gate(struct dsc_engine *e) {
    bool any_round = e->ways.remote && !e->ways.keeps;
    while (any_round) {
        DSC_TRY(meet_at_gate(e, AT_BOUNDARY, &any_round));
        if (any_round)
            DSC_TRY(exchange(e, NULL));
    }
    return DSC_OK;
}

enum dsc_status dsc__engine_remote_end_rounds(struct dsc_engine *e, struct dsc_view *views,
                                              uint32_t *n_rounds) {
    bool any_round, left = dsc__engine_anything_left(e) || e->n_rounds == 0;
    /* Here all ranks are in the same call, so one that has nothing left joins the round too. */
    DSC_TRY(meet_at_gate(e, left ? AT_ROUND : AT_BOUNDARY, &any_round));
    if (any_round)
        DSC_TRY(exchange(e, e->sources));
    dsc__engine_forget_sources(e, views);
    *n_rounds = e->n_rounds;
    return DSC_OK;
}
