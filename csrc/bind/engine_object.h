/* Inside the binding of the engine: the object, and what its files offer each other.
 *
 * Decides: what an Engine holds. Invariant: it holds its parameters and borrows their memory afresh
 * in every call; a gradient is held exactly as long as the core reads it. */
#ifndef DSC_BIND_ENGINE_H
#define DSC_BIND_ENGINE_H

#include "bind.h"

#include "../engine.h"

typedef struct {
    PyObject_HEAD struct dsc_engine *core;
    PyObject *comms;     /* tuple of the control Comm and those of the reduce groups: stay open */
    PyObject *params;    /* list of Parameter: they have .grad and requires_grad */
    PyObject *fulls;     /* list of tensors in the parameters' shapes, over all their values: at
                            stage 3; below, the same list */
    PyObject *parts;     /* list of this rank's part of each, one-dimensional, None where it has the
                            whole in fulls; NULL where it has all */
    PyObject *names;     /* list of str, parallel to params */
    PyObject *conform;   /* (param, grad) -> grad in the parameter's layout */
    PyObject *increment; /* torch's increment_version over a list */
    PyObject *weakrefs;
    Py_ssize_t n_params;
    int n_groups;
    enum dsc_optim_kind optimizer;
    struct dsc_param *shapes;
    uint64_t *layouts; /* per parameter: see layout_of */
    struct dsc_view *views;
    PyObject **grads; /* held during a call */
    struct dsc_hyper *hypers;
    bool busy, all_used;
} EngineObject;

static inline struct dsc_bind_state *dsc_bind_engine_state(EngineObject *self) {
    return dsc_bind_state_of(Py_TYPE(self));
}

static inline const char *dsc_bind_engine_name(EngineObject *self, Py_ssize_t i) {
    const char *name = PyUnicode_AsUTF8(PyList_GET_ITEM(self->names, i));
    return name ? name : "?";
}

/* Under the GIL: the engine is this call's until it clears `busy`. -1 with an exception where it is
 * destroyed, or another thread's. */
int dsc_bind_engine_enter(EngineObject *self, const char *method);

/* Runs one core call without the GIL. */
#define DSC_BIND_WITHOUT_GIL(status, call)                                                         \
    do {                                                                                           \
        Py_BEGIN_ALLOW_THREADS(status) = (call);                                                   \
        Py_END_ALLOW_THREADS                                                                       \
    } while (0)

/* ---- engine_views.c ---- */
/* Equal where elements have the same order in memory. */
uint64_t dsc_bind_layout_of(const struct dsc_borrowed *t);
/* Borrows a gradient in the parameter's own layout. *held is replaced where a copy had to be made.
 */
int dsc_bind_engine_borrow_grad(EngineObject *self, Py_ssize_t i, PyObject **held,
                                struct dsc_borrowed *out);
/* Fills self->views with parameters and gradients; gradients are held until drop_grads. */
int dsc_bind_engine_view_all(EngineObject *self);
void dsc_bind_engine_drop_grads(EngineObject *self);
/* Sets .grad to None where the core has taken the gradient out of its view; or everywhere. */
int dsc_bind_engine_forget_grads(EngineObject *self, bool all);

/* ---- engine_options.c ---- */
struct dsc_config;
/* What the configuration means for the core. */
struct dsc_engine_options dsc_bind_engine_options(const struct dsc_config *config,
                                                  enum dsc_optim_kind optimizer, bool whole,
                                                  int n_threads, uint64_t names_hash,
                                                  int n_averaged);

/* ---- methods: engine_backward.c, engine_step.c, engine_held.c, engine.c ---- */
/* Name, calling convention, documentation. */
#define DSC_BIND_ENGINE_CALLS(X)                                                                   \
    X(close, METH_NOARGS, "Frees everything; idempotent.")                                         \
    X(keep_parts, METH_O,                                                                          \
      "keep_parts(list): stage 3 where ranks share no memory: from here on parameter i is its\n"   \
      "elements part(i), a one-dimensional tensor; None: all of it, in fulls.")                    \
    X(load_masters, METH_NOARGS, "fp32 masters take the parameters' values.")                      \
    X(begin_backward, METH_O, "Before a backward pass.")                                           \
    X(end_backward, METH_O, "After a backward pass.")                                              \
    X(drop_sums, METH_NOARGS,                                                                      \
      "Forgets gradients that were added up over micro-steps on this rank.")                       \
    X(hook, METH_O, "The post-accumulate-grad hook of parameter i (only where `early`).")          \
    X(begin_deferring, METH_NOARGS, "From here on backward passes only add up on this rank.")      \
    X(end_deferring, METH_NOARGS,                                                                  \
      "What was added up is handed over, where the stage does that inside backward.")              \
    X(get_grad, METH_VARARGS,                                                                      \
      "get_grad(i, out): the full averaged, unscaled gradient into a float32 tensor. Collective.") \
    X(set_grad, METH_VARARGS,                                                                      \
      "set_grad(i, values) -> factor: replaces it, the same on all ranks. Where the factor is\n"   \
      "not 0, the caller stores values * factor in .grad. Collective.")                            \
    X(part, METH_VARARGS,                                                                          \
      "part(i, rank=own) -> (begin, n): the elements of parameter i that a rank of its reduce\n"   \
      "group steps.")                                                                              \
    X(step, METH_VARARGS,                                                                          \
      "step(param_groups, run=None): the boundary; returns a report as a dict. run: called\n"      \
      "between gradients and values, where the optimizer is foreign.")                             \
    X(refuse_step, METH_NOARGS,                                                                    \
      "In place of step where this rank cannot: the others get an error instead of waiting.")      \
    X(mend, METH_NOARGS,                                                                           \
      "Parameters and states are loaded: steps go on after one that a foreign optimizer left.")    \
    X(counters, METH_NOARGS, "Counters as a dict.")                                                \
    X(held, METH_VARARGS,                                                                          \
      "held(i, which): (first element, DLPack capsule) over the part held here, or None. which:\n" \
      "-2 a foreign optimizer's gradient, -1 the fp32 master, 0 and 1 the optimizer's states.")    \
    X(steps, METH_NOARGS,                                                                          \
      "DLPack capsule over the steps of each parameter's group (SGD: with momentum), fp32.")       \
    X(hold_momentum, METH_NOARGS,                                                                  \
      "Makes SGD's momentum now; the first step that needs it does so otherwise.")

#define X(name, flags, text) PyObject *dsc_bind_engine_##name(EngineObject *self, PyObject *args);
DSC_BIND_ENGINE_CALLS(X)
#undef X
/* Attributes. */
PyObject *dsc_bind_engine_get_scaler(EngineObject *self, void *unused);
int dsc_bind_engine_set_scaler(EngineObject *self, PyObject *value, void *unused);
PyObject *dsc_bind_engine_get_scale(EngineObject *self, void *unused);
PyObject *dsc_bind_engine_get_early(EngineObject *self, void *unused);
/* The type of the hooks that dsc_bind_engine_hook makes. */
extern PyType_Spec dsc_bind_hook_spec;

#endif
