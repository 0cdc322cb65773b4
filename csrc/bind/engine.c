/* _core.Engine and _core.GradHook: the engine seen from Python.
 *
 * Decides: how torch's parameters and gradients become views, and what is dropped after a call.
 * Invariant: an Engine holds its parameters and borrows their memory afresh in every call; a
 * gradient is held exactly as long as the core reads it; a hook holds its engine weakly. */
#include "bind.h"

#include "../alloc.h"
#include "../comm/comm.h"
#include "../config.h"
#include "../engine.h"
#include "hyper.h"
#include "lend.h"

#include <math.h>
#include <string.h>
#include <structmember.h>

typedef struct {
    PyObject_HEAD struct dsc_engine *core;
    PyObject *comm;      /* keeps the communicator open */
    PyObject *params;    /* list of Parameter */
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

static struct dsc_bind_state *state_of(EngineObject *self) {
    return dsc_bind_state_of(Py_TYPE(self));
}

static int enter(EngineObject *self, const char *method) {
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

/* Runs one core call without the GIL. */
#define WITHOUT_GIL(status, call)                                                                  \
    do {                                                                                           \
        Py_BEGIN_ALLOW_THREADS(status) = (call);                                                   \
        Py_END_ALLOW_THREADS                                                                       \
    } while (0)

/* ---- views ---- */

static const char *name_of(EngineObject *self, Py_ssize_t i) {
    const char *name = PyUnicode_AsUTF8(PyList_GET_ITEM(self->names, i));
    return name ? name : "?";
}

/* Equal where elements have the same order in memory. */
static uint64_t layout_of(const struct dsc_borrowed *t) {
    uint64_t hash = 0;
    for (int i = 0; !t->contiguous && i < t->n_dims; i++)
        if (t->shape[i] != 1)
            hash = (hash * 31 + (uint64_t)t->shape[i]) * 1000003 + (uint64_t)t->strides[i];
    return hash;
}

static int view_param(EngineObject *self, Py_ssize_t i) {
    struct dsc_borrowed t;
    const char *name = name_of(self, i);
    if (dsc_bind_borrow(state_of(self), PyList_GET_ITEM(self->params, i), name, &t) < 0)
        return -1;
    const struct dsc_param *was = &self->shapes[i];
    if (!t.on_cpu || t.dtype != was->dtype || t.n_elems != was->n_elems || !t.dense) {
        PyErr_Format(PyExc_ValueError,
                     "parameter %s changed since initialize: it was a dense CPU tensor of %zu %s "
                     "elements and is %s%s of %zu %s elements",
                     name, was->n_elems, dsc_dtype_name(was->dtype),
                     t.on_cpu ? "" : "not on the CPU, ", t.dense ? "dense" : "not dense", t.n_elems,
                     dsc_dtype_name(t.dtype));
        return -1;
    }
    if (layout_of(&t) != self->layouts[i]) {
        PyErr_Format(PyExc_ValueError,
                     "parameter %s has its elements in another order than at initialize (a memory "
                     "format, a transposition), and its optimizer states have the old one; change "
                     "the layout before initialize",
                     name);
        return -1;
    }
    self->views[i] = (struct dsc_view){.data = t.data};
    return 0;
}

/* Borrows a gradient in the parameter's own layout. *held is replaced where a copy had to be made.
 */
static int borrow_grad(EngineObject *self, Py_ssize_t i, PyObject **held,
                       struct dsc_borrowed *out) {
    struct dsc_borrowed param;
    struct dsc_bind_state *state = state_of(self);
    PyObject *tensor = PyList_GET_ITEM(self->params, i); /* borrowed from the list */
    const char *name = name_of(self, i);
    if (dsc_bind_borrow(state, *held, name, out) < 0)
        return -1;
    if (!out->on_cpu || out->dtype != self->shapes[i].dtype ||
        out->n_elems != self->shapes[i].n_elems) {
        PyErr_Format(
            PyExc_TypeError,
            "the gradient of %s has %zu %s elements, its parameter %zu %s; both must be on "
            "the CPU",
            name, out->n_elems, dsc_dtype_name(out->dtype), self->shapes[i].n_elems,
            dsc_dtype_name(self->shapes[i].dtype));
        return -1;
    }
    if (out->contiguous && out->n_dims <= 1)
        return 0;
    if (dsc_bind_borrow(state, tensor, name, &param) < 0)
        return -1;
    if (dsc_bind_same_layout(&param, out))
        return 0;
    PyObject *copy = PyObject_CallFunctionObjArgs(self->conform, tensor, *held, NULL);
    if (!copy)
        return -1;
    Py_SETREF(*held, copy);
    return dsc_bind_borrow(state, copy, name, out);
}

static void drop_grads(EngineObject *self) {
    for (Py_ssize_t i = 0; i < self->n_params; i++)
        Py_CLEAR(self->grads[i]);
}

/* Fills self->views with parameters and gradients; gradients are held until drop_grads. */
static int view_all(EngineObject *self) {
    struct dsc_bind_state *state = state_of(self);
    for (Py_ssize_t i = 0; i < self->n_params; i++) {
        if (view_param(self, i) < 0)
            return -1;
        PyObject *param = PyList_GET_ITEM(self->params, i); /* borrowed from the list */
        PyObject *trains = PyObject_GetAttr(param, state->str_requires_grad);
        if (!trains)
            return -1;
        self->views[i].frozen = trains == Py_False;
        Py_DECREF(trains);
        PyObject *grad = PyObject_GetAttr(param, state->str_grad);
        if (!grad)
            return -1;
        if (grad == Py_None) {
            Py_DECREF(grad);
            continue;
        }
        struct dsc_borrowed t;
        self->grads[i] = grad;
        if (borrow_grad(self, i, &self->grads[i], &t) < 0)
            return -1;
        self->views[i].grad = t.data;
        self->views[i].grad_dtype = t.dtype;
    }
    return 0;
}

/* Sets .grad to None where it is set; `only_16bit` leaves fp32 ones. */
static int forget_grads(EngineObject *self, bool only_16bit) {
    struct dsc_bind_state *state = state_of(self);
    for (Py_ssize_t i = 0; i < self->n_params; i++) {
        if (!self->grads[i] || (only_16bit && self->shapes[i].dtype == DSC_F32))
            continue;
        if (PyObject_SetAttr(PyList_GET_ITEM(self->params, i), state->str_grad, Py_None) < 0)
            return -1;
    }
    return 0;
}

/* ---- construction ---- */

/* Then the loss needs a scale, as in fp16 mode. */
static bool autocasts_to_f16(const struct dsc_config *config) {
    return config->torch_autocast_enabled && strstr(config->torch_autocast_dtype, "bfloat") == NULL;
}

static bool skips_nonfinite(const struct dsc_config *config) {
    if (config->fp16_enabled || autocasts_to_f16(config))
        return true;
    return config->bf16_enabled ? config->bf16_check_grad_overflow
                                : config->fp32_check_grad_overflow;
}

/* The type that a key names; DSC_F32 where it names none. */
static enum dsc_dtype dtype_of(const char *name) {
    if (name && strcmp(name, "bf16") == 0)
        return DSC_BF16;
    if (name && strcmp(name, "bfp16") == 0) /* upstream's other spelling */
        return DSC_BF16;
    return name && strcmp(name, "fp16") == 0 ? DSC_F16 : DSC_F32;
}

/* Sums of gradients are fp32, so only a type with 16 bits changes what travels. */
static struct dsc_wire wire_of(const struct dsc_config *config, int n_ranks) {
    struct dsc_wire wire = {.dtype = dtype_of(config->communication_data_type)};
    wire.narrow = wire.dtype != DSC_F32;
    if (strcmp(config->gradient_allreduce_op, "sum") == 0)
        return wire;
    if (config->prescale_gradients)
        wire.divisor = (float)n_ranks;
    else if (config->gradient_predivide_factor != 1.0)
        wire.divisor = (float)config->gradient_predivide_factor;
    return wire;
}

static struct dsc_engine_options options_of(const struct dsc_config *config,
                                            enum dsc_optim_kind optimizer, bool whole,
                                            int n_threads, uint64_t names_hash, int n_ranks) {
    bool no_masters =
        config->fp16_master_weights_and_grads || config->bf16_master_weights_and_grads;
    struct dsc_engine_options options = {
        .stage = (int)config->zero_stage,
        .overlap = config->zero_overlap_comm == 1,
        .bucket_elems = (size_t)config->zero_reduce_bucket_size,
        .clip = config->gradient_clipping,
        .skip_nonfinite = skips_nonfinite(config),
        .many_micro_steps = config->gradient_accumulation_steps > 1,
        .narrow_sums = no_masters || dtype_of(config->grad_accum_dtype) != DSC_F32,
        .no_masters = no_masters,
        .sum_only = strcmp(config->gradient_allreduce_op, "sum") == 0,
        .wire = wire_of(config, n_ranks),
        .optim = optimizer,
        .whole = whole,
        .n_threads = n_threads,
        .names_hash = names_hash,
    };
    bool scales = config->fp16_enabled || autocasts_to_f16(config);
    if (scales && config->fp16_loss_scale == 0)
        dsc_scaler_init_dynamic(&options.scaler, ldexp(1.0, (int)config->fp16_initial_scale_power),
                                (double)config->fp16_min_loss_scale, config->fp16_loss_scale_window,
                                config->fp16_hysteresis, config->fp16_consecutive_hysteresis);
    else
        dsc_scaler_init_static(&options.scaler, scales ? config->fp16_loss_scale : 1.0);
    return options;
}

static int describe_params(EngineObject *self, PyObject *groups) {
    for (Py_ssize_t i = 0; i < self->n_params; i++) {
        struct dsc_borrowed t;
        const char *name = name_of(self, i);
        long group = PyLong_AsLong(PyList_GET_ITEM(groups, i));
        if (group == -1 && PyErr_Occurred())
            return -1;
        if (group < 0 || group >= self->n_groups) {
            PyErr_Format(PyExc_ValueError, "parameter %s is in group %ld of %d", name, group,
                         self->n_groups);
            return -1;
        }
        if (dsc_bind_borrow(state_of(self), PyList_GET_ITEM(self->params, i), name, &t) < 0)
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
        self->shapes[i] = (struct dsc_param){t.n_elems, t.dtype, (int)group};
        self->layouts[i] = layout_of(&t);
    }
    return 0;
}

static int allocate(EngineObject *self) {
    size_t n = (size_t)self->n_params;
    struct dsc_bind_state *state = state_of(self);
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

/* Engine(comm, config, params, names, groups, n_groups, optimizer, whole, n_threads, names_hash,
 * conform, increment) */
static PyObject *engine_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *keys[] = {"comm",     "config",    "params", "names",     "groups",
                           "n_groups", "optimizer", "whole",  "n_threads", "names_hash",
                           "conform",  "increment", NULL};
    PyObject *comm, *config, *params, *names, *groups, *conform, *increment;
    const char *optimizer;
    int n_groups, n_threads, whole;
    unsigned long long names_hash;
    enum dsc_optim_kind kind;
    struct dsc_bind_state *state = dsc_bind_state_of(type);
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO!O!O!ispiKOO:Engine", keys, &comm, &config,
                                     &PyList_Type, &params, &PyList_Type, &names, &PyList_Type,
                                     &groups, &n_groups, &optimizer, &whole, &n_threads,
                                     &names_hash, &conform, &increment))
        return NULL;
    if (dsc_optim_find(optimizer, &kind) != DSC_OK)
        return dsc_bind_raise(state, DSC_EINVAL);
    if (PyList_GET_SIZE(names) != PyList_GET_SIZE(params) ||
        PyList_GET_SIZE(groups) != PyList_GET_SIZE(params) || n_groups < 1) {
        PyErr_SetString(PyExc_ValueError, "params, names and groups must be parallel lists");
        return NULL;
    }
    struct dsc_comm *core_comm = dsc_bind_comm(state, comm);
    const struct dsc_config *core_config = dsc_bind_config(state, config);
    if (!core_comm || !core_config)
        return NULL;
    EngineObject *self = (EngineObject *)type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    self->comm = Py_NewRef(comm);
    self->params = Py_NewRef(params);
    self->names = Py_NewRef(names);
    self->conform = Py_NewRef(conform);
    self->increment = Py_NewRef(increment);
    self->n_params = PyList_GET_SIZE(params);
    self->n_groups = n_groups;
    self->optimizer = kind;
    self->all_used = !core_config->zero_ignore_unused_parameters;
    if (allocate(self) < 0 || describe_params(self, groups) < 0)
        goto error;
    struct dsc_engine_options options =
        options_of(core_config, kind, whole, n_threads, names_hash, dsc_comm_size(core_comm));
    enum dsc_status status;
    WITHOUT_GIL(status, dsc_engine_open(core_comm, &options, self->shapes, (size_t)self->n_params,
                                        n_groups, &self->core));
    if (status == DSC_OK)
        return (PyObject *)self;
    dsc_bind_raise(state, status);
error:
    Py_DECREF(self);
    return NULL;
}

static int engine_traverse(EngineObject *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->comm);
    Py_VISIT(self->params);
    Py_VISIT(self->names);
    Py_VISIT(self->conform);
    Py_VISIT(self->increment);
    return 0;
}

static int engine_clear(EngineObject *self) {
    /* The core refers to the communicator's memory, so it goes first. */
    dsc_engine_close(self->core);
    self->core = NULL;
    Py_CLEAR(self->comm);
    Py_CLEAR(self->params);
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
        drop_grads(self);
    (void)engine_clear(self);
    dsc_free(self->shapes);
    dsc_free(self->layouts);
    dsc_free(self->views);
    dsc_free(self->grads);
    dsc_free(self->hypers);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *engine_close(EngineObject *self, PyObject *unused) {
    (void)unused;
    if (self->busy) {
        PyErr_SetString(PyExc_RuntimeError, "close: the engine is already running");
        return NULL;
    }
    dsc_engine_close(self->core);
    self->core = NULL;
    Py_RETURN_NONE;
}

/* ---- backward ---- */

static PyObject *engine_load_masters(EngineObject *self, PyObject *unused) {
    (void)unused;
    if (enter(self, "load_masters") < 0)
        return NULL;
    int failed = view_all(self);
    if (!failed) {
        Py_BEGIN_ALLOW_THREADS dsc_engine_load_masters(self->core, self->views);
        Py_END_ALLOW_THREADS
    }
    drop_grads(self);
    self->busy = false;
    return failed ? NULL : Py_NewRef(Py_None);
}

/* Does what the core asks for around a backward pass. */
static int satisfy(EngineObject *self, int need) {
    enum dsc_status status = DSC_OK;
    if (need == DSC_NEED_NOTHING)
        return 0;
    int failed = view_all(self);
    if (!failed) {
        Py_BEGIN_ALLOW_THREADS if (need & DSC_NEED_CHECK) dsc_engine_check(self->core, self->views);
        if (need & DSC_NEED_FOLD)
            status = dsc_engine_fold(self->core, self->views);
        if (need & DSC_NEED_HAND_OVER)
            status = dsc_engine_hand_over(self->core, self->views);
        Py_END_ALLOW_THREADS if (status != DSC_OK) {
            dsc_bind_raise(state_of(self), status);
            failed = -1;
        }
    }
    if (!failed && need & (DSC_NEED_FOLD | DSC_NEED_HAND_OVER))
        failed = forget_grads(self, !(need & DSC_NEED_HAND_OVER));
    drop_grads(self);
    return failed;
}

static PyObject *around_backward(EngineObject *self, PyObject *boundary, bool begin) {
    int need = DSC_NEED_NOTHING, is_boundary = PyObject_IsTrue(boundary);
    if (is_boundary < 0 || enter(self, begin ? "begin_backward" : "end_backward") < 0)
        return NULL;
    enum dsc_status status;
    if (begin)
        WITHOUT_GIL(status, dsc_engine_begin_backward(self->core, is_boundary, &need));
    else
        WITHOUT_GIL(status, dsc_engine_end_backward(self->core, is_boundary, &need));
    int failed = status != DSC_OK;
    if (failed)
        dsc_bind_raise(state_of(self), status);
    else
        failed = satisfy(self, need);
    self->busy = false;
    return failed ? NULL : Py_NewRef(Py_None);
}

static PyObject *engine_drop_sums(EngineObject *self, PyObject *unused) {
    (void)unused;
    if (enter(self, "zero_grad") < 0)
        return NULL;
    dsc_engine_drop_sums(self->core);
    self->busy = false;
    Py_RETURN_NONE;
}

static PyObject *engine_begin_backward(EngineObject *self, PyObject *boundary) {
    return around_backward(self, boundary, true);
}

static PyObject *engine_end_backward(EngineObject *self, PyObject *boundary) {
    return around_backward(self, boundary, false);
}

/* Hands parameter i's gradient to the core; drops it from .grad where the core took it. */
static int arrive(EngineObject *self, Py_ssize_t i) {
    struct dsc_bind_state *state = state_of(self);
    PyObject *param = PyList_GET_ITEM(self->params, i); /* borrowed from the list */
    PyObject *grad = PyObject_GetAttr(param, state->str_grad);
    struct dsc_borrowed t;
    bool taken = false;
    int failed = 0;
    if (!grad)
        return -1;
    if (grad != Py_None) {
        failed = borrow_grad(self, i, &grad, &t);
        if (!failed) {
            enum dsc_status status;
            WITHOUT_GIL(status, dsc_engine_arrive(self->core, (size_t)i, t.data, t.dtype, &taken));
            if (status != DSC_OK) {
                dsc_bind_raise(state, status);
                failed = -1;
            }
        }
    }
    if (!failed && taken)
        failed = PyObject_SetAttr(param, state->str_grad, Py_None);
    Py_DECREF(grad);
    return failed;
}

typedef struct {
    PyObject_HEAD PyObject *engine; /* weak reference */
    Py_ssize_t index;
} HookObject;

static PyObject *hook_call(HookObject *self, PyObject *args, PyObject *kwargs) {
    (void)args;
    (void)kwargs;
    /* PyWeakref_GetObject lends; the strong reference keeps the engine through the call. */
    EngineObject *engine = (EngineObject *)Py_NewRef(PyWeakref_GetObject(self->engine));
    int failed = 0;
    if ((PyObject *)engine != Py_None && engine->core) {
        failed = enter(engine, "gradient hook");
        if (!failed) {
            failed = arrive(engine, self->index);
            engine->busy = false;
        }
    }
    Py_DECREF(engine);
    return failed ? NULL : Py_NewRef(Py_None);
}

static void hook_dealloc(HookObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    Py_XDECREF(self->engine);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *engine_hook(EngineObject *self, PyObject *index) {
    PyTypeObject *type = state_of(self)->hook_type;
    Py_ssize_t i = PyLong_AsSsize_t(index);
    if (i < 0 || i >= self->n_params) {
        if (!PyErr_Occurred())
            PyErr_Format(PyExc_IndexError, "parameter %zd of %zd", i, self->n_params);
        return NULL;
    }
    HookObject *hook = (HookObject *)type->tp_alloc(type, 0);
    if (!hook)
        return NULL;
    hook->index = i;
    hook->engine = PyWeakref_NewRef((PyObject *)self, NULL);
    if (!hook->engine)
        Py_CLEAR(hook);
    return (PyObject *)hook;
}

/* ---- gradients between backward and step ---- */

static PyObject *engine_begin_deferring(EngineObject *self, PyObject *unused) {
    enum dsc_status status;
    (void)unused;
    if (enter(self, "coalesce_grad_reduction") < 0)
        return NULL;
    WITHOUT_GIL(status, dsc_engine_begin_deferring(self->core));
    self->busy = false;
    return status == DSC_OK ? Py_NewRef(Py_None) : dsc_bind_raise(state_of(self), status);
}

/* Raises a status; where the core has taken what lay in the gradients, they go. */
static int after_views(EngineObject *self, enum dsc_status status, bool taken) {
    if (status == DSC_OK)
        return taken ? forget_grads(self, false) : 0;
    dsc_bind_raise(state_of(self), status);
    return -1;
}

static PyObject *engine_end_deferring(EngineObject *self, PyObject *unused) {
    enum dsc_status status;
    bool taken = false;
    (void)unused;
    if (enter(self, "coalesce_grad_reduction") < 0)
        return NULL;
    int failed = view_all(self);
    if (!failed) {
        WITHOUT_GIL(status, dsc_engine_end_deferring(self->core, self->views, &taken));
        failed = after_views(self, status, taken);
    }
    drop_grads(self);
    self->busy = false;
    return failed ? NULL : Py_NewRef(Py_None);
}

/* A float32 CPU tensor with as many elements as parameter i. */
static int borrow_values(EngineObject *self, Py_ssize_t i, PyObject *tensor,
                         struct dsc_borrowed *out) {
    if (i < 0 || i >= self->n_params) {
        PyErr_Format(PyExc_IndexError, "parameter %zd of %zd", i, self->n_params);
        return -1;
    }
    if (dsc_bind_borrow(state_of(self), tensor, "values", out) < 0)
        return -1;
    if (out->on_cpu && out->contiguous && out->dtype == DSC_F32 &&
        out->n_elems == self->shapes[i].n_elems)
        return 0;
    PyErr_Format(PyExc_ValueError,
                 "values of %s must be a contiguous float32 CPU tensor of %zu "
                 "elements",
                 name_of(self, i), self->shapes[i].n_elems);
    return -1;
}

/* get_grad(i, out), set_grad(i, values) -> factor for .grad, 0 where the core has taken them. */
static PyObject *full_grad(EngineObject *self, PyObject *args, bool get) {
    PyObject *tensor;
    Py_ssize_t i;
    struct dsc_borrowed t;
    bool taken = false;
    double into_grad = 0;
    enum dsc_status status;
    if (!PyArg_ParseTuple(args, "nO:full_grad", &i, &tensor) ||
        borrow_values(self, i, tensor, &t) < 0 ||
        enter(self, get ? "safe_get_full_grad" : "safe_set_full_grad") < 0)
        return NULL;
    int failed = view_all(self);
    if (!failed) {
        if (get)
            WITHOUT_GIL(status,
                        dsc_engine_get_grad(self->core, (size_t)i, self->views, t.data, &taken));
        else
            WITHOUT_GIL(status, dsc_engine_set_grad(self->core, (size_t)i, self->views, t.data,
                                                    &taken, &into_grad));
        failed = after_views(self, status, taken);
    }
    drop_grads(self);
    self->busy = false;
    return failed ? NULL : PyFloat_FromDouble(into_grad);
}

static PyObject *engine_get_grad(EngineObject *self, PyObject *args) {
    return full_grad(self, args, true);
}

static PyObject *engine_set_grad(EngineObject *self, PyObject *args) {
    return full_grad(self, args, false);
}

/* ---- the boundary ---- */

static int read_groups(EngineObject *self, PyObject *groups) {
    if (!PyList_Check(groups) || PyList_GET_SIZE(groups) != self->n_groups) {
        PyErr_Format(PyExc_ValueError,
                     "param_groups must stay a list of %d groups, as at initialize; adding or "
                     "removing groups afterwards is not yet",
                     self->n_groups);
        return -1;
    }
    for (int g = 0; g < self->n_groups; g++)
        if (dsc_bind_read_hyper(self->optimizer, PyList_GET_ITEM(groups, g), &self->hypers[g]) < 0)
            return -1;
    return 0;
}

static PyObject *report_to_dict(const struct dsc_step_report *r) {
    return Py_BuildValue(
        "{s:O,s:O,s:d,s:d,s:d,s:i,s:i,s:K,s:K,s:i,s:K,s:d,s:d}", "stepped",
        r->stepped ? Py_True : Py_False, "nonfinite", r->nonfinite ? Py_True : Py_False, "norm",
        r->norm, "scale", r->scale, "next_scale", r->next_scale, "bad_rank", r->bad_rank,
        "bad_param", r->bad_param, "bad_elem", (unsigned long long)r->bad_elem, "bad_micro",
        (unsigned long long)r->bad_micro, "changed_param", r->changed_param, "n_changed",
        (unsigned long long)r->n_changed, "reduce_s", r->reduce_s, "gather_s", r->gather_s);
}

static int after_step(EngineObject *self, bool stepped) {
    if (forget_grads(self, false) < 0)
        return -1;
    if (!stepped)
        return 0;
    PyObject *done = PyObject_CallOneArg(self->increment, self->params);
    Py_XDECREF(done);
    return done ? 0 : -1;
}

/* This rank has raised before the core could step: the others learn it. The exception stays. */
static void refuse_step(EngineObject *self) {
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    Py_BEGIN_ALLOW_THREADS dsc_engine_refuse_step(self->core);
    Py_END_ALLOW_THREADS PyErr_Restore(type, value, trace);
}

/* zero_optimization.ignore_unused_parameters: false */
static int check_used(EngineObject *self) {
    int64_t unused = self->all_used ? dsc_engine_unused(self->core, self->views) : -1;
    if (unused >= 0)
        PyErr_Format(PyExc_ValueError,
                     "parameter %s got no gradient since the last step, and "
                     "zero_optimization.ignore_unused_parameters is false; leave it true where a "
                     "step may leave parameters out",
                     name_of(self, (Py_ssize_t)unused));
    return unused >= 0 ? -1 : 0;
}

/* Runs the foreign optimizer between the halves of a step. Its exception is kept, and the other
 * ranks learn of it. */
static enum dsc_status run_foreign(EngineObject *self, PyObject *run,
                                   struct dsc_step_report *report) {
    enum dsc_status status;
    PyObject *done = PyObject_CallNoArgs(run);
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    WITHOUT_GIL(status, dsc_engine_end_step(self->core, self->views, !done, report));
    PyErr_Restore(type, value, trace);
    Py_XDECREF(done);
    return status;
}

/* The core call, and what has to follow it whatever it returned. */
static PyObject *step_core(EngineObject *self, PyObject *run) {
    struct dsc_step_report report = {0};
    enum dsc_status status;
    WITHOUT_GIL(status, dsc_engine_step(self->core, self->views, self->hypers, &report));
    if (status == DSC_OK && report.stepped && !report.over)
        status = run_foreign(self, run, &report);
    PyObject *type, *value, *trace; /* of the foreign optimizer */
    PyErr_Fetch(&type, &value, &trace);
    int failed = report.over ? after_step(self, report.stepped) : 0;
    if (type)
        PyErr_Restore(type, value, trace);
    else if (!failed && status != DSC_OK)
        dsc_bind_raise(state_of(self), status);
    return PyErr_Occurred() ? NULL : report_to_dict(&report);
}

/* step(param_groups, run) -> report dict. A loss scale that cannot shrink any more is raised after
 * the gradients are dropped, since the step is over by then. */
static PyObject *engine_step(EngineObject *self, PyObject *args) {
    PyObject *groups, *run = Py_None, *result = NULL; /* borrowed from args */
    if (!PyArg_ParseTuple(args, "O|O:step", &groups, &run) || enter(self, "step") < 0)
        return NULL;
    if (self->optimizer == DSC_OPTIM_FOREIGN && !PyCallable_Check(run))
        PyErr_SetString(PyExc_TypeError, "step: a foreign optimizer needs a callable that runs it");
    if (!PyErr_Occurred() && read_groups(self, groups) == 0 && view_all(self) == 0 &&
        check_used(self) == 0)
        result = step_core(self, run);
    else
        refuse_step(self);
    drop_grads(self);
    self->busy = false;
    return result;
}

static PyObject *engine_refuse_step(EngineObject *self, PyObject *unused) {
    (void)unused;
    if (enter(self, "refuse_step") < 0)
        return NULL;
    refuse_step(self);
    self->busy = false;
    Py_RETURN_NONE;
}

static PyObject *engine_mend(EngineObject *self, PyObject *unused) {
    (void)unused;
    if (enter(self, "mend") < 0)
        return NULL;
    dsc_engine_mend(self->core);
    self->busy = false;
    Py_RETURN_NONE;
}

/* ---- looking ---- */

static PyObject *engine_counters(EngineObject *self, PyObject *unused) {
    (void)unused;
    if (enter(self, "counters") < 0)
        return NULL;
    struct dsc_engine_counters c = dsc_engine_counters(self->core);
    struct dsc_alloc_counters a = dsc_alloc_counters();
    self->busy = false;
    return Py_BuildValue(
        "{s:K,s:K,s:K,s:K,s:K,s:K,s:K,s:K,s:K,s:L,s:L}", "n_settled",
        (unsigned long long)c.n_settled, "n_bytes_settled", (unsigned long long)c.n_bytes_settled,
        "n_bytes_settled_in_backward", (unsigned long long)c.n_bytes_settled_in_backward,
        "n_extra_slots", (unsigned long long)c.n_extra_slots, "private_bytes",
        (unsigned long long)c.private_bytes, "shared_bytes", (unsigned long long)c.shared_bytes,
        "owned_elems", (unsigned long long)c.owned_elems, "padded_elems",
        (unsigned long long)c.padded_elems, "alloc_calls", (unsigned long long)a.n_calls,
        "alloc_live", (long long)a.n_live, "alloc_bytes", (long long)a.n_bytes);
}

/* The values, copied out, with the place of the first one in the parameter. */
static PyObject *state_array(const struct dsc_held *held) {
    void *data;
    PyObject *array = dsc_bind_array(DSC_F32, (Py_ssize_t)held->n, &data);
    if (!array)
        return NULL;
    memcpy(data, held->values, held->n * sizeof *held->values);
    return Py_BuildValue("(nN)", (Py_ssize_t)held->begin, array);
}

/* state(index, which) -> (begin, float32 array) of the part that this rank holds, or None. */
static PyObject *engine_state(EngineObject *self, PyObject *args) {
    Py_ssize_t index;
    int which;
    if (!PyArg_ParseTuple(args, "ni:state", &index, &which) || enter(self, "state") < 0)
        return NULL;
    PyObject *result = NULL;
    if (index < 0 || index >= self->n_params || which < -1 || which >= DSC_OPTIM_MAX_STATES) {
        PyErr_Format(PyExc_IndexError, "state(%zd, %d): allowed: 0 to %zd, -1 to %d", index, which,
                     self->n_params - 1, DSC_OPTIM_MAX_STATES - 1);
    } else {
        struct dsc_held held = dsc_engine_held(self->core, (size_t)index, which);
        result = held.values ? state_array(&held) : Py_NewRef(Py_None);
    }
    self->busy = false;
    return result;
}

/* held(index, which) -> (begin, DLPack capsule) of the part that this rank holds, or None. */
static PyObject *engine_held(EngineObject *self, PyObject *args) {
    Py_ssize_t index;
    int which;
    if (!PyArg_ParseTuple(args, "ni:held", &index, &which) || enter(self, "held") < 0)
        return NULL;
    PyObject *result = NULL;
    if (index < 0 || index >= self->n_params || which < DSC_HELD_GRADIENT ||
        which >= DSC_OPTIM_MAX_STATES) {
        PyErr_Format(PyExc_IndexError, "held(%zd, %d): allowed: 0 to %zd, %d to %d", index, which,
                     self->n_params - 1, DSC_HELD_GRADIENT, DSC_OPTIM_MAX_STATES - 1);
    } else {
        struct dsc_held held = dsc_engine_held(self->core, (size_t)index, which);
        PyObject *capsule = held.values ? dsc_bind_lend(state_of(self), &held) : NULL;
        if (capsule)
            result = Py_BuildValue("(nN)", (Py_ssize_t)held.begin, capsule);
        else if (!held.values)
            result = Py_NewRef(Py_None);
    }
    self->busy = false;
    return result;
}

/* part(index, rank) -> (begin, n) of the elements that `rank` steps. */
static PyObject *engine_part(EngineObject *self, PyObject *args) {
    Py_ssize_t index;
    int rank;
    if (!PyArg_ParseTuple(args, "ni:part", &index, &rank) || enter(self, "part") < 0)
        return NULL;
    self->busy = false;
    int n_ranks = dsc_engine_size(self->core);
    if (index < 0 || index >= self->n_params || rank < 0 || rank >= n_ranks) {
        PyErr_Format(PyExc_IndexError, "part(%zd, %d): allowed: 0 to %zd, 0 to %d", index, rank,
                     self->n_params - 1, n_ranks - 1);
        return NULL;
    }
    size_t begin, n;
    dsc_engine_part(self->core, (size_t)index, rank, &begin, &n);
    return Py_BuildValue("(nn)", (Py_ssize_t)begin, (Py_ssize_t)n);
}

static PyObject *engine_steps(EngineObject *self, PyObject *unused) {
    (void)unused;
    if (enter(self, "steps") < 0)
        return NULL;
    struct dsc_held held = dsc_engine_steps(self->core);
    PyObject *capsule = dsc_bind_lend(state_of(self), &held);
    self->busy = false;
    return capsule;
}

static PyObject *engine_hold_momentum(EngineObject *self, PyObject *unused) {
    (void)unused;
    if (enter(self, "hold_momentum") < 0)
        return NULL;
    enum dsc_status status = dsc_engine_hold_momentum(self->core);
    self->busy = false;
    return status == DSC_OK ? Py_NewRef(Py_None) : dsc_bind_raise(state_of(self), status);
}

static PyObject *engine_get_scaler(EngineObject *self, void *unused) {
    (void)unused;
    if (!self->core) {
        PyErr_SetString(PyExc_RuntimeError, "scaler: the engine was destroyed");
        return NULL;
    }
    struct dsc_scaler s = dsc_engine_scaler(self->core);
    return Py_BuildValue("(dLLL)", s.scale, (long long)s.hysteresis_left, (long long)s.iter,
                         (long long)s.last_overflow);
}

static int engine_set_scaler(EngineObject *self, PyObject *value, void *unused) {
    long long hysteresis_left, iter, last_overflow;
    (void)unused;
    if (!value || !PyTuple_Check(value)) {
        PyErr_SetString(PyExc_TypeError, "scaler is (scale, hysteresis_left, iter, last_overflow)");
        return -1;
    }
    if (enter(self, "scaler") < 0)
        return -1;
    struct dsc_scaler s = dsc_engine_scaler(self->core);
    int parsed =
        PyArg_ParseTuple(value, "dLLL:scaler", &s.scale, &hysteresis_left, &iter, &last_overflow);
    if (parsed) {
        s.hysteresis_left = hysteresis_left;
        s.iter = iter;
        s.last_overflow = last_overflow;
        dsc_engine_set_scaler(self->core, &s);
    }
    self->busy = false;
    return parsed ? 0 : -1;
}

static PyObject *engine_get_early(EngineObject *self, void *unused) {
    (void)unused;
    return PyBool_FromLong(self->core && dsc_engine_early(self->core));
}

static PyObject *engine_get_scale(EngineObject *self, void *unused) {
    (void)unused;
    if (!self->core) {
        PyErr_SetString(PyExc_RuntimeError, "scale: the engine was destroyed");
        return NULL;
    }
    return PyFloat_FromDouble(dsc_engine_scale(self->core));
}

static PyMethodDef engine_methods[] = {
    {"close", (PyCFunction)engine_close, METH_NOARGS, "Frees everything; idempotent."},
    {"load_masters", (PyCFunction)engine_load_masters, METH_NOARGS,
     "fp32 masters take the parameters' values."},
    {"begin_backward", (PyCFunction)engine_begin_backward, METH_O, "Before a backward pass."},
    {"end_backward", (PyCFunction)engine_end_backward, METH_O, "After a backward pass."},
    {"drop_sums", (PyCFunction)engine_drop_sums, METH_NOARGS,
     "Forgets gradients that were added up over micro-steps on this rank."},
    {"hook", (PyCFunction)engine_hook, METH_O,
     "The post-accumulate-grad hook of parameter i (only where `early`)."},
    {"begin_deferring", (PyCFunction)engine_begin_deferring, METH_NOARGS,
     "From here on backward passes only add up on this rank."},
    {"end_deferring", (PyCFunction)engine_end_deferring, METH_NOARGS,
     "What was added up is handed over, where the stage does that inside backward."},
    {"get_grad", (PyCFunction)engine_get_grad, METH_VARARGS,
     "get_grad(i, out): the full averaged, unscaled gradient into a float32 tensor. Collective."},
    {"set_grad", (PyCFunction)engine_set_grad, METH_VARARGS,
     "set_grad(i, values) -> factor: replaces it, the same on all ranks. Where the factor is not "
     "0,\n"
     "the caller stores values * factor in .grad. Collective."},
    {"part", (PyCFunction)engine_part, METH_VARARGS,
     "part(i, rank) -> (begin, n): the elements of parameter i that a rank steps."},
    {"step", (PyCFunction)engine_step, METH_VARARGS,
     "step(param_groups, run=None): the boundary; returns a report as a dict. run: called between\n"
     "gradients and values, where the optimizer is foreign."},
    {"refuse_step", (PyCFunction)engine_refuse_step, METH_NOARGS,
     "In place of step where this rank cannot: the others get an error instead of waiting."},
    {"mend", (PyCFunction)engine_mend, METH_NOARGS,
     "Parameters and states are loaded: steps go on after one that a foreign optimizer left."},
    {"counters", (PyCFunction)engine_counters, METH_NOARGS, "Counters as a dict."},
    {"state", (PyCFunction)engine_state, METH_VARARGS,
     "state(i, which): (first element, float32 array), a copy of what held(i, which) shows; "
     "which:\n"
     "-1, 0, 1."},
    {"held", (PyCFunction)engine_held, METH_VARARGS,
     "held(i, which): (first element, DLPack capsule) over the part held here, or None; which: -2\n"
     "a foreign optimizer's gradient, -1 the fp32 master, 0 and 1 the optimizer's states."},
    {"steps", (PyCFunction)engine_steps, METH_NOARGS,
     "DLPack capsule over the steps of each parameter's group (SGD: with momentum), fp32."},
    {"hold_momentum", (PyCFunction)engine_hold_momentum, METH_NOARGS,
     "Makes SGD's momentum now; the first step that needs it does so otherwise."},
    {NULL},
};

static PyGetSetDef engine_getset[] = {
    {"early", (getter)engine_get_early, NULL, "Gradients are taken inside backward.", NULL},
    {"scale", (getter)engine_get_scale, NULL, "The loss scale of the next backward pass.", NULL},
    {"scaler", (getter)engine_get_scaler, (setter)engine_set_scaler,
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

static PyType_Slot hook_slots[] = {
    {Py_tp_dealloc, hook_dealloc},
    {Py_tp_call, hook_call},
    {0, NULL},
};

static PyType_Spec hook_spec = {
    .name = "deepspeed_c._core.GradHook",
    .basicsize = sizeof(HookObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = hook_slots,
};

static PyObject *alloc_counters(PyObject *module, PyObject *unused) {
    struct dsc_alloc_counters a = dsc_alloc_counters();
    (void)module;
    (void)unused;
    return Py_BuildValue("{s:K,s:L,s:L}", "n_calls", (unsigned long long)a.n_calls, "n_live",
                         (long long)a.n_live, "n_bytes", (long long)a.n_bytes);
}

static PyMethodDef functions[] = {
    {"alloc_counters", alloc_counters, METH_NOARGS,
     "The core's allocations in this process: n_calls, n_live, n_bytes."},
    {NULL},
};

int dsc_bind_add_engine(PyObject *module) {
    struct dsc_bind_state *state = dsc_bind_module_state(module);
    state->engine_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &engine_spec, NULL);
    if (!state->engine_type || PyModule_AddType(module, state->engine_type) < 0)
        return -1;
    state->hook_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &hook_spec, NULL);
    return state->hook_type ? PyModule_AddFunctions(module, functions) : -1;
}
