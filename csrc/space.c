/* Lays parameters out in their spaces, in model order. */
#include "space.h"

#include "alloc.h"

static int find_or_add(struct dsc_space *spaces, size_t *n_spaces, enum dsc_dtype dtype) {
    for (size_t i = 0; i < *n_spaces; i++)
        if (spaces[i].dtype == dtype)
            return (int)i;
    spaces[*n_spaces].dtype = dtype;
    return (int)(*n_spaces)++;
}

static void place(struct dsc_space *space, const struct dsc_param *param, int index) {
    struct dsc_segment *segment = &space->segments[space->n_segments++];
    *segment = (struct dsc_segment){space->n_elems, param->n_elems, index, param->group};
    space->n_elems += dsc_round_up(param->n_elems, DSC_PARAM_ALIGN);
    space->n_used += param->n_elems;
}

enum dsc_status dsc_space_build(const struct dsc_param *params, size_t n_params,
                                struct dsc_space **out, size_t *n_spaces, int *param_space,
                                size_t *param_segment) {
    struct dsc_space *spaces = NULL;
    size_t n = 0;
    DSC_TRY(dsc_alloc(DSC_TRAIN_DTYPE_COUNT * sizeof *spaces, (void **)&spaces));
    for (size_t i = 0; i < n_params; i++) {
        param_space[i] = -1;
        param_segment[i] = 0;
        if (params[i].n_elems == 0)
            continue;
        int s = find_or_add(spaces, &n, params[i].dtype);
        if (!spaces[s].segments) {
            enum dsc_status status =
                dsc_alloc(n_params * sizeof *spaces[s].segments, (void **)&spaces[s].segments);
            if (status != DSC_OK) {
                dsc_space_free(spaces, n);
                return status;
            }
        }
        param_space[i] = s;
        param_segment[i] = spaces[s].n_segments;
        place(&spaces[s], &params[i], (int)i);
    }
    for (size_t s = 0; s < n; s++)
        spaces[s].n_elems = dsc_round_up(spaces[s].n_elems, DSC_BLOCK);
    *out = spaces;
    *n_spaces = n;
    return DSC_OK;
}

void dsc_space_free(struct dsc_space *spaces, size_t n_spaces) {
    for (size_t s = 0; s < n_spaces; s++)
        dsc_free(spaces[s].segments);
    dsc_free(spaces);
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
