/* The operations of a Comm on CPU tensors.
 *
 * Invariant: tensors are borrowed for the call, and for an asynchronous one kept by its Work; the
 * GIL is away for all of a synchronous call. Collectives hold the Comm (`busy`); messages, and the
 * start of asynchronous operations, need not. */
#include "comm.h"

static struct dsc_bind_state *state_of(CommObject *self) {
    return dsc_bind_state_of(Py_TYPE(self));
}

/* ---- arguments ---- */

typedef int (*borrow_fn)(struct dsc_bind_state *, PyObject *, const char *, struct dsc_borrowed *);

static int borrow_by(borrow_fn how, CommObject *self, PyObject *tensor, const char *call,
                     const char *name, struct dsc_borrowed *out) {
    if (how(state_of(self), tensor, name, out) < 0)
        return -1;
    if (out->on_cpu && out->contiguous)
        return 0;
    PyErr_Format(PyExc_ValueError, "%s: %s must be %s", call, name,
                 out->on_cpu ? "contiguous" : "on the CPU");
    return -1;
}

/* A tensor whose elements are combined. */
static int borrow_sum(CommObject *self, PyObject *tensor, const char *call, const char *name,
                      struct dsc_borrowed *out) {
    return borrow_by(dsc_bind_borrow, self, tensor, call, name, out);
}

/* A tensor that is only moved; its elements may be of any type. */
static int borrow_move(CommObject *self, PyObject *tensor, const char *call, const char *name,
                       struct dsc_borrowed *out) {
    return borrow_by(dsc_bind_borrow_any, self, tensor, call, name, out);
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

static int check_open(CommObject *self, const char *call) {
    if (!self->closed)
        return 0;
    PyErr_Format(PyExc_RuntimeError, "%s: this Comm is closed", call);
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

/* ---- one operation ---- */

struct call {
    const char *name;
    enum dsc_comm_op op;
    enum dsc_status (*now)(struct dsc_comm *, const struct dsc_coll *);
    struct dsc_coll coll;
    size_t *n_send, *n_recv; /* all_to_all with splits */
    int is_async;
    PyObject *tensors[2]; /* borrowed; NULL where there is none */
};

static PyObject *kept(const struct call *call) {
    return PyTuple_Pack(2, call->tensors[0] ? call->tensors[0] : Py_None,
                        call->tensors[1] ? call->tensors[1] : Py_None);
}

static enum dsc_status run_now(struct dsc_comm *core, const struct call *call) {
    if (call->op == DSC_COMM_BARRIER)
        return dsc_comm_barrier(core, call->coll.label);
    if (call->op == DSC_COMM_ALL_TO_ALL_V)
        return dsc_comm_all_to_all_v(core, &call->coll, call->n_send, call->n_recv);
    return call->now(core, &call->coll);
}

static PyObject *run(CommObject *self, const struct call *call) {
    struct dsc_work *work = NULL;
    enum dsc_status status;
    if (call->is_async) {
        if (check_open(self, call->name) < 0)
            return NULL;
        status =
            dsc_comm_post(self->core, call->op, &call->coll, call->n_send, call->n_recv, &work);
        return status == DSC_OK ? dsc_bind_work(state_of(self), work, kept(call), self->pending)
                                : dsc_bind_raise(state_of(self), status);
    }
    if (dsc_bind_comm_enter(self, call->name) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    status = run_now(self->core, call);
    Py_END_ALLOW_THREADS;
    return dsc_bind_comm_leave(self, status);
}

/* src and dst of a call that has both, of one dtype; n_elems is the input's. */
static int borrow_both(CommObject *self, struct call *call, borrow_fn how) {
    struct dsc_borrowed out, in;
    if (check_open(self, call->name) < 0 ||
        borrow_by(how, self, call->tensors[0], call->name, "output", &out) < 0 ||
        borrow_by(how, self, call->tensors[1], call->name, "input", &in) < 0 ||
        same_dtype(call->name, &out, &in) < 0)
        return -1;
    call->coll.dst = out.data;
    call->coll.src = in.data;
    call->coll.dtype = in.dtype;
    call->coll.n_elems = in.n_elems;
    switch (call->op) {
    case DSC_COMM_REDUCE_SCATTER:
    case DSC_COMM_SCATTER:
        call->coll.n_elems = out.n_elems;
        return check_parts(self, call->name, "input", in.n_elems, "output", out.n_elems);
    case DSC_COMM_ALL_GATHER:
    case DSC_COMM_GATHER:
        return check_parts(self, call->name, "output", out.n_elems, "input", in.n_elems);
    default:
        return 0;
    }
}

/* ---- combining ---- */

/* The one tensor is input and output. */
static PyObject *combine_in_place(CommObject *self, struct call *call, const char *op) {
    struct dsc_borrowed t;
    if (borrow_sum(self, call->tensors[0], call->name, "tensor", &t) < 0 ||
        op_of(op, &call->coll.op) < 0)
        return NULL;
    call->coll.src = call->coll.dst = t.data;
    call->coll.n_elems = t.n_elems;
    call->coll.dtype = t.dtype;
    return run(self, call);
}

PyObject *dsc_bind_comm_all_reduce(CommObject *self, PyObject *args) {
    struct call call = {"all_reduce", DSC_COMM_ALL_REDUCE, dsc_comm_all_reduce};
    const char *op = "sum";
    if (!PyArg_ParseTuple(args, "O|szp:all_reduce", &call.tensors[0], &op, &call.coll.label,
                          &call.is_async))
        return NULL;
    return combine_in_place(self, &call, op);
}

PyObject *dsc_bind_comm_reduce_scatter(CommObject *self, PyObject *args) {
    struct call call = {"reduce_scatter", DSC_COMM_REDUCE_SCATTER, dsc_comm_reduce_scatter};
    const char *op = "sum";
    if (!PyArg_ParseTuple(args, "OO|szp:reduce_scatter", &call.tensors[0], &call.tensors[1], &op,
                          &call.coll.label, &call.is_async) ||
        borrow_both(self, &call, dsc_bind_borrow) < 0 || op_of(op, &call.coll.op) < 0)
        return NULL;
    return run(self, &call);
}

PyObject *dsc_bind_comm_reduce(CommObject *self, PyObject *args) {
    struct call call = {"reduce", DSC_COMM_REDUCE, dsc_comm_reduce};
    const char *op = "sum";
    if (!PyArg_ParseTuple(args, "O|iszp:reduce", &call.tensors[0], &call.coll.root, &op,
                          &call.coll.label, &call.is_async))
        return NULL;
    return combine_in_place(self, &call, op);
}

/* ---- moving ---- */

PyObject *dsc_bind_comm_all_gather(CommObject *self, PyObject *args) {
    struct call call = {"all_gather", DSC_COMM_ALL_GATHER, dsc_comm_all_gather};
    if (!PyArg_ParseTuple(args, "OO|zp:all_gather", &call.tensors[0], &call.tensors[1],
                          &call.coll.label, &call.is_async) ||
        borrow_both(self, &call, dsc_bind_borrow_any) < 0)
        return NULL;
    return run(self, &call);
}

PyObject *dsc_bind_comm_broadcast(CommObject *self, PyObject *args) {
    struct call call = {"broadcast", DSC_COMM_BROADCAST, dsc_comm_broadcast};
    struct dsc_borrowed t;
    if (!PyArg_ParseTuple(args, "O|izp:broadcast", &call.tensors[0], &call.coll.root,
                          &call.coll.label, &call.is_async) ||
        borrow_move(self, call.tensors[0], "broadcast", "tensor", &t) < 0)
        return NULL;
    call.coll.dst = t.data;
    call.coll.n_elems = t.n_elems;
    call.coll.dtype = t.dtype;
    return run(self, &call);
}

/* gather and scatter: the tensor at `whole` exists on the root only. */
static PyObject *run_rooted(CommObject *self, struct call *call, int whole) {
    static const char *const names[2] = {"output", "input"};
    struct dsc_borrowed part;
    if (check_open(self, call->name) < 0)
        return NULL;
    if ((call->tensors[whole] == Py_None) == (dsc_comm_rank(self->core) == call->coll.root)) {
        PyErr_Format(PyExc_ValueError, "%s: %s must be %s rank %d: the root is %d", call->name,
                     names[whole], call->tensors[whole] == Py_None ? "a tensor on" : "None on",
                     dsc_comm_rank(self->core), call->coll.root);
        return NULL;
    }
    if (call->tensors[whole] != Py_None)
        return borrow_both(self, call, dsc_bind_borrow_any) < 0 ? NULL : run(self, call);
    if (borrow_move(self, call->tensors[1 - whole], call->name, names[1 - whole], &part) < 0)
        return NULL;
    call->coll.src = whole == 0 ? part.data : NULL;
    call->coll.dst = whole == 0 ? NULL : part.data;
    call->coll.n_elems = part.n_elems;
    call->coll.dtype = part.dtype;
    return run(self, call);
}

PyObject *dsc_bind_comm_gather(CommObject *self, PyObject *args) {
    struct call call = {"gather", DSC_COMM_GATHER, dsc_comm_gather};
    if (!PyArg_ParseTuple(args, "OO|izp:gather", &call.tensors[0], &call.tensors[1],
                          &call.coll.root, &call.coll.label, &call.is_async))
        return NULL;
    return run_rooted(self, &call, 0);
}

PyObject *dsc_bind_comm_scatter(CommObject *self, PyObject *args) {
    struct call call = {"scatter", DSC_COMM_SCATTER, dsc_comm_scatter};
    if (!PyArg_ParseTuple(args, "OO|izp:scatter", &call.tensors[0], &call.tensors[1],
                          &call.coll.root, &call.coll.label, &call.is_async))
        return NULL;
    return run_rooted(self, &call, 1);
}

/* Elements per rank from a sequence that must add up to `total`; `scale` counts bytes of foreign
 * types. */
static int splits_of(CommObject *self, PyObject *sequence, const char *name, size_t total,
                     size_t scale, size_t *out) {
    Py_ssize_t n = PySequence_Size(sequence);
    size_t sum = 0;
    if (n < 0)
        return -1;
    if (n != dsc_comm_size(self->core)) {
        PyErr_Format(PyExc_ValueError, "all_to_all: %s has %zd numbers; one for each of %d ranks",
                     name, n, dsc_comm_size(self->core));
        return -1;
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *item = PySequence_GetItem(sequence, i);
        size_t split = item ? PyLong_AsSize_t(item) : 0;
        Py_XDECREF(item);
        if (PyErr_Occurred())
            return -1;
        out[i] = split * scale;
        sum += out[i];
    }
    if (sum == total)
        return 0;
    PyErr_Format(PyExc_ValueError, "all_to_all: %s adds up to %zu, but there are %zu elements",
                 name, sum / scale, total / scale);
    return -1;
}

static size_t n_shaped(const struct dsc_borrowed *t) {
    size_t n = 1;
    for (int i = 0; i < t->n_dims; i++)
        n *= (size_t)t->shape[i];
    return n;
}

/* Splits in memory that the caller frees. */
static int read_splits(CommObject *self, struct call *call, PyObject *out_splits,
                       PyObject *in_splits) {
    struct dsc_borrowed out, in;
    size_t size = (size_t)dsc_comm_size(self->core);
    if (borrow_move(self, call->tensors[0], call->name, "output", &out) < 0 ||
        borrow_move(self, call->tensors[1], call->name, "input", &in) < 0)
        return -1;
    size_t scale = in.dtype == DSC_U8 && in.n_elems > 0 ? in.n_elems / n_shaped(&in) : 1;
    if (in.dtype == DSC_U8 && in.n_elems == 0 && out.n_elems > 0)
        scale = out.n_elems / n_shaped(&out);
    call->op = DSC_COMM_ALL_TO_ALL_V;
    call->n_send = PyMem_New(size_t, 2 * size);
    if (!call->n_send) {
        PyErr_NoMemory();
        return -1;
    }
    call->n_recv = call->n_send + size;
    return splits_of(self, in_splits, "input_splits", in.n_elems, scale, call->n_send) < 0 ||
                   splits_of(self, out_splits, "output_splits", out.n_elems, scale, call->n_recv) <
                       0
               ? -1
               : 0;
}

static int equal_parts(CommObject *self, struct call *call) {
    struct dsc_borrowed out;
    size_t size = (size_t)dsc_comm_size(self->core), n = call->coll.n_elems;
    if (borrow_move(self, call->tensors[0], call->name, "output", &out) < 0)
        return -1;
    call->coll.n_elems = n / size;
    if (n % size == 0 && out.n_elems == n)
        return 0;
    PyErr_Format(PyExc_ValueError,
                 "all_to_all: output has %zu elements and input %zu; without splits both must have "
                 "the same number, a multiple of the %zu ranks",
                 out.n_elems, n, size);
    return -1;
}

PyObject *dsc_bind_comm_all_to_all(CommObject *self, PyObject *args) {
    struct call call = {"all_to_all", DSC_COMM_ALL_TO_ALL, dsc_comm_all_to_all};
    PyObject *out_splits = Py_None, *in_splits = Py_None, *result = NULL;
    if (!PyArg_ParseTuple(args, "OO|OOzp:all_to_all", &call.tensors[0], &call.tensors[1],
                          &out_splits, &in_splits, &call.coll.label, &call.is_async) ||
        borrow_both(self, &call, dsc_bind_borrow_any) < 0)
        return NULL;
    bool ready = out_splits == Py_None && in_splits == Py_None
                     ? equal_parts(self, &call) == 0
                     : read_splits(self, &call, out_splits, in_splits) == 0;
    if (ready)
        result = run(self, &call);
    PyMem_Free(call.n_send);
    return result;
}

PyObject *dsc_bind_comm_barrier(CommObject *self, PyObject *args) {
    struct call call = {.name = "barrier", .op = DSC_COMM_BARRIER};
    if (!PyArg_ParseTuple(args, "|zp:barrier", &call.coll.label, &call.is_async))
        return NULL;
    return run(self, &call);
}

/* ---- messages ---- */

static PyObject *run_message(CommObject *self, PyObject *tensor, struct dsc_p2p *message,
                             bool is_send, int is_async) {
    const char *call = is_send ? "send" : "recv";
    struct dsc_borrowed t;
    struct dsc_work *work = NULL;
    enum dsc_status status;
    int from = message->peer;
    if (check_open(self, call) < 0 || borrow_move(self, tensor, call, "tensor", &t) < 0)
        return NULL;
    message->data = t.data;
    message->n_elems = t.n_elems;
    message->dtype = t.dtype;
    if (is_async) {
        status = dsc_comm_post_message(self->core, is_send, message, &work);
        return status == DSC_OK
                   ? dsc_bind_work(state_of(self), work, PyTuple_Pack(1, tensor), self->pending)
                   : dsc_bind_raise(state_of(self), status);
    }
    self->n_messages++;
    Py_BEGIN_ALLOW_THREADS;
    status =
        is_send ? dsc_comm_send(self->core, message) : dsc_comm_recv(self->core, message, &from);
    Py_END_ALLOW_THREADS;
    self->n_messages--;
    if (status != DSC_OK)
        return dsc_bind_raise(state_of(self), status);
    return is_send ? Py_NewRef(Py_None) : PyLong_FromLong(from);
}

PyObject *dsc_bind_comm_send(CommObject *self, PyObject *args) {
    PyObject *tensor;
    struct dsc_p2p message = {0};
    unsigned long long tag = 0;
    int is_async = 0;
    if (!PyArg_ParseTuple(args, "Oi|Kzp:send", &tensor, &message.peer, &tag, &message.label,
                          &is_async))
        return NULL;
    message.tag = tag;
    return run_message(self, tensor, &message, true, is_async);
}

PyObject *dsc_bind_comm_recv(CommObject *self, PyObject *args) {
    PyObject *tensor;
    struct dsc_p2p message = {.peer = -1};
    unsigned long long tag = 0;
    int is_async = 0;
    if (!PyArg_ParseTuple(args, "O|iKzp:recv", &tensor, &message.peer, &tag, &message.label,
                          &is_async))
        return NULL;
    message.tag = tag;
    return run_message(self, tensor, &message, false, is_async);
}
