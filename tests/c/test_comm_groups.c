/* Groups: communicators of some of the ranks, with their own memory and numbers; and ranks that
 * wait for each other in different ones. */
#include "comm_ranks.h"

#include "comm/backend.h"

static struct dsc_comm *group_of(struct dsc_comm *world, const char *name, int n,
                                 const int *ranks) {
    struct dsc_comm *group = NULL;
    CHECK_OK(dsc_comm_open_group(world, NULL, ranks, n, name, &group));
    CHECK_EQ_INT(dsc_comm_size(group), n);
    CHECK(ranks[dsc_comm_rank(group)] == dsc_comm_rank(world) || n == 1);
    return group;
}

static float sum_over(struct dsc_comm *comm, float x) {
    struct dsc_coll coll = {.src = &x, .dst = &x, .n_elems = 1, .dtype = DSC_F32, .op = DSC_SUM};
    CHECK_OK(dsc_comm_all_reduce(comm, &coll));
    return x;
}

/* ---- arguments ---- */

static void refused_body(struct dsc_comm *world, int rank, void *arg) {
    struct dsc_comm *group = NULL;
    (void)arg;
    CHECK(dsc_comm_open_group(world, NULL, (int[]){0, 2}, 2, "g", &group) == DSC_EINVAL);
    CHECK_TEXT("rank 2; 0 to 1");
    CHECK(dsc_comm_open_group(world, NULL, (int[]){1, 1}, 2, "g", &group) == DSC_EINVAL);
    CHECK_TEXT("rank 1 twice");
    CHECK(dsc_comm_open_group(world, NULL, (int[]){1 - rank}, 1, "g", &group) == DSC_EINVAL);
    CHECK_TEXT("not a member");
    CHECK(dsc_comm_open_group(world, NULL, (int[]){0, 1}, 2, "", &group) == DSC_EINVAL);
    CHECK_OK(dsc_comm_barrier(world, NULL)); /* nothing above broke it */
}

static void wrong_groups_are_refused(void) {
    run_threads(2, 5, false, refused_body, NULL);
}

/* ---- values ---- */

static void values_body(struct dsc_comm *world, int rank, void *arg) {
    struct dsc_comm *pair = rank % 2 ? group_of(world, "odd", 2, (int[]){3, 1})
                                     : group_of(world, "even", 2, (int[]){0, 2});
    struct dsc_comm *all = group_of(world, "all", 4, (int[]){3, 2, 1, 0});
    struct dsc_comm *one = group_of(world, "alone", 1, &rank);
    float got[4], mine = (float)rank;
    struct dsc_coll gather = {.src = &mine, .dst = got, .n_elems = 1, .dtype = DSC_F32};
    (void)arg;
    for (int i = 0; i < 100; i++) {
        CHECK(sum_over(pair, (float)(rank + i)) == (float)(rank % 2 ? 4 : 2) + 2 * (float)i);
        CHECK(sum_over(i % 2 ? all : world, mine) == 6);
        CHECK(sum_over(one, mine) == mine);
    }
    CHECK_OK(dsc_comm_all_gather(all, &gather));
    for (int i = 0; i < 4; i++)
        CHECK(got[i] == (float)(3 - i));
    dsc_comm_close(pair);
    dsc_comm_close(all);
    dsc_comm_close(one);
}

static void groups_reduce_over_their_own_ranks(void) {
    run_threads(4, 8, false, values_body, NULL);
}

/* More often than there is room at a time, with a name that returns; large data dirties blocks. */
static void reopen_body(struct dsc_comm *world, int rank, void *arg) {
    enum { N = 300000 };
    static float x[RANKS_MAX][N];
    (void)arg;
    for (int i = 0; i < 400; i++) {
        struct dsc_comm *group = group_of(world, "again", 2, (int[]){1, 0});
        struct dsc_coll coll = {
            .src = x[rank], .dst = x[rank], .n_elems = i % 100 ? 1 : N, .dtype = DSC_F32};
        x[rank][0] = (float)i;
        CHECK_OK(dsc_comm_all_reduce(group, &coll));
        CHECK(x[rank][0] == 2 * (float)i);
        dsc_comm_close(group);
    }
}

static void groups_can_be_opened_again_and_again(void) {
    run_threads(2, 8, false, reopen_body, NULL);
}

static void orphan_body(struct dsc_comm *world, int rank, void *arg) {
    struct dsc_comm *group = group_of(world, "orphan", 2, (int[]){0, 1});
    (void)arg;
    dsc_comm_close(world);
    CHECK(sum_over(group, (float)rank) == 1);
    dsc_comm_close(group);
}

static void a_group_outlives_its_parent(void) {
    for (int i = 0; i < 50; i++)
        run_threads(2, 8, true, orphan_body, NULL);
}

/* ---- windows and bells ---- */

/* Each member writes its place; whoever sees another group's memory sees another mark. */
static void window_once(struct dsc_comm *group, int mark, size_t n) {
    struct dsc_window *window = NULL;
    int mine = dsc_comm_rank(group);
    CHECK_OK(dsc_comm_window_open(group, n, "w", &window));
    CHECK(window->base[mine][0] == 0 && window->base[mine][n - 1] == 0);
    window->base[mine][n - 1] = (char)(mark + mine);
    CHECK_OK(dsc_comm_barrier(group, NULL));
    for (int r = 0; r < dsc_comm_size(group); r++)
        CHECK_EQ_INT(window->base[r][n - 1], mark + r);
    dsc_comm_window_close(group, window);
}

/* Ranks in two groups open windows of one right after the other's: what one rank has published for
 * the first must not be lost to one that comes late. */
static void windows_body(struct dsc_comm *world, int rank, void *arg) {
    struct dsc_comm *pair = rank % 2 ? group_of(world, "odd", 2, (int[]){3, 1})
                                     : group_of(world, "even", 2, (int[]){0, 2});
    struct dsc_comm *three = rank > 0 ? group_of(world, "three", 3, (int[]){2, 3, 1}) : NULL;
    unsigned seed = (unsigned)rank + 3;
    (void)arg;
    for (int i = 0; i < 50; i++) {
        window_once(pair, rank % 2 ? 10 : 20, 4097);
        if (next_random(&seed) % 8 == 0)
            nap_ms(1);
        if (three)
            window_once(three, 30, 1 << 21);
    }
    dsc_comm_close(three);
    dsc_comm_close(pair);
}

static void groups_have_windows_of_their_own(void) {
    run_threads(4, 8, false, windows_body, NULL);
}

/* A bell rings for one place of one group. */
static void bells_body(struct dsc_comm *world, int rank, void *arg) {
    struct dsc_comm *pair =
        group_of(world, rank % 2 ? "odd" : "even", 2, rank % 2 ? (int[]){3, 1} : (int[]){0, 2});
    struct dsc_window *window = NULL;
    int mine = dsc_comm_rank(pair), n = rank % 2 ? 300 : 170;
    (void)arg;
    CHECK_OK(dsc_comm_window_open(pair, sizeof(int), "turns", &window));
    uint32_t of_world = dsc_comm_bell(world);
    _Atomic int *turn = (void *)window->base[0];
    for (int i = mine; i < n; i += 2) {
        for (;;) {
            uint32_t seen = dsc_comm_bell(pair);
            if (atomic_load(turn) == i)
                break;
            CHECK_OK(dsc_comm_wait_bell(pair, seen, "my turn", dsc_comm_now()));
        }
        atomic_store(turn, i + 1);
        dsc_comm_ring_others(pair);
    }
    CHECK_OK(dsc_comm_barrier(pair, NULL));
    CHECK_EQ_INT(atomic_load(turn), n);
    CHECK(dsc_comm_bell(world) == of_world);
    dsc_comm_window_close(pair, window);
    dsc_comm_close(pair);
}

static void groups_have_bells_of_their_own(void) {
    run_threads(4, 8, false, bells_body, NULL);
}

/* ---- faults ---- */

static void diverged_body(struct dsc_comm *world, int rank, void *arg) {
    (void)arg;
    if (rank == 3) { /* outside: it learns at its next call that its node is lost */
        while (dsc_comm_barrier(world, NULL) == DSC_OK)
            ;
        CHECK_TEXT("rank 1 called barrier()");
        return;
    }
    struct dsc_comm *group = group_of(world, "three", 3, (int[]){0, 1, 2});
    float x = 0;
    struct dsc_coll coll = {.src = &x, .dst = &x, .n_elems = 1, .dtype = DSC_F32};
    CHECK((rank == 1 ? dsc_comm_barrier(group, NULL) : dsc_comm_all_reduce(group, &coll)) ==
          DSC_EDIVERGED);
    CHECK_TEXT("while rank 1 called barrier()");
    dsc_comm_close(group);
}

static void a_diverged_member_is_named_on_all_and_the_rest_hears_of_it(void) {
    run_threads(4, 8, false, diverged_body, NULL);
}

static void absent_body(struct dsc_comm *world, int rank, void *arg) {
    struct dsc_comm *group = NULL;
    (void)arg;
    if (rank == 1)
        return;
    CHECK(dsc_comm_open_group(world, NULL, (int[]){0, 1}, 2, "pair", &group) == DSC_ETIMEDOUT);
    CHECK_TEXT("for rank 1");
    CHECK_TEXT("to open group pair");
}

static void a_member_that_does_not_open_is_named(void) {
    run_threads(2, 0.3, false, absent_body, NULL);
}

/* ---- standstill ---- */

static void crossed_body(struct dsc_comm *world, int rank, void *arg) {
    struct dsc_comm *engine = group_of(world, "engine", 2, (int[]){0, 1});
    double since = dsc_comm_now();
    (void)arg;
    CHECK((rank == 0 ? dsc_comm_meet(engine, "engine.step", 3, NULL, 0, NULL)
                     : dsc_comm_barrier(world, "mine")) == DSC_EDIVERGED);
    CHECK(dsc_comm_now() - since < 4);
    CHECK_TEXT("rank 0 in meet(tag 3, 0 bytes) [engine.step] as operation 2 of group engine");
    CHECK_TEXT("rank 1 in barrier() [mine] as operation 1");
    dsc_comm_close(engine);
}

static void ranks_in_different_channels_are_told_so(void) {
    run_threads(2, 60, false, crossed_body, NULL);
}

/* Each of three ranks waits in a group with the next one. */
static void circle_body(struct dsc_comm *world, int rank, void *arg) {
    static const char *const names[] = {"a", "b", "c"};
    struct dsc_comm *groups[3] = {NULL};
    (void)arg;
    for (int g = 0; g < 3; g++)
        if (rank == g || rank == (g + 1) % 3)
            groups[g] = group_of(world, names[g], 2, (int[]){g, (g + 1) % 3});
    CHECK(dsc_comm_barrier(groups[rank], NULL) == DSC_EDIVERGED);
    CHECK_TEXT("ranks wait for each other in different operations");
    CHECK_TEXT("rank 2 in barrier() as operation 2 of group c for rank 0");
    for (int g = 0; g < 3; g++)
        dsc_comm_close(groups[g]);
}

static void a_circle_of_three_is_told_so(void) {
    run_threads(3, 60, false, circle_body, NULL);
}

static void opening_body(struct dsc_comm *world, int rank, void *arg) {
    struct dsc_comm *group = NULL;
    (void)arg;
    CHECK(dsc_comm_open_group(world, NULL, (int[]){0, 1}, 2, rank ? "one" : "two", &group) ==
          DSC_EDIVERGED);
    CHECK_TEXT("rank 0 in the opening of group two for rank 1");
    CHECK_TEXT("rank 1 in the opening of group one for rank 0");
}

static void ranks_that_open_different_groups_are_told_so(void) {
    run_threads(2, 60, false, opening_body, NULL);
}

/* A chain of waits ends at a rank that is merely slow. */
static void chain_body(struct dsc_comm *world, int rank, void *arg) {
    struct dsc_comm *tail = rank > 0 ? group_of(world, "tail", 2, (int[]){1, 2}) : NULL;
    (void)arg;
    if (rank == 2)
        nap_ms(700);
    if (tail)
        CHECK_OK(dsc_comm_barrier(tail, NULL));
    CHECK_OK(dsc_comm_barrier(world, NULL));
    dsc_comm_close(tail);
}

static void slow_is_no_standstill(void) {
    run_threads(3, 60, false, chain_body, NULL);
}

/* Groups in the same order everywhere, ranks late at random. */
static void stress_body(struct dsc_comm *world, int rank, void *arg) {
    struct dsc_comm *low = rank < 3 ? group_of(world, "low", 3, (int[]){0, 1, 2}) : NULL;
    struct dsc_comm *high = rank > 0 ? group_of(world, "high", 3, (int[]){1, 2, 3}) : NULL;
    unsigned seed = (unsigned)rank + 9;
    (void)arg;
    for (int i = 0; i < 40; i++) {
        if (next_random(&seed) >> 16 & 1)
            nap_ms((int)(next_random(&seed) >> 16) % (i % 13 ? 3 : 250));
        if (low)
            CHECK(sum_over(low, (float)rank) == 3);
        if (high)
            CHECK(sum_over(high, (float)rank) == 6);
        CHECK(sum_over(world, (float)rank) == 6);
    }
    dsc_comm_close(low);
    dsc_comm_close(high);
}

static void random_delays_in_several_groups_are_no_standstill(void) {
    run_threads(4, 60, false, stress_body, NULL);
}

static struct test_case cases[] = {
    CASE(wrong_groups_are_refused),
    CASE(groups_reduce_over_their_own_ranks),
    CASE(groups_can_be_opened_again_and_again),
    CASE(a_group_outlives_its_parent),
    CASE(groups_have_windows_of_their_own),
    CASE(groups_have_bells_of_their_own),
    CASE(a_diverged_member_is_named_on_all_and_the_rest_hears_of_it),
    CASE(a_member_that_does_not_open_is_named),
    CASE(ranks_in_different_channels_are_told_so),
    CASE(a_circle_of_three_is_told_so),
    CASE(ranks_that_open_different_groups_are_told_so),
    CASE(slow_is_no_standstill),
    CASE(random_delays_in_several_groups_are_no_standstill),
};
RUN_CASES(cases)
