/* _core.Fetch: when sharded parameters are gathered and dropped; csrc/fetch.h has the rules.
 *
 * Invariant: a call takes and gives numbers only; what they stand for is the caller's. */
#include "bind.h"

#include "../fetch.h"

typedef struct {
    PyObject_HEAD struct dsc_fetch *core;
} FetchObject;

static PyObject *raise_status(FetchObject *self, enum dsc_status status) {
    return dsc_bind_raise(dsc_bind_state_of(Py_TYPE(self)), status);
}

static PyObject *fetch_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *keys[] = {"ahead", "live", "reuse", NULL};
    Py_ssize_t ahead, live, reuse;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "nnn:Fetch", keys, &ahead, &live, &reuse))
        return NULL;
    if (ahead < 0 || live < 0 || reuse < 0)
        return PyErr_Format(PyExc_ValueError,
                            "Fetch: ahead %zd, live %zd, reuse %zd; numbers of elements >= 0 are "
                            "expected",
                            ahead, live, reuse);
    FetchObject *self = (FetchObject *)type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    const struct dsc_fetch_limits limits = {(size_t)ahead, (size_t)live, (size_t)reuse};
    enum dsc_status status = dsc_fetch_open(&limits, &self->core);
    if (status == DSC_OK)
        return (PyObject *)self;
    (void)raise_status(self, status);
    Py_DECREF(self);
    return NULL;
}

static void fetch_dealloc(FetchObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    dsc_fetch_close(self->core);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *list_of(const size_t *numbers, size_t n) {
    PyObject *list = PyList_New((Py_ssize_t)n);
    for (size_t i = 0; list && i < n; i++) {
        PyObject *number = PyLong_FromSize_t(numbers[i]);
        if (!number)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, (Py_ssize_t)i, number);
    }
    return list;
}

/* The numbers of a sequence, in memory that the caller frees with PyMem_Free; NULL with an
 * exception. */
static size_t *numbers_of(PyObject *sequence, size_t *n) {
    PyObject *tuple = PySequence_Tuple(sequence);
    if (!tuple)
        return NULL;
    *n = (size_t)PyTuple_GET_SIZE(tuple);
    size_t *numbers = PyMem_New(size_t, *n + 1);
    if (!numbers)
        PyErr_NoMemory();
    for (size_t i = 0; numbers && i < *n; i++) {
        numbers[i] = PyLong_AsSize_t(PyTuple_GET_ITEM(tuple, (Py_ssize_t)i));
        if (numbers[i] == (size_t)-1 && PyErr_Occurred()) {
            PyMem_Free(numbers);
            numbers = NULL;
        }
    }
    Py_DECREF(tuple);
    return numbers;
}

PyDoc_STRVAR(add_doc, "add(n_elems) -> int\n\nA parameter's number, from 0 on.");

static PyObject *fetch_add(FetchObject *self, PyObject *args) {
    Py_ssize_t n_elems;
    size_t param = 0;
    if (!PyArg_ParseTuple(args, "n:add", &n_elems))
        return NULL;
    if (n_elems < 0)
        return PyErr_Format(PyExc_ValueError, "add: %zd elements", n_elems);
    enum dsc_status status = dsc_fetch_add(self->core, (size_t)n_elems, &param);
    return status == DSC_OK ? PyLong_FromSize_t(param) : raise_status(self, status);
}

PyDoc_STRVAR(want_doc,
             "want(event, params) -> (drop, now, ahead)\n\n"
             "Before a use of parameters: what to drop, then to gather for it, then to gather\n"
             "ahead, as lists of numbers in order. event: the number of a place in the program;\n"
             "-1: aside from all order.");

static PyObject *fetch_want(FetchObject *self, PyObject *args) {
    Py_ssize_t event;
    PyObject *sequence;
    size_t n = 0;
    struct dsc_fetch_plan plan;
    if (!PyArg_ParseTuple(args, "nO:want", &event, &sequence))
        return NULL;
    if (event < -1 || event > INT32_MAX)
        return PyErr_Format(PyExc_ValueError, "want: event %zd; -1 to 2147483647 are allowed",
                            event);
    size_t *params = numbers_of(sequence, &n);
    if (!params)
        return NULL;
    enum dsc_status status =
        dsc_fetch_want(self->core, event < 0 ? DSC_FETCH_ASIDE : (size_t)event, params, n, &plan);
    PyMem_Free(params);
    if (status != DSC_OK)
        return raise_status(self, status);
    PyObject *drop = list_of(plan.drop, plan.n_drop), *now = list_of(plan.now, plan.n_now);
    PyObject *ahead = list_of(plan.ahead, plan.n_ahead);
    if (drop && now && ahead)
        return Py_BuildValue("(NNN)", drop, now, ahead);
    Py_XDECREF(drop);
    Py_XDECREF(now);
    Py_XDECREF(ahead);
    return NULL;
}

PyDoc_STRVAR(release_doc, "release(params) -> drop\n\nThe end of a use; as often as want().");

static PyObject *fetch_release(FetchObject *self, PyObject *sequence) {
    size_t n = 0, *params = numbers_of(sequence, &n);
    struct dsc_fetch_plan plan;
    if (!params)
        return NULL;
    enum dsc_status status = dsc_fetch_release(self->core, params, n, &plan);
    PyMem_Free(params);
    return status == DSC_OK ? list_of(plan.drop, plan.n_drop) : raise_status(self, status);
}

PyDoc_STRVAR(forget_doc, "forget() -> drop\n\nValues have changed: all that is not in use.");

static PyObject *fetch_forget(FetchObject *self, PyObject *unused) {
    struct dsc_fetch_plan plan;
    (void)unused;
    dsc_fetch_forget(self->core, &plan);
    return list_of(plan.drop, plan.n_drop);
}

PyDoc_STRVAR(is_live_doc, "is_live(param) -> bool\n\nWhether it is gathered, or about to be.");

static PyObject *fetch_is_live(FetchObject *self, PyObject *number) {
    size_t param = PyLong_AsSize_t(number);
    if (param == (size_t)-1 && PyErr_Occurred())
        return NULL;
    return PyBool_FromLong(dsc_fetch_is_live(self->core, param));
}

PyDoc_STRVAR(counters_doc,
             "counters(reset_peak=False) -> dict\n\n"
             "live, peak: elements gathered, now and at most. fetched, ahead, reused, evicted:\n"
             "parameters gathered when wanted, ahead, still there, dropped for room.");

static PyObject *fetch_counters(FetchObject *self, PyObject *args) {
    int reset = 0;
    if (!PyArg_ParseTuple(args, "|p:counters", &reset))
        return NULL;
    const struct dsc_fetch_counters c = dsc_fetch_counters(self->core);
    if (reset)
        dsc_fetch_reset_peak(self->core);
    return Py_BuildValue("{sn sn sK sK sK sK}", "live", (Py_ssize_t)c.live, "peak",
                         (Py_ssize_t)c.peak, "fetched", (unsigned long long)c.n_fetched, "ahead",
                         (unsigned long long)c.n_ahead, "reused", (unsigned long long)c.n_reused,
                         "evicted", (unsigned long long)c.n_evicted);
}

static PyMethodDef methods[] = {
    {"add", (PyCFunction)fetch_add, METH_VARARGS, add_doc},
    {"want", (PyCFunction)fetch_want, METH_VARARGS, want_doc},
    {"release", (PyCFunction)fetch_release, METH_O, release_doc},
    {"forget", (PyCFunction)fetch_forget, METH_NOARGS, forget_doc},
    {"is_live", (PyCFunction)fetch_is_live, METH_O, is_live_doc},
    {"counters", (PyCFunction)fetch_counters, METH_VARARGS, counters_doc},
    {NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, fetch_new},
    {Py_tp_dealloc, fetch_dealloc},
    {Py_tp_methods, methods},
    {Py_tp_doc, "Fetch(ahead, live, reuse): limits in elements; see csrc/fetch.h."},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "deepspeed_c._core.Fetch",
    .basicsize = sizeof(FetchObject),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = slots,
};

int dsc_bind_add_fetch(PyObject *module) {
    PyObject *type = PyType_FromModuleAndSpec(module, &spec, NULL);
    int failed = type ? PyModule_AddType(module, (PyTypeObject *)type) : -1;
    Py_XDECREF(type);
    return failed;
}
