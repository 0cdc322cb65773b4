/* _core.Engine at the boundary.
 *
 * Decides: what precedes and follows the core's step. Invariant: a rank that raises before the core
 * has stepped tells the others, which wait for it. */
#include "engine_object.h"

#include "hyper.h"

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
    if (dsc_bind_engine_forget_grads(self, true) < 0)
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
                     dsc_bind_engine_name(self, (Py_ssize_t)unused));
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
    DSC_BIND_WITHOUT_GIL(status, dsc_engine_end_step(self->core, self->views, !done, report));
    PyErr_Restore(type, value, trace);
    Py_XDECREF(done);
    return status;
}

/* The core call, and what has to follow it whatever it returned. */
static PyObject *step_core(EngineObject *self, PyObject *run) {
    struct dsc_step_report report = {0};
    enum dsc_status status;
    DSC_BIND_WITHOUT_GIL(status, dsc_engine_step(self->core, self->views, self->hypers, &report));
    if (status == DSC_OK && report.stepped && !report.over)
        status = run_foreign(self, run, &report);
    PyObject *type, *value, *trace; /* of the foreign optimizer */
    PyErr_Fetch(&type, &value, &trace);
    int failed = report.over ? after_step(self, report.stepped) : 0;
    if (type)
        PyErr_Restore(type, value, trace);
    else if (!failed && status != DSC_OK)
        dsc_bind_raise(dsc_bind_engine_state(self), status);
    return PyErr_Occurred() ? NULL : report_to_dict(&report);
}

/* step(param_groups, run) -> report dict. A loss scale that cannot shrink any more is raised after
 * the gradients are dropped, since the step is over by then. */
PyObject *dsc_bind_engine_step(EngineObject *self, PyObject *args) {
    PyObject *groups, *run = Py_None, *result = NULL; /* borrowed from args */
    if (!PyArg_ParseTuple(args, "O|O:step", &groups, &run) ||
        dsc_bind_engine_enter(self, "step") < 0)
        return NULL;
    if (self->optimizer == DSC_OPTIM_FOREIGN && !PyCallable_Check(run))
        PyErr_SetString(PyExc_TypeError, "step: a foreign optimizer needs a callable that runs it");
    if (!PyErr_Occurred() && read_groups(self, groups) == 0 &&
        dsc_bind_engine_view_all(self) == 0 && check_used(self) == 0)
        result = step_core(self, run);
    else
        refuse_step(self);
    dsc_bind_engine_drop_grads(self);
    self->busy = false;
    return result;
}

PyObject *dsc_bind_engine_refuse_step(EngineObject *self, PyObject *unused) {
    (void)unused;
    if (dsc_bind_engine_enter(self, "refuse_step") < 0)
        return NULL;
    refuse_step(self);
    self->busy = false;
    Py_RETURN_NONE;
}

PyObject *dsc_bind_engine_mend(EngineObject *self, PyObject *unused) {
    (void)unused;
    if (dsc_bind_engine_enter(self, "mend") < 0)
        return NULL;
    dsc_engine_mend(self->core);
    self->busy = false;
    Py_RETURN_NONE;
}
