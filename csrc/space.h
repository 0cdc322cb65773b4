/* Spaces: the index of trainable elements in model order, one per reduce group and model dtype, and
 * one more where some of the elements do not count in the norm.
 *
 * Decides: where each parameter's elements stand, and which rank owns them: by element (equal
 * shares), or by whole parameter for optimizers that need all of a parameter at once (cuts stand at
 * the parameter borders nearest to equal shares, and what follows a cut starts a block). A space
 * owns no parameter memory; a view says, for one call, where a parameter and its gradient are.
 * Invariant: segments are sorted, start at multiples of DSC_PARAM_ALIGN and do not overlap; n_elems
 * and every cut are multiples of DSC_BLOCK; what no segment covers is padding and counts as zero.
 */
#ifndef DSC_SPACE_H
#define DSC_SPACE_H

#include "dsc.h"
#include "partition.h"

/* A trainable parameter, as the caller describes it. */
struct dsc_param {
    size_t n_elems;
    enum dsc_dtype dtype; /* a training dtype */
    int group;            /* parameter group, for hyper-parameters */
    int reduce;           /* reduce group: ranks over which its gradients are added up */
    bool uncounted;       /* not in the norm here: another rank counts the same values */
};

/* A parameter's memory, borrowed for one call: n_elems in storage order. */
struct dsc_view {
    void *data;       /* of element `begin` and those after it: all that the call touches */
    size_t begin;     /* 0, unless this rank has only the part that it steps */
    const void *grad; /* NULL: none, counts as zero */
    enum dsc_dtype grad_dtype;
    bool frozen; /* not to be stepped now: it requires no gradient */
};

struct dsc_segment {
    size_t begin, n_elems;
    int param, group;
};

struct dsc_space {
    enum dsc_dtype dtype;
    int reduce;
    bool uncounted;
    size_t n_elems; /* with padding */
    size_t n_used;  /* without */
    size_t n_segments;
    struct dsc_segment *segments;
    int n_ranks;
    size_t *cuts; /* n_ranks + 1, ascending from 0 to n_elems */
};

/* Into how many parts spaces are cut. */
struct dsc_cutting {
    const int *n_ranks; /* per reduce group */
    size_t n_reduce;
    bool whole; /* at parameter borders only */
};

/* Builds one space per reduce group, training dtype and kind of counting that occur together, in
 * order of first occurrence; *out is an array of *n_spaces. Zero-element parameters are in none.
 * `param_space[i]` receives the space of parameter i (-1: none) and `param_segment[i]` its segment.
 */
enum dsc_status dsc_space_build(const struct dsc_param *params, size_t n_params,
                                const struct dsc_cutting *cutting, struct dsc_space **out,
                                size_t *n_spaces, int *param_space, size_t *param_segment);
void dsc_space_free(struct dsc_space *spaces, size_t n_spaces);

/* Index of the first segment that ends behind `elem`; n_segments where there is none. */
size_t dsc_space_find(const struct dsc_space *space, size_t elem);

/* What a rank owns; maybe nothing. */
static inline struct dsc_range dsc_space_owned(const struct dsc_space *space, int rank) {
    return (struct dsc_range){space->cuts[rank], space->cuts[rank + 1]};
}
/* Elements of the rank that owns most. */
size_t dsc_space_most_owned(const struct dsc_space *space);

static inline struct dsc_range dsc_segment_range(const struct dsc_segment *segment) {
    return (struct dsc_range){segment->begin, segment->begin + segment->n_elems};
}

/* Walks the parts of segments inside a range:
 *   struct dsc_parts it = dsc_parts(space, range);
 *   while (dsc_parts_next(&it)) use it.segment and it.part; */
struct dsc_parts {
    const struct dsc_space *space;
    struct dsc_range range;
    size_t next;
    const struct dsc_segment *segment;
    struct dsc_range
        part; /* in elements of the space; part.begin - segment->begin is in the parameter */
};

static inline struct dsc_parts dsc_parts(const struct dsc_space *space, struct dsc_range range) {
    struct dsc_parts parts = {space, range, dsc_space_find(space, range.begin), NULL, range};
    return parts;
}

static inline bool dsc_parts_next(struct dsc_parts *parts) {
    if (parts->next >= parts->space->n_segments)
        return false;
    parts->segment = &parts->space->segments[parts->next++];
    if (parts->segment->begin >= parts->range.end)
        return false;
    parts->part = dsc_range_cut(dsc_segment_range(parts->segment), parts->range);
    return true;
}

#endif
