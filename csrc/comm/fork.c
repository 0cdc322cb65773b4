/* What happens to communicators in a forked child: their descriptors close at once, and every call
 * on them fails. Their shared mappings are not in the child at all (MADV_DONTFORK).
 *
 * Invariant: the list holds every communicator between dsc__comm_new and dsc__comm_delete. It is
 * process-wide because fork is; nothing else reads it. */
#include "backend.h"

#include <pthread.h>
#include <string.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct dsc_comm *live;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static int register_error;

static void before_fork(void) {
    (void)pthread_mutex_lock(&lock);
}

static void after_in_parent(void) {
    (void)pthread_mutex_unlock(&lock);
}

/* Only the forking thread exists here, and only async-signal-safe calls are allowed. */
static void after_in_child(void) {
    for (struct dsc_comm *comm = live; comm; comm = comm->next) {
        atomic_store(&comm->forked, true);
        comm->backend->forked(comm->state);
    }
    live = NULL;
    (void)pthread_mutex_unlock(&lock);
}

static void install(void) {
    register_error = pthread_atfork(before_fork, after_in_parent, after_in_child);
}

enum dsc_status dsc__fork_register(struct dsc_comm *comm) {
    (void)pthread_once(&once, install);
    if (register_error)
        return DSC_FAIL(DSC_ENOMEM, "could not register a fork handler: %s",
                        strerror(register_error));
    (void)pthread_mutex_lock(&lock);
    comm->prev = NULL;
    comm->next = live;
    if (live)
        live->prev = comm;
    live = comm;
    (void)pthread_mutex_unlock(&lock);
    return DSC_OK;
}

void dsc__fork_forget(struct dsc_comm *comm) {
    (void)pthread_mutex_lock(&lock);
    if (comm->prev)
        comm->prev->next = comm->next;
    else
        live = comm->next;
    if (comm->next)
        comm->next->prev = comm->prev;
    (void)pthread_mutex_unlock(&lock);
}
