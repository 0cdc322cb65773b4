/* The type Work: an asynchronous operation.
 *
 * Invariant: the tensors of an operation live until it has ended, whoever drops the Work: a Comm
 * keeps a list of its Works; and no longer than until somebody looks. */
#include "bind.h"

#include "../comm/comm.h"

typedef struct {
    PyObject_HEAD struct dsc_work *core;
    PyObject *keep;
} WorkObject;

/* One that has ended lets go of its tensors: a Comm, and a program, may keep the Work for long. */
static bool has_ended(PyObject *object) {
    WorkObject *self = (WorkObject *)object;
    if (!dsc_work_done(self->core))
        return false;
    Py_CLEAR(self->keep);
    return true;
}

/* Forgets those at the front that have ended: they end in order, or nearly. */
static int forget_ended(PyObject *pending) {
    Py_ssize_t n = 0;
    while (n < PyList_GET_SIZE(pending) && has_ended(PyList_GET_ITEM(pending, n)))
        n++;
    return n > 0 ? PyList_SetSlice(pending, 0, n, NULL) : 0;
}

PyObject *dsc_bind_work(struct dsc_bind_state *state, struct dsc_work *core, PyObject *keep,
                        PyObject *pending) {
    WorkObject *self = keep ? (WorkObject *)state->work_type->tp_alloc(state->work_type, 0) : NULL;
    if (!self) {
        /* The operation runs on; without its tensors it must not. */
        (void)dsc_work_wait(core, 0, NULL, NULL);
        dsc_work_release(core);
        Py_XDECREF(keep);
        return NULL;
    }
    self->core = core;
    self->keep = keep;
    if (forget_ended(pending) < 0 || PyList_Append(pending, (PyObject *)self) < 0) {
        (void)dsc_work_wait(core, 0, NULL, NULL);
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

PyDoc_STRVAR(wait_doc,
             "wait(timeout=0.0)\n\n"
             "Returns once the operation has ended; raises what it raised. timeout: seconds,\n"
             "0 for none; TimeoutError when they have passed, and the operation goes on.");

static PyObject *work_wait(WorkObject *self, PyObject *args) {
    double timeout_s = 0;
    enum dsc_status status;
    if (!PyArg_ParseTuple(args, "|d:wait", &timeout_s))
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    status = dsc_work_wait(self->core, timeout_s, dsc_bind_interrupted, NULL);
    Py_END_ALLOW_THREADS;
    PyObject *result = status == DSC_OK ? Py_NewRef(Py_None)
                                        : dsc_bind_raise(dsc_bind_state_of(Py_TYPE(self)), status);
    (void)has_ended((PyObject *)self);
    return result;
}

PyDoc_STRVAR(done_doc, "done() -> bool\n\nWhether the operation has ended, well or not.");

static PyObject *work_done(WorkObject *self, PyObject *unused) {
    (void)unused;
    return PyBool_FromLong(has_ended((PyObject *)self));
}

static PyObject *work_peer(WorkObject *self, void *unused) {
    (void)unused;
    return PyLong_FromLong(dsc_work_peer(self->core));
}

static int work_traverse(WorkObject *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->keep);
    return 0;
}

static void work_dealloc(WorkObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    dsc_work_release(self->core);
    Py_XDECREF(self->keep);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyGetSetDef work_getset[] = {
    {"peer", (getter)work_peer, NULL, "The other rank of a message, once it has ended.", NULL},
    {NULL},
};

static PyMethodDef work_methods[] = {
    {"wait", (PyCFunction)work_wait, METH_VARARGS, wait_doc},
    {"done", (PyCFunction)work_done, METH_NOARGS, done_doc},
    {NULL},
};

static PyType_Slot work_slots[] = {
    {Py_tp_doc, "An asynchronous operation of a Comm."},
    {Py_tp_traverse, work_traverse},
    {Py_tp_dealloc, work_dealloc},
    {Py_tp_methods, work_methods},
    {Py_tp_getset, work_getset},
    {0, NULL},
};

static PyType_Spec work_spec = {
    .name = "deepspeed_c._core.Work",
    .basicsize = sizeof(WorkObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = work_slots,
};

int dsc_bind_add_work(PyObject *module) {
    struct dsc_bind_state *state = dsc_bind_module_state(module);
    state->work_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &work_spec, NULL);
    return state->work_type ? PyModule_AddType(module, state->work_type) : -1;
}
