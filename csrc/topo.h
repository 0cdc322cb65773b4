/* Ranks as a grid of named dimensions, and groups of ranks along some of them. Pure arithmetic.
 *
 * Decides: which ranks form which group, for every kind of parallelism. Invariant: the groups of
 * one family hold every rank of the grid exactly once, their members in ascending order, and
 * whoever asks gets the same; nothing here costs more than a few operations per dimension and rank.
 */
#ifndef DSC_TOPO_H
#define DSC_TOPO_H

#include "dsc.h"

enum { DSC_TOPO_MAX_DIMS = 16, DSC_TOPO_NAME_BYTES = 32 };

/* rank = the sum over dimensions of coordinate * stride; the first dimension is the fastest. A
 * plain value: copy it, no init, no destroy. */
struct dsc_topo {
    int n_dims;
    int64_t n_ranks;
    struct dsc_topo_dim {
        char name[DSC_TOPO_NAME_BYTES];
        int64_t size, stride;
    } dim[DSC_TOPO_MAX_DIMS];
};

/* A grid of n_dims dimensions, fastest first. DSC_EINVAL naming the dimension for a size below 1, a
 * name that is empty, too long or there twice, too many dimensions, and over 2^31 - 1 ranks. */
enum dsc_status dsc_topo_make(const char *const names[], const int64_t sizes[], int n_dims,
                              struct dsc_topo *out);
/* The index of a dimension, -1 if the grid has none of this name. */
int dsc_topo_find(const struct dsc_topo *topo, const char *name);
/* Where `rank`, one of the grid, stands along a dimension. */
int64_t dsc_topo_coordinate(const struct dsc_topo *topo, int dim, int64_t rank);
/* The rank with these coordinates, one per dimension. DSC_EINVAL naming the one out of range. */
enum dsc_status dsc_topo_rank(const struct dsc_topo *topo, const int64_t coordinates[],
                              int64_t *out);

/* Groups of ranks that differ along some dimensions only, whole or each in parts. */
struct dsc_topo_family {
    uint32_t dims;   /* bit i: dimension i */
    int64_t n_parts; /* 1: whole groups */
    bool across;     /* a group takes one member of each part, instead of being a part */
};
struct dsc_topo_place {
    int64_t group, member;
};

/* DSC_EINVAL with the numbers where n_parts does not divide what it cuts. */
enum dsc_status dsc_topo_check(const struct dsc_topo *topo, const struct dsc_topo_family *family);
/* Of a family that was checked: ranks of a group, and groups of the grid. */
int64_t dsc_topo_n_members(const struct dsc_topo *topo, const struct dsc_topo_family *family);
int64_t dsc_topo_n_groups(const struct dsc_topo *topo, const struct dsc_topo_family *family);
/* The group of a rank and its number in it; groups count along the other dimensions, the first the
 * fastest, parts faster still. */
struct dsc_topo_place dsc_topo_place(const struct dsc_topo *topo,
                                     const struct dsc_topo_family *family, int64_t rank);
/* The inverse: the rank that stands at a place. */
int64_t dsc_topo_member(const struct dsc_topo *topo, const struct dsc_topo_family *family,
                        struct dsc_topo_place place);

/* What a job asks for. */
struct dsc_topo_sizes {
    int64_t tensor, pipe, context, sequence, expert;
    int64_t expert_tensor; /* 0: as `tensor` */
    int64_t n_instances;   /* parts of the data ranks that have groups of their own */
};
/* The same ranks as two grids, of dimensions tp, ep, dp, pp, cp, sp: ep is 1 for what is not an
 * expert's, cp and sp are 1 for experts, dp is what remains. */
struct dsc_topo_layout {
    struct dsc_topo shared, experts;
};

/* Both grids for n_ranks ranks. `order`: dimensions joined by '-', fastest first; cp and sp that
 * are not in it stand right before dp. DSC_EINVAL with the numbers where sizes do not divide, for
 * an order with an unknown dimension, one twice, or without one whose size is not 1, and where an
 * expert would be in another pipeline stage than what surrounds it. */
enum dsc_status dsc_topo_lay_out(const struct dsc_topo_sizes *sizes, const char *order,
                                 int64_t n_ranks, struct dsc_topo_layout *out);

/* Expert-parallel groups of MoE layers: in each pipeline stage, and for each tensor-parallel rank,
 * experts spread over `expert` neighbours in data order and repeat (dimensions tp, ep, dp, pp), or
 * with data_first the other way round (tp, dp, ep, pp). DSC_EINVAL with the numbers. */
enum dsc_status dsc_topo_experts(int64_t n_ranks, int64_t expert, int64_t tensor, int64_t pipe,
                                 bool data_first, struct dsc_topo *out);

#endif
