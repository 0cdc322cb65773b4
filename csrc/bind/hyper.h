/* Reading param_groups: see hyper.c. */
#ifndef DSC_BIND_HYPER_H
#define DSC_BIND_HYPER_H

#include "bind.h"

#include "../optim.h"

/* One group. 0, or -1 with an exception that says which value is wrong. */
int dsc_bind_read_hyper(enum dsc_optim_kind kind, PyObject *group, struct dsc_hyper *out);

#endif
