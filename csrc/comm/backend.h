/* What comm.c and the back ends share: fingerprints, the back-end table, the communicator itself.
 *
 * Decides: the border between the two. comm.c checks arguments, numbers operations, compares
 * fingerprints and poisons; a back end publishes, waits and moves bytes. It may assume checked
 * arguments and that no call comes after a failure of its own.
 * Invariant: a back end never writes a caller's buffer before `agree` returned DSC_OK. */
#ifndef DSC_COMM_BACKEND_H
#define DSC_COMM_BACKEND_H

#include "comm.h"

#include <pthread.h>
#include <stdatomic.h>
#include <sys/types.h>

enum {
    DSC__TOKEN_CHARS = 32,
    DSC__LABEL_MAX = 64,
    DSC__CALL_TEXT_MAX = 192,
    DSC__REASON_MAX = 1024
};

/* The fingerprint of one operation. Every byte is set (padding included), so memcmp compares it. */
struct dsc__print {
    uint64_t sequence; /* from 1 */
    uint64_t tag;
    uint64_t n_elems; /* meet and window: bytes */
    uint32_t op, dtype, reduce, root, size, zero;
    char label[DSC__LABEL_MAX];
};

/* Whether two tokens, what a connection shows to be of this job, are equal; in a time that does not
 * depend on where they differ. */
static inline bool dsc__same_token(const char *a, const char *b) {
    unsigned difference = 0;
    for (int i = 0; i < DSC__TOKEN_CHARS; i++)
        difference |= (unsigned char)a[i] ^ (unsigned char)b[i];
    return difference == 0;
}

/* Lengths of an all_to_all with uneven parts, checked against all other ranks'. */
struct dsc__parts {
    const size_t *n_send, *n_recv; /* elements to and from each rank */
    size_t n_max;                  /* the longest part between any two ranks; equal on all */
};

/* The pieces of a gathering, one after the other as a strand of bytes per owner; and how far each
 * has been stored here, and this rank's own read. */
struct dsc__strand {
    size_t n_bytes;
    size_t piece, offset; /* the next byte */
};
struct dsc__strands {
    const struct dsc_piece *pieces;
    struct dsc__strand own;
    size_t n_max;            /* the longest strand; equal on all ranks */
    struct dsc__strand of[]; /* per rank */
};

/* One end of a message under way. */
struct dsc__message {
    struct dsc_p2p what;
    bool is_send, is_async, done;
    int peer; /* once known */
    void *lane;
    size_t n_bytes, n_moved;
    double since;
    unsigned n_looks, n_gone; /* the back end's, for its checks */
};

/* A group that is being opened. */
struct dsc__group {
    const struct dsc_comm_options *options;
    const int *ranks; /* of the parent, in the group's order */
    int rank, size;   /* this one's place */
    const char *name;
    uint64_t key; /* of the name, not 0 */
};

/* Everything below takes the back end's state first. A failed call ends the communicator. */
struct dsc_comm_backend {
    const char *name;
    size_t state_size;      /* comm.c allocates and zeroes it */
    bool agrees_by_message; /* an agreement costs a round trip, and covered operations have none */
    void (*close)(void *state);
    /* In a forked child, from pthread_atfork: give up descriptors; nothing else is safe there. */
    void (*forked)(void *state);

    /* Publishes `mine` with up to n_payload bytes and waits until every rank has published its own
     * fingerprint of the same sequence. */
    enum dsc_status (*agree)(void *state, const struct dsc__print *mine, const void *payload,
                             size_t n_payload);
    void (*print_of)(void *state, int rank, struct dsc__print *out);
    /* What `rank` published with the current operation; only for n_payload <= DSC_MEET_MAX. */
    const void *(*payload_of)(void *state, int rank);

    enum dsc_status (*all_reduce)(void *state, const struct dsc_coll *coll);
    enum dsc_status (*reduce_scatter)(void *state, const struct dsc_coll *coll);
    enum dsc_status (*all_gather)(void *state, const struct dsc_coll *coll);
    enum dsc_status (*broadcast)(void *state, const struct dsc_coll *coll);
    enum dsc_status (*reduce)(void *state, const struct dsc_coll *coll);
    enum dsc_status (*gather)(void *state, const struct dsc_coll *coll);
    enum dsc_status (*scatter)(void *state, const struct dsc_coll *coll);
    enum dsc_status (*all_to_all)(void *state, const struct dsc_coll *coll);
    enum dsc_status (*all_to_all_v)(void *state, const struct dsc_coll *coll,
                                    const struct dsc__parts *parts);
    /* See dsc_comm_part_sums. n_parts NULL: a part is a rank's. part_sums NULL: all_to_all_v
     * moves them. */
    int (*n_parts)(void *state);
    enum dsc_status (*part_sums)(void *state, const struct dsc_coll *coll, const size_t *n_send,
                                 size_t n_mine);
    /* The strands of the others, n_max > 0. NULL: pieces are broadcast one by one. */
    enum dsc_status (*gather_pieces)(void *state, struct dsc__strands *strands);
    /* Messages between two ranks, from any thread; all NULL where there are none. has_messages:
     * NULL where all communicators of the back end have them. advance does what can be done without
     * waiting. wait returns when `mail` differs from what it was, or after a tenth of a second at
     * most. check looks whether the message can still come. */
    bool (*has_messages)(void *state);
    enum dsc_status (*message_advance)(void *state, struct dsc__message *message);
    uint32_t (*mail)(void *state);
    void (*message_wait)(void *state, uint32_t seen);
    enum dsc_status (*message_check)(void *state, struct dsc__message *message, uint32_t seen);
    /* A synchronous wait for a message has ended. May be NULL. */
    void (*message_end)(void *state);
    /* The message failed: its memory is no longer the back end's. May be NULL. */
    void (*message_drop)(void *state, struct dsc__message *message);
    void (*ring_mail)(void *state); /* ends this rank's own waits */

    /* By how much the number of this rank's unfinished asynchronous operations changes. May be
     * NULL.
     */
    void (*posted)(void *state, enum dsc_comm_op op, int change);

    /* A communicator of some ranks, which alone call this. It need not have compared anything yet.
     * NULL where groups have their own way. */
    enum dsc_status (*open_group)(void *state, const struct dsc__group *group,
                                  struct dsc_comm **out);
    /* All members have opened the group. May be NULL. */
    void (*opened)(void *state);

    /* Windows and bells, present or absent (NULL) together. */
    enum dsc_status (*window_open)(void *state, size_t n_bytes, struct dsc_window **out);
    void (*window_close)(void *state, struct dsc_window *window);
    void (*window_keep)(void *state, struct dsc_window *window, int rank, struct dsc_kept *out);

    void (*ring)(void *state, int rank);
    uint32_t (*bell)(void *state);
    enum dsc_status (*wait_bell)(void *state, uint32_t seen, const char *label, double since);
    /* Tells the other ranks that this one gives up; `status` is what their waits return. */
    void (*give_up)(void *state, enum dsc_status status, const char *reason);
    /* Tells the other ranks that this one closed; the state stays. */
    void (*leave)(void *state);
    /* The process ends, or the communicator is left: no thread of the back end's own goes on. May
     * be NULL. */
    void (*halt)(void *state);
};

struct dsc_comm {
    const struct dsc_comm_backend *backend;
    void *state;
    struct dsc_comm_options given;   /* as the caller gave them */
    struct dsc_comm_options options; /* the same, but threads of ours never call the caller's */
    int rank, size;
    uint64_t sequence;
    bool covered;        /* dsc_comm_cover */
    atomic_bool silent;  /* a failure is told to nobody: the process ends */
    atomic_bool halting; /* every wait ends */
    struct dsc__queue *_Atomic works,
        *_Atomic messages; /* async.c, messages.c: NULL until first used */
    _Atomic(enum dsc_status)
        broken; /* what every later call returns; DSC_OK while the world is whole */
    char reason[DSC__REASON_MAX];
    atomic_flag busy;   /* two threads in one communicator would diverge silently */
    atomic_bool forked; /* set in a forked child */
    struct dsc_comm *prev, *next;
};

/* A communicator with zeroed state of its back end, registered for forks. */
enum dsc_status dsc__comm_new(const struct dsc_comm_backend *backend,
                              const struct dsc_comm_options *options, int rank, int size,
                              struct dsc_comm **out);
/* Frees what dsc__comm_new gave; the state's contents are the back end's to release before. */
void dsc__comm_delete(struct dsc_comm *comm);

/* comm.c: the steps of every operation. enter: usable, and by nobody else at the moment. agree: the
 * next number, and the same fingerprint on every rank. leave: ends what enter began; a failure
 * breaks the communicator and is told to the other ranks. */
enum dsc_status dsc__check_usable(const struct dsc_comm *comm);
enum dsc_status dsc__enter(struct dsc_comm *comm);
struct dsc__print dsc__print_of(const struct dsc_comm *comm, enum dsc_comm_op op,
                                const char *label);
enum dsc_status dsc__agree(struct dsc_comm *comm, struct dsc__print *mine, const void *payload,
                           size_t n_payload);
enum dsc_status dsc__leave(struct dsc_comm *comm, enum dsc_status status);
/* A usable communicator and two buffers of these lengths that do not overlap. */
enum dsc_status dsc__check_pair(const struct dsc_comm *comm, const char *call,
                                const struct dsc_coll *coll, size_t n_src, size_t n_dst);

/* async.c: a thread that works off a queue. */
struct dsc_work {
    atomic_int n_refs;
    struct dsc__queue *queue;
    struct dsc_work *next;
    enum dsc_comm_op op;
    struct dsc_coll coll;
    size_t *counts; /* n_send, then n_recv; NULL for equal parts */
    struct dsc_piece *pieces;
    size_t n_pieces;
    uint64_t tag; /* of the pieces and all of the label */
    struct dsc__message message;
    char label[DSC__LABEL_MAX];
    bool done; /* these three under the queue's lock */
    enum dsc_status status;
    char reason[DSC__REASON_MAX];
};
typedef void (*dsc__serve_fn)(struct dsc__queue *queue);
struct dsc__queue {
    atomic_int n_refs;
    struct dsc_comm *comm; /* only for its own thread */
    pid_t pid;             /* a forked child has no such thread */
    dsc__serve_fn serve;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct dsc_work *head, *tail;
    atomic_bool stop;
    atomic_int n_waiting; /* threads that wait for what is in the queue, and would for ever */
};
/* A queue with its thread. */
enum dsc_status dsc__queue_open(struct dsc_comm *comm, dsc__serve_fn serve,
                                struct dsc__queue *_Atomic *out);
/* Ends the thread, which ends what is in the queue. NULL is fine. */
void dsc__queue_close(struct dsc__queue *queue);
enum dsc_status dsc__work_new(struct dsc__queue *queue, enum dsc_comm_op op, const char *label,
                              struct dsc_work **out);
void dsc__queue_push(struct dsc__queue *queue, struct dsc_work *work);
/* For the thread: takes the work out of the queue as ended with `status` and the last error. */
void dsc__queue_end(struct dsc__queue *queue, struct dsc_work *work, enum dsc_status status);
bool dsc__queue_empty(struct dsc__queue *queue);
/* What an interrupt of a communicator's own thread means: nobody sends one but who closes. */
enum dsc_status dsc__fail_closed(void);
/* Waits until the asynchronous collectives before have ended. */
enum dsc_status dsc__drain(struct dsc_comm *comm);
/* Whether the caller is one of the communicator's own threads. */
bool dsc__on_own_thread(const struct dsc_comm *comm);
/* Whether some thread waits, without a time of its own, for the asynchronous collectives. */
bool dsc__is_awaited(const struct dsc_comm *comm);
/* dsc_interrupt_fn of every communicator: context is the communicator. */
bool dsc__interrupted(void *context);

/* messages.c: a message as a call, and DSC_EDIVERGED for a recv that found another one sent. */
void dsc__message_call(const struct dsc__message *message, char text[DSC__CALL_TEXT_MAX]);
enum dsc_status dsc__message_differs(const struct dsc__message *recv, int rank,
                                     enum dsc_dtype dtype, size_t n_bytes, const char *label);

/* pieces.c: the next n bytes of this rank's own strand; of a rank's, stored where they belong. */
void dsc__strand_read(struct dsc__strands *strands, char *to, size_t n);
void dsc__strand_write(struct dsc__strands *strands, int rank, const char *from, size_t n);
/* What ranks compare of a gathering, and the gathering with that. */
uint64_t dsc__pieces_tag(const char *label, const struct dsc_piece *pieces, size_t n_pieces);
enum dsc_status dsc__gather_pieces(struct dsc_comm *comm, const char *label, uint64_t tag,
                                   const struct dsc_piece *pieces, size_t n_pieces);

/* fork.c: the list of live communicators that the fork handler walks. */
enum dsc_status dsc__fork_register(struct dsc_comm *comm);
void dsc__fork_forget(struct dsc_comm *comm);

/* fingerprint.c: "all_reduce(fp32 x 1024, sum)", and with " as operation 17" behind it. */
void dsc__print_call(const struct dsc__print *print, char text[DSC__CALL_TEXT_MAX]);
void dsc__print_operation(const struct dsc__print *print, char text[DSC__CALL_TEXT_MAX]);
/* DSC_EDIVERGED naming two ranks and both calls unless all ranks' fingerprints equal rank 0's. */
enum dsc_status dsc__print_compare(struct dsc_comm *comm, const struct dsc__print *mine);

/* reduce.c: dst = the sources combined in rank order, in fp32 for 16-bit floats, rounded once.
 * dst may equal a source, not overlap one otherwise. `stream`: dst is part of a large result. */
void dsc__reduce(void *dst, const void *const *srcs, int n_srcs, size_t n_elems,
                 enum dsc_dtype dtype, enum dsc_op op, bool stream);
/* The same in two steps. First the ranks of a node, into values of sum_dtype (fp32 for 16-bit
 * floats), neither divided nor rounded; then the nodes' values, in node order. dst may equal no
 * source. */
enum dsc_dtype dsc__sum_dtype(enum dsc_dtype dtype);
void dsc__reduce_ranks(void *dst, const void *const *srcs, int n_srcs, size_t n_elems,
                       enum dsc_dtype dtype, enum dsc_op op);
void dsc__reduce_nodes(void *dst, const void *const *srcs, int n_srcs, size_t n_elems,
                       enum dsc_dtype dtype, enum dsc_op op, int n_ranks);

/* dsc__stream_copy pays for results from about this size on. */
enum { DSC__STREAM_FROM = 16 << 20 };

#endif
