/* Communicators: a fixed set of ranks that call the same operations in the same order.
 *
 * Decides: argument checks, numbering, fingerprints, time-outs and poisoning; back ends (self.c,
 * shm.c, later delegate.c, nccl.c) only move bytes. Two classes of failure: the caller's argument
 * (nothing has changed), and a broken world (the communicator is poisoned: every later call returns
 * the first error). Invariant: no data moves before all ranks' fingerprints agree; every sum is
 * taken in rank order and starts at +0.0, so results repeat bit for bit.
 *
 * A communicator belongs to one thread at a time (the binding sees to it). */
#ifndef DSC_COMM_H
#define DSC_COMM_H

#include "../dsc.h"

struct dsc_comm;

/* What an operation is: compared between ranks before data moves. `label` says who calls, for
 * people
 * ("all_reduce", "engine.step #12"); it is cut at 63 bytes and compared as well. */
enum dsc_comm_op {
    DSC_COMM_ALL_REDUCE,
    DSC_COMM_REDUCE_SCATTER,
    DSC_COMM_ALL_GATHER,
    DSC_COMM_BROADCAST,
    DSC_COMM_REDUCE,
    DSC_COMM_GATHER,
    DSC_COMM_SCATTER,
    DSC_COMM_ALL_TO_ALL,
    DSC_COMM_ALL_TO_ALL_V,
    DSC_COMM_SEND,
    DSC_COMM_RECV,
    DSC_COMM_BARRIER,
    DSC_COMM_PART_SUMS,
    DSC_COMM_GATHER_PIECES,
    DSC_COMM_WINDOW,
    DSC_COMM_MEET,
    DSC_COMM_OP_COUNT
};

struct dsc_coll {
    const void *src;      /* all but broadcast; may equal dst for all_reduce and reduce */
    void *dst;            /* all operations but barrier; broadcast reads it on root */
    size_t n_elems;       /* all_reduce, reduce, broadcast: of the buffer; the others: per rank */
    enum dsc_dtype dtype; /* DSC_U8 (bytes of any type) where nothing is combined */
    enum dsc_op op;       /* all_reduce, reduce_scatter, reduce */
    int root;             /* broadcast, reduce, gather, scatter */
    const char *label;    /* NULL: the operation's own name */
};

/* Polled about every 100 ms in every wait, with no lock held; true means: give up (DSC_EINTR). */
typedef bool (*dsc_interrupt_fn)(void *context);

struct dsc_comm_options {
    double timeout_s; /* of one operation; <= 0 means none */
    dsc_interrupt_fn interrupted;
    void *interrupt_context;
};

/* ---- opening ---- */

/* A world of one. */
enum dsc_status dsc_comm_open_self(const struct dsc_comm_options *options, struct dsc_comm **out);

/* Ranks of one node over shared memory, in two steps, because addresses travel through the
 * rendezvous of the caller (torch.distributed's store). listen: rank 0 makes an abstract Unix
 * socket and fills `address` (text, NUL-terminated) that all ranks then pass to connect. `node`
 * receives this machine's identity (boot id and user), which the caller compares between ranks
 * first. */
struct dsc_shm_listener;
enum { DSC_SHM_ADDRESS_MAX = 108, DSC_SHM_NODE_MAX = 96 };
enum dsc_status dsc_shm_node(char node[DSC_SHM_NODE_MAX]);
enum dsc_status dsc_shm_listen(struct dsc_shm_listener **out, char address[DSC_SHM_ADDRESS_MAX],
                               char token[33]);
void dsc_shm_listener_close(struct dsc_shm_listener *listener);
/* Collective. `listener` on rank 0 (consumed on success), NULL elsewhere. */
enum dsc_status dsc_comm_open_shm(const struct dsc_comm_options *options,
                                  struct dsc_shm_listener *listener, const char *address,
                                  const char *token, int rank, int size, struct dsc_comm **out);
/* All ranks as threads of this process, over plain mappings: for ThreadSanitizer and stress tests.
 * out[size] receives a communicator per rank. */
enum dsc_status dsc_comm_open_threads(const struct dsc_comm_options *options, int size,
                                      struct dsc_comm **out);

/* Collective over `ranks` (ranks of `parent`, in the new order; this one is among them), which
 * takes about as long as a barrier; the others do nothing and need not know. Two groups, even of
 * the same ranks, have their own sequences. `name` tells groups apart while they are being opened,
 * so it must be the same on all members and another one for each group that a member may be
 * opening at the time; it stands in texts. The parent may be closed before the group. DSC_ENOTYET
 * where the back end has no groups. */
enum dsc_status dsc_comm_open_group(struct dsc_comm *parent, const struct dsc_comm_options *options,
                                    const int *ranks, int n_ranks, const char *name,
                                    struct dsc_comm **out);

/* Local, never fails, NULL is fine. Other ranks that still wait for this one get DSC_EDEAD
 * ("left"). Does nothing in a forked child. Windows must be closed before. */
void dsc_comm_close(struct dsc_comm *comm);

/* The half of close that the other ranks see, for who still refers to the communicator: later calls
 * are DSC_ESTATE, and close remains to be called. Nothing in a forked child. */
void dsc_comm_leave(struct dsc_comm *comm);

/* This rank, from 0. */
int dsc_comm_rank(const struct dsc_comm *comm);
/* The number of ranks. */
int dsc_comm_size(const struct dsc_comm *comm);
const char *dsc_comm_backend(const struct dsc_comm *comm); /* "self", "shm" */

/* Tells every other rank that this one gives up and why; their waits end with DSC_EDEAD and this
 * text. For a rank that fails outside a communicator call. */
void dsc_comm_abort(struct dsc_comm *comm, const char *reason);

/* ---- collectives ---- */

/* dst = the reduction of all ranks' src, on every rank. */
enum dsc_status dsc_comm_all_reduce(struct dsc_comm *comm, const struct dsc_coll *coll);
/* dst = part `rank` (n_elems) of the reduction of all ranks' src (size * n_elems). */
enum dsc_status dsc_comm_reduce_scatter(struct dsc_comm *comm, const struct dsc_coll *coll);
/* dst (size * n_elems) = every rank's src (n_elems), in rank order. */
enum dsc_status dsc_comm_all_gather(struct dsc_comm *comm, const struct dsc_coll *coll);
/* dst = rank root's dst. */
enum dsc_status dsc_comm_broadcast(struct dsc_comm *comm, const struct dsc_coll *coll);
/* On root, dst = the reduction of all ranks' src; elsewhere dst is not looked at. */
enum dsc_status dsc_comm_reduce(struct dsc_comm *comm, const struct dsc_coll *coll);
/* On root, dst (size * n_elems) = every rank's src (n_elems); elsewhere dst is not looked at. */
enum dsc_status dsc_comm_gather(struct dsc_comm *comm, const struct dsc_coll *coll);
/* dst (n_elems) = part `rank` of root's src (size * n_elems); elsewhere src is not looked at. */
enum dsc_status dsc_comm_scatter(struct dsc_comm *comm, const struct dsc_coll *coll);
/* Part r of dst = part `rank` of rank r's src; both have size * n_elems. */
enum dsc_status dsc_comm_all_to_all(struct dsc_comm *comm, const struct dsc_coll *coll);
/* The same with parts of any lengths, one after the other: n_send[r] elements for rank r, n_recv[r]
 * from it. Ranks whose counts contradict each other all get DSC_EDIVERGED, before data moves.
 * coll->n_elems counts for nothing, except under dsc_comm_cover, where counts are not compared:
 * then it is the longest part between any two ranks. */
enum dsc_status dsc_comm_all_to_all_v(struct dsc_comm *comm, const struct dsc_coll *coll,
                                      const size_t *n_send, const size_t *n_recv);
/* Returns when every rank has come. */
enum dsc_status dsc_comm_barrier(struct dsc_comm *comm, const char *label);

/* A run of bytes that one rank has and all get. */
struct dsc_piece {
    int owner;
    const void *src; /* on the owner; may be dst */
    void *dst;
    size_t n_bytes;
};
/* Every rank's dst of every piece = its owner's src. All ranks bring the same owners and lengths,
 * in ascending order of owners, or all get DSC_EDIVERGED before data moves. All of the label is
 * compared, however long. Memory of its own: some words per rank. */
enum dsc_status dsc_comm_gather_pieces(struct dsc_comm *comm, const char *label,
                                       const struct dsc_piece *pieces, size_t n_pieces);

/* ---- asynchronous operations ---- */

/* An operation that a thread of the communicator runs; operations of a communicator, synchronous or
 * not, run in the order of their calls. */
struct dsc_work;
/* Hands over a collective with equal parts, a barrier, or (with counts, which are copied) an
 * all_to_all with splits. Buffers stay the operation's until it is done; wrong arguments are the
 * work's failure. */
enum dsc_status dsc_comm_post(struct dsc_comm *comm, enum dsc_comm_op op,
                              const struct dsc_coll *coll, const size_t *n_send,
                              const size_t *n_recv, struct dsc_work **out);
/* The same for pieces, which are copied; what they point to is the operation's until it is done. */
enum dsc_status dsc_comm_post_pieces(struct dsc_comm *comm, const char *label,
                                     const struct dsc_piece *pieces, size_t n_pieces,
                                     struct dsc_work **out);
/* Whether it has ended, well or not. Never waits. */
bool dsc_work_done(struct dsc_work *work);
/* Waits, and returns how the operation ended; again and again if one likes. timeout_s <= 0 means
 * none. DSC_ETIMEDOUT with "still runs" and DSC_EINTR end the wait, not the operation. */
enum dsc_status dsc_work_wait(struct dsc_work *work, double timeout_s, dsc_interrupt_fn interrupted,
                              void *context);
/* A message's peer, once it is done: whom a recv from any rank heard. */
int dsc_work_peer(struct dsc_work *work);
/* Gives up the handle; an operation under way goes on. NULL is fine. */
void dsc_work_release(struct dsc_work *work);
/* Ends the communicator's threads, and on a delegate other threads' waits, without telling the
 * other ranks: for the end of the process. */
void dsc_comm_halt(struct dsc_comm *comm);

/* ---- from one rank to another ---- */

/* Messages of a pair of ranks with one tag arrive in order; they have no place in the sequence of
 * the collectives. Ranks that disagree about type or length both fail with DSC_EDIVERGED. */
struct dsc_p2p {
    void *data; /* send only reads it */
    size_t n_elems;
    enum dsc_dtype dtype;
    int peer;     /* recv: -1 takes the first that comes, from whichever rank */
    uint64_t tag; /* any value; two communicators of the same ranks need different ones */
    const char *label;
};
/* Returns when data may be overwritten: the receiver need not have it yet. DSC_ENOTYET where the
 * back end has no messages. */
enum dsc_status dsc_comm_send(struct dsc_comm *comm, const struct dsc_p2p *message);
/* *from receives the sender's rank; may be NULL. */
enum dsc_status dsc_comm_recv(struct dsc_comm *comm, const struct dsc_p2p *message, int *from);
/* The same without waiting. Messages under way do not wait for each other. */
enum dsc_status dsc_comm_post_message(struct dsc_comm *comm, bool is_send,
                                      const struct dsc_p2p *message, struct dsc_work **out);

/* ---- what the engine builds on ---- */

/* Whether windows and bells exist: all ranks share memory. */
bool dsc_comm_has_windows(const struct dsc_comm *comm);

/* Operations between cover(true) and cover(false) were agreed on as a whole by the caller (its plan
 * was part of the last meet's tag), so that each needs no agreement of its own where that costs a
 * round trip over a network. Returns what was set before. Back ends where it does not compare as
 * ever, and so do asynchronous operations. */
bool dsc_comm_cover(struct dsc_comm *comm, bool covered);

/* The contributions of all ranks to what each owns, in as few parts as the back end can tell apart
 * without choosing an order of its own: dsc_comm_n_parts of them, in rank order, whose sum (from
 * +0.0, in that order) is every element's. A part is a rank's own contribution, of `dtype`, or,
 * where the ranks of a node add up first, the sum of a node's (from +0.0, in rank order), of fp32.
 * coll: src holds n_send[r] elements for each rank r, one after the other; dst receives n_parts
 * times n_mine elements of dsc_comm_part_dtype; n_elems is the longest n_send of all ranks. Counts
 * must follow from what ranks agreed on before: all bring n_send[r] of what rank r calls n_mine. */
int dsc_comm_n_parts(const struct dsc_comm *comm);
enum dsc_dtype dsc_comm_part_dtype(const struct dsc_comm *comm, enum dsc_dtype dtype);
enum dsc_status dsc_comm_part_sums(struct dsc_comm *comm, const struct dsc_coll *coll,
                                   const size_t *n_send, size_t n_mine);

/* Every rank brings n_bytes (<= DSC_MEET_MAX) and receives everyone's, in rank order, in `all`
 * (size * n_bytes). `label` and `tag` are fingerprinted: ranks that come with different ones all
 * get DSC_EDIVERGED naming both. Also a barrier: what a rank wrote before it is visible to all
 * after it. */
enum { DSC_MEET_MAX = 512 };
enum dsc_status dsc_comm_meet(struct dsc_comm *comm, const char *label, uint64_t tag,
                              const void *mine, size_t n_bytes, void *all);

/* A window: n_bytes of memory per rank (zeroed, page-aligned) that all ranks of this node map;
 * base[r] is rank r's part. Pages cost memory only once touched. Collective open; local close. On
 * `self` it is private memory. Not inherited by a forked child. */
struct dsc_window {
    size_t n_bytes;
    char *base[]; /* size entries */
};
enum dsc_status dsc_comm_window_open(struct dsc_comm *comm, size_t n_bytes, const char *label,
                                     struct dsc_window **out);
void dsc_comm_window_close(struct dsc_comm *comm, struct dsc_window *window);
/* Ends a window but for one rank's part, which is memory of its own from then on: it outlives the
 * communicator, a forked child has it too, and it goes when all ranks have released it. Local. Not
 * in a forked child; the window must have bytes. */
struct dsc_kept {
    char *base;
    size_t n_bytes;
    void *owner; /* the back end's */
    void (*release)(struct dsc_kept *kept);
};
void dsc_comm_window_keep(struct dsc_comm *comm, struct dsc_window *window, int rank,
                          struct dsc_kept *out);

/* Bells: one counter per rank. A rank that changed shared state rings those who may wait for it
 * (ordinary stores before ring are visible to who sees the ring); a rank that waits reads its bell
 * first, then looks at the state, then waits for the bell to differ from what it read. Ringing
 * never blocks and costs one atomic add when nobody sleeps. */
void dsc_comm_ring(struct dsc_comm *comm, int rank);
void dsc_comm_ring_others(struct dsc_comm *comm);
uint32_t dsc_comm_bell(struct dsc_comm *comm);
/* `label` says what is waited for, and goes into the error of a time-out or a dead rank. `since` is
 * where the wait's clock started (dsc_comm_now), so that a loop of waits has one time-out. */
enum dsc_status dsc_comm_wait_bell(struct dsc_comm *comm, uint32_t seen, const char *label,
                                   double since);
double dsc_comm_now(void); /* seconds, monotonic */

#endif
