/* What tcp_mail.c (messages) and tcp_link.c (connections) share. Nobody else includes it. All of it
 * is under mail->lock; only the thread closes descriptors, so it may poll them without the lock. */
#ifndef DSC_COMM_TCP_IMPL_H
#define DSC_COMM_TCP_IMPL_H

#include "tcp_mail.h"

#include <poll.h>
#include <sys/socket.h>

enum { DSC__MAIL_STRANGERS = 16, DSC__MAIL_SMALL = 1024 };

/* On the wire, in the order of the machines' bytes; all ranks are of one kind (the hello tells). */
struct dsc__hello {
    uint64_t magic;
    char token[DSC__TOKEN_CHARS];
    int32_t from, to;
};
enum dsc__letter_kind { DSC__LETTER = 1, DSC__BODY }; /* a short LETTER's bytes follow at once */
struct dsc__letter {
    uint32_t kind, dtype;
    uint64_t id, tag, n_bytes;
    char label[DSC__LABEL_MAX];
};
enum dsc__receipt_kind { DSC__RECEIVED = 1, DSC__TAKEN }; /* RECEIVED: all of its bytes */
struct dsc__receipt {
    uint64_t kind, id;
};

/* A message on its way out: queued, then waiting until it is received; a long one first until it is
 * taken, which then is queued again. Delivered, the message that has it as its lane frees it;
 * dropped, the link does. */
struct dsc__outgoing {
    struct dsc__outgoing *next;
    struct dsc__letter head;
    const char *body; /* NULL: none now */
    const char *data; /* the sender's memory */
    bool delivered, dropped;
};
struct dsc__outbox {
    struct dsc__outgoing *first, *last;
};

/* A message that has come, or is coming. */
struct dsc__parcel {
    struct dsc__parcel *next;
    struct dsc__letter head;
    int from;
    char *copy; /* a short one's body */
    char *to;   /* a long one's place, once taken; NULL: nobody wants it any more */
    bool complete, taken, dropped;
};

enum dsc__link_state { DSC__LINK_NONE, DSC__LINK_CONNECTING, DSC__LINK_OPEN, DSC__LINK_DEAD };
struct dsc__link {
    enum dsc__link_state state;
    int fd, peer;
    bool is_out, failed; /* failed: the thread shall end it */
    union {
        struct dsc__hello hello;
        struct dsc__letter letter;
        struct dsc__receipt receipt;
    } in;
    size_t n_in;
    double since;                /* of a stranger */
    struct dsc__parcel *filling; /* whose body comes */
    size_t n_filled;
    char small[DSC__MAIL_SMALL]; /* the hello, or receipts: before everything else */
    size_t n_small;
    /* of a link out: */
    struct dsc__outbox queue, waiting;
    size_t n_written; /* of the queue's first */
    uint64_t n_ids;
    int n_untaken;
};

struct dsc__mail {
    int rank, size, listener, wake;
    char token[DSC__TOKEN_CHARS];
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    uint32_t count;  /* changes */
    bool stop, full; /* full: the process has no descriptor for a caller now */
    enum dsc_status broken;
    char reason[DSC__REASON_MAX];
    struct dsc__mail_place {
        struct sockaddr_storage address;
        socklen_t n_address; /* 0: not known yet */
        char token[DSC__TOKEN_CHARS];
    } * places;
    struct dsc__link *links; /* 2 * size: to each rank, then from each */
    struct dsc__link strangers[DSC__MAIL_STRANGERS];
    struct dsc__parcel *inbox;
    struct pollfd *polled;
    struct dsc__link **polled_links;
};

static inline struct dsc__link *dsc__link_to(const struct dsc__mail *mail, int peer) {
    return &mail->links[peer];
}

static inline struct dsc__link *dsc__link_from(const struct dsc__mail *mail, int peer) {
    return &mail->links[mail->size + peer];
}

/* tcp_link.c */
/* Begins to connect, if that has not been done. */
void dsc__link_connect(struct dsc__mail *mail, struct dsc__link *link);
/* Writes what can be written, and has the thread write the rest. */
void dsc__link_flush(struct dsc__mail *mail, struct dsc__link *link);
void dsc__link_receipt(struct dsc__mail *mail, int to, enum dsc__receipt_kind kind, uint64_t id);
void dsc__link_wake(struct dsc__mail *mail);
void *dsc__link_serve(void *mail);

/* tcp_mail.c: what came on a link. False: no rank of ours says such a thing. */
void dsc__mail_changed(struct dsc__mail *mail);
bool dsc__mail_letter(struct dsc__mail *mail, struct dsc__link *link);
void dsc__mail_filled(struct dsc__mail *mail, struct dsc__link *link);
bool dsc__mail_receipt(struct dsc__mail *mail, struct dsc__link *link);
/* The first of the queue is written. */
void dsc__mail_written(struct dsc__link *link);
/* The link has ended. */
void dsc__mail_ended(struct dsc__mail *mail, struct dsc__link *link);

#endif
