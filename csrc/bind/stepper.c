/* _core.Stepper: an optimizer's rule on tensors, without an engine.
 *
 * Decides: which tensors may meet in a step: on the CPU, dense, one layout. Invariant: everything
 * is borrowed and checked before the first element changes. */
#include "bind.h"
#include "hyper.h"

#include "../alloc.h"
#include "../fpenv.h"
#include "../stepping.h"

typedef struct {
    PyObject_HEAD struct dsc_pool *pool;
    enum dsc_optim_kind kind;
    struct dsc_norm *norms;
    bool busy;
} StepperObject;

static PyObject *stepper_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *keys[] = {"kind", "n_threads", NULL};
    const char *name;
    int n_threads;
    struct dsc_bind_state *state = dsc_bind_state_of(type);
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "si:Stepper", keys, &name, &n_threads))
        return NULL;
    StepperObject *self = (StepperObject *)type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    enum dsc_status status = dsc_optim_find(name, &self->kind);
    if (status == DSC_OK && self->kind == DSC_OPTIM_FOREIGN)
        status = DSC_FAIL(DSC_EINVAL, "a foreign optimizer has no rule in the core");
    if (status == DSC_OK)
        status = dsc_alloc(DSC_LAMB_NORMS * sizeof *self->norms, (void **)&self->norms);
    if (status == DSC_OK)
        status = dsc_pool_open(n_threads, dsc_bind_team(state), &self->pool);
    if (status == DSC_OK)
        return (PyObject *)self;
    dsc_bind_raise(state, status);
    Py_DECREF(self);
    return NULL;
}

static void stepper_dealloc(StepperObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    dsc_pool_close(self->pool);
    dsc_free(self->norms);
    type->tp_free(self);
    Py_DECREF(type);
}

/* Borrows item k of a row; it has to be like `first` (NULL: this is the first). */
static int borrow(struct dsc_bind_state *state, PyObject *row, Py_ssize_t k,
                  const struct dsc_borrowed *first, struct dsc_borrowed *out) {
    static const char *const names[] = {"parameter", "gradient", "first state", "second state"};
    if (dsc_bind_borrow(state, PyTuple_GET_ITEM(row, k), names[k], out) < 0)
        return -1;
    if ((int)out->dtype >= (int)DSC_TRAIN_DTYPE_COUNT) {
        PyErr_Format(PyExc_TypeError, "a %s is %s, allowed: float32, bfloat16, float16", names[k],
                     dsc_dtype_name(out->dtype));
        return -1;
    }
    if (!out->on_cpu || !out->dense || (first && !dsc_bind_same_layout(first, out))) {
        PyErr_Format(PyExc_ValueError,
                     "a %s of %zu elements is %s; allowed: CPU tensors, dense, of the parameter's "
                     "shape and strides",
                     names[k], out->n_elems,
                     !out->on_cpu  ? "not on the CPU"
                     : !out->dense ? "not dense"
                                   : "laid out otherwise than its parameter");
        return -1;
    }
    return 0;
}

static int read_row(StepperObject *self, PyObject *row, struct dsc_stepped *out) {
    struct dsc_bind_state *state = dsc_bind_state_of(Py_TYPE(self));
    struct dsc_borrowed p, t;
    Py_ssize_t n_states = dsc_optim_info(self->kind)->n_states;
    if (!PyTuple_Check(row) || PyTuple_GET_SIZE(row) < 2 || PyTuple_GET_SIZE(row) > 2 + n_states) {
        PyErr_Format(PyExc_TypeError, "step: a row is (parameter, gradient, up to %zd states)",
                     n_states);
        return -1;
    }
    if (borrow(state, row, 0, NULL, &p) < 0 || borrow(state, row, 1, &p, &t) < 0)
        return -1;
    *out = (struct dsc_stepped){
        .p = p.data, .grad = t.data, .p_dtype = p.dtype, .grad_dtype = t.dtype, .n = p.n_elems};
    for (Py_ssize_t k = 2; k < PyTuple_GET_SIZE(row); k++) {
        if (borrow(state, row, k, &p, &t) < 0)
            return -1;
        if (k > 2 && t.dtype != out->state_dtype) {
            PyErr_SetString(PyExc_TypeError, "the states of a parameter have different dtypes");
            return -1;
        }
        out->state[k - 2] = t.data;
        out->state_dtype = t.dtype;
    }
    return 0;
}

static enum dsc_status run_rows(StepperObject *self, const struct dsc_optim_args *args,
                                struct dsc_stepped *rows, Py_ssize_t n) {
    enum dsc_status status = DSC_OK;
    uint64_t saved = dsc_fp_enter();
    for (Py_ssize_t i = 0; status == DSC_OK && i < n; i++)
        status = dsc_stepping_run(self->pool, args, self->norms, &rows[i]);
    dsc_fp_leave(saved);
    return status;
}

static PyObject *ratios_of(const struct dsc_stepped *rows, Py_ssize_t n) {
    PyObject *list = PyList_New(n);
    for (Py_ssize_t i = 0; list && i < n; i++) {
        PyObject *ratio = PyFloat_FromDouble(rows[i].trust_ratio);
        if (ratio)
            PyList_SET_ITEM(list, i, ratio);
        else
            Py_CLEAR(list);
    }
    return list;
}

/* Whether every row has the states that the rule needs with these options. */
static bool states_are_there(StepperObject *self, const struct dsc_hyper *hyper,
                             const struct dsc_stepped *rows, Py_ssize_t n) {
    int needed = self->kind == DSC_OPTIM_SGD && hyper->momentum == 0
                     ? 0
                     : dsc_optim_info(self->kind)->n_states;
    for (Py_ssize_t i = 0; i < n; i++)
        for (int k = 0; k < needed; k++)
            if (!rows[i].state[k] && rows[i].n > 0)
                return false;
    return true;
}

static PyObject *step_rows(StepperObject *self, const struct dsc_hyper *hyper,
                           unsigned long long step, PyObject *rows) {
    struct dsc_stepped *stepped;
    struct dsc_optim_args args;
    PyObject *result = NULL;
    struct dsc_bind_state *state = dsc_bind_state_of(Py_TYPE(self));
    Py_ssize_t n = PyList_GET_SIZE(rows);
    enum dsc_status status = dsc_optim_check(self->kind, hyper, 0);
    if (status == DSC_OK)
        status = dsc_alloc((size_t)n * sizeof *stepped, (void **)&stepped);
    if (status != DSC_OK)
        return dsc_bind_raise(state, status);
    for (Py_ssize_t i = 0; i < n; i++)
        if (read_row(self, PyList_GET_ITEM(rows, i), &stepped[i]) < 0)
            goto out;
    if (!states_are_there(self, hyper, stepped, n)) {
        PyErr_SetString(PyExc_ValueError, "step: a parameter lacks a state that the rule needs");
        goto out;
    }
    dsc_optim_prepare(self->kind, hyper, step, 1.0, &args);
    Py_BEGIN_ALLOW_THREADS;
    status = run_rows(self, &args, stepped, n);
    Py_END_ALLOW_THREADS;
    result = status == DSC_OK ? ratios_of(stepped, n) : dsc_bind_raise(state, status);
out:
    dsc_free(stepped);
    return result;
}

/* step(group, step, rows) -> list of trust ratios */
static PyObject *stepper_step(StepperObject *self, PyObject *args) {
    PyObject *group, *rows, *result = NULL; /* borrowed from args */
    unsigned long long step;
    struct dsc_hyper hyper;
    if (!PyArg_ParseTuple(args, "OKO!:step", &group, &step, &PyList_Type, &rows) ||
        dsc_bind_read_hyper(self->kind, group, &hyper) < 0)
        return NULL;
    if (step < 1 || self->busy) {
        PyErr_SetString(self->busy ? PyExc_RuntimeError : PyExc_ValueError,
                        self->busy ? "step: already running in another thread"
                                   : "step: steps count from 1");
        return NULL;
    }
    self->busy = true;
    result = step_rows(self, &hyper, step, rows);
    self->busy = false;
    return result;
}

static PyMethodDef methods[] = {
    {"step", (PyCFunction)stepper_step, METH_VARARGS,
     "step(group, step, rows) -> [trust ratio of LAMB, else 0].\n\n"
     "group: a dict of options. step: counted from 1. rows: a list of tuples (parameter, "
     "gradient,\n"
     "states...), CPU tensors of float32, bfloat16 or float16 in one layout; parameter and states\n"
     "change in place."},
    {NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, stepper_new},
    {Py_tp_dealloc, stepper_dealloc},
    {Py_tp_methods, methods},
    {Py_tp_doc, "Stepper(kind, n_threads): the rule of one optimizer."},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "deepspeed_c._core.Stepper",
    .basicsize = sizeof(StepperObject),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = slots,
};

/* check_group(kind, group, index) -> None */
static PyObject *check_group(PyObject *module, PyObject *args) {
    const char *name;
    PyObject *group; /* borrowed from args */
    int index;
    enum dsc_optim_kind kind;
    struct dsc_hyper hyper;
    if (!PyArg_ParseTuple(args, "sOi:check_group", &name, &group, &index))
        return NULL;
    enum dsc_status status = dsc_optim_find(name, &kind);
    if (status == DSC_OK && dsc_bind_read_hyper(kind, group, &hyper) < 0)
        return NULL;
    if (status == DSC_OK)
        status = dsc_optim_check(kind, &hyper, index);
    if (status != DSC_OK)
        return dsc_bind_raise(dsc_bind_module_state(module), status);
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"check_group", check_group, METH_VARARGS,
     "check_group(kind, group, index)\n\nValueError where a step by this rule would refuse the "
     "options in `group`, a dict; index is the group's number, for the message."},
    {NULL},
};

int dsc_bind_add_stepper(PyObject *module) {
    PyObject *type = PyType_FromModuleAndSpec(module, &spec, NULL);
    int failed = type ? PyModule_AddType(module, (PyTypeObject *)type) : -1;
    Py_XDECREF(type);
    return failed ? failed : PyModule_AddFunctions(module, functions);
}
