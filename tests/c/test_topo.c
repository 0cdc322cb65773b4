/* Grids of ranks and their groups: against brute force for every factorisation of up to 64 ranks,
 * the documented expert layouts, and errors with the numbers. */
#include "case.h"
#include "random.h"
#include "topo.h"

enum { MOST = 64, N_AXES = 6 };
static const char *const axes[N_AXES] = {"tp", "ep", "dp", "pp", "cp", "sp"};

/* Coordinates of every rank, counted up like an odometer: no arithmetic in common with topo.c. */
static int64_t table[MOST][DSC_TOPO_MAX_DIMS];

static void count_up(const struct dsc_topo *topo) {
    int64_t digits[DSC_TOPO_MAX_DIMS] = {0};
    for (int64_t rank = 0; rank < topo->n_ranks; rank++) {
        memcpy(table[rank], digits, sizeof digits);
        for (int i = 0; i < topo->n_dims && ++digits[i] == topo->dim[i].size; i++)
            digits[i] = 0;
    }
}

static bool differ_along_only(const struct dsc_topo *topo, uint32_t dims, int64_t a, int64_t b) {
    for (int i = 0; i < topo->n_dims; i++)
        if (!(dims >> i & 1) && table[a][i] != table[b][i])
            return false;
    return true;
}

/* The whole groups of a family are what brute force finds, each rank once, ascending. */
static void check_family(const struct dsc_topo *topo, uint32_t dims) {
    const struct dsc_topo_family whole = {.dims = dims, .n_parts = 1};
    CHECK_OK(dsc_topo_check(topo, &whole));
    const int64_t n = dsc_topo_n_members(topo, &whole);
    CHECK_EQ_INT(n * dsc_topo_n_groups(topo, &whole), topo->n_ranks);
    for (int64_t rank = 0; rank < topo->n_ranks; rank++) {
        const struct dsc_topo_place place = dsc_topo_place(topo, &whole, rank);
        CHECK(place.group >= 0 && place.group < dsc_topo_n_groups(topo, &whole));
        CHECK_EQ_INT(dsc_topo_member(topo, &whole, place), rank);
        int64_t k = 0;
        for (int64_t other = 0; other < topo->n_ranks; other++)
            if (differ_along_only(topo, dims, rank, other)) {
                CHECK(other != rank || k == place.member);
                const struct dsc_topo_place at = {place.group, k++};
                CHECK_EQ_INT(dsc_topo_member(topo, &whole, at), other);
            }
        CHECK_EQ_INT(k, n);
    }
}

/* Parts are runs of the whole group's members, and across them one of each. */
static void check_parts(const struct dsc_topo *topo, uint32_t dims, int64_t n_parts) {
    const struct dsc_topo_family whole = {dims, 1, false}, runs = {dims, n_parts, false};
    const struct dsc_topo_family across = {dims, n_parts, true};
    const int64_t n = dsc_topo_n_members(topo, &whole);
    if (n % n_parts) {
        CHECK_EQ_INT(dsc_topo_check(topo, &runs), DSC_EINVAL);
        return;
    }
    CHECK_EQ_INT(dsc_topo_n_members(topo, &runs), n / n_parts);
    CHECK_EQ_INT(dsc_topo_n_members(topo, &across), n_parts);
    for (int64_t rank = 0; rank < topo->n_ranks; rank++) {
        const struct dsc_topo_place place = dsc_topo_place(topo, &whole, rank);
        const struct dsc_topo_place run = dsc_topo_place(topo, &runs, rank);
        const struct dsc_topo_place line = dsc_topo_place(topo, &across, rank);
        CHECK_EQ_INT(dsc_topo_member(topo, &runs, run), rank);
        CHECK_EQ_INT(dsc_topo_member(topo, &across, line), rank);
        CHECK_EQ_INT(line.member * (n / n_parts) + run.member, place.member);
        const struct dsc_topo_place first = {run.group, 0};
        const struct dsc_topo_place start = {place.group, place.member - run.member};
        CHECK_EQ_INT(dsc_topo_member(topo, &runs, first), dsc_topo_member(topo, &whole, start));
    }
}

static void check_grid(const struct dsc_topo *topo) {
    int64_t back;
    count_up(topo);
    for (int64_t rank = 0; rank < topo->n_ranks; rank++) {
        for (int i = 0; i < topo->n_dims; i++)
            CHECK_EQ_INT(dsc_topo_coordinate(topo, i, rank), table[rank][i]);
        CHECK_OK(dsc_topo_rank(topo, table[rank], &back));
        CHECK_EQ_INT(back, rank);
    }
}

static uint32_t mask(const struct dsc_topo *topo, const char *a, const char *b) {
    uint32_t dims = UINT32_C(1) << dsc_topo_find(topo, a);
    return b ? dims | UINT32_C(1) << dsc_topo_find(topo, b) : dims;
}

static int draw(int n) {
    return (int)(next_random() % (uint64_t)n);
}

/* A random order of all six dimensions, or the usual one; pp last, so that every layout is one. */
static void draw_order(char out[32]) {
    int order[N_AXES] = {0, 1, 2, 4, 5, 3};
    for (int i = N_AXES - 2; i > 0; i--) {
        const int j = draw(i + 1), kept = order[i];
        order[i] = order[j], order[j] = kept;
    }
    out[0] = '\0';
    for (int i = 0; i < N_AXES; i++)
        snprintf(out + strlen(out), 32 - strlen(out), "%s%s", i ? "-" : "", axes[order[i]]);
}

static void check_layout(const struct dsc_topo_sizes *sizes, const char *order, int64_t n_ranks) {
    struct dsc_topo_layout layout;
    CHECK_OK(dsc_topo_lay_out(sizes, order, n_ranks, &layout));
    CHECK_EQ_INT(layout.shared.n_ranks, n_ranks);
    CHECK_EQ_INT(layout.experts.n_ranks, n_ranks);
    for (int grid = 0; grid < 2; grid++) {
        const struct dsc_topo *topo = grid ? &layout.experts : &layout.shared;
        check_grid(topo);
        for (int i = 0; i < N_AXES; i++)
            check_family(topo, mask(topo, axes[i], NULL));
        check_family(topo, mask(topo, "tp", "pp"));
        check_family(topo, mask(topo, "dp", "cp"));
        check_family(topo, mask(topo, "dp", "cp") | mask(topo, "sp", NULL));
        check_parts(topo, mask(topo, "dp", "cp"), 1 + draw(4));
    }
    const int pipe = dsc_topo_find(&layout.shared, "pp");
    for (int64_t rank = 0; rank < n_ranks; rank++)
        CHECK_EQ_INT(dsc_topo_coordinate(&layout.shared, pipe, rank),
                     dsc_topo_coordinate(&layout.experts, pipe, rank));
}

/* Every (tensor, pipe, context, sequence) that divides every world of 1 to 64 ranks, with an expert
 * grid drawn from those that fit. */
static void every_factorisation_of_up_to_64_ranks_agrees_with_brute_force(void) {
    int n_layouts = 0;
    for (int64_t n = 1; n <= MOST; n++)
        for (int64_t t = 1; t <= n; t++)
            for (int64_t p = 1; p <= n / t; p++)
                for (int64_t c = 1; c <= n / (t * p); c++)
                    for (int64_t s = 1; s <= n / (t * p * c); s++) {
                        if (n % (t * p * c * s))
                            continue;
                        struct dsc_topo_sizes sizes = {t, p, c, s, 1, 1, 1};
                        char order[32];
                        do {
                            sizes.expert = 1 + draw((int)(n / p));
                            sizes.expert_tensor = 1 + draw((int)(n / p));
                        } while ((n / p) % (sizes.expert * sizes.expert_tensor));
                        draw_order(order);
                        check_layout(&sizes, n_layouts++ % 3 ? order : "tp-ep-dp-pp", n);
                    }
    CHECK(n_layouts > 2000);
}

/* Members of the group of `rank` along one dimension are first, first + step, ... */
static void check_run(const struct dsc_topo *topo, const char *axis, int64_t rank, int64_t first,
                      int64_t step, int64_t n) {
    const struct dsc_topo_family family = {.dims = mask(topo, axis, NULL), .n_parts = 1};
    const struct dsc_topo_place place = dsc_topo_place(topo, &family, rank);
    CHECK_EQ_INT(dsc_topo_n_members(topo, &family), n);
    for (int64_t k = 0; k < n; k++) {
        const struct dsc_topo_place at = {place.group, k};
        CHECK_EQ_INT(dsc_topo_member(topo, &family, at), first + k * step);
    }
}

/* Per stage of `stage` ranks from s: blocks of e, or strided by stage / e. */
static void expert_layouts_are_the_documented_ones(void) {
    for (int64_t n = 1; n <= MOST; n++)
        for (int64_t p = 1; p <= n; p++)
            for (int64_t e = 1; e <= n; e++) {
                struct dsc_topo topo;
                const int64_t stage = n / p, d = stage / e;
                if (n % (p * e)) {
                    CHECK_EQ_INT(dsc_topo_experts(n, e, 1, p, false, &topo), DSC_EINVAL);
                    continue;
                }
                for (int64_t rank = 0; rank < n; rank++) {
                    const int64_t s = rank / stage * stage, i = rank - s;
                    CHECK_OK(dsc_topo_experts(n, e, 1, p, false, &topo));
                    check_run(&topo, "ep", rank, s + i / e * e, 1, e);
                    check_run(&topo, "dp", rank, s + i % e, e, d);
                    CHECK_OK(dsc_topo_experts(n, e, 1, p, true, &topo));
                    check_run(&topo, "dp", rank, s + i / d * d, 1, d);
                    check_run(&topo, "ep", rank, s + i % d, d, e);
                }
            }
}

/* 16 ranks, tensor 2, experts over 4: the groups of one tensor-parallel rank. */
static void experts_with_tensor_parallelism_keep_tensor_ranks_apart(void) {
    struct dsc_topo topo;
    CHECK_OK(dsc_topo_experts(16, 4, 2, 1, false, &topo));
    check_run(&topo, "ep", 11, 9, 2, 4);
    check_run(&topo, "dp", 11, 3, 8, 2);
    CHECK_OK(dsc_topo_experts(16, 4, 2, 1, true, &topo));
    check_run(&topo, "ep", 11, 3, 4, 4);
    check_run(&topo, "dp", 11, 9, 2, 2);
}

static void refuses(const struct dsc_topo_sizes *sizes, const char *order, int64_t n,
                    const char *why) {
    struct dsc_topo_layout out, before;
    memset(&out, 7, sizeof out);
    before = out;
    CHECK_EQ_INT(dsc_topo_lay_out(sizes, order, n, &out), DSC_EINVAL);
    if (!strstr(dsc_last_error(), why)) {
        fprintf(stderr, "'%s' is not in '%s'\n", why, dsc_last_error());
        exit(1);
    }
    CHECK(memcmp(&out, &before, sizeof out) == 0);
}

static void sizes_that_do_not_fit_are_named_with_their_numbers(void) {
    const char *usual = "tp-ep-dp-pp";
    refuses(&(struct dsc_topo_sizes){2, 2, 1, 1, 1, 0, 1}, usual, 6, "6 ranks do not divide");
    refuses(&(struct dsc_topo_sizes){2, 2, 1, 1, 1, 0, 1}, usual, 6, "= 2 x 2 x 1 x 1");
    refuses(&(struct dsc_topo_sizes){1, 1, 1, 1, 3, 0, 1}, usual, 8, "= 1 x 3 x 1");
    refuses(&(struct dsc_topo_sizes){0, 1, 1, 1, 1, 0, 1}, usual, 8, "= 0 x 1 x 1 x 1");
    refuses(&(struct dsc_topo_sizes){INT64_MAX, INT64_MAX, INT64_MAX, INT64_MIN, 1, 0, 1}, usual, 8,
            "-9223372036854775808");
    refuses(&(struct dsc_topo_sizes){1, 1, 1, 1, 1, 0, 1}, usual, 0, "0 ranks");
    refuses(&(struct dsc_topo_sizes){2, 1, 1, 1, 1, 0, 1}, "dp-pp", 8,
            "lacks 'tp', whose size is 2");
    refuses(&(struct dsc_topo_sizes){1, 1, 1, 1, 2, 0, 1}, "dp-pp", 8,
            "lacks 'ep', whose size is 2");
    refuses(&(struct dsc_topo_sizes){2, 1, 1, 1, 1, 0, 1}, "tp", 8, "lacks 'dp', whose size is 4");
    refuses(&(struct dsc_topo_sizes){1, 1, 1, 1, 1, 0, 1}, "tp-dp-tp", 8, "'tp' twice");
    refuses(&(struct dsc_topo_sizes){1, 1, 1, 1, 1, 0, 1}, "tp-dpp", 8, "dimension 'dpp'");
    refuses(&(struct dsc_topo_sizes){1, 1, 1, 1, 1, 0, 1}, "tp--dp", 8, "dimension ''");
    refuses(&(struct dsc_topo_sizes){1, 1, 1, 1, 1, 0, 3}, usual, 8, "instances is 3");
    refuses(&(struct dsc_topo_sizes){1, 1, 1, 1, 4, 0, 4}, usual, 8, "expert-data ranks (2)");
    refuses(&(struct dsc_topo_sizes){4, 1, 1, 1, 1, 1, 4}, usual, 8,
            "data ranks (2, with context)");
    struct dsc_topo_layout layout; /* parts of data and context ranks together */
    CHECK_OK(dsc_topo_lay_out(&(struct dsc_topo_sizes){1, 1, 4, 1, 1, 0, 4}, usual, 8, &layout));
    refuses(&(struct dsc_topo_sizes){2, 2, 1, 1, 2, 1, 1}, "tp-pp-ep-dp", 8, "allowed: pp last");
}

/* cp and sp come from inside the data dimension where the order does not place them. */
static void an_order_may_leave_out_what_has_a_place_of_its_own(void) {
    struct dsc_topo_layout layout;
    CHECK_OK(dsc_topo_lay_out(&(struct dsc_topo_sizes){2, 2, 1, 2, 1, 0, 1}, "TP-ep-Dp-pp", 16,
                              &layout));
    check_run(&layout.shared, "tp", 5, 4, 1, 2);
    check_run(&layout.shared, "sp", 5, 5, 2, 2);
    check_run(&layout.shared, "dp", 5, 1, 4, 2);
    check_run(&layout.shared, "pp", 5, 5, 8, 2);
    CHECK_OK(dsc_topo_lay_out(&(struct dsc_topo_sizes){1, 1, 1, 4, 1, 0, 1}, "sp-dp", 8, &layout));
    check_run(&layout.shared, "sp", 6, 4, 1, 4);
    CHECK_OK(dsc_topo_lay_out(&(struct dsc_topo_sizes){1, 1, 4, 1, 1, 0, 1}, "dp-cp", 8, &layout));
    check_run(&layout.shared, "cp", 1, 1, 2, 4);
}

static void grids_that_cannot_be_are_named(void) {
    struct dsc_topo topo;
    char tall[DSC_TOPO_NAME_BYTES + 1];
    memset(tall, 'x', sizeof tall);
    tall[DSC_TOPO_NAME_BYTES] = '\0';
    const char *const names[] = {"a", "b", "a", "", tall};
    CHECK_EQ_INT(dsc_topo_make(names, (int64_t[]){2, 0}, 2, &topo), DSC_EINVAL);
    CHECK(strstr(dsc_last_error(), "'b' has size 0"));
    CHECK_EQ_INT(dsc_topo_make(names, (int64_t[]){2, 1, 2}, 3, &topo), DSC_EINVAL);
    CHECK(strstr(dsc_last_error(), "'a' is there twice"));
    CHECK_EQ_INT(dsc_topo_make(names + 3, (int64_t[]){1}, 1, &topo), DSC_EINVAL);
    CHECK_EQ_INT(dsc_topo_make(names + 4, (int64_t[]){1}, 1, &topo), DSC_EINVAL);
    CHECK_EQ_INT(dsc_topo_make(names, (int64_t[]){INT32_MAX, 2}, 2, &topo), DSC_EINVAL);
    CHECK_EQ_INT(dsc_topo_make(names, NULL, DSC_TOPO_MAX_DIMS + 1, &topo), DSC_EINVAL);
    CHECK_OK(dsc_topo_make(names, NULL, 0, &topo));
    CHECK_EQ_INT(topo.n_ranks, 1);
    CHECK_OK(dsc_topo_make(names, (int64_t[]){2, 3}, 2, &topo));
    int64_t rank = -5;
    CHECK_EQ_INT(dsc_topo_rank(&topo, (int64_t[]){1, 3}, &rank), DSC_EINVAL);
    CHECK(strstr(dsc_last_error(), "b is 3; allowed: 0 to 2") && rank == -5);
    const struct dsc_topo_family none = {.dims = 3, .n_parts = 0};
    CHECK_EQ_INT(dsc_topo_check(&topo, &none), DSC_EINVAL);
}

static const struct test_case cases[] = {
    CASE(every_factorisation_of_up_to_64_ranks_agrees_with_brute_force),
    CASE(expert_layouts_are_the_documented_ones),
    CASE(experts_with_tensor_parallelism_keep_tensor_ranks_apart),
    CASE(sizes_that_do_not_fit_are_named_with_their_numbers),
    CASE(an_order_may_leave_out_what_has_a_place_of_its_own),
    CASE(grids_that_cannot_be_are_named),
};

RUN_CASES(cases)
