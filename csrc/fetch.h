/* When sharded parameters are gathered and dropped, where ranks share no memory.
 *
 * Decides: what a module's parameters need before it runs, what is gathered ahead from the recorded
 * order of earlier fetches, and what stays because it is used again soon. It moves nothing: the
 * caller drops, then gathers, as each answer says. Invariant: answers follow from the calls alone,
 * so ranks that make the same calls gather the same in the same order; gathering ahead and keeping
 * never bring the gathered elements above the limit, and a fetch that has to drops idle ones first.
 *
 * An event is one place of a program that fetches: a module's forward, or its backward. What
 * follows an event is remembered for each event before it, so one record serves loops of several
 * kinds, and a changed order replaces what it contradicts. */
#ifndef DSC_FETCH_H
#define DSC_FETCH_H

#include "dsc.h"

struct dsc_fetch;

struct dsc_fetch_limits {
    size_t ahead; /* elements gathered and not yet used */
    size_t live;  /* elements gathered in all */
    size_t reuse; /* elements fetched until a parameter is used again, up to which it stays */
};

/* The most elements that are ever gathered, of `total` with `kept` among them, where no use needs
 * more than `used` others at a time. */
size_t dsc_fetch_most(const struct dsc_fetch_limits *limits, size_t total, size_t kept,
                      size_t used);

/* Valid until the next call. No parameter is in two of the lists. */
struct dsc_fetch_plan {
    const size_t *drop, *now, *ahead;
    size_t n_drop, n_now, n_ahead;
};

struct dsc_fetch_counters {
    size_t live, peak;            /* elements gathered: now, and at most since the last reset */
    uint64_t n_fetched, n_ahead;  /* parameters gathered when wanted, and ahead */
    uint64_t n_reused, n_evicted; /* wanted and still there; gathered, and dropped for room */
};

/* The caller closes it. */
enum dsc_status dsc_fetch_open(const struct dsc_fetch_limits *limits, struct dsc_fetch **out);
/* NULL is fine. */
void dsc_fetch_close(struct dsc_fetch *fetch);

/* Parameters are numbered from 0. */
enum dsc_status dsc_fetch_add(struct dsc_fetch *fetch, size_t n_elems, size_t *param);
/* Not an event: a use that is not part of an order, predicts nothing and changes no record. */
#define DSC_FETCH_ASIDE SIZE_MAX

/* Before a use: all of `params` are in use until they are released as often. An event has the same
 * parameters each time, else what is known of it is forgotten. */
enum dsc_status dsc_fetch_want(struct dsc_fetch *fetch, size_t event, const size_t *params,
                               size_t n_params, struct dsc_fetch_plan *plan);
enum dsc_status dsc_fetch_release(struct dsc_fetch *fetch, const size_t *params, size_t n_params,
                                  struct dsc_fetch_plan *plan);
/* Values have changed: drops whatever is not in use, and begins a new order. */
void dsc_fetch_forget(struct dsc_fetch *fetch, struct dsc_fetch_plan *plan);

/* Whether a parameter is gathered, or about to be. */
bool dsc_fetch_is_live(const struct dsc_fetch *fetch, size_t param);
/* Since the beginning. */
struct dsc_fetch_counters dsc_fetch_counters(const struct dsc_fetch *fetch);
/* The peak counts anew from what is gathered now. */
void dsc_fetch_reset_peak(struct dsc_fetch *fetch);

#endif
