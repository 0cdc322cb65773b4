/* When parameters are gathered and dropped: the record, limits, and what stays. */
#include "case.h"

#include "alloc.h"
#include "fetch.h"

enum { N = 8, ELEMS = 100 };

/* Eight parameters of 100 elements, a module each; events: forward i, backward N + i. */
static struct dsc_fetch *open_fetch(size_t ahead, size_t live, size_t reuse) {
    struct dsc_fetch_limits limits = {ahead, live, reuse};
    struct dsc_fetch *f = NULL;
    size_t param = 99;
    CHECK_OK(dsc_fetch_open(&limits, &f));
    for (size_t i = 0; i < N; i++) {
        CHECK_OK(dsc_fetch_add(f, ELEMS, &param));
        CHECK_EQ_INT(param, i);
    }
    return f;
}

struct seen {
    size_t now, ahead, dropped;
};

static void use(struct dsc_fetch *f, size_t event, size_t param, struct seen *seen) {
    struct dsc_fetch_plan plan;
    CHECK_OK(dsc_fetch_want(f, event, &param, 1, &plan));
    CHECK(dsc_fetch_is_live(f, param));
    seen->now += plan.n_now;
    seen->ahead += plan.n_ahead;
    seen->dropped += plan.n_drop;
    CHECK_OK(dsc_fetch_release(f, &param, 1, &plan));
    seen->dropped += plan.n_drop;
}

static struct seen train(struct dsc_fetch *f) {
    struct dsc_fetch_plan plan;
    struct seen seen = {0};
    for (size_t i = 0; i < N; i++)
        use(f, i, i, &seen);
    for (size_t i = N; i-- > 0;)
        use(f, N + i, i, &seen);
    dsc_fetch_forget(f, &plan);
    seen.dropped += plan.n_drop;
    CHECK_EQ_INT(dsc_fetch_counters(f).live, 0);
    return seen;
}

static void each_use_is_a_fetch_where_nothing_may_stay(void) {
    struct dsc_fetch *f = open_fetch(0, 1000000, 0);
    for (int pass = 0; pass < 3; pass++) {
        struct seen seen = train(f);
        /* The last module's backward follows its forward at once: nothing is fetched between. */
        CHECK_EQ_INT(seen.now, pass == 0 ? 2 * N : 2 * N - 1);
        CHECK_EQ_INT(seen.dropped, seen.now);
        CHECK_EQ_INT(seen.ahead, 0);
    }
    CHECK_EQ_INT(dsc_fetch_counters(f).peak, ELEMS);
    dsc_fetch_close(f);
}

static void the_recorded_order_is_fetched_ahead(void) {
    struct dsc_fetch *f = open_fetch(2 * ELEMS, 1000000, 0);
    struct seen seen = train(f);
    CHECK_EQ_INT(seen.ahead, 0);
    for (int pass = 0; pass < 3; pass++) {
        seen = train(f);
        CHECK_EQ_INT(seen.now, 1);
        CHECK_EQ_INT(seen.ahead, 2 * N - 2); /* nothing beyond the end */
        CHECK_EQ_INT(seen.dropped, 2 * N - 1);
        CHECK(dsc_fetch_counters(f).peak <= 3 * ELEMS);
    }
    dsc_fetch_close(f);
}

static void what_is_used_again_soon_stays(void) {
    struct dsc_fetch *f = open_fetch(0, 1000000, 4 * ELEMS);
    struct seen seen = train(f);
    CHECK_EQ_INT(seen.now, 2 * N);
    for (int pass = 0; pass < 2; pass++) {
        seen = train(f);
        /* Between forward and backward of the last three modules 0, 2 and 4 others are fetched. */
        CHECK_EQ_INT(seen.now, 2 * N - 3);
    }
    dsc_fetch_close(f);
}

static void neither_makes_more_live_than_the_limit(void) {
    struct dsc_fetch *f = open_fetch(1000000, 3 * ELEMS, 1000000);
    for (int pass = 0; pass < 4; pass++)
        (void)train(f);
    CHECK_EQ_INT(dsc_fetch_counters(f).peak, 3 * ELEMS);
    CHECK(dsc_fetch_counters(f).n_ahead > 0);
    /* What has to be, has to be. */
    size_t all[N] = {0, 1, 2, 3, 4, 5, 6, 7};
    struct dsc_fetch_plan plan;
    CHECK_OK(dsc_fetch_want(f, 2 * N, all, N, &plan));
    CHECK_EQ_INT(dsc_fetch_counters(f).live, N * ELEMS);
    CHECK_OK(dsc_fetch_release(f, all, N, &plan));
    dsc_fetch_close(f);
}

/* The order of everything that is asked for is a function of the calls. */
static void idle_parameters_make_room_oldest_first(void) {
    struct dsc_fetch *f = open_fetch(0, 3 * ELEMS, 1000000);
    struct dsc_fetch_plan plan;
    struct seen seen = {0};
    for (int pass = 0; pass < 3; pass++)
        for (size_t i = 0; i < 3; i++)
            use(f, i, i, &seen);
    CHECK_EQ_INT(dsc_fetch_counters(f).live, 3 * ELEMS);
    size_t two[2] = {6, 7};
    CHECK_OK(dsc_fetch_want(f, 3, two, 2, &plan));
    CHECK_EQ_INT(plan.n_drop, 2);
    CHECK_EQ_INT(plan.drop[0], 0);
    CHECK_EQ_INT(plan.drop[1], 1);
    CHECK_EQ_INT(plan.n_now, 2);
    CHECK_EQ_INT(dsc_fetch_counters(f).n_evicted, 2);
    CHECK_EQ_INT(dsc_fetch_counters(f).live, 3 * ELEMS);
    dsc_fetch_close(f);
}

/* Idle ones go oldest first: a small one in vain, then a large one, after which there is room for
 * the small one, which is used next. */
static void what_is_dropped_is_not_gathered_ahead_by_the_same_plan(void) {
    struct dsc_fetch_limits limits = {.ahead = 10, .live = 100, .reuse = 1000};
    const size_t sizes[] = {10, 80, 30};
    struct dsc_fetch_plan plan;
    struct dsc_fetch *f = NULL;
    size_t param;
    CHECK_OK(dsc_fetch_open(&limits, &f));
    for (size_t i = 0; i < 3; i++)
        CHECK_OK(dsc_fetch_add(f, sizes[i], &param));
    for (int pass = 0; pass < 4; pass++)
        for (size_t i = 0; i < 3; i++) {
            CHECK_OK(dsc_fetch_want(f, i, &i, 1, &plan));
            for (size_t d = 0; d < plan.n_drop; d++)
                for (size_t a = 0; a < plan.n_ahead; a++)
                    CHECK(plan.drop[d] != plan.ahead[a]);
            if (pass == 3 && i == 2) {
                CHECK_EQ_INT(plan.n_drop, 1);
                CHECK_EQ_INT(plan.drop[0], 1);
                CHECK_EQ_INT(plan.n_ahead, 0);
                CHECK(dsc_fetch_is_live(f, 0));
                CHECK_EQ_INT(dsc_fetch_counters(f).live, 40);
            }
            CHECK_OK(dsc_fetch_release(f, &i, 1, &plan));
        }
    dsc_fetch_close(f);
}

static void a_changed_order_is_recorded_anew(void) {
    struct dsc_fetch *f = open_fetch(ELEMS, 1000000, 0);
    struct seen seen = {0};
    struct dsc_fetch_plan plan;
    for (int pass = 0; pass < 3; pass++)
        for (size_t i = 0; i < 4; i++)
            use(f, i, i, &seen);
    memset(&seen, 0, sizeof seen);
    for (int pass = 0; pass < 2; pass++) { /* 0 3 2 1 */
        memset(&seen, 0, sizeof seen);
        for (size_t i = 4; i > 0; i--)
            use(f, i % 4, i % 4, &seen);
    }
    for (int pass = 0; pass < 2; pass++) {
        memset(&seen, 0, sizeof seen);
        for (size_t i = 4; i > 0; i--)
            use(f, i % 4, i % 4, &seen);
    }
    CHECK_EQ_INT(seen.now, 0); /* each was fetched ahead */
    CHECK_EQ_INT(seen.ahead, 4);
    dsc_fetch_forget(f, &plan);
    CHECK_EQ_INT(dsc_fetch_counters(f).live, 0);
    dsc_fetch_close(f);
}

static void what_is_in_use_stays(void) {
    struct dsc_fetch *f = open_fetch(0, 1000000, 0);
    struct dsc_fetch_plan plan;
    size_t one = 1, two = 2, none = N;
    CHECK_OK(dsc_fetch_want(f, DSC_FETCH_ASIDE, &one, 1, &plan));
    CHECK_EQ_INT(plan.n_now, 1);
    CHECK_OK(dsc_fetch_want(f, 0, &one, 1, &plan));
    CHECK_EQ_INT(plan.n_now, 0);
    CHECK_OK(dsc_fetch_release(f, &one, 1, &plan));
    CHECK_EQ_INT(plan.n_drop, 0);
    CHECK(dsc_fetch_is_live(f, one));
    CHECK_OK(dsc_fetch_want(f, DSC_FETCH_ASIDE, &two, 1, &plan));
    CHECK_OK(dsc_fetch_want(f, 1, &two, 1, &plan));
    CHECK_OK(dsc_fetch_release(f, &two, 1, &plan));
    CHECK_EQ_INT(plan.n_drop, 0);
    dsc_fetch_forget(f, &plan);
    CHECK_EQ_INT(plan.n_drop, 0);
    CHECK_OK(dsc_fetch_release(f, &two, 1, &plan));
    CHECK_EQ_INT(plan.n_drop, 1);
    CHECK(dsc_fetch_release(f, &two, 1, &plan) == DSC_ESTATE);
    CHECK(dsc_fetch_want(f, 1, &none, 1, &plan) == DSC_EINVAL);
    CHECK_OK(dsc_fetch_release(f, &one, 1, &plan));
    CHECK_EQ_INT(plan.n_drop, 1);
    CHECK_EQ_INT(dsc_fetch_counters(f).live, 0);
    dsc_fetch_close(f);
    dsc_fetch_close(NULL);
    CHECK_EQ_INT(dsc_alloc_counters().n_live, 0);
}

/* As a state dict between a forward pass and a step takes them, one after the other. */
static struct seen train_after_uses_aside(bool aside) {
    struct dsc_fetch *f = open_fetch(0, 1000000, 2 * ELEMS);
    struct dsc_fetch_plan plan;
    struct seen seen = {0};
    (void)train(f);
    for (size_t i = 0; i < N; i++)
        use(f, i, i, &seen);
    CHECK_EQ_INT(dsc_fetch_counters(f).live, 2 * ELEMS); /* until their backward */
    for (size_t i = 0; aside && i < N; i++)
        use(f, DSC_FETCH_ASIDE, i, &seen);
    CHECK_EQ_INT(dsc_fetch_counters(f).live, 2 * ELEMS);
    memset(&seen, 0, sizeof seen);
    for (size_t i = N; i-- > 0;)
        use(f, N + i, i, &seen);
    dsc_fetch_forget(f, &plan);
    (void)train(f);
    struct seen next = train(f);
    seen.now += next.now;
    dsc_fetch_close(f);
    return seen;
}

static void uses_aside_keep_nothing_and_change_no_record(void) {
    struct seen without = train_after_uses_aside(false), with = train_after_uses_aside(true);
    CHECK_EQ_INT(with.now, without.now);
    CHECK_EQ_INT(with.dropped, without.dropped);
}

static void a_recorded_order_allocates_nothing(void) {
    struct dsc_fetch *f = open_fetch(2 * ELEMS, 5 * ELEMS, 3 * ELEMS);
    (void)train(f);
    (void)train(f);
    uint64_t before = dsc_alloc_counters().n_calls;
    for (int pass = 0; pass < 5; pass++)
        (void)train(f);
    CHECK_EQ_INT(dsc_alloc_counters().n_calls, before);
    dsc_fetch_close(f);
}

static const struct test_case cases[] = {
    CASE(each_use_is_a_fetch_where_nothing_may_stay),
    CASE(the_recorded_order_is_fetched_ahead),
    CASE(what_is_used_again_soon_stays),
    CASE(neither_makes_more_live_than_the_limit),
    CASE(idle_parameters_make_room_oldest_first),
    CASE(what_is_dropped_is_not_gathered_ahead_by_the_same_plan),
    CASE(a_changed_order_is_recorded_anew),
    CASE(what_is_in_use_stays),
    CASE(uses_aside_keep_nothing_and_change_no_record),
    CASE(a_recorded_order_allocates_nothing),
};
RUN_CASES(cases)
