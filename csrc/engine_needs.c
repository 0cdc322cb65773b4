/* Which stage holds what; see engine_needs.h. Pure arithmetic. */
#include "engine_needs.h"

enum dsc_status dsc_engine_check_options(const struct dsc_engine_options *options) {
    if (options->stage < 0 || options->stage > 3)
        return DSC_FAIL(DSC_EINVAL, "zero_optimization.stage is %d; allowed: 0, 1, 2, 3",
                        options->stage);
    if (options->no_masters &&
        (options->optim == DSC_OPTIM_LAMB || options->optim == DSC_OPTIM_FOREIGN))
        return DSC_FAIL(DSC_ENOTYET,
                        "fp16_master_weights_and_grads and bf16_master_weights_and_grads "
                        "with LAMB, or with an optimizer that torch runs: not yet; allowed: Adam, "
                        "AdamW, SGD, Adagrad, Lion");
    return DSC_OK;
}

bool dsc_engine_keeps_whole(const struct dsc_engine_options *options) {
    return options->whole || dsc_optim_info(options->optim)->whole;
}

struct dsc_engine_ways dsc_engine_ways_of(const struct dsc_engine_options *options, int n_first,
                                          bool remote) {
    bool alone = n_first == 1;
    return (struct dsc_engine_ways){
        .alone = alone,
        .remote = remote,
        .early = !alone && !remote && (options->stage >= 2 || options->overlap),
        .keeps = alone || options->stage < 2,
        .folds = !options->narrow_sums,
    };
}

struct dsc_space_needs dsc_engine_needs(const struct dsc_engine_options *options,
                                        const struct dsc_engine_ways *ways,
                                        const struct dsc_space *space, int rank) {
    bool is_16bit = space->dtype != DSC_F32, shared = space->n_ranks > 1;
    struct dsc_space_needs needs = {
        .stepped = {0, space->n_elems},
        .owns = options->stage > 0,
        .master = is_16bit && !options->no_masters,
        /* SGD's momentum is there from the first step that has one. */
        .n_states = options->optim == DSC_OPTIM_SGD ? 0 : dsc_optim_info(options->optim)->n_states,
        .grads = options->optim == DSC_OPTIM_FOREIGN,
        /* At stage 3 owners step where all ranks read, or nobody has the whole. */
        .spread = shared && options->stage > 0 && options->stage < 3,
        .shared = shared,
        .keeps = ways->keeps || !shared,
        .buckets =
            {
                .early = ways->early,
                .shared_sums = options->stage == 0,
                .remote = ways->remote,
                .bucket_elems = options->bucket_elems,
                .wire = options->wire,
                .accum = options->narrow_sums ? space->dtype : DSC_F32,
            },
    };
    if (needs.owns)
        needs.stepped = dsc_space_owned(space, rank);
    if (options->swap.folder && dsc_range_size(needs.stepped) > 0) {
        needs.n_filed = needs.master + dsc_optim_info(options->optim)->n_states;
        /* The others see all of a parameter at once, through the mapping. */
        bool streams = options->optim != DSC_OPTIM_LAMB && options->optim != DSC_OPTIM_FOREIGN;
        needs.n_buffers = streams ? options->swap.n_buffers : 0;
    }
    needs.local = is_16bit && needs.keeps && ways->folds && options->many_micro_steps;
    return needs;
}
