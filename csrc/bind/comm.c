/* The type Comm: a communicator, its opening and its end. Its operations are in comm_calls.c.
 *
 * Invariant: one call at a time per Comm (`busy`, under the GIL); tensors are borrowed for the call
 * and the GIL is released for all of it. An engine may borrow the communicator (dsc_bind_comm):
 * close() then tells the other ranks at once, and the memory goes when the last reference to the
 * Comm does. One that is open when the interpreter ends is left to the end of the process. */
#include "comm.h"

static const char CAPSULE[] = "deepspeed_c.shm_listener";
static const char CAPSULE_USED[] = "deepspeed_c.shm_listener, used";

static struct dsc_bind_state *state_of(CommObject *self) {
    return dsc_bind_state_of(Py_TYPE(self));
}

int dsc_bind_comm_enter(CommObject *self, const char *what) {
    if (!self->closed && !self->busy && (self->n_messages == 0 || strcmp(what, "close") != 0)) {
        self->busy = true;
        return 0;
    }
    PyErr_Format(PyExc_RuntimeError, "%s: %s", what,
                 self->closed ? "this Comm is closed"
                              : "an operation of this Comm is already running in another thread");
    return -1;
}

PyObject *dsc_bind_comm_leave(CommObject *self, enum dsc_status status) {
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

struct dsc_comm *dsc_bind_comm_take(struct dsc_bind_state *state, PyObject *comm) {
    struct dsc_comm *core = dsc_bind_comm(state, comm);
    CommObject *self = (CommObject *)comm;
    if (!core)
        return NULL;
    self->lent = false;
    if (dsc_bind_comm_enter(self, "delegate") < 0)
        return NULL;
    self->closed = true;
    self->core = NULL;
    self->busy = false;
    return core;
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
    self->pending = PyList_New(0);
    if (!self->pending)
        Py_CLEAR(self);
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

/* ---- groups ---- */

/* The ranks of a sequence, in memory to be freed, or NULL with an exception. */
static int *ranks_of(PyObject *sequence, Py_ssize_t *n) {
    PyObject *fast = PySequence_Fast(sequence, "group: ranks must be a sequence of numbers");
    int *ranks = NULL;
    if (!fast)
        return NULL;
    *n = PySequence_Fast_GET_SIZE(fast);
    ranks = PyMem_New(int, *n ? *n : 1);
    for (Py_ssize_t i = 0; ranks && i < *n; i++) {
        ranks[i] = (int)PyLong_AsLong(PySequence_Fast_GET_ITEM(fast, i));
        if (PyErr_Occurred()) {
            PyMem_Free(ranks);
            ranks = NULL;
        }
    }
    if (!ranks && !PyErr_Occurred())
        PyErr_NoMemory();
    Py_DECREF(fast);
    return ranks;
}

PyDoc_STRVAR(group_doc,
             "group(ranks, name, timeout=None) -> Comm\n\n"
             "Collective over `ranks` only: a communicator of them, in this order, with a\n"
             "sequence of its own. The name must be the same on all of them, and another\n"
             "one for each group that is being opened at the same time.");

static PyObject *comm_group(CommObject *self, PyObject *args) {
    PyObject *sequence, *timeout = Py_None;
    const char *name;
    Py_ssize_t n = 0;
    struct dsc_comm *core = NULL;
    enum dsc_status status;
    if (!PyArg_ParseTuple(args, "Os|O:group", &sequence, &name, &timeout) ||
        dsc_bind_comm_enter(self, "group") < 0)
        return NULL;
    struct dsc_comm_options options = options_of(0);
    if (timeout != Py_None)
        options.timeout_s = PyFloat_AsDouble(timeout);
    int *ranks = PyErr_Occurred() ? NULL : ranks_of(sequence, &n);
    if (!ranks) {
        self->busy = false;
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS;
    status = dsc_comm_open_group(self->core, timeout == Py_None ? NULL : &options, ranks, (int)n,
                                 name, &core);
    Py_END_ALLOW_THREADS;
    PyMem_Free(ranks);
    self->busy = false;
    if (status != DSC_OK)
        return dsc_bind_raise(state_of(self), status);
    return dsc_bind_wrap_comm(Py_TYPE(self), core);
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
    if (dsc_bind_comm_enter(self, "close") < 0)
        return NULL;
    self->closed = true;
    struct dsc_comm *core = self->core;
    /* An engine may still refer to it: its next call must fail, not crash. */
    if (!self->lent)
        self->core = NULL;
    Py_BEGIN_ALLOW_THREADS;
    if (self->lent)
        dsc_comm_leave(core);
    else
        dsc_comm_close(core);
    Py_END_ALLOW_THREADS;
    self->busy = false;
    return PyList_SetSlice(self->pending, 0, PY_SSIZE_T_MAX, NULL) < 0 ? NULL : Py_NewRef(Py_None);
}

PyDoc_STRVAR(halt_doc,
             "halt()\n\n"
             "For the end of the process: ends asynchronous operations without telling the\n"
             "other ranks, which see this process's end.");

static PyObject *comm_halt(CommObject *self, PyObject *unused) {
    (void)unused;
    if (self->core) {
        Py_BEGIN_ALLOW_THREADS;
        dsc_comm_halt(self->core);
        Py_END_ALLOW_THREADS;
    }
    Py_RETURN_NONE;
}

static int comm_traverse(CommObject *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->pending);
    return 0;
}

static void comm_dealloc(CommObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    /* A rank that raised must not tell the others before it has ended: one of them would end first,
     * and whoever watches the processes would take it for the cause. */
    if (!dsc_bind_interpreter_ends()) {
        struct dsc_comm *core = self->core;
        Py_BEGIN_ALLOW_THREADS; /* a thread of the communicator may need it to end */
        dsc_comm_close(core);
        Py_END_ALLOW_THREADS;
    }
    Py_XDECREF(self->pending);
    type->tp_free(self);
    Py_DECREF(type);
}

/* ---- attributes ---- */

static PyObject *comm_rank(CommObject *self, void *unused) {
    (void)unused;
    return self->core ? PyLong_FromLong(dsc_comm_rank(self->core))
                      : (dsc_bind_comm_enter(self, "rank"), NULL);
}

static PyObject *comm_size(CommObject *self, void *unused) {
    (void)unused;
    return self->core ? PyLong_FromLong(dsc_comm_size(self->core))
                      : (dsc_bind_comm_enter(self, "size"), NULL);
}

static PyObject *comm_backend(CommObject *self, void *unused) {
    (void)unused;
    return self->core ? PyUnicode_FromString(dsc_comm_backend(self->core))
                      : (dsc_bind_comm_enter(self, "backend"), NULL);
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
    {"group", (PyCFunction)comm_group, METH_VARARGS, group_doc},
#define X(name, text) {#name, (PyCFunction)dsc_bind_comm_##name, METH_VARARGS, #name text},
    DSC_BIND_COMM_CALLS(X)
#undef X
        {"halt", (PyCFunction)comm_halt, METH_NOARGS, halt_doc},
    {"abort", (PyCFunction)comm_abort, METH_O, abort_doc},
    {"close", (PyCFunction)comm_close, METH_NOARGS, close_doc},
    {NULL},
};

static PyType_Slot comm_slots[] = {
    {Py_tp_doc,
     "A fixed set of ranks that call the same operations in the same order.\n\n"
     "Made by Comm.self_, Comm.shm, Comm.delegate and group(). Tensors are contiguous CPU tensors, "
     "of\n"
     "float32, bfloat16, float16, float64, int32 or int64 where they are combined. With\n"
     "is_async a call returns a Work. A call on wrong arguments raises\n"
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
