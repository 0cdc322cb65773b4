/* The order of fetches, and what follows from it. */
#include "fetch.h"

#include "alloc.h"

#include <string.h>

/* Predecessors of an event that are told apart, and how far a look ahead goes. */
enum { N_TURNS = 4, LOOK_EVENTS = 64 };
static const size_t NONE = SIZE_MAX;

/* An event as it comes after a certain other one. */
struct turn {
    size_t before, next; /* events */
    size_t reuse;        /* elements fetched after it until one of its parameters is used again */
};

struct event {
    size_t *params;
    size_t n_params;
    struct turn turns[N_TURNS];
    size_t n_turns; /* ever made: the oldest is replaced */
};

struct param {
    size_t n_elems;
    size_t n_users;
    bool live;
    bool ahead;                /* gathered and not yet used */
    uint64_t turned;           /* when it was wanted, gathered or released last */
    size_t event, turn, clock; /* of its last use; event NONE: none that counts */
};

struct dsc_fetch {
    struct dsc_fetch_limits limits;
    struct dsc_fetch_counters counters;
    struct param *params;
    size_t n_params;
    struct event *events;
    size_t n_events;
    size_t event, turn; /* the last one */
    size_t clock;       /* elements wanted so far */
    uint64_t now;       /* calls so far */
    size_t ahead;       /* elements gathered and not yet used */
    size_t *lists;      /* drop, now, ahead: n_params each */
    struct dsc_fetch_plan plan;
};

/* What is in use is gathered whatever the limits say; what stays, or comes early, obeys them. */
size_t dsc_fetch_most(const struct dsc_fetch_limits *limits, size_t total, size_t kept,
                      size_t used) {
    size_t needed = dsc_min(kept + used, total);
    size_t idle = dsc_min(limits->ahead, total) + dsc_min(limits->reuse, total);
    return dsc_min(total, dsc_max(needed, dsc_min(limits->live, needed + idle)));
}

/* ---- life ---- */

enum dsc_status dsc_fetch_open(const struct dsc_fetch_limits *limits, struct dsc_fetch **out) {
    struct dsc_fetch *f = NULL;
    DSC_TRY(dsc_alloc(sizeof *f, (void **)&f));
    f->limits = *limits;
    f->event = NONE;
    *out = f;
    return DSC_OK;
}

void dsc_fetch_close(struct dsc_fetch *f) {
    if (!f)
        return;
    for (size_t i = 0; i < f->n_events; i++)
        dsc_free(f->events[i].params);
    dsc_free(f->events);
    dsc_free(f->params);
    dsc_free(f->lists);
    dsc_free(f);
}

enum dsc_status dsc_fetch_add(struct dsc_fetch *f, size_t n_elems, size_t *param) {
    size_t n = f->n_params + 1;
    DSC_TRY(dsc_realloc((void **)&f->params, n * sizeof *f->params));
    DSC_TRY(dsc_realloc((void **)&f->lists, 3 * n * sizeof *f->lists));
    f->params[n - 1] = (struct param){.n_elems = n_elems, .event = NONE};
    f->n_params = n;
    *param = n - 1;
    return DSC_OK;
}

/* ---- lists ---- */

static void begin_plan(struct dsc_fetch *f) {
    memset(&f->plan, 0, sizeof f->plan);
    f->plan.drop = f->lists;
    f->plan.now = f->lists + f->n_params;
    f->plan.ahead = f->lists + 2 * f->n_params;
    f->now++;
}

static void drop(struct dsc_fetch *f, size_t param) {
    struct param *p = &f->params[param];
    f->counters.live -= p->n_elems;
    f->ahead -= p->ahead ? p->n_elems : 0;
    p->live = p->ahead = false;
    f->lists[f->plan.n_drop++] = param;
}

/* Whether this plan was to drop the parameter, which stays after all. */
static bool takes_back(struct dsc_fetch *f, size_t param) {
    size_t i = 0;
    while (i < f->plan.n_drop && f->lists[i] != param)
        i++;
    if (i == f->plan.n_drop)
        return false;
    f->plan.n_drop--;
    memmove(&f->lists[i], &f->lists[i + 1], (f->plan.n_drop - i) * sizeof *f->lists);
    f->counters.n_evicted--;
    return true;
}

static void take(struct dsc_fetch *f, size_t param, bool ahead) {
    struct param *p = &f->params[param];
    f->counters.live += p->n_elems;
    f->counters.peak = dsc_max(f->counters.peak, f->counters.live);
    p->live = true;
    p->ahead = ahead;
    p->turned = f->now;
    f->ahead += ahead ? p->n_elems : 0;
    if (ahead && takes_back(f, param))
        return;
    if (ahead) {
        f->lists[2 * f->n_params + f->plan.n_ahead++] = param;
        f->counters.n_ahead++;
    } else {
        f->lists[f->n_params + f->plan.n_now++] = param;
        f->counters.n_fetched++;
    }
}

static bool is_idle(const struct param *p) {
    return p->live && p->n_users == 0;
}

/* Drops idle parameters, those that have been idle longest first. */
static void make_room(struct dsc_fetch *f, size_t n_elems) {
    while (f->counters.live + n_elems > f->limits.live) {
        size_t oldest = NONE;
        for (size_t i = 0; i < f->n_params; i++)
            if (is_idle(&f->params[i]) &&
                (oldest == NONE || f->params[i].turned < f->params[oldest].turned))
                oldest = i;
        if (oldest == NONE)
            return;
        drop(f, oldest);
        f->counters.n_evicted++;
    }
}

static enum dsc_status check(const struct dsc_fetch *f, const size_t *params, size_t n_params) {
    for (size_t i = 0; i < n_params; i++)
        if (params[i] >= f->n_params)
            return DSC_FAIL(DSC_EINVAL, "fetch: parameter %zu; there are %zu", params[i],
                            f->n_params);
    return DSC_OK;
}

/* ---- the record ---- */

static struct turn *find_turn(struct event *event, size_t before) {
    size_t n = dsc_min(event->n_turns, N_TURNS);
    for (size_t i = 0; i < n; i++)
        if (event->turns[i].before == before)
            return &event->turns[i];
    return NULL;
}

/* The one made last, where this predecessor is new; NULL: the event has never been. */
static struct turn *likely_turn(struct event *event, size_t before) {
    struct turn *turn = find_turn(event, before);
    return turn || event->n_turns == 0 ? turn : &event->turns[(event->n_turns - 1) % N_TURNS];
}

static enum dsc_status need_event(struct dsc_fetch *f, size_t number, const size_t *params,
                                  size_t n_params) {
    if (number >= f->n_events) {
        size_t n = dsc_max(number + 1, 2 * f->n_events);
        DSC_TRY(dsc_realloc((void **)&f->events, n * sizeof *f->events));
        f->n_events = n;
    }
    struct event *event = &f->events[number];
    if (event->n_params == n_params && n_params > 0 &&
        memcmp(event->params, params, n_params * sizeof *params) == 0)
        return DSC_OK;
    DSC_TRY(dsc_realloc((void **)&event->params, dsc_max(n_params, 1) * sizeof *params));
    if (n_params > 0)
        memcpy(event->params, params, n_params * sizeof *params);
    event->n_params = n_params;
    event->n_turns = 0;
    return DSC_OK;
}

/* The event comes after the last one: what was thought to follow that is replaced. */
static void record(struct dsc_fetch *f, size_t number) {
    struct event *event = &f->events[number];
    if (f->event != NONE)
        f->events[f->event].turns[f->turn].next = number;
    struct turn *turn = find_turn(event, f->event);
    if (!turn) {
        const struct turn *like = likely_turn(event, f->event);
        size_t next = like ? like->next : NONE;
        turn = &event->turns[event->n_turns++ % N_TURNS];
        *turn = (struct turn){.before = f->event, .next = next, .reuse = NONE};
    }
    f->event = number;
    f->turn = (size_t)(turn - event->turns);
}

/* The last event uses its parameters: how far that was from the use before. */
static void record_uses(struct dsc_fetch *f) {
    const struct event *event = &f->events[f->event];
    size_t clock = f->clock;
    for (size_t i = 0; i < event->n_params; i++)
        f->clock += f->params[event->params[i]].n_elems;
    for (size_t i = 0; i < event->n_params; i++) {
        struct param *p = &f->params[event->params[i]];
        if (p->event != NONE)
            f->events[p->event].turns[p->turn].reuse = clock - p->clock;
        p->event = f->event;
        p->turn = f->turn;
        p->clock = f->clock;
    }
}

static void use(struct dsc_fetch *f, struct param *p) {
    p->turned = f->now;
    p->n_users++;
    f->ahead -= p->ahead ? p->n_elems : 0;
    p->ahead = false;
}

/* ---- looking ahead ---- */

/* Whether all of an event's parameters are gathered or could be. */
static bool take_ahead(struct dsc_fetch *f, const struct event *event) {
    for (size_t i = 0; i < event->n_params; i++) {
        const struct param *p = &f->params[event->params[i]];
        if (p->live)
            continue;
        if (f->ahead + p->n_elems > f->limits.ahead ||
            f->counters.live + p->n_elems > f->limits.live)
            return false;
        take(f, event->params[i], true);
    }
    return true;
}

/* Not a little with each event but, once half of the limit is used up, as much as there is room
 * for, so that what is gathered ahead travels together. */
static void look_ahead(struct dsc_fetch *f) {
    size_t number = f->event;
    const struct turn *turn = &f->events[number].turns[f->turn];
    if (f->ahead > f->limits.ahead / 2)
        return;
    for (int i = 0; i < LOOK_EVENTS && turn && turn->next != NONE; i++) {
        size_t before = number;
        number = turn->next;
        if (!take_ahead(f, &f->events[number]))
            return;
        turn = likely_turn(&f->events[number], before);
    }
}

/* ---- calls ---- */

enum dsc_status dsc_fetch_want(struct dsc_fetch *f, size_t event, const size_t *params,
                               size_t n_params, struct dsc_fetch_plan *plan) {
    size_t n_missing = 0;
    DSC_TRY(check(f, params, n_params));
    if (event != DSC_FETCH_ASIDE)
        DSC_TRY(need_event(f, event, params, n_params));
    begin_plan(f);
    if (event != DSC_FETCH_ASIDE) {
        record(f, event);
        record_uses(f);
    }
    for (size_t i = 0; i < n_params; i++) {
        struct param *p = &f->params[params[i]];
        use(f, p);
        n_missing += p->live ? 0 : p->n_elems;
        f->counters.n_reused += p->live;
    }
    make_room(f, n_missing);
    for (size_t i = 0; i < n_params; i++)
        if (!f->params[params[i]].live)
            take(f, params[i], false);
    if (event != DSC_FETCH_ASIDE)
        look_ahead(f);
    *plan = f->plan;
    return DSC_OK;
}

enum dsc_status dsc_fetch_release(struct dsc_fetch *f, const size_t *params, size_t n_params,
                                  struct dsc_fetch_plan *plan) {
    DSC_TRY(check(f, params, n_params));
    for (size_t i = 0; i < n_params; i++)
        if (f->params[params[i]].n_users == 0)
            return DSC_FAIL(DSC_ESTATE, "fetch: parameter %zu is released more often than wanted",
                            params[i]);
    begin_plan(f);
    for (size_t i = 0; i < n_params; i++) {
        struct param *p = &f->params[params[i]];
        p->n_users -= p->n_users > 0;
        p->turned = f->now;
        size_t reuse = p->event == NONE ? NONE : f->events[p->event].turns[p->turn].reuse;
        bool soon = reuse != NONE && reuse <= f->limits.reuse;
        if (is_idle(p) && !(soon && f->counters.live <= f->limits.live))
            drop(f, params[i]);
    }
    *plan = f->plan;
    return DSC_OK;
}

/* An end of the order: what is used again only after this need neither stay nor be gathered ahead,
 * since it would have to be gathered again. */
void dsc_fetch_forget(struct dsc_fetch *f, struct dsc_fetch_plan *plan) {
    begin_plan(f);
    if (f->event != NONE)
        f->events[f->event].turns[f->turn].next = NONE;
    f->event = NONE;
    for (size_t i = 0; i < f->n_params; i++) {
        struct param *p = &f->params[i];
        if (p->event != NONE)
            f->events[p->event].turns[p->turn].reuse = NONE;
        p->event = NONE;
        if (is_idle(p))
            drop(f, i);
    }
    *plan = f->plan;
}

bool dsc_fetch_is_live(const struct dsc_fetch *f, size_t param) {
    return param < f->n_params && f->params[param].live;
}

struct dsc_fetch_counters dsc_fetch_counters(const struct dsc_fetch *f) {
    return f->counters;
}

void dsc_fetch_reset_peak(struct dsc_fetch *f) {
    f->counters.peak = f->counters.live;
}
