/* Learning rates, data order and loss scales for Python.
 *
 * Adds module functions only: the values behind them are plain structs that cost nothing to build
 * per call. */
#include "bind.h"

#include "../lr.h"
#include "../scaler.h"
#include "../shuffle.h"

/* "O&": an int in [0, 2**64); the "K" format would take any int modulo 2**64 without a word. */
static int as_uint64(PyObject *number, void *out) {
    const unsigned long long value = PyLong_AsUnsignedLongLong(number);
    if (value == (unsigned long long)-1 && PyErr_Occurred())
        return 0;
    *(uint64_t *)out = value;
    return 1;
}

/* "O&": the name of a schedule class. */
static int as_kind(PyObject *name, void *out) {
    static const char *const names[] = {"WarmupLR", "WarmupDecayLR", "WarmupCosineLR"};
    for (int kind = DSC_LR_WARMUP; kind <= DSC_LR_WARMUP_COSINE; kind++)
        if (PyUnicode_Check(name) && PyUnicode_CompareWithASCIIString(name, names[kind]) == 0) {
            *(enum dsc_lr_kind *)out = (enum dsc_lr_kind)kind;
            return 1;
        }
    PyErr_Format(PyExc_ValueError,
                 "schedule %R is not one of 'WarmupLR', 'WarmupDecayLR', 'WarmupCosineLR'", name);
    return 0;
}

static int as_ramp(PyObject *name, void *out) {
    static const char *const names[] = {"log", "linear"};
    for (int ramp = DSC_LR_LOG; ramp <= DSC_LR_LINEAR; ramp++)
        if (PyUnicode_Check(name) && PyUnicode_CompareWithASCIIString(name, names[ramp]) == 0) {
            *(enum dsc_lr_ramp *)out = (enum dsc_lr_ramp)ramp;
            return 1;
        }
    PyErr_Format(PyExc_ValueError, "warm-up ramp %R is not one of 'log', 'linear'", name);
    return 0;
}

/* False with the exception of a status that is none of success. */
static bool passes(PyObject *module, enum dsc_status status) {
    if (status != DSC_OK)
        (void)dsc_bind_raise(dsc_bind_module_state(module), status);
    return status == DSC_OK;
}

PyDoc_STRVAR(
    lr_at_doc,
    "lr_at(kind, ramp, n_warmup, n_total, min, max, i, base=0.0) -> float\n\n"
    "The learning rate at step index i (-1: at construction). kind: 'WarmupLR',\n"
    "'WarmupDecayLR' or 'WarmupCosineLR'; ramp: 'log' or 'linear'. For the cosine, min and\n"
    "max are warmup_min_ratio and cos_min_ratio, both of base. n_total counts where the\n"
    "kind uses it. ValueError names the parameter that is out of range.");

static PyObject *lr_at(PyObject *module, PyObject *args) {
    struct dsc_lr lr;
    long long n_warmup, n_total, i;
    double base = 0;
    if (!PyArg_ParseTuple(args, "O&O&LLddL|d:lr_at", as_kind, &lr.kind, as_ramp, &lr.ramp,
                          &n_warmup, &n_total, &lr.min, &lr.max, &i, &base))
        return NULL;
    lr.n_warmup = n_warmup, lr.n_total = n_total;
    if (!passes(module, dsc_lr_check(&lr)))
        return NULL;
    return PyFloat_FromDouble(dsc_lr_at(&lr, i, base));
}

PyDoc_STRVAR(lr_table_doc,
             "lr_table(kind, ramp, n_warmup, n_total, min, max, i0, count, base=0.0)\n\n"
             "The rates at indices i0, i0 + 1, ... as a float64 NumPy array of `count` elements;\n"
             "the other arguments are those of lr_at.");

static PyObject *lr_table(PyObject *module, PyObject *args) {
    struct dsc_lr lr;
    long long n_warmup, n_total, i0;
    Py_ssize_t count;
    double base = 0;
    if (!PyArg_ParseTuple(args, "O&O&LLddLn|d:lr_table", as_kind, &lr.kind, as_ramp, &lr.ramp,
                          &n_warmup, &n_total, &lr.min, &lr.max, &i0, &count, &base))
        return NULL;
    lr.n_warmup = n_warmup, lr.n_total = n_total;
    if (!passes(module, dsc_lr_check(&lr)))
        return NULL;
    if (count > 0 && i0 > INT64_MAX - count)
        return PyErr_Format(PyExc_ValueError, "index i0 + count does not fit 64 bits");
    void *data;
    PyObject *array = dsc_bind_array(DSC_F64, count, &data);
    if (!array)
        return NULL;
    double *rate = data;
    for (Py_ssize_t k = 0; k < count; k++)
        rate[k] = dsc_lr_at(&lr, i0 + k, base);
    return array;
}

PyDoc_STRVAR(
    one_cycle_doc,
    "one_cycle(first, second, first_stairs, second_stairs, decay_step, min, max, decay_rate, i,\n"
    "          momentum=False) -> float\n\n"
    "The learning rate of OneCycle at step index i (-1: at construction), or with `momentum`\n"
    "its momentum, of which min, max and decay_rate are then. ValueError names the parameter\n"
    "that is out of range.");

static PyObject *one_cycle(PyObject *module, PyObject *args) {
    struct dsc_lr_cycle cycle;
    long long first_stairs, second_stairs, i;
    double min, max, decay_rate;
    int is_momentum = 0;
    if (!PyArg_ParseTuple(args, "ddLLddddL|p:one_cycle", &cycle.first, &cycle.second, &first_stairs,
                          &second_stairs, &cycle.decay_step, &min, &max, &decay_rate, &i,
                          &is_momentum))
        return NULL;
    cycle.first_stairs = first_stairs, cycle.second_stairs = second_stairs;
    if (!passes(module, dsc_lr_cycle_check(&cycle)))
        return NULL;
    return PyFloat_FromDouble(is_momentum ? dsc_lr_cycle_mom_at(&cycle, min, max, decay_rate, i)
                                          : dsc_lr_cycle_at(&cycle, min, max, decay_rate, i));
}

PyDoc_STRVAR(range_test_doc,
             "range_test(min, n_step, rate, staircase, i) -> float\n\n"
             "The learning rate of LRRangeTest at step index i (-1: at construction); n_step must\n"
             "be positive.");

static PyObject *range_test(PyObject *module, PyObject *args) {
    (void)module;
    double min, rate;
    long long n_step, i;
    int is_staircase;
    if (!PyArg_ParseTuple(args, "dLdpL:range_test", &min, &n_step, &rate, &is_staircase, &i))
        return NULL;
    if (n_step < 1)
        return PyErr_Format(PyExc_ValueError, "n_step must be positive, got %lld", n_step);
    return PyFloat_FromDouble(dsc_lr_range_at(min, n_step, rate, is_staircase, i));
}

PyDoc_STRVAR(shuffle_doc,
             "shuffle(seed, epoch, n, start, stride, count)\n\n"
             "Samples at positions start, start + stride, ... of the order of (seed, epoch) over\n"
             "range(n), as an int64 NumPy array of `count` elements; positions wrap around at n.\n"
             "The order is a function of its arguments alone, in this and every later version.");

static PyObject *shuffle(PyObject *module, PyObject *args) {
    uint64_t seed, epoch, n, start, stride;
    Py_ssize_t count;
    if (!PyArg_ParseTuple(args, "O&O&O&O&O&n:shuffle", as_uint64, &seed, as_uint64, &epoch,
                          as_uint64, &n, as_uint64, &start, as_uint64, &stride, &count))
        return NULL;
    void *data;
    PyObject *array = dsc_bind_array(DSC_I64, count, &data);
    if (!array)
        return NULL;
    int64_t *out = data;
    enum dsc_status status;
    Py_BEGIN_ALLOW_THREADS;
    status = dsc_shuffle_fill(seed, epoch, n, start, stride, (uint64_t)count, out);
    Py_END_ALLOW_THREADS;
    if (!passes(module, status))
        Py_CLEAR(array);
    return array;
}

PyDoc_STRVAR(
    scaler_update_doc,
    "scaler_update(overflow, scale, min_scale, window, hysteresis, consecutive_hysteresis,\n"
    "              stays_at_min, hysteresis_left, iter, last_overflow)\n"
    "    -> (scale, hysteresis_left, iter, last_overflow)\n\n"
    "A dynamic loss scale after one more boundary step. RuntimeError when the scale must shrink\n"
    "below min_scale, unless stays_at_min.");

static PyObject *scaler_update(PyObject *module, PyObject *args) {
    double scale, min_scale;
    long long window, hysteresis, hysteresis_left, iter, last_overflow;
    int overflow, consecutive, stays_at_min;
    if (!PyArg_ParseTuple(args, "pddLLppLLL:scaler_update", &overflow, &scale, &min_scale, &window,
                          &hysteresis, &consecutive, &stays_at_min, &hysteresis_left, &iter,
                          &last_overflow))
        return NULL;
    if (!(scale > 0) || !(min_scale > 0) || window < 1 || hysteresis < 1)
        return PyErr_Format(PyExc_ValueError,
                            "scale, min_scale, window and hysteresis must be positive");
    struct dsc_scaler scaler;
    dsc_scaler_init_dynamic(&scaler, scale, min_scale, window, hysteresis, consecutive);
    scaler.stays_at_min = stays_at_min;
    scaler.hysteresis_left = hysteresis_left;
    scaler.iter = iter, scaler.last_overflow = last_overflow;
    if (!passes(module, dsc_scaler_update(&scaler, overflow)))
        return NULL;
    return Py_BuildValue("dLLL", scaler.scale, (long long)scaler.hysteresis_left,
                         (long long)scaler.iter, (long long)scaler.last_overflow);
}

static PyMethodDef methods[] = {
    {"lr_at", lr_at, METH_VARARGS, lr_at_doc},
    {"lr_table", lr_table, METH_VARARGS, lr_table_doc},
    {"one_cycle", one_cycle, METH_VARARGS, one_cycle_doc},
    {"range_test", range_test, METH_VARARGS, range_test_doc},
    {"shuffle", shuffle, METH_VARARGS, shuffle_doc},
    {"scaler_update", scaler_update, METH_VARARGS, scaler_update_doc},
    {NULL, NULL, 0, NULL},
};

int dsc_bind_add_schedule(PyObject *module) {
    return PyModule_AddFunctions(module, methods);
}
