/* _core.Store: memory of a communicator's ranks for parameters at ZeRO stage 3.
 *
 * Decides: which tensors lie in it (any dtype that DLPack and torch have in common). Invariant: a
 * tensor holds its slab by a reference of its own (lend.h), so that it outlives Store and Comm. */
#include "bind.h"
#include "lend.h"

#include "../store.h"

#include <string.h>

typedef struct {
    PyObject_HEAD struct dsc_store *core; /* NULL once closed */
    PyObject *comm;                       /* stays open */
    bool busy;
} StoreObject;

static const struct {
    const char *name;
    DLDataType type;
} types[] = {
    {"float32", {kDLFloat, 32, 1}},     {"bfloat16", {kDLBfloat, 16, 1}},
    {"float16", {kDLFloat, 16, 1}},     {"float64", {kDLFloat, 64, 1}},
    {"int8", {kDLInt, 8, 1}},           {"int16", {kDLInt, 16, 1}},
    {"int32", {kDLInt, 32, 1}},         {"int64", {kDLInt, 64, 1}},
    {"uint8", {kDLUInt, 8, 1}},         {"bool", {kDLBool, 8, 1}},
    {"complex64", {kDLComplex, 64, 1}}, {"complex128", {kDLComplex, 128, 1}},
};

/* dtype: a torch.dtype, or its name. */
static int read_type(PyObject *dtype, DLDataType *out) {
    PyObject *text = PyObject_Str(dtype);
    const char *name = text ? PyUnicode_AsUTF8(text) : NULL;
    int found = -1;
    if (name && strncmp(name, "torch.", 6) == 0)
        name += 6;
    for (size_t i = 0; name && i < sizeof types / sizeof types[0]; i++)
        if (strcmp(types[i].name, name) == 0) {
            *out = types[i].type;
            found = 0;
        }
    if (name && found < 0)
        PyErr_Format(PyExc_TypeError,
                     "Store.take: dtype is %s; allowed: float32, bfloat16, float16, float64, int8, "
                     "int16, int32, int64, uint8, bool, complex64, complex128",
                     name);
    Py_XDECREF(text);
    return found;
}

/* Under the GIL: the store is this call's until it clears `busy`. */
static int enter(StoreObject *self) {
    if (!self->core || self->busy) {
        PyErr_SetString(PyExc_RuntimeError,
                        self->core ? "Store: running in another thread" : "Store: it is closed");
        return -1;
    }
    self->busy = true;
    return 0;
}

static PyObject *store_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *keys[] = {"comm", "folder", NULL};
    PyObject *comm;
    const char *folder = NULL;
    struct dsc_bind_state *state = dsc_bind_state_of(type);
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|z:Store", keys, &comm, &folder))
        return NULL;
    struct dsc_comm *core_comm = dsc_bind_comm(state, comm);
    StoreObject *self = core_comm ? (StoreObject *)type->tp_alloc(type, 0) : NULL;
    if (!self)
        return NULL;
    self->comm = Py_NewRef(comm);
    enum dsc_status status = dsc_store_open(core_comm, folder, &self->core);
    if (status == DSC_OK)
        return (PyObject *)self;
    dsc_bind_raise(state, status);
    Py_DECREF(self);
    return NULL;
}

static int store_traverse(StoreObject *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->comm);
    return 0;
}

static int store_clear(StoreObject *self) {
    dsc_store_close(self->core);
    self->core = NULL;
    Py_CLEAR(self->comm);
    return 0;
}

static void store_dealloc(StoreObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    (void)store_clear(self);
    type->tp_free(self);
    Py_DECREF(type);
}

static void release_slab(void *slab, size_t unused) {
    (void)unused;
    if (slab)
        dsc_slab_release(slab);
}

PyDoc_STRVAR(
    take_doc,
    "take(n_elems, dtype)\n\n"
    "A DLPack capsule over a zeroed, one-dimensional tensor that all ranks of the Comm\n"
    "have as one memory. dtype: a torch.dtype or its name. All ranks take the same in the\n"
    "same order; CommError where they are seen not to.");

static PyObject *store_take(StoreObject *self, PyObject *args) {
    PyObject *dtype;
    Py_ssize_t n_elems;
    struct dsc_lent lent = {.release = release_slab};
    struct dsc_slab *slab = NULL;
    enum dsc_status status = DSC_OK;
    if (!PyArg_ParseTuple(args, "nO:take", &n_elems, &dtype) || read_type(dtype, &lent.type) < 0)
        return NULL;
    size_t elem_size = lent.type.bits / 8u;
    if (n_elems < 0 || (size_t)n_elems > PTRDIFF_MAX / elem_size) {
        PyErr_Format(PyExc_ValueError, "Store.take: n_elems is %zd; allowed: 0 to %zd", n_elems,
                     (Py_ssize_t)(PTRDIFF_MAX / elem_size));
        return NULL;
    }
    if (enter(self) < 0)
        return NULL;
    lent.n_elems = (size_t)n_elems;
    if (n_elems > 0) {
        Py_BEGIN_ALLOW_THREADS;
        status = dsc_store_take(self->core, lent.n_elems * elem_size, &slab, &lent.data);
        Py_END_ALLOW_THREADS;
    }
    self->busy = false;
    lent.owner = slab;
    struct dsc_bind_state *state = dsc_bind_state_of(Py_TYPE(self));
    return status == DSC_OK ? dsc_bind_lend(state, &lent) : dsc_bind_raise(state, status);
}

PyDoc_STRVAR(agree_doc, "agree(label)\n\n"
                        "CommError where ranks have not taken the same so far. Collective.");

static PyObject *store_agree(StoreObject *self, PyObject *label) {
    enum dsc_status status;
    const char *text = PyUnicode_AsUTF8(label);
    if (!text || enter(self) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    status = dsc_store_agree(self->core, text);
    Py_END_ALLOW_THREADS;
    self->busy = false;
    return status == DSC_OK ? Py_NewRef(Py_None)
                            : dsc_bind_raise(dsc_bind_state_of(Py_TYPE(self)), status);
}

static PyObject *store_counters(StoreObject *self, PyObject *unused) {
    (void)unused;
    if (enter(self) < 0)
        return NULL;
    struct dsc_store_counters c = dsc_store_counters(self->core);
    self->busy = false;
    return Py_BuildValue("{s:n,s:n}", "n_bytes", (Py_ssize_t)c.n_bytes, "n_slabs",
                         (Py_ssize_t)c.n_slabs);
}

static PyObject *store_close(StoreObject *self, PyObject *unused) {
    (void)unused;
    if (self->busy) {
        PyErr_SetString(PyExc_RuntimeError, "Store: running in another thread");
        return NULL;
    }
    (void)store_clear(self);
    Py_RETURN_NONE;
}

static PyMethodDef store_methods[] = {
    {"take", (PyCFunction)store_take, METH_VARARGS, take_doc},
    {"agree", (PyCFunction)store_agree, METH_O, agree_doc},
    {"counters", (PyCFunction)store_counters, METH_NOARGS,
     "n_bytes taken (with padding; the node has them once) and n_slabs opened, as a dict."},
    {"close", (PyCFunction)store_close, METH_NOARGS, "Idempotent; tensors stay."},
    {NULL},
};

static PyType_Slot store_slots[] = {
    {Py_tp_new, store_new},
    {Py_tp_dealloc, store_dealloc},
    {Py_tp_traverse, store_traverse},
    {Py_tp_clear, store_clear},
    {Py_tp_methods, store_methods},
    {Py_tp_doc, "Store(comm, folder=None)\n\nMemory of the ranks of a Comm, which they hold once; "
                "files in a folder where one is named."},
    {0, NULL},
};

static PyType_Spec store_spec = {
    .name = "deepspeed_c._core.Store",
    .basicsize = sizeof(StoreObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = store_slots,
};

int dsc_bind_add_store(PyObject *module) {
    PyObject *type = PyType_FromModuleAndSpec(module, &store_spec, NULL);
    int failed = type ? PyModule_AddType(module, (PyTypeObject *)type) : -1;
    Py_XDECREF(type);
    return failed;
}
