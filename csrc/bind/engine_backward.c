/* _core.Engine around backward passes, and _core.GradHook.
 *
 * Decides: which gradients are handed over, folded or dropped, as the core asks for it. Invariant:
 * a hook holds its engine weakly. */
#include "engine_object.h"

PyObject *dsc_bind_engine_load_masters(EngineObject *self, PyObject *unused) {
    (void)unused;
    if (dsc_bind_engine_enter(self, "load_masters") < 0)
        return NULL;
    int failed = dsc_bind_engine_view_all(self);
    if (!failed) {
        Py_BEGIN_ALLOW_THREADS dsc_engine_load_masters(self->core, self->views);
        Py_END_ALLOW_THREADS
    }
    dsc_bind_engine_drop_grads(self);
    self->busy = false;
    return failed ? NULL : Py_NewRef(Py_None);
}

/* Does what the core asks for around a backward pass. */
static int satisfy(EngineObject *self, int need) {
    enum dsc_status status = DSC_OK;
    if (need == DSC_NEED_NOTHING)
        return 0;
    int failed = dsc_bind_engine_view_all(self);
    if (!failed) {
        Py_BEGIN_ALLOW_THREADS if (need & DSC_NEED_CHECK) dsc_engine_check(self->core, self->views);
        if (need & DSC_NEED_FOLD)
            status = dsc_engine_fold(self->core, self->views);
        if (need & DSC_NEED_HAND_OVER)
            status = dsc_engine_hand_over(self->core, self->views);
        Py_END_ALLOW_THREADS if (status != DSC_OK) {
            dsc_bind_raise(dsc_bind_engine_state(self), status);
            failed = -1;
        }
    }
    if (!failed)
        failed = dsc_bind_engine_forget_grads(self, false);
    dsc_bind_engine_drop_grads(self);
    return failed;
}

static PyObject *around_backward(EngineObject *self, PyObject *boundary, bool begin) {
    int need = DSC_NEED_NOTHING, is_boundary = PyObject_IsTrue(boundary);
    if (is_boundary < 0 ||
        dsc_bind_engine_enter(self, begin ? "begin_backward" : "end_backward") < 0)
        return NULL;
    enum dsc_status status;
    if (begin)
        DSC_BIND_WITHOUT_GIL(status, dsc_engine_begin_backward(self->core, is_boundary, &need));
    else
        DSC_BIND_WITHOUT_GIL(status, dsc_engine_end_backward(self->core, is_boundary, &need));
    int failed = status != DSC_OK;
    if (failed)
        dsc_bind_raise(dsc_bind_engine_state(self), status);
    else
        failed = satisfy(self, need);
    self->busy = false;
    return failed ? NULL : Py_NewRef(Py_None);
}

PyObject *dsc_bind_engine_drop_sums(EngineObject *self, PyObject *unused) {
    (void)unused;
    if (dsc_bind_engine_enter(self, "zero_grad") < 0)
        return NULL;
    dsc_engine_drop_sums(self->core);
    self->busy = false;
    Py_RETURN_NONE;
}

PyObject *dsc_bind_engine_begin_backward(EngineObject *self, PyObject *boundary) {
    return around_backward(self, boundary, true);
}

PyObject *dsc_bind_engine_end_backward(EngineObject *self, PyObject *boundary) {
    return around_backward(self, boundary, false);
}

/* Hands parameter i's gradient to the core; drops it from .grad where the core took it. */
static int arrive(EngineObject *self, Py_ssize_t i) {
    struct dsc_bind_state *state = dsc_bind_engine_state(self);
    PyObject *param = PyList_GET_ITEM(self->params, i); /* borrowed from the list */
    PyObject *grad = PyObject_GetAttr(param, state->str_grad);
    struct dsc_borrowed t;
    bool taken = false;
    int failed = 0;
    if (!grad)
        return -1;
    if (grad != Py_None) {
        failed = dsc_bind_engine_borrow_grad(self, i, &grad, &t);
        if (!failed) {
            enum dsc_status status;
            DSC_BIND_WITHOUT_GIL(status,
                                 dsc_engine_arrive(self->core, (size_t)i, t.data, t.dtype, &taken));
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
        failed = dsc_bind_engine_enter(engine, "gradient hook");
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

PyObject *dsc_bind_engine_hook(EngineObject *self, PyObject *index) {
    PyTypeObject *type = dsc_bind_engine_state(self)->hook_type;
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

static PyType_Slot hook_slots[] = {
    {Py_tp_dealloc, hook_dealloc},
    {Py_tp_call, hook_call},
    {0, NULL},
};

PyType_Spec dsc_bind_hook_spec = {
    .name = "deepspeed_c._core.GradHook",
    .basicsize = sizeof(HookObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = hook_slots,
};

/* ---- gradients between backward and step ---- */

PyObject *dsc_bind_engine_begin_deferring(EngineObject *self, PyObject *unused) {
    enum dsc_status status;
    (void)unused;
    if (dsc_bind_engine_enter(self, "coalesce_grad_reduction") < 0)
        return NULL;
    DSC_BIND_WITHOUT_GIL(status, dsc_engine_begin_deferring(self->core));
    self->busy = false;
    return status == DSC_OK ? Py_NewRef(Py_None)
                            : dsc_bind_raise(dsc_bind_engine_state(self), status);
}

/* Raises a status; where the core has taken what lay in the gradients, they go. */
static int after_views(EngineObject *self, enum dsc_status status) {
    if (status == DSC_OK)
        return dsc_bind_engine_forget_grads(self, false);
    dsc_bind_raise(dsc_bind_engine_state(self), status);
    return -1;
}

PyObject *dsc_bind_engine_end_deferring(EngineObject *self, PyObject *unused) {
    enum dsc_status status;
    (void)unused;
    if (dsc_bind_engine_enter(self, "coalesce_grad_reduction") < 0)
        return NULL;
    int failed = dsc_bind_engine_view_all(self);
    if (!failed) {
        DSC_BIND_WITHOUT_GIL(status, dsc_engine_end_deferring(self->core, self->views));
        failed = after_views(self, status);
    }
    dsc_bind_engine_drop_grads(self);
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
    if (dsc_bind_borrow(dsc_bind_engine_state(self), tensor, "values", out) < 0)
        return -1;
    if (out->on_cpu && out->contiguous && out->dtype == DSC_F32 &&
        out->n_elems == self->shapes[i].n_elems)
        return 0;
    PyErr_Format(PyExc_ValueError,
                 "values of %s must be a contiguous float32 CPU tensor of %zu "
                 "elements",
                 dsc_bind_engine_name(self, i), self->shapes[i].n_elems);
    return -1;
}

/* get_grad(i, out), set_grad(i, values) -> factor for .grad, 0 where the core has taken them. */
static PyObject *full_grad(EngineObject *self, PyObject *args, bool get) {
    PyObject *tensor;
    Py_ssize_t i;
    struct dsc_borrowed t;
    double into_grad = 0;
    enum dsc_status status;
    if (!PyArg_ParseTuple(args, "nO:full_grad", &i, &tensor) ||
        borrow_values(self, i, tensor, &t) < 0 ||
        dsc_bind_engine_enter(self, get ? "safe_get_full_grad" : "safe_set_full_grad") < 0)
        return NULL;
    int failed = dsc_bind_engine_view_all(self);
    if (!failed) {
        if (get)
            DSC_BIND_WITHOUT_GIL(status,
                                 dsc_engine_get_grad(self->core, (size_t)i, self->views, t.data));
        else
            DSC_BIND_WITHOUT_GIL(status, dsc_engine_set_grad(self->core, (size_t)i, self->views,
                                                             t.data, &into_grad));
        failed = after_views(self, status);
    }
    dsc_bind_engine_drop_grads(self);
    self->busy = false;
    return failed ? NULL : PyFloat_FromDouble(into_grad);
}

PyObject *dsc_bind_engine_get_grad(EngineObject *self, PyObject *args) {
    return full_grad(self, args, true);
}

PyObject *dsc_bind_engine_set_grad(EngineObject *self, PyObject *args) {
    return full_grad(self, args, false);
}
