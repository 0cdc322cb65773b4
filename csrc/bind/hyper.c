/* A parameter group's dict becomes struct dsc_hyper, afresh in every step: whatever a script or a
 * schedule wrote into it counts. Invariant: a missing key or None is the default of that key. */
#include "hyper.h"

/* Reads one number of a group's dict; a missing key or None gives `absent`. */
static int read_number(PyObject *group, const char *key, double absent, double *out) {
    PyObject *value = PyDict_GetItemString(group, key); /* borrowed from the dict */
    *out = absent;
    if (!value || value == Py_None)
        return 0;
    PyObject *number = PyNumber_Float(value); /* tensors of one element included */
    if (!number)
        return -1;
    *out = PyFloat_AS_DOUBLE(number);
    Py_DECREF(number);
    return 0;
}

static int read_flag(PyObject *group, const char *key, bool absent, bool *out) {
    PyObject *value = PyDict_GetItemString(group, key); /* borrowed from the dict */
    int truth = !value || value == Py_None ? absent : PyObject_IsTrue(value);
    *out = truth > 0;
    return truth < 0 ? -1 : 0;
}

static int read_betas(PyObject *group, struct dsc_hyper *out) {
    PyObject *betas = PyDict_GetItemString(group, "betas"); /* borrowed from the dict */
    PyObject *pair = NULL;
    out->beta1 = 0.9;
    out->beta2 = 0.999;
    if (!betas)
        return 0;
    pair = PySequence_Fast(betas, "betas must be two numbers");
    if (!pair)
        return -1;
    if (PySequence_Fast_GET_SIZE(pair) != 2)
        PyErr_Format(PyExc_ValueError, "betas has %zd items, allowed: 2",
                     PySequence_Fast_GET_SIZE(pair));
    else {
        out->beta1 = PyFloat_AsDouble(PySequence_Fast_GET_ITEM(pair, 0));
        out->beta2 = PyFloat_AsDouble(PySequence_Fast_GET_ITEM(pair, 1));
    }
    Py_DECREF(pair);
    return PyErr_Occurred() ? -1 : 0;
}

/* Options of torch's classes that the core lacks and that would change numbers. */
static int refuse_flags(PyObject *group) {
    static const char *const names[] = {"amsgrad", "maximize"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        bool set;
        if (read_flag(group, names[i], false, &set) < 0)
            return -1;
        if (set) {
            PyErr_Format(PyExc_NotImplementedError,
                         "a parameter group has %s set: the core's rule lacks it; allowed: False "
                         "(an optimizer of torch that has it before initialize is run by torch)",
                         names[i]);
            return -1;
        }
    }
    return 0;
}

int dsc_bind_read_hyper(enum dsc_optim_kind kind, PyObject *group, struct dsc_hyper *out) {
    double eps = kind == DSC_OPTIM_ADAGRAD ? 1e-10 : 1e-8;
    if (!PyDict_Check(group)) {
        PyErr_SetString(PyExc_TypeError, "a parameter group must be a dict");
        return -1;
    }
    if (kind == DSC_OPTIM_FOREIGN) { /* only what ranks compare */
        *out = (struct dsc_hyper){0};
        return read_number(group, "lr", 0, &out->lr);
    }
    /* torch's key for what DeepSpeed calls adam_w_mode; ours wins. */
    return refuse_flags(group) < 0 ||
                   read_flag(group, "decoupled_weight_decay", true, &out->decoupled) < 0 ||
                   read_flag(group, "adam_w_mode", out->decoupled, &out->decoupled) < 0 ||
                   read_number(group, "lr", 1e-3, &out->lr) < 0 ||
                   read_number(group, "weight_decay", 0, &out->weight_decay) < 0 ||
                   read_number(group, "eps", eps, &out->eps) < 0 ||
                   read_number(group, "momentum", 0, &out->momentum) < 0 ||
                   read_number(group, "dampening", 0, &out->dampening) < 0 ||
                   read_number(group, "lr_decay", 0, &out->lr_decay) < 0 ||
                   read_number(group, "min_coeff", 0.01, &out->min_coeff) < 0 ||
                   read_number(group, "max_coeff", 10.0, &out->max_coeff) < 0 ||
                   read_flag(group, "nesterov", false, &out->nesterov) < 0 ||
                   read_flag(group, "bias_correction", true, &out->bias_correction) < 0 ||
                   read_flag(group, "raw_numerator", false, &out->raw_numerator) < 0 ||
                   read_flag(group, "eps_inside_sqrt", false, &out->eps_inside) < 0 ||
                   read_betas(group, out) < 0
               ? -1
               : 0;
}
