/* Lending the core's memory: see lend.c. */
#ifndef DSC_BIND_LEND_H
#define DSC_BIND_LEND_H

#include "bind.h"

#include "../engine.h"

/* A DLPack capsule over held->values, one-dimensional fp32; NULL with an exception. */
PyObject *dsc_bind_lend(struct dsc_bind_state *state, const struct dsc_held *held);

#endif
