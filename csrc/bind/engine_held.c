/* What _core.Engine shows of the core: counters, masters, states, the loss scale.
 *
 * Invariant: memory of the core's is lent with a reference of its own (lend.h), so that a tensor
 * over it outlives the engine. */
#include "engine_object.h"

#include "../alloc.h"
#include "lend.h"

PyObject *dsc_bind_engine_counters(EngineObject *self, PyObject *unused) {
    (void)unused;
    if (dsc_bind_engine_enter(self, "counters") < 0)
        return NULL;
    struct dsc_engine_counters c = dsc_engine_counters(self->core);
    struct dsc_alloc_counters a = dsc_alloc_counters();
    self->busy = false;
    return Py_BuildValue(
        "{s:K,s:K,s:K,s:K,s:K,s:K,s:K,s:K,s:K,s:K,s:L,s:L}", "n_settled",
        (unsigned long long)c.n_settled, "n_bytes_settled", (unsigned long long)c.n_bytes_settled,
        "n_bytes_settled_in_backward", (unsigned long long)c.n_bytes_settled_in_backward,
        "n_extra_slots", (unsigned long long)c.n_extra_slots, "private_bytes",
        (unsigned long long)c.private_bytes, "shared_bytes", (unsigned long long)c.shared_bytes,
        "file_bytes", (unsigned long long)c.file_bytes, "owned_elems",
        (unsigned long long)c.owned_elems, "padded_elems", (unsigned long long)c.padded_elems,
        "alloc_calls", (unsigned long long)a.n_calls, "alloc_live", (long long)a.n_live,
        "alloc_bytes", (long long)a.n_bytes);
}

/* held(index, which) -> (begin, DLPack capsule) of the part that this rank holds, or None. */
PyObject *dsc_bind_engine_held(EngineObject *self, PyObject *args) {
    Py_ssize_t index;
    int which;
    if (!PyArg_ParseTuple(args, "ni:held", &index, &which) ||
        dsc_bind_engine_enter(self, "held") < 0)
        return NULL;
    PyObject *result = NULL;
    if (index < 0 || index >= self->n_params || which < DSC_HELD_GRADIENT ||
        which >= DSC_OPTIM_MAX_STATES) {
        PyErr_Format(PyExc_IndexError, "held(%zd, %d): allowed: 0 to %zd, %d to %d", index, which,
                     self->n_params - 1, DSC_HELD_GRADIENT, DSC_OPTIM_MAX_STATES - 1);
    } else {
        struct dsc_held held = dsc_engine_held(self->core, (size_t)index, which);
        PyObject *capsule =
            held.values ? dsc_bind_lend_held(dsc_bind_engine_state(self), &held) : NULL;
        if (capsule)
            result = Py_BuildValue("(nN)", (Py_ssize_t)held.begin, capsule);
        else if (!held.values)
            result = Py_NewRef(Py_None);
    }
    self->busy = false;
    return result;
}

/* part(index, rank) -> (begin, n) of the elements that `rank` steps, a number in the parameter's
 * reduce group; without one those that this rank steps. */
PyObject *dsc_bind_engine_part(EngineObject *self, PyObject *args) {
    Py_ssize_t index;
    int rank = -1, own = 0, n_ranks = 0;
    if (!PyArg_ParseTuple(args, "n|i:part", &index, &rank) ||
        dsc_bind_engine_enter(self, "part") < 0)
        return NULL;
    self->busy = false;
    if (index >= 0 && index < self->n_params)
        dsc_engine_place(self->core, (size_t)index, &own, &n_ranks);
    if (PyTuple_GET_SIZE(args) == 1)
        rank = own;
    if (index < 0 || index >= self->n_params || rank < 0 || rank >= n_ranks) {
        PyErr_Format(PyExc_IndexError, "part(%zd, %d): allowed: 0 to %zd, 0 to %d", index, rank,
                     self->n_params - 1, n_ranks - 1);
        return NULL;
    }
    size_t begin, n;
    dsc_engine_part(self->core, (size_t)index, rank, &begin, &n);
    return Py_BuildValue("(nn)", (Py_ssize_t)begin, (Py_ssize_t)n);
}

PyObject *dsc_bind_engine_keep_parts(EngineObject *self, PyObject *parts) {
    if (!PyList_Check(parts) || PyList_GET_SIZE(parts) != self->n_params) {
        PyErr_Format(PyExc_TypeError, "keep_parts needs a list of %zd tensors", self->n_params);
        return NULL;
    }
    if (dsc_bind_engine_enter(self, "keep_parts") < 0)
        return NULL;
    PyObject *before = self->parts;
    self->parts = Py_NewRef(parts);
    int failed = dsc_bind_engine_view_all(self);
    dsc_bind_engine_drop_grads(self);
    if (failed)
        Py_SETREF(self->parts, Py_XNewRef(before));
    Py_XDECREF(before);
    self->busy = false;
    return failed ? NULL : Py_NewRef(Py_None);
}

PyObject *dsc_bind_engine_steps(EngineObject *self, PyObject *unused) {
    (void)unused;
    if (dsc_bind_engine_enter(self, "steps") < 0)
        return NULL;
    struct dsc_held held = dsc_engine_steps(self->core);
    PyObject *capsule = dsc_bind_lend_held(dsc_bind_engine_state(self), &held);
    self->busy = false;
    return capsule;
}

PyObject *dsc_bind_engine_hold_momentum(EngineObject *self, PyObject *unused) {
    (void)unused;
    if (dsc_bind_engine_enter(self, "hold_momentum") < 0)
        return NULL;
    enum dsc_status status = dsc_engine_hold_momentum(self->core);
    self->busy = false;
    return status == DSC_OK ? Py_NewRef(Py_None)
                            : dsc_bind_raise(dsc_bind_engine_state(self), status);
}

PyObject *dsc_bind_engine_get_scaler(EngineObject *self, void *unused) {
    (void)unused;
    if (!self->core) {
        PyErr_SetString(PyExc_RuntimeError, "scaler: the engine was destroyed");
        return NULL;
    }
    struct dsc_scaler s = dsc_engine_scaler(self->core);
    return Py_BuildValue("(dLLL)", s.scale, (long long)s.hysteresis_left, (long long)s.iter,
                         (long long)s.last_overflow);
}

int dsc_bind_engine_set_scaler(EngineObject *self, PyObject *value, void *unused) {
    long long hysteresis_left, iter, last_overflow;
    (void)unused;
    if (!value || !PyTuple_Check(value)) {
        PyErr_SetString(PyExc_TypeError, "scaler is (scale, hysteresis_left, iter, last_overflow)");
        return -1;
    }
    if (dsc_bind_engine_enter(self, "scaler") < 0)
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

PyObject *dsc_bind_engine_get_early(EngineObject *self, void *unused) {
    (void)unused;
    return PyBool_FromLong(self->core && dsc_engine_early(self->core));
}

PyObject *dsc_bind_engine_get_scale(EngineObject *self, void *unused) {
    (void)unused;
    if (!self->core) {
        PyErr_SetString(PyExc_RuntimeError, "scale: the engine was destroyed");
        return NULL;
    }
    return PyFloat_FromDouble(dsc_engine_scale(self->core));
}
