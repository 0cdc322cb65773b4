/* Lending the core's memory: see lend.c. */
#ifndef DSC_BIND_LEND_H
#define DSC_BIND_LEND_H

#include "bind.h"

#include "../engine.h"

/* One-dimensional memory, and whoever keeps it: `release` ends one share of `owner`, from any
 * thread. */
struct dsc_lent {
    void *data;
    size_t n_elems;
    DLDataType type;
    void *owner;
    size_t owner_bytes;
    void (*release)(void *owner, size_t owner_bytes);
};
/* A DLPack capsule over it, which takes over the share; NULL with an exception, the share ended. */
PyObject *dsc_bind_lend(struct dsc_bind_state *state, const struct dsc_lent *lent);
/* One over held->values, with a share of its own. */
PyObject *dsc_bind_lend_held(struct dsc_bind_state *state, const struct dsc_held *held);

#endif
