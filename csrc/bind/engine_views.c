/* torch's parameters and gradients as views for the core.
 *
 * Decides: which changes since initialize a parameter bears (another storage does, another size,
 * dtype or memory order does not), and what is dropped after a call. */
#include "engine_object.h"

/* Equal where elements have the same order in memory. */
uint64_t dsc_bind_layout_of(const struct dsc_borrowed *t) {
    uint64_t hash = 0;
    for (int i = 0; !t->contiguous && i < t->n_dims; i++)
        if (t->shape[i] != 1)
            hash = (hash * 31 + (uint64_t)t->shape[i]) * 1000003 + (uint64_t)t->strides[i];
    return hash;
}

/* This rank's part of a parameter. */
static int view_part(EngineObject *self, Py_ssize_t i, PyObject *tensor) {
    struct dsc_borrowed t;
    size_t begin, n;
    int rank, size;
    const char *name = dsc_bind_engine_name(self, i);
    if (dsc_bind_borrow(dsc_bind_engine_state(self), tensor, name, &t) < 0)
        return -1;
    dsc_engine_place(self->core, (size_t)i, &rank, &size);
    dsc_engine_part(self->core, (size_t)i, rank, &begin, &n);
    if (!t.on_cpu || !t.contiguous || t.dtype != self->shapes[i].dtype || t.n_elems != n) {
        PyErr_Format(PyExc_ValueError,
                     "the part of parameter %s is %s of %zu %s elements; allowed: a contiguous CPU "
                     "tensor of %zu %s elements, those from %zu on",
                     name, t.on_cpu && t.contiguous ? "a tensor" : "not such a tensor", t.n_elems,
                     dsc_dtype_name(t.dtype), n, dsc_dtype_name(self->shapes[i].dtype), begin);
        return -1;
    }
    self->views[i] = (struct dsc_view){.data = t.data, .begin = begin};
    return 0;
}

static int view_param(EngineObject *self, Py_ssize_t i) {
    struct dsc_borrowed t;
    const char *name = dsc_bind_engine_name(self, i);
    PyObject *part = self->parts ? PyList_GET_ITEM(self->parts, i) : Py_None; /* borrowed */
    if (part != Py_None)
        return view_part(self, i, part);
    if (dsc_bind_borrow(dsc_bind_engine_state(self), PyList_GET_ITEM(self->fulls, i), name, &t) < 0)
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
    if (dsc_bind_layout_of(&t) != self->layouts[i]) {
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
int dsc_bind_engine_borrow_grad(EngineObject *self, Py_ssize_t i, PyObject **held,
                                struct dsc_borrowed *out) {
    struct dsc_borrowed param;
    struct dsc_bind_state *state = dsc_bind_engine_state(self);
    PyObject *tensor = PyList_GET_ITEM(self->fulls, i); /* borrowed from the list */
    const char *name = dsc_bind_engine_name(self, i);
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

void dsc_bind_engine_drop_grads(EngineObject *self) {
    for (Py_ssize_t i = 0; i < self->n_params; i++)
        Py_CLEAR(self->grads[i]);
}

/* Fills self->views with parameters and gradients; gradients are held until drop_grads. */
int dsc_bind_engine_view_all(EngineObject *self) {
    struct dsc_bind_state *state = dsc_bind_engine_state(self);
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
        if (dsc_bind_engine_borrow_grad(self, i, &self->grads[i], &t) < 0)
            return -1;
        self->views[i].grad = t.data;
        self->views[i].grad_dtype = t.dtype;
    }
    return 0;
}

/* Sets .grad to None where it is set; `only_16bit` leaves fp32 ones. */
int dsc_bind_engine_forget_grads(EngineObject *self, bool all) {
    struct dsc_bind_state *state = dsc_bind_engine_state(self);
    for (Py_ssize_t i = 0; i < self->n_params; i++) {
        if (!self->grads[i] || (!all && self->views[i].grad))
            continue;
        if (PyObject_SetAttr(PyList_GET_ITEM(self->params, i), state->str_grad, Py_None) < 0)
            return -1;
    }
    return 0;
}
