/* What the binding's files about checkpoints share. */
#ifndef DSC_BIND_CHECKPOINT_H
#define DSC_BIND_CHECKPOINT_H

#include "bind.h"

#include "../manifest.h"

/* Of a Manifest object, borrowed. */
const struct dsc_manifest *dsc_bind_manifest(PyObject *manifest);
/* (tensor rank, pipe rank); -1 with an exception. */
int dsc_bind_place(PyObject *place, uint32_t out[2]);
/* NULL with a KeyError that names the tensor. */
const struct dsc_manifest_tensor *dsc_bind_find_tensor(PyObject *manifest, const char *kind,
                                                       const char *name, const uint32_t place[2]);
/* A new Reader of a closed Manifest; NULL with an exception. */
PyObject *dsc_bind_open_reader(struct dsc_bind_state *state, PyObject *manifest, PyObject *folder);

#endif
