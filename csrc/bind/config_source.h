/* Inside the binding of configurations. */
#ifndef DSC_BIND_CONFIG_SOURCE_H
#define DSC_BIND_CONFIG_SOURCE_H

#include "bind.h"

struct cJSON;

enum { DSC_BIND_PATH_BYTES = 512 }; /* of a dotted path */

/* A configuration as it was given: both are the caller's, also where one of them failed (NULL). */
struct dsc_bind_given {
    PyObject *objects; /* the user's own dict, or what the text says */
    struct cJSON *root;
};
/* 0, or -1 with an exception. */
int dsc_bind_config_take(struct dsc_bind_state *state, PyObject *source,
                         struct dsc_bind_given *out);
/* Python's json.loads: a new reference, or NULL with an exception. */
PyObject *dsc_bind_json_loads(PyObject *text);
/* DeepSpeedConfigError with this text; NULL. */
PyObject *dsc_bind_config_raise(struct dsc_bind_state *state, const char *text);

#endif
