/* _core.Router: routing of tokens to experts on tensors, and the threads that do it.
 *
 * Decides: which tensors are taken: on the CPU, contiguous, of one dtype and number of elements
 * each. Invariant: all are checked before the core runs. A Router holds nothing but its threads, so
 * several threads may call it at once (the pool serves one of them). */
#include "bind.h"

#include "../alloc.h"
#include "../moe.h"

#include <string.h>

typedef struct {
    PyObject_HEAD struct dsc_pool *pool;
} RouterObject;

static PyObject *router_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *keys[] = {"n_threads", NULL};
    int n_threads;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "i:Router", keys, &n_threads))
        return NULL;
    RouterObject *self = (RouterObject *)type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    enum dsc_status status =
        dsc_pool_open(n_threads, dsc_bind_team(dsc_bind_state_of(type)), &self->pool);
    dsc_alloc_keep_freed();
    if (status == DSC_OK)
        return (PyObject *)self;
    dsc_bind_raise(dsc_bind_state_of(type), status);
    Py_DECREF(self);
    return NULL;
}

static void router_dealloc(RouterObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    dsc_pool_close(self->pool);
    type->tp_free(self);
    Py_DECREF(type);
}

/* ---- arguments ---- */

static int usable(const struct dsc_borrowed *t, const char *what) {
    if (t->on_cpu && t->contiguous)
        return 0;
    PyErr_Format(PyExc_ValueError, "%s is %s; allowed: contiguous CPU tensors", what,
                 t->on_cpu ? "not contiguous" : "not on the CPU");
    return -1;
}

/* The memory of a tensor of that dtype and number of elements. */
static int take(RouterObject *self, PyObject *tensor, const char *what, enum dsc_dtype dtype,
                size_t n_elems, void *out) {
    struct dsc_borrowed t;
    if (dsc_bind_borrow(dsc_bind_state_of(Py_TYPE(self)), tensor, what, &t) < 0 ||
        usable(&t, what) < 0)
        return -1;
    if (t.dtype != dtype || t.n_elems != n_elems) {
        PyErr_Format(PyExc_ValueError, "%s has %zu elements of %s, expected: %zu of %s", what,
                     t.n_elems, dsc_dtype_name(t.dtype), n_elems, dsc_dtype_name(dtype));
        return -1;
    }
    memcpy(out, &t.data, sizeof t.data);
    return 0;
}

/* The same, and None leaves *out as it is. */
static int take_if_any(RouterObject *self, PyObject *tensor, const char *what, enum dsc_dtype dtype,
                       size_t n_elems, void *out) {
    return tensor == Py_None ? 0 : take(self, tensor, what, dtype, n_elems, out);
}

/* A tensor of rows: (n_rows, columns) of any training dtype. */
static int take_rows(RouterObject *self, PyObject *tensor, const char *what,
                     struct dsc_borrowed *out) {
    if (dsc_bind_borrow(dsc_bind_state_of(Py_TYPE(self)), tensor, what, out) < 0 ||
        usable(out, what) < 0)
        return -1;
    if (out->n_dims == 2)
        return 0;
    PyErr_Format(PyExc_ValueError, "%s has %d dimensions, expected: 2", what, out->n_dims);
    return -1;
}

/* "top1", "top2", "topk" and k. */
static int parse_rule(PyObject *object, void *out) {
    static const char *const names[] = {"top1", "top2", "topk"};
    const char *name = PyUnicode_AsUTF8(object);
    for (int i = 0; name && i < 3; i++)
        if (strcmp(name, names[i]) == 0) {
            *(enum dsc_moe_rule *)out = (enum dsc_moe_rule)i;
            return 1;
        }
    if (name)
        PyErr_Format(PyExc_ValueError, "rule '%s', allowed: top1, top2, topk", name);
    return 0;
}

static PyObject *finish(RouterObject *self, enum dsc_status status) {
    if (status != DSC_OK)
        return dsc_bind_raise(dsc_bind_state_of(Py_TYPE(self)), status);
    Py_RETURN_NONE;
}

/* ---- logits ---- */

static int take_linear(RouterObject *self, PyObject *x, PyObject *weight,
                       struct dsc_moe_linear *out) {
    struct dsc_borrowed t, w;
    if (take_rows(self, x, "x", &t) < 0 || take_rows(self, weight, "weight", &w) < 0)
        return -1;
    if (t.shape[1] != w.shape[1]) {
        PyErr_Format(PyExc_ValueError, "x has %zd columns and weight %zd; allowed: as many",
                     (Py_ssize_t)t.shape[1], (Py_ssize_t)w.shape[1]);
        return -1;
    }
    *out = (struct dsc_moe_linear){
        (size_t)t.shape[0], (size_t)t.shape[1], (size_t)w.shape[0], t.data, t.dtype, NULL};
    return take(self, weight, "weight", DSC_F32, out->n_experts * out->n_columns, &out->weight);
}

static PyObject *router_logits(RouterObject *self, PyObject *args) {
    PyObject *x, *weight, *logits; /* borrowed */
    struct dsc_moe_linear l;
    float *out;
    enum dsc_status status;
    if (!PyArg_ParseTuple(args, "OOO:logits", &x, &weight, &logits) ||
        take_linear(self, x, weight, &l) < 0 ||
        take(self, logits, "logits", DSC_F32, l.n_tokens * l.n_experts, &out) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    status = dsc_moe_logits(self->pool, &l, out);
    Py_END_ALLOW_THREADS;
    return finish(self, status);
}

static PyObject *router_logits_backward(RouterObject *self, PyObject *args) {
    PyObject *x, *weight, *d_logits, *d_x, *d_weight; /* borrowed */
    struct dsc_moe_linear l;
    const float *d;
    void *d_x_data = NULL;
    float *d_w = NULL;
    int add;
    enum dsc_status status;
    if (!PyArg_ParseTuple(args, "OOOOpO:logits_backward", &x, &weight, &d_logits, &d_x, &add,
                          &d_weight) ||
        take_linear(self, x, weight, &l) < 0 ||
        take(self, d_logits, "d_logits", DSC_F32, l.n_tokens * l.n_experts, &d) < 0 ||
        take_if_any(self, d_x, "d_x", l.dtype, l.n_tokens * l.n_columns, &d_x_data) < 0 ||
        take_if_any(self, d_weight, "d_weight", DSC_F32, l.n_experts * l.n_columns, &d_w) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    status = dsc_moe_logits_backward(self->pool, &l, d, d_x_data, add, d_w);
    Py_END_ALLOW_THREADS;
    return finish(self, status);
}

/* ---- gates ---- */

static PyObject *router_choose(RouterObject *self, PyObject *args) {
    PyObject *logits, *noise, *used, *gates, *experts, *counts, *slope, *l_aux; /* borrowed */
    struct dsc_moe_choice c = {.noise = NULL};
    struct dsc_borrowed t;
    enum dsc_status status;
    if (!PyArg_ParseTuple(args, "O&nOOOOOOOO:choose", parse_rule, &c.size.rule, &c.size.k, &logits,
                          &noise, &used, &gates, &experts, &counts, &slope, &l_aux) ||
        take_rows(self, logits, "logits", &t) < 0)
        return NULL;
    size_t n_tokens = c.size.n_tokens = (size_t)t.shape[0];
    size_t n_experts = c.size.n_experts = (size_t)t.shape[1];
    if (take(self, logits, "logits", DSC_F32, t.n_elems, &c.logits) < 0 ||
        take_if_any(self, noise, "noise", DSC_F32, t.n_elems, &c.noise) < 0 ||
        take_if_any(self, used, "used_token", DSC_I32, n_tokens, &c.used) < 0 ||
        take(self, gates, "gates", DSC_F32, t.n_elems, &c.gates) < 0 ||
        take(self, experts, "experts", DSC_I32, n_tokens * c.size.k, &c.experts) < 0 ||
        take(self, counts, "counts", DSC_I64, n_experts, &c.counts) < 0 ||
        take(self, slope, "slope", DSC_F32, n_experts, &c.slope) < 0 ||
        take(self, l_aux, "l_aux", DSC_F32, 1, &c.l_aux) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    status = dsc_moe_choose(self->pool, &c);
    Py_END_ALLOW_THREADS;
    return finish(self, status);
}

static PyObject *router_place(RouterObject *self, PyObject *args) {
    PyObject *gates, *experts, *counts, *priority, *slots, *entries, *weights; /* borrowed */
    struct dsc_moe_placement p = {.priority = NULL};
    struct dsc_borrowed t;
    enum dsc_status status;
    if (!PyArg_ParseTuple(args, "O&nnOOOOOOO:place", parse_rule, &p.size.rule, &p.size.k,
                          &p.size.capacity, &gates, &experts, &counts, &priority, &slots, &entries,
                          &weights) ||
        take_rows(self, gates, "gates", &t) < 0)
        return NULL;
    size_t n_tokens = p.size.n_tokens = (size_t)t.shape[0];
    size_t n_experts = p.size.n_experts = (size_t)t.shape[1], n_choices = n_tokens * p.size.k;
    if (take(self, gates, "gates", DSC_F32, t.n_elems, &p.gates) < 0 ||
        take(self, experts, "experts", DSC_I32, n_choices, &p.experts) < 0 ||
        take(self, counts, "counts", DSC_I64, n_experts, &p.counts) < 0 ||
        take_if_any(self, priority, "priority", DSC_F32, t.n_elems, &p.priority) < 0 ||
        take(self, slots, "slots", DSC_I32, n_choices, &p.slots) < 0 ||
        take(self, entries, "entries", DSC_I32, n_experts * p.size.capacity, &p.entries) < 0 ||
        take(self, weights, "weights", DSC_F32, n_choices, &p.weights) < 0)
        return NULL;
    p.drop = p.priority ? DSC_MOE_LARGEST : DSC_MOE_FIRST;
    Py_BEGIN_ALLOW_THREADS;
    status = dsc_moe_place(self->pool, &p);
    Py_END_ALLOW_THREADS;
    return finish(self, status);
}

static PyObject *router_differentiate(RouterObject *self, PyObject *args) {
    PyObject *gates, *experts, *slots, *slope, *d_weights, *d_l_aux, *d_logits; /* borrowed */
    struct dsc_moe_grad g = {.d_weights = NULL};
    struct dsc_borrowed t;
    enum dsc_status status;
    if (!PyArg_ParseTuple(args, "O&nOOOOOOO:differentiate", parse_rule, &g.size.rule, &g.size.k,
                          &gates, &experts, &slots, &slope, &d_weights, &d_l_aux, &d_logits) ||
        take_rows(self, gates, "gates", &t) < 0)
        return NULL;
    g.size.n_tokens = (size_t)t.shape[0];
    g.size.n_experts = (size_t)t.shape[1];
    size_t n_choices = g.size.n_tokens * g.size.k;
    if (take(self, gates, "gates", DSC_F32, t.n_elems, &g.gates) < 0 ||
        take(self, experts, "experts", DSC_I32, n_choices, &g.experts) < 0 ||
        take(self, slots, "slots", DSC_I32, n_choices, &g.slots) < 0 ||
        take(self, slope, "slope", DSC_F32, g.size.n_experts, &g.slope) < 0 ||
        take_if_any(self, d_weights, "d_weights", DSC_F32, n_choices, &g.d_weights) < 0 ||
        take_if_any(self, d_l_aux, "d_l_aux", DSC_F32, 1, &g.d_l_aux) < 0 ||
        take(self, d_logits, "d_logits", DSC_F32, t.n_elems, &g.d_logits) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    status = dsc_moe_differentiate(self->pool, &g);
    Py_END_ALLOW_THREADS;
    return finish(self, status);
}

/* ---- rows ---- */

/* Memory of a list of parts, all of one dtype and of n_elems elements, in a block that the caller
 * frees; None gives NULL. */
static int take_parts(RouterObject *self, PyObject *list, const char *what, size_t n_elems,
                      enum dsc_dtype *dtype, void ***out) {
    struct dsc_bind_state *state = dsc_bind_state_of(Py_TYPE(self));
    struct dsc_borrowed t;
    void **data = NULL;
    Py_ssize_t n = PyList_GET_SIZE(list);
    enum dsc_status status = dsc_alloc((size_t)n * sizeof *data, (void **)&data);
    if (status != DSC_OK) {
        dsc_bind_raise(state, status);
        return -1;
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        if (dsc_bind_borrow(state, PyList_GET_ITEM(list, i), what, &t) < 0 || usable(&t, what) < 0)
            goto error;
        if (t.n_elems != n_elems || (i > 0 && t.dtype != *dtype)) {
            PyErr_Format(PyExc_ValueError,
                         "%s %zd has %zu elements of %s, expected: %zu of one type", what, i,
                         t.n_elems, dsc_dtype_name(t.dtype), n_elems);
            goto error;
        }
        *dtype = t.dtype;
        data[i] = t.data;
    }
    *out = data;
    return 0;
error:
    dsc_free(data);
    return -1;
}

/* Sizes, slots, entries and parts from (n_experts, capacity, slots, entries, parts) and the tokens'
 * rows. *parts_data is the caller's to free. */
static int take_routes(RouterObject *self, const struct dsc_borrowed *tokens, PyObject *slots,
                       PyObject *entries, PyObject *parts, struct dsc_moe_rows *r,
                       void ***parts_data) {
    struct dsc_borrowed t;
    size_t n_experts = r->size.n_experts, n_parts = (size_t)PyList_GET_SIZE(parts);
    if (take_rows(self, slots, "slots", &t) < 0)
        return -1;
    r->size.n_tokens = (size_t)t.shape[0];
    r->size.k = (size_t)t.shape[1];
    r->dtype = tokens->dtype;
    r->n_columns = (size_t)tokens->shape[1];
    if (n_parts == 0 || n_experts % n_parts || (size_t)tokens->shape[0] != r->size.n_tokens) {
        PyErr_Format(PyExc_ValueError, "%zu parts for %zu experts, %zd rows for %zu tokens",
                     n_parts, n_experts, (Py_ssize_t)tokens->shape[0], r->size.n_tokens);
        return -1;
    }
    r->parts.n_parts = n_parts;
    r->parts.n_ranks = n_experts / n_parts;
    if (take(self, slots, "slots", DSC_I32, t.n_elems, &r->slots) < 0 ||
        take(self, entries, "entries", DSC_I32, n_experts * r->size.capacity, &r->entries) < 0 ||
        take_parts(self, parts, "part", r->parts.n_ranks * r->size.capacity * r->n_columns,
                   &r->parts.dtype, parts_data) < 0)
        return -1;
    r->parts.data = *parts_data;
    return 0;
}

static PyObject *router_dispatch(RouterObject *self, PyObject *args) {
    PyObject *x, *slots, *entries, *parts; /* borrowed */
    struct dsc_moe_rows r = {.size.rule = DSC_MOE_TOPK};
    struct dsc_borrowed t;
    void **data = NULL;
    enum dsc_status status;
    if (!PyArg_ParseTuple(args, "nnOOOO!:dispatch", &r.size.n_experts, &r.size.capacity, &x, &slots,
                          &entries, &PyList_Type, &parts) ||
        take_rows(self, x, "x", &t) < 0 ||
        take_routes(self, &t, slots, entries, parts, &r, &data) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    status = dsc_moe_dispatch(self->pool, &r, t.data);
    Py_END_ALLOW_THREADS;
    dsc_free(data);
    return finish(self, status);
}

static PyObject *router_combine(RouterObject *self, PyObject *args) {
    PyObject *weights, *slots, *entries, *parts, *out; /* borrowed */
    struct dsc_moe_rows r = {.size.rule = DSC_MOE_TOPK};
    struct dsc_borrowed t;
    const float *w = NULL;
    void **data = NULL;
    enum dsc_status status;
    if (!PyArg_ParseTuple(args, "nnOOOO!O:combine", &r.size.n_experts, &r.size.capacity, &weights,
                          &slots, &entries, &PyList_Type, &parts, &out) ||
        take_rows(self, out, "out", &t) < 0 ||
        take_routes(self, &t, slots, entries, parts, &r, &data) < 0)
        return NULL;
    if (take_if_any(self, weights, "weights", DSC_F32, r.size.n_tokens * r.size.k, &w) < 0) {
        dsc_free(data);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS;
    status = dsc_moe_combine(self->pool, &r, w, t.data);
    Py_END_ALLOW_THREADS;
    dsc_free(data);
    return finish(self, status);
}

static PyObject *router_combine_backward(RouterObject *self, PyObject *args) {
    PyObject *weights, *slots, *entries, *parts, *d_out, *d_parts, *d_weights; /* borrowed */
    PyObject *result = NULL;
    struct dsc_moe_rows r = {.size.rule = DSC_MOE_TOPK};
    struct dsc_borrowed t;
    const float *w;
    float *d_w = NULL;
    enum dsc_dtype dtype;
    void **data = NULL, **d_data = NULL;
    enum dsc_status status;
    if (!PyArg_ParseTuple(args, "nnOOOO!OOO:combine_backward", &r.size.n_experts, &r.size.capacity,
                          &weights, &slots, &entries, &PyList_Type, &parts, &d_out, &d_parts,
                          &d_weights) ||
        take_rows(self, d_out, "d_out", &t) < 0 ||
        take_routes(self, &t, slots, entries, parts, &r, &data) < 0)
        return NULL;
    if (take(self, weights, "weights", DSC_F32, r.size.n_tokens * r.size.k, &w) < 0 ||
        take_if_any(self, d_weights, "d_weights", DSC_F32, r.size.n_tokens * r.size.k, &d_w) < 0)
        goto out;
    if (d_parts != Py_None) {
        size_t n_elems = r.parts.n_ranks * r.size.capacity * r.n_columns;
        if (!PyList_Check(d_parts) || PyList_GET_SIZE(d_parts) != PyList_GET_SIZE(parts)) {
            PyErr_SetString(PyExc_TypeError, "d_parts must be a list as long as parts, or None");
            goto out;
        }
        if (take_parts(self, d_parts, "gradient of part", n_elems, &dtype, &d_data) < 0)
            goto out;
        if (dtype != r.parts.dtype) {
            PyErr_SetString(PyExc_TypeError, "parts and their gradients have different dtypes");
            goto out;
        }
    }
    Py_BEGIN_ALLOW_THREADS;
    status = dsc_moe_combine_backward(self->pool, &r, w, t.data, d_data, d_w);
    Py_END_ALLOW_THREADS;
    result = finish(self, status);
out:
    dsc_free(data);
    dsc_free(d_data);
    return result;
}

static PyMethodDef methods[] = {
    {"logits", (PyCFunction)router_logits, METH_VARARGS,
     "logits(x, weight, logits)\n\n"
     "x (S, M) times weight (E, M) transposed, into logits (S, E), in float32."},
    {"logits_backward", (PyCFunction)router_logits_backward, METH_VARARGS,
     "logits_backward(x, weight, d_logits, d_x, add, d_weight)\n\n"
     "Gradients of logits; d_x is added to (add) or set, d_weight set, each None where not "
     "wanted."},
    {"choose", (PyCFunction)router_choose, METH_VARARGS,
     "choose(rule, k, logits, noise, used, gates, experts, counts, slope, l_aux)\n\n"
     "Softmax, chosen experts and load, into the last five. csrc/moe.h has shapes and meaning; "
     "rule:\n'top1', 'top2', 'topk'; noise, used: None for none."},
    {"place", (PyCFunction)router_place, METH_VARARGS,
     "place(rule, k, capacity, gates, experts, counts, priority, slots, entries, weights)\n\n"
     "Places and weights of the choices, into the last three. priority: who stays where there are\n"
     "too many; None: who comes first."},
    {"differentiate", (PyCFunction)router_differentiate, METH_VARARGS,
     "differentiate(rule, k, gates, experts, slots, slope, d_weights, d_l_aux, d_logits)\n\n"
     "The gradient in the logits, into the last. d_weights, d_l_aux: None is zero."},
    {"dispatch", (PyCFunction)router_dispatch, METH_VARARGS,
     "dispatch(n_experts, capacity, x, slots, entries, parts)\n\n"
     "Rows of x (S, M) into parts, a list of tensors (n_ranks, C, M)."},
    {"combine", (PyCFunction)router_combine, METH_VARARGS,
     "combine(n_experts, capacity, weights, slots, entries, parts, out)\n\n"
     "out (S, M): sums of rows of parts by weights (None: 1)."},
    {"combine_backward", (PyCFunction)router_combine_backward, METH_VARARGS,
     "combine_backward(n_experts, capacity, weights, slots, entries, parts, d_out, d_parts, "
     "d_weights)\n\nGradients of combine into the last two, each None where not wanted."},
    {NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, router_new},
    {Py_tp_dealloc, router_dealloc},
    {Py_tp_methods, methods},
    {Py_tp_doc, "Router(n_threads): routing of tokens to experts on CPU tensors."},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "deepspeed_c._core.Router",
    .basicsize = sizeof(RouterObject),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = slots,
};

int dsc_bind_add_moe(PyObject *module) {
    PyObject *type = PyType_FromModuleAndSpec(module, &spec, NULL);
    int failed = type ? PyModule_AddType(module, (PyTypeObject *)type) : -1;
    Py_XDECREF(type);
    return failed;
}
