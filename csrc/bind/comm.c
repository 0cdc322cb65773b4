/* The type Comm: a communicator, its opening in two steps, and the collectives on CPU tensors.
 *
 * Invariant: one call at a time per Comm (`busy`, under the GIL); tensors are borrowed for the call
 * and the GIL is released for all of it. An engine may borrow the communicator (dsc_bind_comm):
 * close() then tells the other ranks at once, and the memory goes when the last reference to the
 * Comm does. One that is open when the interpreter ends is left to the end of the process. */
#include "bind.h"

#include "../comm/comm.h"

typedef struct {
    PyObject_HEAD struct dsc_comm *core; /* NULL once closed */
    bool busy, lent, closed;
} CommObject;

static const char CAPSULE[] = "deepspeed_c.shm_listener";
static const char CAPSULE_USED[] = "deepspeed_c.shm_listener, used";

static struct dsc_bind_state *state_of(CommObject *self) {
    return dsc_bind_state_of(Py_TYPE(self));
}

static int enter(CommObject *self, const char *what) {
    if (!self->closed && !self->busy) {
        self->busy = true;
        return 0;
    }
    PyErr_Format(PyExc_RuntimeError, "%s: %s", what,
                 self->closed ? "this Comm is closed"
                              : "an operation of this Comm is already running in another thread");
    return -1;
}

/* Ends what enter began: None, or the exception of the status. */
static PyObject *leave(CommObject *self, enum dsc_status status) {
    self->busy = false;
    return status == DSC_OK ? Py_NewRef(Py_None) : dsc_bind_raise(state_of(self), status);
}

struct dsc_comm *dsc_bind_comm(struct dsc_bind_state *state, PyObject *comm) {
    if (!PyObject_TypeCheck(comm, state->comm_type)) {
        PyErr_Format(PyExc_TypeError, "a deepspeed_c._core.Comm is expected, not %.100s",
                     Py_TYPE(comm)->tp_name);
        return NULL;
    }
    CommObject *self = (CommObject *)comm;
    if (self->closed) {
        PyErr_SetString(PyExc_RuntimeError, "this Comm is closed");
        return NULL;
    }
    self->lent = true;
    return self->core;
}

/* ---- opening ---- */

static struct dsc_comm_options options_of(double timeout_s) {
    return (struct dsc_comm_options){.timeout_s = timeout_s, .interrupted = dsc_bind_interrupted};
}

PyObject *dsc_bind_wrap_comm(PyTypeObject *type, struct dsc_comm *core) {
    CommObject *self = (CommObject *)type->tp_alloc(type, 0);
    if (!self) {
        dsc_comm_close(core);
        return NULL;
    }
    self->core = core;
    return (PyObject *)self;
}

PyDoc_STRVAR(self_doc, "self_(timeout=0.0) -> Comm\n\nA world of one.");

static PyObject *comm_self(PyObject *type, PyObject *args) {
    double timeout_s = 0;
    struct dsc_comm *core = NULL;
    if (!PyArg_ParseTuple(args, "|d:self_", &timeout_s))
        return NULL;
    struct dsc_comm_options options = options_of(timeout_s);
    const enum dsc_status status = dsc_comm_open_self(&options, &core);
    if (status != DSC_OK)
        return dsc_bind_raise(dsc_bind_state_of((PyTypeObject *)type), status);
    return dsc_bind_wrap_comm((PyTypeObject *)type, core);
}

static void free_listener(PyObject *capsule) {
    if (PyCapsule_IsValid(capsule, CAPSULE))
        dsc_shm_listener_close(PyCapsule_GetPointer(capsule, CAPSULE));
}

PyDoc_STRVAR(listen_doc, "listen() -> (listener, address, token)\n\n"
                         "Rank 0's first step: the other ranks pass address and token to shm().");

static PyObject *comm_listen(PyObject *type, PyObject *unused) {
    struct dsc_shm_listener *listener = NULL;
    char address[DSC_SHM_ADDRESS_MAX], token[33];
    (void)unused;
    const enum dsc_status status = dsc_shm_listen(&listener, address, token);
    if (status != DSC_OK)
        return dsc_bind_raise(dsc_bind_state_of((PyTypeObject *)type), status);
    PyObject *capsule = PyCapsule_New(listener, CAPSULE, free_listener);
    if (!capsule) {
        dsc_shm_listener_close(listener);
        return NULL;
    }
    return Py_BuildValue("(Nss)", capsule, address, token);
}

PyDoc_STRVAR(
    shm_doc,
    "shm(listener, address, token, rank, size, timeout=0.0) -> Comm\n\n"
    "Collective: the ranks of one machine. listener: from listen() on rank 0, None on the\n"
    "others. timeout: seconds per operation, 0 for none.");

static PyObject *comm_shm(PyObject *type, PyObject *args) {
    PyObject *capsule;
    const char *address, *token;
    int rank, size;
    double timeout_s = 0;
    struct dsc_comm *core = NULL;
    struct dsc_shm_listener *listener = NULL;
    enum dsc_status status;
    if (!PyArg_ParseTuple(args, "Ossii|d:shm", &capsule, &address, &token, &rank, &size,
                          &timeout_s))
        return NULL;
    if (capsule != Py_None) {
        if (!PyCapsule_IsValid(capsule, CAPSULE)) {
            PyErr_SetString(PyExc_TypeError, "shm: listener must be None or what listen() gave, "
                                             "and serves once");
            return NULL;
        }
        listener = PyCapsule_GetPointer(capsule, CAPSULE);
        /* Taken over now, so that a second call cannot while the GIL is away. */
        if (PyCapsule_SetName(capsule, CAPSULE_USED) < 0)
            return NULL;
    }
    struct dsc_comm_options options = options_of(timeout_s);
    Py_BEGIN_ALLOW_THREADS;
    status = dsc_comm_open_shm(&options, listener, address, token, rank, size, &core);
    Py_END_ALLOW_THREADS;
    if (status != DSC_OK) {
        dsc_shm_listener_close(listener);
        return dsc_bind_raise(dsc_bind_state_of((PyTypeObject *)type), status);
    }
    return dsc_bind_wrap_comm((PyTypeObject *)type, core);
}

/* ---- collectives ---- */

static int borrow(CommObject *self, PyObject *tensor, const char *call, const char *name,
                  struct dsc_borrowed *out) {
    if (dsc_bind_borrow(state_of(self), tensor, name, out) < 0)
        return -1;
    if (out->on_cpu && out->contiguous)
        return 0;
    PyErr_Format(PyExc_ValueError, "%s: %s must be %s", call, name,
                 out->on_cpu ? "contiguous" : "on the CPU");
    return -1;
}

static int op_of(const char *name, enum dsc_op *out) {
    for (int op = 0; op < DSC_OP_COUNT; op++)
        if (strcmp(name, dsc_op_name((enum dsc_op)op)) == 0) {
            *out = (enum dsc_op)op;
            return 0;
        }
    PyErr_Format(PyExc_ValueError, "op is '%.50s'; 'sum', 'avg', 'min', 'max', 'prod' are allowed",
                 name);
    return -1;
}

static int same_dtype(const char *call, const struct dsc_borrowed *output,
                      const struct dsc_borrowed *input) {
    if (output->dtype == input->dtype)
        return 0;
    PyErr_Format(PyExc_TypeError, "%s: output is %s, input is %s", call,
                 dsc_dtype_name(output->dtype), dsc_dtype_name(input->dtype));
    return -1;
}

/* The larger tensor has `size` times the elements of the smaller one. */
static int check_parts(CommObject *self, const char *call, const char *large, size_t n_large,
                       const char *small, size_t n_small) {
    size_t n_ranks = (size_t)dsc_comm_size(self->core);
    if (n_large % n_ranks == 0 && n_large / n_ranks == n_small)
        return 0;
    PyErr_Format(
        PyExc_ValueError,
        "%s: %s has %zu elements and %s %zu; with %zu ranks %s must have %zu times as many", call,
        large, n_large, small, n_small, n_ranks, large, n_ranks);
    return -1;
}

typedef enum dsc_status (*collective_fn)(struct dsc_comm *, const struct dsc_coll *);

static PyObject *run(CommObject *self, const char *call, collective_fn collective,
                     const struct dsc_coll *coll) {
    enum dsc_status status;
    if (enter(self, call) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    status = collective(self->core, coll);
    Py_END_ALLOW_THREADS;
    return leave(self, status);
}

PyDoc_STRVAR(all_reduce_doc,
             "all_reduce(tensor, op='sum', label=None)\n\n"
             "Replaces every rank's tensor by all of them combined, in rank order.");

static PyObject *comm_all_reduce(CommObject *self, PyObject *args) {
    PyObject *tensor;
    const char *op = "sum", *label = NULL;
    struct dsc_borrowed t;
    struct dsc_coll coll = {0};
    if (!PyArg_ParseTuple(args, "O|sz:all_reduce", &tensor, &op, &label) ||
        borrow(self, tensor, "all_reduce", "tensor", &t) < 0 || op_of(op, &coll.op) < 0)
        return NULL;
    coll.src = coll.dst = t.data;
    coll.n_elems = t.n_elems;
    coll.dtype = t.dtype;
    coll.label = label;
    return run(self, "all_reduce", dsc_comm_all_reduce, &coll);
}

PyDoc_STRVAR(
    reduce_scatter_doc,
    "reduce_scatter(output, input, op='sum', label=None)\n\n"
    "output: this rank's part of all ranks' inputs combined; input is size times as long.");

static PyObject *comm_reduce_scatter(CommObject *self, PyObject *args) {
    PyObject *output, *input;
    const char *op = "sum", *label = NULL;
    struct dsc_borrowed out, in;
    struct dsc_coll coll = {0};
    if (!PyArg_ParseTuple(args, "OO|sz:reduce_scatter", &output, &input, &op, &label))
        return NULL;
    if (self->closed)
        return enter(self, "reduce_scatter"), NULL;
    if (borrow(self, output, "reduce_scatter", "output", &out) < 0 ||
        borrow(self, input, "reduce_scatter", "input", &in) < 0 ||
        same_dtype("reduce_scatter", &out, &in) < 0 || op_of(op, &coll.op) < 0 ||
        check_parts(self, "reduce_scatter", "input", in.n_elems, "output", out.n_elems) < 0)
        return NULL;
    coll.src = in.data;
    coll.dst = out.data;
    coll.n_elems = out.n_elems;
    coll.dtype = out.dtype;
    coll.label = label;
    return run(self, "reduce_scatter", dsc_comm_reduce_scatter, &coll);
}

PyDoc_STRVAR(all_gather_doc,
             "all_gather(output, input, label=None)\n\n"
             "output: all ranks' inputs in rank order; it is size times as long as input.");

static PyObject *comm_all_gather(CommObject *self, PyObject *args) {
    PyObject *output, *input;
    const char *label = NULL;
    struct dsc_borrowed out, in;
    struct dsc_coll coll = {0};
    if (!PyArg_ParseTuple(args, "OO|z:all_gather", &output, &input, &label))
        return NULL;
    if (self->closed)
        return enter(self, "all_gather"), NULL;
    if (borrow(self, output, "all_gather", "output", &out) < 0 ||
        borrow(self, input, "all_gather", "input", &in) < 0 ||
        same_dtype("all_gather", &out, &in) < 0 ||
        check_parts(self, "all_gather", "output", out.n_elems, "input", in.n_elems) < 0)
        return NULL;
    coll.src = in.data;
    coll.dst = out.data;
    coll.n_elems = in.n_elems;
    coll.dtype = in.dtype;
    coll.label = label;
    return run(self, "all_gather", dsc_comm_all_gather, &coll);
}

PyDoc_STRVAR(broadcast_doc, "broadcast(tensor, root=0, label=None)\n\n"
                            "Replaces every rank's tensor by that of rank `root`.");

static PyObject *comm_broadcast(CommObject *self, PyObject *args) {
    PyObject *tensor;
    int root = 0;
    const char *label = NULL;
    struct dsc_borrowed t;
    if (!PyArg_ParseTuple(args, "O|iz:broadcast", &tensor, &root, &label) ||
        borrow(self, tensor, "broadcast", "tensor", &t) < 0)
        return NULL;
    struct dsc_coll coll = {
        .dst = t.data, .n_elems = t.n_elems, .dtype = t.dtype, .root = root, .label = label};
    return run(self, "broadcast", dsc_comm_broadcast, &coll);
}

PyDoc_STRVAR(barrier_doc, "barrier(label=None)\n\nReturns once every rank has called it.");

static PyObject *comm_barrier(CommObject *self, PyObject *args) {
    const char *label = NULL;
    enum dsc_status status;
    if (!PyArg_ParseTuple(args, "|z:barrier", &label) || enter(self, "barrier") < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    status = dsc_comm_barrier(self->core, label);
    Py_END_ALLOW_THREADS;
    return leave(self, status);
}

/* ---- ending ---- */

PyDoc_STRVAR(abort_doc,
             "abort(text)\n\n"
             "Tells the other ranks that this one gives up; their waits raise CommError\n"
             "with this text. Allowed while an operation runs in another thread.");

static PyObject *comm_abort(CommObject *self, PyObject *text) {
    const char *reason = PyUnicode_AsUTF8(text);
    if (!reason)
        return NULL;
    if (!self->closed)
        dsc_comm_abort(self->core, reason);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(close_doc, "close()\n\n"
                        "Local; further calls raise RuntimeError. Other ranks that wait for this\n"
                        "one get CommError.");

static PyObject *comm_close(CommObject *self, PyObject *unused) {
    (void)unused;
    if (self->closed)
        Py_RETURN_NONE;
    if (enter(self, "close") < 0)
        return NULL;
    self->closed = true;
    if (self->lent) {
        /* An engine may still refer to it: its next call must fail, not crash. */
        dsc_comm_leave(self->core);
    } else {
        dsc_comm_close(self->core);
        self->core = NULL;
    }
    self->busy = false;
    Py_RETURN_NONE;
}

static int comm_traverse(CommObject *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    return 0;
}

static bool interpreter_ends(void) {
#if PY_VERSION_HEX >= 0x030d0000
    return Py_IsFinalizing();
#else
    return _Py_IsFinalizing();
#endif
}

static void comm_dealloc(CommObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    /* A rank that raised must not tell the others before it has ended: one of them would end first,
     * and whoever watches the processes would take it for the cause. */
    if (!interpreter_ends())
        dsc_comm_close(self->core);
    type->tp_free(self);
    Py_DECREF(type);
}

/* ---- attributes ---- */

static PyObject *comm_rank(CommObject *self, void *unused) {
    (void)unused;
    return self->core ? PyLong_FromLong(dsc_comm_rank(self->core)) : (enter(self, "rank"), NULL);
}

static PyObject *comm_size(CommObject *self, void *unused) {
    (void)unused;
    return self->core ? PyLong_FromLong(dsc_comm_size(self->core)) : (enter(self, "size"), NULL);
}

static PyObject *comm_backend(CommObject *self, void *unused) {
    (void)unused;
    return self->core ? PyUnicode_FromString(dsc_comm_backend(self->core))
                      : (enter(self, "backend"), NULL);
}

static PyObject *comm_closed(CommObject *self, void *unused) {
    (void)unused;
    return PyBool_FromLong(self->closed);
}

static PyGetSetDef comm_getset[] = {
    {"rank", (getter)comm_rank, NULL, "This process's place, from 0.", NULL},
    {"size", (getter)comm_size, NULL, "How many ranks there are.", NULL},
    {"backend", (getter)comm_backend, NULL, "'self', 'shm' or 'delegate'.", NULL},
    {"closed", (getter)comm_closed, NULL, "Whether close() was called.", NULL},
    {NULL},
};

static PyMethodDef comm_methods[] = {
    {"self_", comm_self, METH_VARARGS | METH_CLASS, self_doc},
    {"listen", comm_listen, METH_NOARGS | METH_CLASS, listen_doc},
    {"shm", comm_shm, METH_VARARGS | METH_CLASS, shm_doc},
    {"delegate", dsc_bind_delegate, METH_VARARGS | METH_CLASS, dsc_bind_delegate_doc},
    {"all_reduce", (PyCFunction)comm_all_reduce, METH_VARARGS, all_reduce_doc},
    {"reduce_scatter", (PyCFunction)comm_reduce_scatter, METH_VARARGS, reduce_scatter_doc},
    {"all_gather", (PyCFunction)comm_all_gather, METH_VARARGS, all_gather_doc},
    {"broadcast", (PyCFunction)comm_broadcast, METH_VARARGS, broadcast_doc},
    {"barrier", (PyCFunction)comm_barrier, METH_VARARGS, barrier_doc},
    {"abort", (PyCFunction)comm_abort, METH_O, abort_doc},
    {"close", (PyCFunction)comm_close, METH_NOARGS, close_doc},
    {NULL},
};

static PyType_Slot comm_slots[] = {
    {Py_tp_doc, "A fixed set of ranks that call the same operations in the same order.\n\n"
                "Made by Comm.self_, Comm.shm and Comm.delegate. Tensors are contiguous CPU "
                "tensors of float32,\n"
                "bfloat16, float16, float64, int32 or int64. A call on wrong arguments raises\n"
                "ValueError or TypeError and changes nothing; ranks that diverged, died, left or\n"
                "gave up are a CommError, late ones a TimeoutError, and from then on every call\n"
                "raises the same."},
    {Py_tp_traverse, comm_traverse},
    {Py_tp_dealloc, comm_dealloc},
    {Py_tp_methods, comm_methods},
    {Py_tp_getset, comm_getset},
    {0, NULL},
};

static PyType_Spec comm_spec = {
    .name = "deepspeed_c._core.Comm",
    .basicsize = sizeof(CommObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = comm_slots,
};

PyDoc_STRVAR(shm_node_doc,
             "shm_node() -> str\n\n"
             "This machine, user and network: ranks where it is equal can share memory.");

static PyObject *shm_node(PyObject *module, PyObject *unused) {
    char node[DSC_SHM_NODE_MAX];
    (void)unused;
    const enum dsc_status status = dsc_shm_node(node);
    if (status != DSC_OK)
        return dsc_bind_raise(dsc_bind_module_state(module), status);
    return PyUnicode_FromString(node);
}

static PyMethodDef functions[] = {
    {"shm_node", shm_node, METH_NOARGS, shm_node_doc},
    {NULL},
};

int dsc_bind_add_comm(PyObject *module) {
    struct dsc_bind_state *state = dsc_bind_module_state(module);
    state->comm_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &comm_spec, NULL);
    if (!state->comm_type || PyModule_AddType(module, state->comm_type) < 0)
        return -1;
    return PyModule_AddFunctions(module, functions);
}
