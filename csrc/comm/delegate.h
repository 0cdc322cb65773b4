/* A communicator that hands its operations to somebody else: for ranks that share no memory.
 *
 * Decides: what that somebody (torch.distributed, through bind/; a fake in tests) has to offer:
 * four moves of bytes inside a staging area that both sides see, one at a time, and a board of keys
 * that all ranks of the job read. Numbers, agreement and order stay here, so results have the bits
 * of `shm`. Invariant: a move touches nothing but the staging, so that one which never ends cannot
 * write to a caller's memory. */
#ifndef DSC_COMM_DELEGATE_H
#define DSC_COMM_DELEGATE_H

#include "comm.h"

enum dsc_move_kind {
    DSC_MOVE_EXCHANGE, /* n_send[r] bytes from src on to each rank r, n_recv[r] from it to dst on */
    DSC_MOVE_GATHER,   /* dst = every rank's n_bytes at src, in rank order */
    DSC_MOVE_BROADCAST, /* n_bytes at dst become rank root's */
    DSC_MOVE_MINIMUM,   /* n_bytes of int64 at dst become the least of all ranks' */
};
struct dsc_move {
    enum dsc_move_kind kind;
    size_t src, dst; /* offsets into the staging, multiples of 64; apart from each other */
    size_t n_bytes;
    const size_t *n_send, *n_recv; /* per rank; one part follows the other */
    int root;
};

enum { DSC_BOARD_KEY_MAX = 96, DSC_BOARD_TEXT_MAX = 1280, DSC_BOARD_DEAD_MAX = 64 };

/* All are called from the thread that uses the communicator. The moves: DSC_EDEAD with the reason
 * where the connection is lost. The board: DSC_EDEAD where it cannot be reached. */
struct dsc_delegate {
    void *context;
    char *staging;
    size_t n_staging;       /* at least 4 * DSC_MEET_MAX * size */
    const char *channel;    /* names this communicator among all of the job; copied */
    int job_rank, job_size; /* this process among all that use the board */
    /* For messages between two ranks: a listening TCP socket, taken over, and what a connection to
     * it has to show (copied). The board says where each rank listens ("mail/RANK": "host port
     * token"). NULL: no messages. */
    int listener;
    const char *token;

    enum dsc_status (*start)(void *context, const struct dsc_move *move);
    /* Waits at most `ms` for what start began. */
    enum dsc_status (*wait)(void *context, int ms, bool *done);

    /* *value: after adding; a key starts at 0. */
    enum dsc_status (*add)(void *context, const char *key, int64_t by, int64_t *value);
    /* once: an existing value stays. */
    enum dsc_status (*put)(void *context, const char *key, const char *text, bool once);
    /* "" where there is none. */
    enum dsc_status (*look)(void *context, const char *key, char text[DSC_BOARD_TEXT_MAX]);
    /* "rank 3 (pid 77)" of a process that is known to have ended, or "". */
    void (*dead)(void *context, char text[DSC_BOARD_DEAD_MAX]);

    void (*leave)(void *context);   /* ends the connections; a move that runs may stay behind */
    void (*release)(void *context); /* the last call */
};

/* Local: the delegate's connections exist. Takes over `delegate` (released also on failure),
 * and its listener. */
enum dsc_status dsc_comm_open_delegate(const struct dsc_comm_options *options,
                                       const struct dsc_delegate *delegate, int rank, int size,
                                       struct dsc_comm **out);

/* Collective over the ranks of this one's node: from now on they reduce among themselves first, and
 * only sums of nodes travel (delegate_nodes.c). Every node has as many ranks of `comm`, at least
 * two, one after the other. node: their communicator, with windows. rail: another context of the
 * delegate's start, wait, leave and release, over the same staging: the ranks with this one's place
 * on all nodes, in the order of nodes. Takes over both (closed, released also on failure). */
enum dsc_status dsc_comm_delegate_use_nodes(struct dsc_comm *comm, struct dsc_comm *node,
                                            void *rail);

#endif
