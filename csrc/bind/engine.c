/* _core.Engine: construction, end and tables of the type; engine_object.h says where the rest is.
 */
#include "engine_object.h"

#include "../alloc.h"
#include "../comm/comm.h"
#include "../config.h"

#include <structmember.h>

int dsc_bind_engine_enter(EngineObject *self, const char *method) {
    if (!self->core) {
        PyErr_Format(PyExc_RuntimeError, "%s: the engine was destroyed", method);
        return -1;
    }
    if (self->busy) {
        PyErr_Format(PyExc_RuntimeError, "%s: the engine is already running in another thread",
                     method);
        return -1;
    }
    self->busy = true;
    return 0;
}

/* ---- construction ---- */

/* The communicators that `ranks` describes: (control, ((Comm, id), ...), n_averaged). Fills `out`
 * and self->comms. */
static int read_ranks(EngineObject *self, PyObject *ranks, struct dsc_engine_ranks *out) {
    struct dsc_bind_state *state = dsc_bind_engine_state(self);
    PyObject *control, *reduce; /* borrowed from ranks */
    if (!PyArg_ParseTuple(ranks, "OO!i:ranks", &control, &PyTuple_Type, &reduce, &out->n_averaged))
        return -1;
    out->control = dsc_bind_comm(state, control);
    out->n_reduce = (size_t)PyTuple_GET_SIZE(reduce);
    if (!out->control)
        return -1;
    if (out->n_reduce < 1 || out->n_reduce > DSC_REDUCE_MAX || out->n_averaged < 1) {
        PyErr_Format(PyExc_ValueError,
                     "%zu reduce groups, averaged over %d ranks; allowed: 1 to %d groups, 1 rank "
                     "or more",
                     out->n_reduce, out->n_averaged, DSC_REDUCE_MAX);
        return -1;
    }
    self->comms = PyTuple_New(1 + (Py_ssize_t)out->n_reduce);
    if (!self->comms)
        return -1;
    PyTuple_SET_ITEM(self->comms, 0, Py_NewRef(control));
    for (size_t g = 0; g < out->n_reduce; g++) {
        PyObject *comm; /* borrowed from reduce */
        if (!PyArg_ParseTuple(PyTuple_GET_ITEM(reduce, (Py_ssize_t)g), "Oi:reduce", &comm,
                              &out->reduce[g].id))
            return -1;
        out->reduce[g].comm = dsc_bind_comm(state, comm);
        if (!out->reduce[g].comm)
            return -1;
        PyTuple_SET_ITEM(self->comms, 1 + (Py_ssize_t)g, Py_NewRef(comm));
    }
    return 0;
}

/* places: per parameter (parameter group, reduce group, whether it counts in the norm here). */
static int describe_params(EngineObject *self, PyObject *places, size_t n_reduce) {
    for (Py_ssize_t i = 0; i < self->n_params; i++) {
        struct dsc_borrowed t;
        const char *name = dsc_bind_engine_name(self, i);
        int group, reduce, counted;
        if (!PyArg_ParseTuple(PyList_GET_ITEM(places, i), "iip:places", &group, &reduce, &counted))
            return -1;
        if (group < 0 || group >= self->n_groups || reduce < 0 || reduce >= (int)n_reduce) {
            PyErr_Format(PyExc_ValueError,
                         "parameter %s is in group %d of %d, reduce group %d of %zu", name, group,
                         self->n_groups, reduce, n_reduce);
            return -1;
        }
        if (dsc_bind_borrow(dsc_bind_engine_state(self), PyList_GET_ITEM(self->fulls, i), name,
                            &t) < 0)
            return -1;
        if (!t.on_cpu) {
            PyErr_Format(PyExc_NotImplementedError,
                         "parameter %s is not on the CPU: other devices are not yet", name);
            return -1;
        }
        if ((int)t.dtype >= (int)DSC_TRAIN_DTYPE_COUNT) {
            PyErr_Format(PyExc_TypeError,
                         "trainable parameter %s is %s, allowed: float32, bfloat16, float16", name,
                         dsc_dtype_name(t.dtype));
            return -1;
        }
        self->shapes[i] = (struct dsc_param){t.n_elems, t.dtype, group, reduce, !counted};
        self->layouts[i] = dsc_bind_layout_of(&t);
    }
    return 0;
}

static int allocate(EngineObject *self) {
    size_t n = (size_t)self->n_params;
    struct dsc_bind_state *state = dsc_bind_engine_state(self);
    enum dsc_status status = dsc_alloc(n * sizeof *self->shapes, (void **)&self->shapes);
    if (status == DSC_OK)
        status = dsc_alloc(n * sizeof *self->layouts, (void **)&self->layouts);
    if (status == DSC_OK)
        status = dsc_alloc(n * sizeof *self->views, (void **)&self->views);
    if (status == DSC_OK)
        status = dsc_alloc(n * sizeof *self->grads, (void **)&self->grads);
    if (status == DSC_OK)
        status = dsc_alloc((size_t)self->n_groups * sizeof *self->hypers, (void **)&self->hypers);
    if (status != DSC_OK)
        dsc_bind_raise(state, status);
    return status == DSC_OK ? 0 : -1;
}

/* Engine(ranks, config, params, fulls, names, places, n_groups, optimizer, whole, n_threads,
 * names_hash, conform, increment); ranks: see read_ranks, places: see describe_params. */
static PyObject *engine_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *keys[] = {"ranks",      "config",   "params",    "fulls", "names",
                           "places",     "n_groups", "optimizer", "whole", "n_threads",
                           "names_hash", "conform",  "increment", NULL};
    PyObject *ranks, *config, *params, *fulls, *names, *places, *conform, *increment;
    const char *optimizer;
    int n_groups, n_threads, whole;
    unsigned long long names_hash;
    enum dsc_optim_kind kind;
    struct dsc_bind_state *state = dsc_bind_state_of(type);
    if (!PyArg_ParseTupleAndKeywords(
            args, kwargs, "O!OO!O!O!O!ispiKOO:Engine", keys, &PyTuple_Type, &ranks, &config,
            &PyList_Type, &params, &PyList_Type, &fulls, &PyList_Type, &names, &PyList_Type,
            &places, &n_groups, &optimizer, &whole, &n_threads, &names_hash, &conform, &increment))
        return NULL;
    if (dsc_optim_find(optimizer, &kind) != DSC_OK)
        return dsc_bind_raise(state, DSC_EINVAL);
    if (PyList_GET_SIZE(names) != PyList_GET_SIZE(params) ||
        PyList_GET_SIZE(fulls) != PyList_GET_SIZE(params) ||
        PyList_GET_SIZE(places) != PyList_GET_SIZE(params) || n_groups < 1) {
        PyErr_SetString(PyExc_ValueError, "params, fulls, names and places must be parallel lists");
        return NULL;
    }
    const struct dsc_config *core_config = dsc_bind_config(state, config);
    EngineObject *self = core_config ? (EngineObject *)type->tp_alloc(type, 0) : NULL;
    if (!self)
        return NULL;
    self->params = Py_NewRef(params);
    self->fulls = Py_NewRef(fulls);
    self->names = Py_NewRef(names);
    self->conform = Py_NewRef(conform);
    self->increment = Py_NewRef(increment);
    self->n_params = PyList_GET_SIZE(params);
    self->n_groups = n_groups;
    self->optimizer = kind;
    self->all_used = !core_config->zero_ignore_unused_parameters;
    struct dsc_engine_ranks core_ranks = {0};
    if (read_ranks(self, ranks, &core_ranks) < 0 || allocate(self) < 0 ||
        describe_params(self, places, core_ranks.n_reduce) < 0)
        goto error;
    struct dsc_engine_options options = dsc_bind_engine_options(core_config, kind, whole, n_threads,
                                                                names_hash, core_ranks.n_averaged);
    options.team = dsc_bind_team(state);
    enum dsc_status status;
    DSC_BIND_WITHOUT_GIL(status, dsc_engine_open(&core_ranks, &options, self->shapes,
                                                 (size_t)self->n_params, n_groups, &self->core));
    if (status == DSC_OK)
        return (PyObject *)self;
    dsc_bind_raise(state, status);
error:
    Py_DECREF(self);
    return NULL;
}

static int engine_traverse(EngineObject *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->comms);
    Py_VISIT(self->params);
    Py_VISIT(self->fulls);
    Py_VISIT(self->parts);
    Py_VISIT(self->names);
    Py_VISIT(self->conform);
    Py_VISIT(self->increment);
    return 0;
}

static int engine_clear(EngineObject *self) {
    /* The core refers to the communicators' memory, so it goes first. */
    dsc_engine_close(self->core);
    self->core = NULL;
    Py_CLEAR(self->comms);
    Py_CLEAR(self->params);
    Py_CLEAR(self->fulls);
    Py_CLEAR(self->parts);
    Py_CLEAR(self->names);
    Py_CLEAR(self->conform);
    Py_CLEAR(self->increment);
    return 0;
}

static void engine_dealloc(EngineObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    if (self->weakrefs)
        PyObject_ClearWeakRefs((PyObject *)self);
    if (self->grads)
        dsc_bind_engine_drop_grads(self);
    (void)engine_clear(self);
    dsc_free(self->shapes);
    dsc_free(self->layouts);
    dsc_free(self->views);
    dsc_free(self->grads);
    dsc_free(self->hypers);
    type->tp_free(self);
    Py_DECREF(type);
}

PyObject *dsc_bind_engine_close(EngineObject *self, PyObject *unused) {
    (void)unused;
    if (self->busy) {
        PyErr_SetString(PyExc_RuntimeError, "close: the engine is already running");
        return NULL;
    }
    dsc_engine_close(self->core);
    self->core = NULL;
    Py_RETURN_NONE;
}

/* ---- tables ---- */

static PyMethodDef engine_methods[] = {
#define X(name, flags, text) {#name, (PyCFunction)dsc_bind_engine_##name, flags, text},
    DSC_BIND_ENGINE_CALLS(X)
#undef X
        {NULL},
};

static PyGetSetDef engine_getset[] = {
    {"early", (getter)dsc_bind_engine_get_early, NULL, "Gradients are taken inside backward.",
     NULL},
    {"scale", (getter)dsc_bind_engine_get_scale, NULL, "The loss scale of the next backward pass.",
     NULL},
    {"scaler", (getter)dsc_bind_engine_get_scaler, (setter)dsc_bind_engine_set_scaler,
     "(scale, hysteresis_left, iter, last_overflow) of the loss scale.", NULL},
    {NULL},
};

static PyMemberDef engine_members[] = {
    {"__weaklistoffset__", T_PYSSIZET, offsetof(EngineObject, weakrefs), READONLY, NULL},
    {NULL},
};

static PyType_Slot engine_slots[] = {
    {Py_tp_new, engine_new},           {Py_tp_dealloc, engine_dealloc},
    {Py_tp_traverse, engine_traverse}, {Py_tp_clear, engine_clear},
    {Py_tp_methods, engine_methods},   {Py_tp_getset, engine_getset},
    {Py_tp_members, engine_members},   {0, NULL},
};

static PyType_Spec engine_spec = {
    .name = "deepspeed_c._core.Engine",
    .basicsize = sizeof(EngineObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = engine_slots,
};

static PyObject *alloc_counters(PyObject *module, PyObject *unused) {
    struct dsc_alloc_counters a = dsc_alloc_counters();
    (void)module;
    (void)unused;
    return Py_BuildValue("{s:K,s:L,s:L}", "n_calls", (unsigned long long)a.n_calls, "n_live",
                         (long long)a.n_live, "n_bytes", (long long)a.n_bytes);
}

static PyObject *give_back_freed(PyObject *module, PyObject *unused) {
    (void)module;
    (void)unused;
    Py_BEGIN_ALLOW_THREADS dsc_alloc_give_back();
    Py_END_ALLOW_THREADS Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"give_back_freed", give_back_freed, METH_NOARGS,
     "Gives the kernel what the C library's heap keeps of freed memory now."},
    {"alloc_counters", alloc_counters, METH_NOARGS,
     "The core's allocations in this process: n_calls, n_live, n_bytes."},
    {NULL},
};

int dsc_bind_add_engine(PyObject *module) {
    struct dsc_bind_state *state = dsc_bind_module_state(module);
    state->engine_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &engine_spec, NULL);
    if (!state->engine_type || PyModule_AddType(module, state->engine_type) < 0)
        return -1;
    state->hook_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &dsc_bind_hook_spec, NULL);
    return state->hook_type ? PyModule_AddFunctions(module, functions) : -1;
}
