/* Lays parameters out in their spaces, in model order, and cuts spaces into ranks' parts. */
#include "space.h"

#include "alloc.h"

static int find(const struct dsc_space *spaces, size_t n_spaces, const struct dsc_param *param) {
    for (size_t i = 0; i < n_spaces; i++)
        if (spaces[i].dtype == param->dtype && spaces[i].reduce == param->reduce &&
            spaces[i].uncounted == param->uncounted)
            return (int)i;
    return -1;
}

static enum dsc_status add(struct dsc_space *spaces, size_t *n_spaces,
                           const struct dsc_param *param, size_t n_params, int n_ranks) {
    struct dsc_space *space = &spaces[*n_spaces];
    space->dtype = param->dtype;
    space->reduce = param->reduce;
    space->uncounted = param->uncounted;
    space->n_ranks = n_ranks;
    (*n_spaces)++; /* from here on dsc_space_free knows it */
    DSC_TRY(dsc_alloc(n_params * sizeof *space->segments, (void **)&space->segments));
    return dsc_alloc(((size_t)n_ranks + 1) * sizeof *space->cuts, (void **)&space->cuts);
}

/* Where parameters stay whole: how far the cuts of one space have come. */
struct cutter {
    size_t total; /* elements with the padding of parameters, without that of cuts */
    size_t done;  /* of them, placed */
    int rank;     /* whose part is being filled */
};

/* Begins the next rank's part where the border before the next parameter (of n elements) is at
 * least as near to the equal share as the border behind it. */
static void cut_before(struct dsc_space *space, struct cutter *cutter, size_t n) {
    size_t before = cutter->done, behind = before + n;
    while (cutter->rank + 1 < space->n_ranks) {
        size_t target = cutter->total / (size_t)space->n_ranks * ((size_t)cutter->rank + 1) +
                        cutter->total % (size_t)space->n_ranks * ((size_t)cutter->rank + 1) /
                            (size_t)space->n_ranks;
        if (target > before && target - before > (behind > target ? behind - target : 0))
            return;
        space->n_elems = dsc_round_up(space->n_elems, DSC_BLOCK);
        space->cuts[++cutter->rank] = space->n_elems;
    }
}

static void place(struct dsc_space *space, const struct dsc_param *param, int index) {
    struct dsc_segment *segment = &space->segments[space->n_segments++];
    *segment = (struct dsc_segment){space->n_elems, param->n_elems, index, param->group};
    space->n_elems += dsc_round_up(param->n_elems, DSC_PARAM_ALIGN);
    space->n_used += param->n_elems;
}

/* What is left to cut once every parameter has its place. */
static void finish(struct dsc_space *space, bool whole, const struct cutter *cutter) {
    space->n_elems = dsc_round_up(space->n_elems, DSC_BLOCK);
    for (int r = whole ? cutter->rank + 1 : 1; r <= space->n_ranks; r++)
        space->cuts[r] =
            whole ? space->n_elems : dsc_partition_range(space->n_elems, r - 1, space->n_ranks).end;
}

/* Finds out which spaces there are, and how much each will hold. */
static enum dsc_status add_all(const struct dsc_param *params, size_t n_params,
                               const struct dsc_cutting *cutting, struct dsc_space *spaces,
                               size_t *n_spaces, struct cutter *cutters) {
    for (size_t i = 0; i < n_params; i++) {
        const struct dsc_param *param = &params[i];
        if (param->n_elems == 0)
            continue;
        if (find(spaces, *n_spaces, param) < 0)
            DSC_TRY(add(spaces, n_spaces, param, n_params, cutting->n_ranks[param->reduce]));
        cutters[find(spaces, *n_spaces, param)].total +=
            dsc_round_up(param->n_elems, DSC_PARAM_ALIGN);
    }
    return DSC_OK;
}

enum dsc_status dsc_space_build(const struct dsc_param *params, size_t n_params,
                                const struct dsc_cutting *cutting, struct dsc_space **out,
                                size_t *n_spaces, int *param_space, size_t *param_segment) {
    struct dsc_space *spaces = NULL;
    struct cutter *cutters = NULL;
    size_t n = 0, most = 2 * DSC_TRAIN_DTYPE_COUNT * cutting->n_reduce;
    DSC_TRY(dsc_alloc(most * sizeof *spaces, (void **)&spaces));
    enum dsc_status status = dsc_alloc(most * sizeof *cutters, (void **)&cutters);
    if (status == DSC_OK)
        status = add_all(params, n_params, cutting, spaces, &n, cutters);
    if (status != DSC_OK) {
        dsc_space_free(spaces, n);
        dsc_free(cutters);
        return status;
    }
    for (size_t i = 0; i < n_params; i++) {
        param_space[i] = params[i].n_elems ? find(spaces, n, &params[i]) : -1;
        param_segment[i] = 0;
        if (param_space[i] < 0)
            continue;
        struct dsc_space *space = &spaces[param_space[i]];
        struct cutter *cutter = &cutters[param_space[i]];
        size_t n_elems = dsc_round_up(params[i].n_elems, DSC_PARAM_ALIGN);
        if (cutting->whole)
            cut_before(space, cutter, n_elems);
        cutter->done += n_elems;
        param_segment[i] = space->n_segments;
        place(space, &params[i], (int)i);
    }
    for (size_t s = 0; s < n; s++)
        finish(&spaces[s], cutting->whole, &cutters[s]);
    dsc_free(cutters);
    *out = spaces;
    *n_spaces = n;
    return DSC_OK;
}

void dsc_space_free(struct dsc_space *spaces, size_t n_spaces) {
    for (size_t s = 0; s < n_spaces; s++) {
        dsc_free(spaces[s].segments);
        dsc_free(spaces[s].cuts);
    }
    dsc_free(spaces);
}

size_t dsc_space_most_owned(const struct dsc_space *space) {
    size_t most = 0;
    for (int r = 0; r < space->n_ranks; r++)
        most = dsc_max(most, dsc_range_size(dsc_space_owned(space, r)));
    return most;
}

size_t dsc_space_find(const struct dsc_space *space, size_t elem) {
    size_t low = 0, high = space->n_segments;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        const struct dsc_segment *segment = &space->segments[middle];
        if (segment->begin + segment->n_elems > elem)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}
