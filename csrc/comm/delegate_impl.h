/* What delegate.c (moving), delegate_nodes.c (moving in two levels) and delegate_watch.c (waiting)
 * share. Nobody else includes it. */
#ifndef DSC_COMM_DELEGATE_IMPL_H
#define DSC_COMM_DELEGATE_IMPL_H

#include "backend.h"
#include "delegate.h"
#include "tcp_mail.h"

enum { DSC__CHANNEL_MAX = 48 };

/* How long this rank has been blocked in the move that runs, in slices; and what the board knows.
 */
struct dsc__watch {
    int n_slices;
    bool posted;       /* on the board */
    bool counts;       /* on the board as a rank that is blocked */
    bool hopeful;      /* and as one whose operation will end */
    atomic_bool noted; /* that a process has ended, by any thread */
    int64_t seen;      /* `moves` when all were blocked at the last look; -1: they were not */
    uint64_t sequence; /* posted under */
};

/* What this rank sends to and gets from another in an exchange: elements of src and dst. */
struct dsc__delegate_part {
    size_t send_at, n_send, fill_at, n_fill;
};

struct dsc__nodes; /* delegate_nodes.c */

struct dsc__delegate {
    struct dsc_comm *comm;
    struct dsc_delegate ops;
    void *moving;             /* the context whose move runs: ops.context, or the rail's */
    struct dsc__nodes *nodes; /* NULL: every rank is its own node */
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
    struct dsc__mail *mail; /* NULL: no messages */
    bool left;
};

/* ---- delegate.c ---- */
static inline size_t dsc__delegate_send_area(const struct dsc__delegate *d, size_t chunk) {
    return (chunk & 1) * d->area;
}
static inline size_t dsc__delegate_fill_area(const struct dsc__delegate *d, size_t chunk) {
    return (2 + (chunk & 1)) * d->area;
}
/* What is left of n elements from `at` on, at most `step`. */
static inline size_t dsc__delegate_cut(size_t n, size_t at, size_t step) {
    return n <= at ? 0 : dsc_min(n - at, step);
}
/* Begins a move of all ranks, or of this one's rail; dsc__delegate_finish ends it. */
enum dsc_status dsc__delegate_start(struct dsc__delegate *d, void *context,
                                    const struct dsc_move *move);

/* ---- delegate_pieces.c ---- */
/* This rank's next bytes, as many times as there are others, for an exchange of `size`. */
void dsc__delegate_copies(struct dsc__strands *strands, char *to, size_t n, int size);
enum dsc_status dsc__delegate_gather_pieces(void *state, struct dsc__strands *strands);

/* ---- delegate_nodes.c: operations in two levels ---- */
int dsc__nodes_count(const struct dsc__nodes *nodes);
enum dsc_status dsc__nodes_all_reduce(struct dsc__delegate *d, const struct dsc_coll *coll);
enum dsc_status dsc__nodes_reduce_scatter(struct dsc__delegate *d, const struct dsc_coll *coll);
enum dsc_status dsc__nodes_all_gather(struct dsc__delegate *d, const struct dsc_coll *coll);
enum dsc_status dsc__nodes_broadcast(struct dsc__delegate *d, const struct dsc_coll *coll);
enum dsc_status dsc__nodes_reduce(struct dsc__delegate *d, const struct dsc_coll *coll);
enum dsc_status dsc__nodes_part_sums(struct dsc__delegate *d, const struct dsc_coll *coll,
                                     const size_t *n_send, size_t n_mine);
enum dsc_status dsc__nodes_gather_pieces(struct dsc__delegate *d, struct dsc__strands *strands);
/* The same reduction of contributions that are all here, n_bytes of each rank from `all` on. */
void dsc__nodes_reduce_here(struct dsc__delegate *d, const struct dsc_coll *coll, const char *all,
                            size_t n_bytes);
enum dsc_status dsc__nodes_open_group(struct dsc__delegate *d, const struct dsc__group *group,
                                      struct dsc_comm **out);
void dsc__nodes_give_up(struct dsc__delegate *d, const char *reason);
void dsc__nodes_leave(struct dsc__delegate *d);
void dsc__nodes_close(struct dsc__delegate *d);

/* ---- delegate_watch.c ---- */
/* A wait of another kind: begins, looks around (each 100 ms; what it returns ends the wait), ends.
 */
void dsc__delegate_begin_wait(struct dsc__delegate *d);
enum dsc_status dsc__delegate_look_around(struct dsc__delegate *d, double since);
void dsc__delegate_end_wait(struct dsc__delegate *d);
/* Waits for the move that runs, and finds out when it never will end. */
enum dsc_status dsc__delegate_finish(struct dsc__delegate *d);
/* A move failed with `status`: the error that says whose end, or whose decision, that was. */
enum dsc_status dsc__delegate_lost(struct dsc__delegate *d, enum dsc_status status);
/* The reason for the other ranks, of this channel or of all the job; the first one stays. */
void dsc__delegate_tell(struct dsc__delegate *d, const char *list, bool of_all,
                        enum dsc_status status, const char *reason);
/* Tells the ranks of other machines of a process of this one that has ended, if one has. */
enum dsc_status dsc__delegate_note_dead(struct dsc__delegate *d);
/* The error of a rank that gave up, in whatever channel, or of a standstill, if there is one. */
enum dsc_status dsc__delegate_check_board(struct dsc__delegate *d);
/* Whoever ended (`reason`: how that showed) has left a word about it, or is known to be dead;
 * `call` is what waited. */
enum dsc_status dsc__delegate_gone(struct dsc__delegate *d, const char *reason, const char *call);

/* delegate_mail.c: the entries of the back end for messages. */
bool dsc__delegate_has_messages(void *state);
enum dsc_status dsc__delegate_message_advance(void *state, struct dsc__message *message);
enum dsc_status dsc__delegate_message_check(void *state, struct dsc__message *message,
                                            uint32_t seen);
void dsc__delegate_message_drop(void *state, struct dsc__message *message);
void dsc__delegate_message_wait(void *state, uint32_t seen);
uint32_t dsc__delegate_mail(void *state);
void dsc__delegate_ring_mail(void *state);

/* After it: gives the others time to hear it where this process holds the board. */
void dsc__delegate_linger(struct dsc__delegate *d, enum dsc_status status, const char *reason);

#endif
