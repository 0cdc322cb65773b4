/* Inside the shared-memory back end: what lies in a rank's memory, and what its files offer each
 * other.
 *
 * Decides: the layout. Every rank owns one region, with a block (slots, chunk areas) per channel: a
 * channel is a communicator, the whole node's or a group's. A rank writes only its own region and a
 * few words meant for others (wake, bell, broken, references), and reads everybody's. Memory that
 * nobody touches costs address space only. Invariant: no call on these structures happens in a
 * forked child. Threads: none of its own. */
#ifndef DSC_COMM_SHM_H
#define DSC_COMM_SHM_H

#define _GNU_SOURCE
#include "backend.h"

#include <poll.h>
#include <sched.h>

enum {
    DSC__SHM_PAGE = 4096,
    DSC__SHM_RANKS_MAX = 1024,
    DSC__SHM_CHANNELS = 128,   /* open at a time, per rank; number 0 is the whole node's */
    DSC__SHM_RING = 4,         /* fingerprints kept; 2 are needed, the rest is for texts */
    DSC__SHM_SMALL = 32 << 10, /* up to here data travels with the fingerprint */
    DSC__SHM_AREA = 2 << 20,   /* beyond, in chunks through the cells of an area, which are */
    DSC__SHM_CELL_MIN = 16 << 10,
    DSC__SHM_CELL_MAX = 128 << 10,
    DSC__SHM_LANES = 8, /* messages on their way between two ranks, per direction */
    DSC__SHM_LANE_BYTES = 1 << 20,
    DSC__SHM_BLOCKED_TEXT = 320,
    DSC__SHM_TOKEN = DSC__TOKEN_CHARS + 1, /* 16 random bytes as text */
    DSC__SHM_PRINT_WORDS = sizeof(struct dsc__print) / sizeof(uint64_t),
};
_Static_assert(DSC__SHM_PRINT_WORDS == 14, "a fingerprint fills a slot of 16 words");
_Static_assert(sizeof(void *) == 8, "sizes of regions are computed in 64 bits");

/* A published fingerprint. Word 0 is the sequence: stored last, 0 while the others change. */
struct dsc__shm_slot {
    _Alignas(128) _Atomic uint64_t words[16];
};

/* Each line below is written by one side only, and padded to two cache lines (CPUs fetch pairs). */
struct dsc__shm_block {
    struct dsc__shm_slot ring[DSC__SHM_RING];
    _Alignas(128) _Atomic uint64_t phase; /* steps inside operations, monotonic */
    _Alignas(128) _Atomic uint32_t asleep;
    _Alignas(128) _Atomic uint32_t wake; /* the futex: changed by others to end this rank's sleep */
    _Alignas(128) _Atomic uint32_t bell;
    _Alignas(128) _Atomic uint32_t left; /* closed */
    _Atomic uint32_t n_posted;           /* asynchronous operations that have not ended */
    _Alignas(DSC__SHM_PAGE) char small[2][DSC__SHM_SMALL]; /* an operation's parity selects one */
    /* Rings of cells. */
    _Alignas(DSC__SHM_PAGE) char in[DSC__SHM_AREA];
    _Alignas(DSC__SHM_PAGE) char result[DSC__SHM_AREA];
};

/* What a rank's main thread has been waiting in for a while, and for whom. */
struct dsc__shm_blocked {
    _Alignas(128) _Atomic uint64_t epoch; /* odd: holds; changes with every other field */
    _Atomic uint32_t waits_for;           /* rank of the node */
    _Atomic uint32_t slot;                /* where that one's block of the channel is */
    _Atomic uint32_t kind;                /* enum dsc__shm_awaited */
    _Atomic uint64_t target;
    _Atomic uint64_t text[DSC__SHM_BLOCKED_TEXT / sizeof(uint64_t)];
};

/* A message on its way; in the sender's region. */
struct dsc__shm_lane {
    _Alignas(128) _Atomic uint32_t claimed; /* by the sender; the receiver frees it */
    _Atomic uint64_t stamp; /* from 1, stored after the fields below; a receiver adds the mark */
    _Atomic uint64_t tag;   /* read before the message is taken, when the lane may be another's */
    uint64_t n_bytes;
    uint32_t dtype;
    char label[DSC__LABEL_MAX];
    _Alignas(128) _Atomic uint64_t n_written;
    _Alignas(128) _Atomic uint64_t n_read;
    _Alignas(DSC__SHM_PAGE) char data[DSC__SHM_LANE_BYTES]; /* a ring */
};
struct dsc__shm_mailbox {
    _Atomic uint64_t n_stamps;
    struct dsc__shm_lane lanes[DSC__SHM_LANES];
};

struct dsc__shm_entry {
    _Atomic uint64_t key;    /* of the group that is being opened, 0 otherwise */
    _Atomic uint32_t n_refs; /* members that have not closed the channel yet; 0: free */
};

struct dsc__shm_region {
    _Alignas(128) _Atomic uint32_t broken; /* rank 0's only: 1 + the first rank that gave up */
    _Atomic uint32_t giving;               /* somebody writes the reason */
    _Atomic uint32_t gave_up;              /* -status, 0 while it did not */
    int32_t pid;
    cpu_set_t cpus; /* where the rank may run */
    char reason[DSC__REASON_MAX];
    struct dsc__shm_blocked blocked;
    struct dsc__shm_entry entries[DSC__SHM_CHANNELS];
    _Alignas(128) _Atomic uint32_t mail; /* changes when a message for or from this rank moved */
    _Atomic uint32_t mail_sleepers;
    _Atomic uint32_t n_messages; /* asynchronous ones that have not ended */
    struct dsc__shm_block blocks[DSC__SHM_CHANNELS];
    struct dsc__shm_mailbox mailboxes[]; /* one per rank of the node: what goes there */
};

static inline size_t dsc__shm_region_size(int size) {
    return sizeof(struct dsc__shm_region) + (size_t)size * sizeof(struct dsc__shm_mailbox);
}

struct dsc__shm_world; /* ranks as threads, see shm_threads.c */

/* All ranks of the node as one of them sees them: what its channels share. Goes with the last. */
struct dsc__shm_node {
    atomic_int n_refs;
    int rank, size;
    struct dsc__shm_world *world;      /* NULL where ranks are processes */
    int *pidfds;                       /* size; -1 for this rank; NULL where ranks are threads */
    struct dsc__shm_region *regions[]; /* size */
};

enum dsc__shm_awaited {
    DSC__SHM_PRINT,
    DSC__SHM_PHASE,
    DSC__SHM_BELL,
    DSC__SHM_MAIL,
    DSC__SHM_OPEN, /* of a group, by its key */
    DSC__SHM_AWAITED_COUNT
};

/* How long waits of one kind spin before they sleep: adapts to how that went. */
struct dsc__shm_spin {
    unsigned budget, n_waits;
};

struct dsc__shm {
    const struct dsc_comm_options *options;
    int rank, size;
    unsigned n_spins_max;
    struct dsc__shm_spin spins[DSC__SHM_AWAITED_COUNT];
    uint64_t sequence, phase;
    uint64_t used; /* bytes of the areas that operations have passed, monotonic, alike on all */
    struct dsc__print current; /* the operation that runs, for texts */
    struct dsc__shm_node *node;
    int *members;                   /* size: a rank's place on the node */
    uint32_t *slots;                /* size: which block of its region a rank uses here */
    struct dsc__shm_block **blocks; /* size */
    const void **sources;           /* size: one reduction's inputs */
    char name[DSC__LABEL_MAX];      /* of the group, "" for the whole node */
    uint64_t standstill;            /* what shm_standstill.c saw at its last look */
};

/* ---- shm.c ---- */
extern const struct dsc_comm_backend dsc__shm_backend;
/* A node of `size` ranks whose regions are still to be mapped. */
enum dsc_status dsc__shm_node_new(int rank, int size, struct dsc__shm_node **out);
/* Drops one reference; the last releases whatever the node got, in any state of completion. */
void dsc__shm_node_unref(struct dsc__shm_node *node);
/* Allocates the arrays of a state and takes a reference to the node. Members are the node's. */
enum dsc_status dsc__shm_prepare(struct dsc__shm *shm, int rank, int size,
                                 const struct dsc_comm_options *options,
                                 struct dsc__shm_node *node);
/* Once all regions are mapped: the channel of the whole node. */
void dsc__shm_use_world(struct dsc__shm *shm);
/* The region of a channel's rank. */
static inline struct dsc__shm_region *dsc__shm_region_of(const struct dsc__shm *shm, int rank) {
    return shm->node->regions[shm->members[rank]];
}
/* After all regions are mapped: how long to spin. */
void dsc__shm_settle_spins(struct dsc__shm *shm);
/* Releases whatever prepare and open got, in any state of completion. */
void dsc__shm_release(struct dsc__shm *shm);
enum dsc_status dsc__shm_check_world(int rank, int size);

/* ---- shm_group.c ---- */
enum dsc_status dsc__shm_open_group(void *state, const struct dsc__group *group,
                                    struct dsc_comm **out);
void dsc__shm_group_opened(void *state);
/* Where a region has its block of the group that is being opened under `key`, 0 if nowhere. */
uint32_t dsc__shm_find_key(struct dsc__shm_region *region, uint64_t key);
/* Lets go of the blocks of a group's channel. */
void dsc__shm_close_group(struct dsc__shm *shm);

/* ---- shm_memory.c: memfds ---- */
/* A sealed memfd of n_bytes. */
enum dsc_status dsc__shm_memfd(const char *name, size_t n_bytes, int *out);
/* Maps a memfd that must have exactly n_bytes and be sealed against shrinking. */
enum dsc_status dsc__shm_map(int fd, size_t n_bytes, int owner, void **out);
enum dsc_status dsc__shm_window_open(void *state, size_t n_bytes, struct dsc_window **out);
void dsc__shm_window_close(void *state, struct dsc_window *window);
void dsc__shm_window_keep(void *state, struct dsc_window *window, int rank, struct dsc_kept *out);

/* ---- shm_socket.c: messages with descriptors ---- */
enum { DSC__SHM_TEXT_MAX = 512, DSC__SHM_FDS_MAX = 2 };
enum dsc__shm_kind { DSC__SHM_HELLO = 1, DSC__SHM_REFUSED, DSC__SHM_WINDOW };
struct dsc__shm_message {
    uint64_t magic; /* protocol and version */
    uint64_t number;
    uint32_t kind;
    int32_t rank, size, pid;
    int32_t n_fds;
    int32_t fds[DSC__SHM_FDS_MAX]; /* local numbers: filled by receive, read by send */
    char text[DSC__SHM_TEXT_MAX];  /* token or reason */
};
/* What a wait on a socket polls besides the socket. `check` may be NULL. */
struct dsc__shm_patience {
    const struct dsc_comm_options *options;
    double since;
    const char *what; /* for the texts: "connecting to rank 0" */
    enum dsc_status (*check)(void *context);
    void *context;
};
enum dsc__shm_received { DSC__SHM_GOT, DSC__SHM_NOTHING, DSC__SHM_CLOSED, DSC__SHM_GARBAGE };
/* Never blocks. Descriptors of anything but DSC__SHM_GOT are closed already. */
enum dsc__shm_received dsc__shm_receive_now(int socket, struct dsc__shm_message *out);
/* `peer` is named in the texts. A refusal and a closed socket are DSC_EDEAD. */
enum dsc_status dsc__shm_receive(int socket, int peer, const struct dsc__shm_patience *patience,
                                 struct dsc__shm_message *out);
enum dsc_status dsc__shm_send(int socket, int peer, const struct dsc__shm_patience *patience,
                              const struct dsc__shm_message *message);
/* Time-out and interrupt of a wait; DSC_OK means go on. */
enum dsc_status dsc__shm_patience_check(const struct dsc__shm_patience *patience);
struct dsc__shm_message dsc__shm_message_of(enum dsc__shm_kind kind, int rank, int size);
void dsc__shm_close_fds(struct dsc__shm_message *message);
/* The uid at the other end is ours. */
bool dsc__shm_same_user(int socket);

/* ---- shm_gather.c: descriptors of all ranks to all ---- */
struct dsc__shm_gathering {
    struct dsc__shm_message *own; /* whose descriptors remain the caller's */
    struct dsc__shm_patience patience;
    /* Takes over the descriptors of another rank's message, also where it fails. */
    enum dsc_status (*take)(void *context, int rank, struct dsc__shm_message *message);
    void *context;
};
/* One call each: rank 0 with its listener (dsc_shm_listen), the others with what that gave. */
enum dsc_status dsc__shm_gather_as_leader(const struct dsc__shm_gathering *gathering,
                                          const struct dsc_shm_listener *listener);
enum dsc_status dsc__shm_gather_as_follower(const struct dsc__shm_gathering *gathering,
                                            const char *address, const char *token);

/* ---- shm_threads.c ---- */
enum dsc_status dsc__shm_threads_window(struct dsc__shm *shm, size_t n_bytes,
                                        struct dsc_window **out);
void dsc__shm_threads_window_close(struct dsc__shm *shm, struct dsc_window *window);
void dsc__shm_threads_window_keep(struct dsc__shm *shm, struct dsc_window *window, int rank,
                                  struct dsc_kept *out);
void dsc__shm_world_unref(struct dsc__shm_world *world);

/* ---- shm_sync.c: publishing, waiting, death ---- */
struct dsc__shm_wait {
    enum dsc__shm_awaited kind;
    uint64_t target;   /* sequence, phase, or the bell's value that must pass */
    const char *label; /* bell: what is waited for */
    double since;      /* 0: from now */
};
enum dsc_status dsc__shm_wait(struct dsc__shm *shm, const struct dsc__shm_wait *wait);
/* Whether the word that `wait` looks for is there in `block`. Not for bells. */
bool dsc__shm_has(struct dsc__shm_block *block, enum dsc__shm_awaited kind, uint64_t target);
/* A step inside an operation. With lag 1 all ranks meet: what each wrote before, all see after.
 * Otherwise this rank only waits until all have done the step before the last lag - 1. */
enum dsc_status dsc__shm_step(struct dsc__shm *shm, size_t lag);
void dsc__shm_publish(struct dsc__shm *shm, const struct dsc__print *print);
/* The print in rank's slot for `sequence`. */
void dsc__shm_read_print(const struct dsc__shm *shm, int rank, uint64_t sequence,
                         struct dsc__print *out);
/* The newest print of a rank, sequence 0 if none. */
void dsc__shm_last_print(const struct dsc__shm *shm, int rank, struct dsc__print *out);
/* DSC_OK, or the failure that somebody told this world about. */
enum dsc_status dsc__shm_check_broken(const struct dsc__shm *shm);
/* Whether the process of a channel's rank has ended. */
bool dsc__shm_is_dead(const struct dsc__shm *shm, int rank);
/* Dead, left and given-up ranks that `wait` needs. */
enum dsc_status dsc__shm_check_ranks(struct dsc__shm *shm, const struct dsc__shm_wait *wait);
void dsc__shm_ring(void *state, int rank);
uint32_t dsc__shm_bell(void *state);
enum dsc_status dsc__shm_wait_bell(void *state, uint32_t seen, const char *label, double since);
void dsc__shm_give_up(void *state, enum dsc_status status, const char *reason);
/* Says that this rank closed, and wakes all. */
void dsc__shm_leave(void *state);
/* What this rank waits in, for texts. */
void dsc__shm_describe_wait(const struct dsc__shm *shm, const struct dsc__shm_wait *wait,
                            char text[DSC__SHM_BLOCKED_TEXT]);

/* ---- shm_standstill.c: ranks that wait for each other in different operations ---- */
/* Called now and then by a waiter. Tells the others about this wait, and fails with DSC_EDIVERGED
 * if ranks wait for each other in a circle, in this look and the one before. */
enum dsc_status dsc__shm_look_for_standstill(struct dsc__shm *shm, const struct dsc__shm_wait *wait,
                                             int missing);
/* The wait that look_for_standstill told about has ended. */
void dsc__shm_end_look(struct dsc__shm *shm);

/* ---- shm_mail.c: messages between two ranks ---- */
enum dsc_status dsc__shm_message_advance(void *state, struct dsc__message *message);
uint32_t dsc__shm_mail(void *state);
void dsc__shm_message_wait(void *state, uint32_t seen);
enum dsc_status dsc__shm_message_check(void *state, struct dsc__message *message, uint32_t seen);
void dsc__shm_message_end(void *state);
void dsc__shm_ring_mail(void *state);

/* ---- shm_travel.c: chunks on their way ---- */
/* One operation on its way. Lengths of parts are in bytes; a part is what one rank has for another,
 * for the root, or for all. */
struct dsc__shm_route {
    struct dsc__shm *shm;
    const struct dsc_coll *coll;
    const struct dsc__parts *parts; /* NULL: all parts have n_bytes */
    size_t n_bytes;                 /* of the longest part, not 0 */
    size_t cell;                    /* bytes of an area that a chunk takes */
    size_t chunk;                   /* bytes of a part that travel at once */
    uint64_t first;                 /* where the first cell is */
};
/* Where `shared`, a cell holds a part for each other rank. */
struct dsc__shm_route dsc__shm_route_of(struct dsc__shm *shm, const struct dsc_coll *coll,
                                        size_t n_bytes, bool shared);
/* Does its share of chunk `index`. */
typedef void (*dsc__shm_stage)(const struct dsc__shm_route *r, size_t index);
/* Takes every chunk through the stages. What all ranks did in one stage, each sees in the next. */
enum dsc_status dsc__shm_travel(const struct dsc__shm_route *r, const dsc__shm_stage *stages,
                                size_t n_stages);
/* Where chunk `index` of `rank` lies for the others. */
static inline size_t dsc__shm_cell_at(const struct dsc__shm_route *r, size_t index) {
    return (r->first + index * r->cell) % DSC__SHM_AREA;
}
static inline char *dsc__shm_in(const struct dsc__shm_route *r, int rank, size_t index) {
    return r->shm->blocks[rank]->in + dsc__shm_cell_at(r, index);
}
static inline char *dsc__shm_result(const struct dsc__shm_route *r, int rank, size_t index) {
    return r->shm->blocks[rank]->result + dsc__shm_cell_at(r, index);
}
/* The same where the cell is shared: what `rank` has for `to`, another one. */
static inline char *dsc__shm_in_for(const struct dsc__shm_route *r, int rank, int to,
                                    size_t index) {
    return dsc__shm_in(r, rank, index) + (size_t)(to < rank ? to : to - 1) * r->chunk;
}
static inline const char *dsc__shm_small(const struct dsc__shm *shm, int rank) {
    return shm->blocks[rank]->small[shm->sequence & 1];
}
static inline size_t dsc__shm_bytes_of(const struct dsc_coll *coll) {
    return coll->n_elems * dsc_dtype_size(coll->dtype);
}
/* What is left of a part of n bytes at chunk `index`, at most one chunk. */
static inline size_t dsc__shm_length_at(const struct dsc__shm_route *r, size_t n, size_t index) {
    size_t first = index * r->chunk;
    return first < n ? dsc_min(r->chunk, n - first) : 0;
}
/* A piece of a result of n_whole bytes: past the caches if that is more than they hold. */
void dsc__shm_put(void *dst, const void *src, size_t n_bytes, size_t n_whole);

/* ---- shm_coll.c: algorithms ---- */
enum dsc_status dsc__shm_all_reduce(void *state, const struct dsc_coll *coll);
enum dsc_status dsc__shm_reduce_scatter(void *state, const struct dsc_coll *coll);
enum dsc_status dsc__shm_all_gather(void *state, const struct dsc_coll *coll);
enum dsc_status dsc__shm_broadcast(void *state, const struct dsc_coll *coll);

/* ---- shm_parts.c: algorithms of one root, and of all pairs ---- */
enum dsc_status dsc__shm_reduce(void *state, const struct dsc_coll *coll);
enum dsc_status dsc__shm_gather(void *state, const struct dsc_coll *coll);
enum dsc_status dsc__shm_scatter(void *state, const struct dsc_coll *coll);
enum dsc_status dsc__shm_all_to_all(void *state, const struct dsc_coll *coll);
enum dsc_status dsc__shm_all_to_all_v(void *state, const struct dsc_coll *coll,
                                      const struct dsc__parts *parts);

#endif
