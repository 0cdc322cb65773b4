/* What delegate.c (moving) and delegate_watch.c (waiting) share. Nobody else includes it. */
#ifndef DSC_COMM_DELEGATE_IMPL_H
#define DSC_COMM_DELEGATE_IMPL_H

#include "backend.h"
#include "delegate.h"

enum { DSC__CHANNEL_MAX = 48 };

/* How long this rank has been blocked in the move that runs, in slices; and what the board knows.
 */
struct dsc__watch {
    int n_slices;
    bool posted;       /* on the board */
    bool counts;       /* as a rank that is blocked */
    bool hopeful;      /* and as one whose operation will end */
    int64_t seen;      /* `moves` when all were blocked at the last look; -1: they were not */
    uint64_t sequence; /* posted under */
};

/* What this rank sends to and gets from another in an exchange: elements of src and dst. */
struct dsc__delegate_part {
    size_t send_at, n_send, fill_at, n_fill;
};

struct dsc__delegate {
    struct dsc_comm *comm;
    struct dsc_delegate ops;
    char channel[DSC__CHANNEL_MAX];
    struct dsc__print current;
    struct dsc__print *prints; /* per rank; as of the last difference */
    bool differ;               /* the last agreement failed: `prints` counts */
    char *payloads;            /* DSC_MEET_MAX per rank, packed */
    size_t n_payload;
    size_t *counts;                   /* 2 * size: bytes to and from each rank */
    struct dsc__delegate_part *parts; /* per rank, of the operation that runs */
    const void **srcs;                /* per rank */
    size_t area; /* bytes of each of the staging's four parts: two to send from, two to fill */
    struct dsc__watch watch;
    bool left;
};

/* Waits for the move that runs, and finds out when it never will end. */
enum dsc_status dsc__delegate_finish(struct dsc__delegate *d);
/* A move failed with `status`: the error that says whose end, or whose decision, that was. */
enum dsc_status dsc__delegate_lost(struct dsc__delegate *d, enum dsc_status status);
/* The reason for the other ranks, of this channel or of all the job; the first one stays. */
void dsc__delegate_tell(struct dsc__delegate *d, const char *list, bool of_all,
                        enum dsc_status status, const char *reason);
/* After it: gives the others time to hear it where this process holds the board. */
void dsc__delegate_linger(struct dsc__delegate *d, enum dsc_status status, const char *reason);

#endif
