/* Mixed-radix arithmetic: a rank is a number whose digits are its coordinates.
 *
 * A group along dimensions D fixes the other digits: members count through the digits of D, groups
 * through the others. Invariant: strides ascend with the dimensions, so that members do too. */
#include "topo.h"

#include <ctype.h>
#include <stdio.h>
#include <string.h>

static enum dsc_status check_dim(const struct dsc_topo *before, const char *name, int64_t size) {
    if (!name[0] || strlen(name) >= DSC_TOPO_NAME_BYTES)
        return DSC_FAIL(DSC_EINVAL, "dimension '%.40s': a name has 1 to %d bytes", name,
                        DSC_TOPO_NAME_BYTES - 1);
    if (dsc_topo_find(before, name) >= 0)
        return DSC_FAIL(DSC_EINVAL, "dimension '%s' is there twice", name);
    if (size < 1)
        return DSC_FAIL(DSC_EINVAL, "dimension '%s' has size %lld; allowed: >= 1", name,
                        (long long)size);
    return DSC_OK;
}

enum dsc_status dsc_topo_make(const char *const names[], const int64_t sizes[], int n_dims,
                              struct dsc_topo *out) {
    struct dsc_topo topo = {.n_ranks = 1};
    if (n_dims < 0 || n_dims > DSC_TOPO_MAX_DIMS)
        return DSC_FAIL(DSC_EINVAL, "a grid of %d dimensions; allowed: at most %d", n_dims,
                        DSC_TOPO_MAX_DIMS);
    for (; topo.n_dims < n_dims; topo.n_dims++) {
        struct dsc_topo_dim *dim = &topo.dim[topo.n_dims];
        DSC_TRY(check_dim(&topo, names[topo.n_dims], sizes[topo.n_dims]));
        snprintf(dim->name, sizeof dim->name, "%s", names[topo.n_dims]);
        dim->size = sizes[topo.n_dims];
        dim->stride = topo.n_ranks;
        if (dim->size > INT32_MAX / topo.n_ranks)
            return DSC_FAIL(DSC_EINVAL,
                            "a grid of over 2^31 - 1 ranks: '%s' has size %lld after %lld",
                            dim->name, (long long)dim->size, (long long)dim->stride);
        topo.n_ranks *= dim->size;
    }
    *out = topo;
    return DSC_OK;
}

int dsc_topo_find(const struct dsc_topo *topo, const char *name) {
    for (int i = 0; i < topo->n_dims; i++)
        if (strcmp(topo->dim[i].name, name) == 0)
            return i;
    return -1;
}

int64_t dsc_topo_coordinate(const struct dsc_topo *topo, int dim, int64_t rank) {
    return rank / topo->dim[dim].stride % topo->dim[dim].size;
}

enum dsc_status dsc_topo_rank(const struct dsc_topo *topo, const int64_t coordinates[],
                              int64_t *out) {
    int64_t rank = 0;
    for (int i = 0; i < topo->n_dims; i++) {
        const struct dsc_topo_dim *dim = &topo->dim[i];
        if (coordinates[i] < 0 || coordinates[i] >= dim->size)
            return DSC_FAIL(DSC_EINVAL, "%s is %lld; allowed: 0 to %lld", dim->name,
                            (long long)coordinates[i], (long long)dim->size - 1);
        rank += coordinates[i] * dim->stride;
    }
    *out = rank;
    return DSC_OK;
}

/* ---- groups ---- */

/* Ranks of a whole group: the product of the sizes of `dims`. */
static int64_t volume(const struct dsc_topo *topo, uint32_t dims) {
    int64_t product = 1;
    for (int i = 0; i < topo->n_dims; i++)
        if (dims >> i & 1)
            product *= topo->dim[i].size;
    return product;
}

/* The digits of `rank` along `dims`, as one number. */
static int64_t fold(const struct dsc_topo *topo, uint32_t dims, int64_t rank) {
    int64_t folded = 0, radix = 1;
    for (int i = 0; i < topo->n_dims; i++)
        if (dims >> i & 1) {
            folded += dsc_topo_coordinate(topo, i, rank) * radix;
            radix *= topo->dim[i].size;
        }
    return folded;
}

/* The inverse: the rank with these digits along `dims` and zeros elsewhere. */
static int64_t unfold(const struct dsc_topo *topo, uint32_t dims, int64_t folded) {
    int64_t rank = 0;
    for (int i = 0; i < topo->n_dims; i++)
        if (dims >> i & 1) {
            rank += folded % topo->dim[i].size * topo->dim[i].stride;
            folded /= topo->dim[i].size;
        }
    return rank;
}

enum dsc_status dsc_topo_check(const struct dsc_topo *topo, const struct dsc_topo_family *family) {
    const int64_t n = volume(topo, family->dims);
    if (family->n_parts < 1 || n % family->n_parts)
        return DSC_FAIL(DSC_EINVAL, "groups of %lld ranks do not divide into %lld parts",
                        (long long)n, (long long)family->n_parts);
    return DSC_OK;
}

int64_t dsc_topo_n_members(const struct dsc_topo *topo, const struct dsc_topo_family *family) {
    return family->across ? family->n_parts : volume(topo, family->dims) / family->n_parts;
}

int64_t dsc_topo_n_groups(const struct dsc_topo *topo, const struct dsc_topo_family *family) {
    return topo->n_ranks / dsc_topo_n_members(topo, family);
}

struct dsc_topo_place dsc_topo_place(const struct dsc_topo *topo,
                                     const struct dsc_topo_family *family, int64_t rank) {
    const int64_t whole = fold(topo, ~family->dims, rank),
                  position = fold(topo, family->dims, rank);
    const int64_t share = volume(topo, family->dims) / family->n_parts;
    const int64_t part = position / share, inside = position % share;
    if (family->across)
        return (struct dsc_topo_place){whole * share + inside, part};
    return (struct dsc_topo_place){whole * family->n_parts + part, inside};
}

int64_t dsc_topo_member(const struct dsc_topo *topo, const struct dsc_topo_family *family,
                        struct dsc_topo_place place) {
    const int64_t share = volume(topo, family->dims) / family->n_parts;
    int64_t whole, part, inside;
    if (family->across) {
        whole = place.group / share, inside = place.group % share;
        part = place.member;
    } else {
        whole = place.group / family->n_parts, part = place.group % family->n_parts;
        inside = place.member;
    }
    return unfold(topo, ~family->dims, whole) + unfold(topo, family->dims, part * share + inside);
}

/* ---- layouts ---- */

enum axis { TP, EP, DP, PP, CP, SP, N_AXES };
static const char *const axis_names[N_AXES] = {"tp", "ep", "dp", "pp", "cp", "sp"};

/* The six dimensions in an order. */
struct axes {
    int n;
    enum axis axis[N_AXES];
};

static bool has(const struct axes *axes, enum axis axis) {
    for (int i = 0; i < axes->n; i++)
        if (axes->axis[i] == axis)
            return true;
    return false;
}

/* Puts an axis in front of the one at `at`. */
static void insert(struct axes *axes, int at, enum axis axis) {
    memmove(&axes->axis[at + 1], &axes->axis[at], (size_t)(axes->n - at) * sizeof axes->axis[0]);
    axes->axis[at] = axis;
    axes->n++;
}

/* The axis that the first n bytes of a text name, in either case; N_AXES for none. */
static enum axis axis_of(const char *text, size_t n) {
    int i = 0;
    while (i < N_AXES && !(n == 2 && tolower((unsigned char)text[0]) == axis_names[i][0] &&
                           tolower((unsigned char)text[1]) == axis_names[i][1]))
        i++;
    return (enum axis)i;
}

static enum dsc_status read_order(const char *order, struct axes *axes) {
    axes->n = 0;
    for (const char *at = order;; at++) {
        const size_t n = strcspn(at, "-");
        const enum axis axis = axis_of(at, n);
        if (axis == N_AXES)
            return DSC_FAIL(DSC_EINVAL,
                            "the order '%.60s' has the dimension '%.*s'; allowed: tp, ep, dp, pp, "
                            "cp, sp, joined by '-'",
                            order, (int)dsc_min(n, 20), at);
        if (has(axes, axis))
            return DSC_FAIL(DSC_EINVAL, "the order '%.60s' has '%s' twice", order,
                            axis_names[axis]);
        insert(axes, axes->n, axis);
        at += n;
        if (!*at)
            return DSC_OK;
    }
}

/* Adds what the order does not name: cp and sp before dp, others, whose size must be 1, anywhere.
 */
static enum dsc_status complete_order(const char *order, const int64_t shared[N_AXES],
                                      const int64_t experts[N_AXES], struct axes *axes) {
    for (int axis = 0; axis < N_AXES; axis++) {
        if (has(axes, (enum axis)axis))
            continue;
        const int64_t size = shared[axis] > experts[axis] ? shared[axis] : experts[axis];
        int at = axes->n;
        if (axis == CP || axis == SP)
            for (at = 0; at < axes->n && axes->axis[at] != DP;)
                at++;
        else if (size != 1)
            return DSC_FAIL(DSC_EINVAL, "the order '%.60s' lacks '%s', whose size is %lld", order,
                            axis_names[axis], (long long)size);
        insert(axes, at, (enum axis)axis);
    }
    return DSC_OK;
}

static enum dsc_status make_grid(const struct axes *axes, const int64_t sizes[N_AXES],
                                 struct dsc_topo *out) {
    const char *names[N_AXES] = {0};
    int64_t ordered[N_AXES] = {0};
    for (int i = 0; i < axes->n; i++) {
        names[i] = axis_names[axes->axis[i]];
        ordered[i] = sizes[axes->axis[i]];
    }
    return dsc_topo_make(names, ordered, axes->n, out);
}

/* n_ranks / product of the factors; `what` says what each of them is. DSC_EINVAL where that is not
 * a whole number. */
static enum dsc_status divide(int64_t n_ranks, const char *what, const int64_t factors[], int n,
                              int64_t *out) {
    int64_t rest = n_ranks;
    char shown[N_AXES * 24] = "";
    for (int i = 0, used = 0; i < n; i++) {
        used += snprintf(shown + used, sizeof shown - (size_t)used, "%s%lld", i ? " x " : "",
                         (long long)factors[i]);
        rest = rest > 0 && factors[i] > 0 && rest % factors[i] == 0 ? rest / factors[i] : 0;
    }
    if (rest < 1)
        return DSC_FAIL(DSC_EINVAL, "%lld ranks do not divide by %s = %s", (long long)n_ranks, what,
                        shown);
    *out = rest;
    return DSC_OK;
}

/* What cannot be seen from one grid. */
static enum dsc_status check_layout(const struct dsc_topo_sizes *sizes, const char *order,
                                    const struct dsc_topo_layout *layout) {
    const int pipe = dsc_topo_find(&layout->shared, "pp"),
              data = dsc_topo_find(&layout->shared, "dp");
    const int64_t stride = layout->shared.dim[pipe].stride;
    const int64_t of_experts = layout->experts.dim[pipe].stride;
    if (sizes->pipe > 1 && stride != of_experts)
        return DSC_FAIL(DSC_EINVAL,
                        "the order '%.60s' puts neighbouring pipeline stages %lld ranks apart, and "
                        "those of experts %lld; allowed: pp last",
                        order, (long long)stride, (long long)of_experts);
    const int64_t n_data = layout->shared.dim[data].size * sizes->context;
    const int64_t n_expert_data = layout->experts.dim[data].size;
    if (sizes->n_instances < 1 || n_data % sizes->n_instances || n_expert_data % sizes->n_instances)
        return DSC_FAIL(
            DSC_EINVAL,
            "num_distributed_optimizer_instances is %lld and must divide the data ranks "
            "(%lld, with context) and the expert-data ranks (%lld)",
            (long long)sizes->n_instances, (long long)n_data, (long long)n_expert_data);
    return DSC_OK;
}

enum dsc_status dsc_topo_lay_out(const struct dsc_topo_sizes *sizes, const char *order,
                                 int64_t n_ranks, struct dsc_topo_layout *out) {
    const int64_t expert_tensor = sizes->expert_tensor ? sizes->expert_tensor : sizes->tensor;
    int64_t shared[N_AXES] = {sizes->tensor, 1, 0, sizes->pipe, sizes->context, sizes->sequence};
    int64_t experts[N_AXES] = {expert_tensor, sizes->expert, 0, sizes->pipe, 1, 1};
    struct axes axes;
    struct dsc_topo_layout layout;
    DSC_TRY(divide(n_ranks, "tensor x pipeline x context x sequence",
                   (int64_t[]){sizes->tensor, sizes->pipe, sizes->context, sizes->sequence}, 4,
                   &shared[DP]));
    DSC_TRY(divide(n_ranks, "expert tensor x expert x pipeline",
                   (int64_t[]){expert_tensor, sizes->expert, sizes->pipe}, 3, &experts[DP]));
    DSC_TRY(read_order(order, &axes));
    DSC_TRY(complete_order(order, shared, experts, &axes));
    DSC_TRY(make_grid(&axes, shared, &layout.shared));
    DSC_TRY(make_grid(&axes, experts, &layout.experts));
    DSC_TRY(check_layout(sizes, order, &layout));
    *out = layout;
    return DSC_OK;
}

enum dsc_status dsc_topo_experts(int64_t n_ranks, int64_t expert, int64_t tensor, int64_t pipe,
                                 bool data_first, struct dsc_topo *out) {
    const struct axes axes = {4, {TP, data_first ? DP : EP, data_first ? EP : DP, PP}};
    int64_t sizes[N_AXES] = {tensor, expert, 0, pipe, 1, 1};
    DSC_TRY(divide(n_ranks, "tensor x expert x pipeline", (int64_t[]){tensor, expert, pipe}, 3,
                   &sizes[DP]));
    return make_grid(&axes, sizes, out);
}
