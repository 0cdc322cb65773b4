/* One kernel of one tier on buffers: what tests and benchmarks hold against torch.
 *
 * Decides: which operations have a name in Python. Invariant: sizes and item sizes are checked
 * before the kernel runs, so that no wrong call touches memory that it was not given. */
#include "bind.h"

#include "../clip.h"
#include "../fpenv.h"
#include "../kernels/kernels.h"

#include <string.h>

enum { MAX_BUFFERS = 5 };

struct call {
    const struct dsc_kernels *kernels;
    enum dsc_dtype dtype;
    Py_buffer buffer[MAX_BUFFERS];
    int n_buffers;
    size_t n;
    bool first;
    struct dsc_adam adam;
    struct dsc_sgd sgd;
    struct dsc_adagrad adagrad;
    struct dsc_lion lion;
    struct dsc_lamb lamb;
    float step;   /* lamb_step */
    float weight; /* add_weighted */
    /* what came back: a value or two, or a flag */
    double sum, squares[2];
    bool finite;
};

static void *at(struct call *call, int i) {
    return call->buffer[i].buf;
}

/* Item size of each buffer: 4 or 8 for a fixed one, OF_DTYPE, or OF_ACC (fp32 for the half types).
 */
enum { OF_DTYPE = -1, OF_ACC = -2 };
enum result { NOTHING, SUM, SQUARES, FINITE };

static void run_accumulate(struct call *c) {
    c->kernels->accumulate[c->dtype](at(c, 0), at(c, 1), c->n, c->first);
}
static void run_to_f32(struct call *c) {
    c->kernels->to_f32[c->dtype](at(c, 0), at(c, 1), c->n);
}
static void run_from_f32(struct call *c) {
    c->kernels->from_f32[c->dtype](at(c, 0), at(c, 1), c->n);
}
static void run_copy_finite(struct call *c) {
    c->finite = c->kernels->copy_finite[c->dtype](at(c, 0), at(c, 1), c->n);
}
static void run_is_finite(struct call *c) {
    c->finite = c->kernels->is_finite[c->dtype](at(c, 0), c->n);
}
static void run_sum_squares(struct call *c) {
    c->sum = c->kernels->sum_squares(at(c, 0), c->n);
}
static void run_add_weighted(struct call *c) {
    c->kernels->add_weighted(at(c, 0), at(c, 1), c->weight, c->n, c->first);
}
static void run_softmax(struct call *c) {
    c->kernels->softmax(at(c, 0), at(c, 1), 1, c->n);
}
static void run_adam(struct call *c) {
    c->kernels->adam(at(c, 0), at(c, 1), at(c, 2), at(c, 3), c->n, &c->adam);
}
static void run_sgd(struct call *c) {
    c->kernels->sgd(at(c, 0), at(c, 1), at(c, 2), c->n, &c->sgd);
}
static void run_adagrad(struct call *c) {
    c->kernels->adagrad(at(c, 0), at(c, 1), at(c, 2), c->n, &c->adagrad);
}
static void run_lion(struct call *c) {
    c->kernels->lion(at(c, 0), at(c, 1), at(c, 2), c->n, &c->lion);
}
static void run_lamb_moments(struct call *c) {
    c->kernels->lamb_moments(at(c, 0), at(c, 1), at(c, 2), at(c, 3), c->n, &c->lamb, c->squares);
}
static void run_lamb_step(struct call *c) {
    c->kernels->lamb_step(at(c, 0), at(c, 1), at(c, 2), c->n, c->step, &c->lamb);
}
static void run_sum(struct call *c) {
    c->kernels->combine[c->dtype][DSC_SUM](at(c, 0), at(c, 1), c->n);
}
static void run_min(struct call *c) {
    c->kernels->combine[c->dtype][DSC_MIN](at(c, 0), at(c, 1), c->n);
}
static void run_max(struct call *c) {
    c->kernels->combine[c->dtype][DSC_MAX](at(c, 0), at(c, 1), c->n);
}
static void run_prod(struct call *c) {
    c->kernels->combine[c->dtype][DSC_PROD](at(c, 0), at(c, 1), c->n);
}

static const struct operation {
    const char *name;
    void (*run)(struct call *);
    int n_buffers, item_size[MAX_BUFFERS];
    int n_dtypes;
    enum result result;
} operations[] = {
    {"accumulate", run_accumulate, 2, {4, OF_DTYPE}, DSC_TRAIN_DTYPE_COUNT, NOTHING},
    {"to_f32", run_to_f32, 2, {4, OF_DTYPE}, DSC_TRAIN_DTYPE_COUNT, NOTHING},
    {"from_f32", run_from_f32, 2, {OF_DTYPE, 4}, DSC_TRAIN_DTYPE_COUNT, NOTHING},
    {"copy_finite", run_copy_finite, 2, {OF_DTYPE, OF_DTYPE}, DSC_TRAIN_DTYPE_COUNT, FINITE},
    {"is_finite", run_is_finite, 1, {OF_DTYPE}, DSC_TRAIN_DTYPE_COUNT, FINITE},
    {"sum_squares", run_sum_squares, 1, {4}, 1, SUM},
    {"add_weighted", run_add_weighted, 2, {4, 4}, 1, NOTHING},
    {"softmax", run_softmax, 2, {4, 4}, 1, NOTHING},
    {"adam", run_adam, 4, {4, 4, 4, 4}, 1, NOTHING},
    {"sgd", run_sgd, 3, {4, 4, 4}, 1, NOTHING},
    {"adagrad", run_adagrad, 3, {4, 4, 4}, 1, NOTHING},
    {"lion", run_lion, 3, {4, 4, 4}, 1, NOTHING},
    {"lamb_moments", run_lamb_moments, 4, {4, 4, 4, 4}, 1, SQUARES},
    {"lamb_step", run_lamb_step, 3, {4, 4, 4}, 1, NOTHING},
    {"sum", run_sum, 2, {OF_ACC, OF_DTYPE}, DSC_REDUCE_DTYPE_COUNT, NOTHING},
    {"min", run_min, 2, {OF_ACC, OF_DTYPE}, DSC_REDUCE_DTYPE_COUNT, NOTHING},
    {"max", run_max, 2, {OF_ACC, OF_DTYPE}, DSC_REDUCE_DTYPE_COUNT, NOTHING},
    {"prod", run_prod, 2, {OF_ACC, OF_DTYPE}, DSC_REDUCE_DTYPE_COUNT, NOTHING},
};

static const struct operation *find_operation(const char *name) {
    for (size_t i = 0; i < sizeof operations / sizeof *operations; i++)
        if (strcmp(operations[i].name, name) == 0)
            return &operations[i];
    PyErr_Format(PyExc_ValueError, "op: there is no kernel '%s'", name);
    return NULL;
}

static int find_dtype(const char *name, const struct operation *op, enum dsc_dtype *out) {
    for (int i = 0; i < op->n_dtypes; i++) {
        if (strcmp(dsc_dtype_name((enum dsc_dtype)i), name) == 0) {
            *out = (enum dsc_dtype)i;
            return 0;
        }
    }
    PyErr_Format(PyExc_ValueError, "dtype: kernel '%s' has no variant for '%s'", op->name, name);
    return -1;
}

static size_t item_size(const struct operation *op, int i, enum dsc_dtype dtype) {
    switch (op->item_size[i]) {
    case OF_DTYPE:
        return dsc_dtype_size(dtype);
    case OF_ACC:
        return dsc_max(dsc_dtype_size(dtype), sizeof(float));
    default:
        return (size_t)op->item_size[i];
    }
}

/* Takes the buffers of a tuple; the caller releases n_buffers of them in every case. */
static int take_buffers(struct call *call, const struct operation *op, PyObject *buffers) {
    if (PyTuple_GET_SIZE(buffers) != op->n_buffers) {
        PyErr_Format(PyExc_ValueError, "buffers: kernel '%s' takes %d, %zd came", op->name,
                     op->n_buffers, PyTuple_GET_SIZE(buffers));
        return -1;
    }
    for (int i = 0; i < op->n_buffers; i++) {
        Py_buffer *buffer = &call->buffer[i];
        /* The last buffer is read only, unless it is the only one that there is to look at. */
        int flags = i < op->n_buffers - 1 ? PyBUF_WRITABLE : PyBUF_SIMPLE;
        if (PyObject_GetBuffer(PyTuple_GET_ITEM(buffers, i), buffer, flags | PyBUF_C_CONTIGUOUS) <
            0)
            return -1;
        call->n_buffers = i + 1;
        size_t size = item_size(op, i, call->dtype), n = (size_t)buffer->len / size;
        if ((size_t)buffer->itemsize != size || (i > 0 && n != call->n)) {
            PyErr_Format(PyExc_ValueError,
                         "buffers[%d]: kernel '%s' takes %zu items of %zu bytes, %zd of %zd came",
                         i, op->name, i ? call->n : n, size, buffer->len / buffer->itemsize,
                         buffer->itemsize);
            return -1;
        }
        call->n = n;
    }
    return 0;
}

PyDoc_STRVAR(
    run_kernel_doc,
    "run_kernel(tier, op, dtype, buffers, **hyper)\n--\n\n"
    "Runs one kernel of one tier on C-contiguous buffers of one length.\n\n"
    "tier: a name of kernel_tiers(). dtype: 'fp32', 'bf16', ...; half types are 2-byte items.\n"
    "buffers, by op: accumulate, to_f32 (fp32 out, in); from_f32 (out, fp32 in); copy_finite\n"
    "(out, in); is_finite (in); sum_squares (in); add_weighted (acc, in); softmax\n"
    "(out, in: one row); adam (p, m, v, grad); sgd (p, buf, grad);\n"
    "adagrad (p, sum, grad); lion (p, m, grad); lamb_moments (m, v, p, grad); lamb_step\n"
    "(p, m, v); sum, min, max, prod (accumulator, in; the accumulator is fp32 for half types).\n"
    "hyper: first for accumulate and add_weighted, weight, step for lamb_step; the fields of "
    "struct dsc_<op>.\n"
    "Returns None, a bool (finite?), a float (sum of squares) or two (of p and the direction).\n"
    "ValueError for a wrong name,\n"
    "count, length or item size.");

/* Keywords by name; one name may stand for fields of several operations. */
static const struct field {
    const char *name;
    size_t offset;
    bool is_flag;
} fields[] = {
#define FLOAT(op, name)                                                                            \
    { #name, offsetof(struct call, op.name), false }
#define FLAG(op, name)                                                                             \
    { #name, offsetof(struct call, op.name), true }
    {"first", offsetof(struct call, first), true},
    {"step", offsetof(struct call, step), false},
    {"weight", offsetof(struct call, weight), false},
    FLOAT(adam, grad_scale),
    FLOAT(adam, step_size),
    FLOAT(adam, beta1),
    FLOAT(adam, beta2),
    FLOAT(adam, one_minus_beta1),
    FLOAT(adam, one_minus_beta2),
    FLOAT(adam, inv_sqrt_c2),
    FLOAT(adam, eps),
    FLOAT(adam, decay),
    FLAG(adam, decoupled),
    FLOAT(sgd, grad_scale),
    FLOAT(sgd, lr),
    FLOAT(sgd, momentum),
    FLOAT(sgd, weight_decay),
    FLOAT(sgd, one_minus_dampening),
    FLAG(sgd, nesterov),
    FLAG(sgd, first),
    FLOAT(adagrad, grad_scale),
    FLOAT(adagrad, step_size),
    FLOAT(adagrad, weight_decay),
    FLOAT(adagrad, eps),
    FLAG(adagrad, raw_numerator),
    FLOAT(lion, grad_scale),
    FLOAT(lion, lr),
    FLOAT(lion, beta1),
    FLOAT(lion, beta2),
    FLOAT(lion, one_minus_beta1),
    FLOAT(lion, one_minus_beta2),
    FLOAT(lion, decay),
    FLOAT(lamb, grad_scale),
    FLOAT(lamb, beta1),
    FLOAT(lamb, beta2),
    FLOAT(lamb, one_minus_beta1),
    FLOAT(lamb, one_minus_beta2),
    FLOAT(lamb, eps),
    FLOAT(lamb, decay),
    FLAG(lamb, eps_inside),
#undef FLOAT
#undef FLAG
};

/* Sets every field of that name; -1 with an exception. */
static int set_fields(struct call *call, const char *name, PyObject *value) {
    double number = PyFloat_AsDouble(value); /* True is 1.0 */
    bool known = false;
    if (number == -1.0 && PyErr_Occurred())
        return -1;
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        if (strcmp(fields[i].name, name) != 0)
            continue;
        char *place = (char *)call + fields[i].offset;
        if (fields[i].is_flag)
            *(bool *)place = number != 0;
        else
            *(float *)(void *)place = (float)number;
        known = true;
    }
    if (!known)
        PyErr_Format(PyExc_TypeError, "run_kernel: '%s' is no keyword of a kernel", name);
    return known ? 0 : -1;
}

static int parse_hyper(struct call *call, PyObject *kwargs) {
    PyObject *key, *value; /* borrowed from kwargs */
    Py_ssize_t at_item = 0;
    call->adam.grad_scale = call->sgd.grad_scale = call->adagrad.grad_scale = 1.0f;
    call->lion.grad_scale = call->lamb.grad_scale = call->sgd.one_minus_dampening = 1.0f;
    while (kwargs && PyDict_Next(kwargs, &at_item, &key, &value)) {
        const char *name = PyUnicode_AsUTF8(key);
        if (!name || set_fields(call, name, value) < 0)
            return -1;
    }
    return 0;
}

static PyObject *run_kernel(PyObject *module, PyObject *args, PyObject *kwargs) {
    const char *tier, *op_name, *dtype;
    PyObject *buffers, *result = NULL; /* buffers: borrowed from args */
    struct call call = {.n_buffers = 0};
    const struct operation *op;
    (void)module;
    if (!PyArg_ParseTuple(args, "sssO!:run_kernel", &tier, &op_name, &dtype, &PyTuple_Type,
                          &buffers))
        return NULL;
    call.kernels = dsc_kernels_tier(tier);
    if (!call.kernels)
        return PyErr_Format(PyExc_ValueError, "tier: this machine and build have no '%s'", tier);
    op = find_operation(op_name);
    if (!op || find_dtype(dtype, op, &call.dtype) < 0 || parse_hyper(&call, kwargs) < 0 ||
        take_buffers(&call, op, buffers) < 0)
        goto out;
    Py_BEGIN_ALLOW_THREADS;
    uint64_t saved = dsc_fp_enter();
    op->run(&call);
    dsc_fp_leave(saved);
    Py_END_ALLOW_THREADS;
    result = op->result == SUM       ? PyFloat_FromDouble(call.sum)
             : op->result == SQUARES ? Py_BuildValue("(dd)", call.squares[0], call.squares[1])
             : op->result == FINITE  ? PyBool_FromLong(call.finite)
                                     : Py_NewRef(Py_None);
out:
    for (int i = 0; i < call.n_buffers; i++)
        PyBuffer_Release(&call.buffer[i]);
    return result;
}

PyDoc_STRVAR(kernel_tiers_doc,
             "kernel_tiers()\n--\n\n"
             "Names of the kernel tiers that this machine can run, slowest first.");
static PyObject *kernel_tiers(PyObject *module, PyObject *unused) {
    PyObject *list = PyList_New(0);
    (void)module;
    (void)unused;
    for (const char *const *name = dsc_kernels_tiers(); list && *name; name++) {
        PyObject *text = PyUnicode_FromString(*name);
        if (!text || PyList_Append(list, text) < 0)
            Py_CLEAR(list);
        Py_XDECREF(text);
    }
    return list;
}

PyDoc_STRVAR(kernel_tier_doc,
             "kernel_tier()\n--\n\n"
             "Name of the tier that serves; the environment's DSC_ISA forces one.");
static PyObject *kernel_tier(PyObject *module, PyObject *unused) {
    (void)module;
    (void)unused;
    return PyUnicode_FromString(dsc_kernels()->name);
}

PyDoc_STRVAR(
    norm_sum_doc,
    "norm_sum(parts)\n--\n\n"
    "The exact sum of a buffer of fp64 partial sums of squares, rounded once; NaN where one is\n"
    "negative, infinite or NaN.");
static PyObject *norm_sum(PyObject *module, PyObject *parts) {
    Py_buffer buffer;
    struct dsc_norm norm = {.n_nonfinite = 0};
    (void)module;
    if (PyObject_GetBuffer(parts, &buffer, PyBUF_C_CONTIGUOUS) < 0)
        return NULL;
    if (buffer.itemsize != sizeof(double)) {
        PyErr_Format(PyExc_ValueError, "parts: items of 8 bytes (fp64) are taken, of %zd came",
                     buffer.itemsize);
        PyBuffer_Release(&buffer);
        return NULL;
    }
    for (size_t i = 0; i < (size_t)buffer.len / sizeof(double); i++)
        dsc_norm_add(&norm, ((const double *)buffer.buf)[i]);
    PyBuffer_Release(&buffer);
    return PyFloat_FromDouble(dsc_norm_sum(&norm));
}

PyDoc_STRVAR(
    clip_factor_doc,
    "clip_factor(norm, clip)\n--\n\n"
    "What gradients of this norm are multiplied by: torch.nn.utils.clip_grad_norm_'s factor;\n"
    "1.0 where clip <= 0.");
static PyObject *clip_factor(PyObject *module, PyObject *args) {
    double norm, clip;
    (void)module;
    if (!PyArg_ParseTuple(args, "dd:clip_factor", &norm, &clip))
        return NULL;
    return PyFloat_FromDouble(dsc_clip_factor(norm, clip));
}

static PyMethodDef functions[] = {
    {"kernel_tiers", kernel_tiers, METH_NOARGS, kernel_tiers_doc},
    {"kernel_tier", kernel_tier, METH_NOARGS, kernel_tier_doc},
    {"run_kernel", (PyCFunction)(void (*)(void))run_kernel, METH_VARARGS | METH_KEYWORDS,
     run_kernel_doc},
    {"norm_sum", norm_sum, METH_O, norm_sum_doc},
    {"clip_factor", clip_factor, METH_VARARGS, clip_factor_doc},
    {NULL},
};

int dsc_bind_add_kernels(PyObject *module) {
    enum dsc_status status = dsc_kernels_check();
    if (status != DSC_OK) {
        (void)dsc_bind_raise(dsc_bind_module_state(module), status);
        return -1;
    }
    return PyModule_AddFunctions(module, functions);
}
