/* Messages between two ranks over TCP, for a communicator whose ranks share no memory.
 *
 * Decides: how two ends find each other and what travels. A rank that sends to another connects to
 * it; messages go one way on that connection, receipts the other. Up to DSC__MAIL_EAGER bytes a
 * message travels at once, and the receiver keeps it until somebody takes it; a longer one travels
 * when it is taken, from the sender's memory into the receiver's. Invariant:
 * everything is under one lock, nobody sleeps with it, and a thread of the mail's own (pure C,
 * from open to finish) does what sockets want, so that a message never waits for its rank to call
 * something else. */
#ifndef DSC_COMM_TCP_MAIL_H
#define DSC_COMM_TCP_MAIL_H

#include "backend.h"

enum { DSC__MAIL_EAGER = 1 << 20, DSC__MAIL_UNTAKEN_MAX = 8 };
struct dsc__mail;

/* `listener`: a listening TCP socket, taken over also on failure. token: DSC__TOKEN_CHARS
 * characters that a connection to it has to show. */
enum dsc_status dsc__mail_open(int listener, const char *token, int rank, int size,
                               struct dsc__mail **out);
/* Ends the thread; later calls fail. Other ranks see no end before close. */
void dsc__mail_finish(struct dsc__mail *mail);
/* After finish. NULL is fine. */
void dsc__mail_close(struct dsc__mail *mail);
/* In a forked child. */
void dsc__mail_forked(struct dsc__mail *mail);
/* From now on advance returns this. The first one stays. */
void dsc__mail_break(struct dsc__mail *mail, enum dsc_status status, const char *reason);

/* Where a rank listens, as "host port token": needed before the first call that names it. */
bool dsc__mail_knows(struct dsc__mail *mail, int peer);
enum dsc_status dsc__mail_introduce(struct dsc__mail *mail, int peer, const char *where);

/* As in struct dsc_comm_backend. */
enum dsc_status dsc__mail_advance(struct dsc__mail *mail, struct dsc__message *message);
void dsc__mail_drop(struct dsc__mail *mail, struct dsc__message *message);
uint32_t dsc__mail_count(struct dsc__mail *mail);
void dsc__mail_ring(struct dsc__mail *mail);
void dsc__mail_wait(struct dsc__mail *mail, uint32_t seen);
/* Whether nothing can come from the rank any more (go to it, where is_send). Connects to it. */
bool dsc__mail_gone(struct dsc__mail *mail, int peer, bool is_send);

#endif
