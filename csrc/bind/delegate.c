/* Comm.delegate: a communicator whose bytes a Python object moves (deepspeed_c._delegate).
 *
 * Decides: how the core's callbacks become method calls. A method returns a str where the
 * connection or the board is lost, which is DSC_EDEAD with that text; whatever it raises came from
 * a signal handler, stays set, and is DSC_EINTR. Invariant: the GIL is held for the method only. */
#include "comm.h"

#include "../comm/delegate.h"

#include <string.h>
#include <unistd.h>

/* Takes the result (NULL: raised). *value receives it if it is no str, and is then the caller's. */
static enum dsc_status result_of(PyObject *result, PyObject **value) {
    if (!result)
        return DSC_FAIL(DSC_EINTR, "interrupted while waiting for other ranks");
    if (PyUnicode_Check(result)) {
        const char *text = PyUnicode_AsUTF8(result);
        enum dsc_status status =
            DSC_FAIL(DSC_EDEAD, "%.300s", text ? text : "an error that cannot be shown");
        if (!text)
            PyErr_Clear(); /* lone surrogates in another library's message */
        Py_DECREF(result);
        return status;
    }
    *value = result;
    return DSC_OK;
}

/* Runs the statement with the GIL; an exception that is set stays apart from what it does, unless
 * it raises itself. */
#define WITH_GIL(statement)                                                                        \
    do {                                                                                           \
        PyGILState_STATE gil_ = PyGILState_Ensure();                                               \
        PyObject *type_, *value_, *trace_;                                                         \
        PyErr_Fetch(&type_, &value_, &trace_);                                                     \
        statement;                                                                                 \
        if (type_)                                                                                 \
            PyErr_Restore(type_, value_, trace_);                                                  \
        PyGILState_Release(gil_);                                                                  \
    } while (0)

static PyObject *list_of(const size_t *counts, Py_ssize_t n) {
    PyObject *list = PyList_New(n);
    for (Py_ssize_t i = 0; list && i < n; i++) {
        PyObject *count = PyLong_FromSize_t(counts[i]);
        if (!count)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, i, count);
    }
    return list;
}

struct context {
    PyObject *object;
    Py_buffer staging;
    int size;
};

static PyObject *call_start(const struct context *c, const struct dsc_move *move) {
    PyObject *sends = NULL, *receives = NULL, *result = NULL;
    bool is_exchange = move->kind == DSC_MOVE_EXCHANGE;
    sends = is_exchange ? list_of(move->n_send, c->size) : Py_NewRef(Py_None);
    receives = is_exchange ? list_of(move->n_recv, c->size) : Py_NewRef(Py_None);
    if (sends && receives)
        result = PyObject_CallMethod(c->object, "start", "innnOOi", (int)move->kind,
                                     (Py_ssize_t)move->src, (Py_ssize_t)move->dst,
                                     (Py_ssize_t)move->n_bytes, sends, receives, move->root);
    Py_XDECREF(sends);
    Py_XDECREF(receives);
    return result;
}

static enum dsc_status start(void *context, const struct dsc_move *move) {
    enum dsc_status status;
    PyObject *value = NULL;
    WITH_GIL(status = result_of(call_start(context, move), &value); Py_XDECREF(value));
    return status;
}

static enum dsc_status wait_for(void *context, int ms, bool *done) {
    struct context *c = context;
    enum dsc_status status;
    PyObject *value = NULL;
    WITH_GIL(status = result_of(PyObject_CallMethod(c->object, "wait", "i", ms), &value);
             if (value) *done = value == Py_True; Py_XDECREF(value));
    return status;
}

static enum dsc_status add(void *context, const char *key, int64_t by, int64_t *value) {
    struct context *c = context;
    enum dsc_status status;
    PyObject *number = NULL;
    WITH_GIL(status = result_of(PyObject_CallMethod(c->object, "add", "sL", key, (long long)by),
                                &number);
             if (number) *value = PyLong_AsLongLong(number); Py_XDECREF(number));
    return status;
}

static enum dsc_status put(void *context, const char *key, const char *text, bool once) {
    struct context *c = context;
    enum dsc_status status;
    PyObject *value = NULL;
    if (dsc_bind_interpreter_ends())
        return DSC_FAIL(DSC_ESTATE, "the interpreter ends");
    WITH_GIL(status = result_of(PyObject_CallMethod(c->object, "put", "syi", key, text, (int)once),
                                &value);
             Py_XDECREF(value));
    return status;
}

static enum dsc_status look(void *context, const char *key, char text[DSC_BOARD_TEXT_MAX]) {
    struct context *c = context;
    enum dsc_status status;
    PyObject *value = NULL;
    text[0] = '\0';
    WITH_GIL(status = result_of(PyObject_CallMethod(c->object, "look", "s", key), &value);
             if (value && PyBytes_Check(value))
                 snprintf(text, DSC_BOARD_TEXT_MAX, "%s", PyBytes_AS_STRING(value));
             Py_XDECREF(value));
    return status;
}

static void dead(void *context, char text[DSC_BOARD_DEAD_MAX]) {
    struct context *c = context;
    PyObject *value = NULL;
    text[0] = '\0';
    WITH_GIL(value = PyObject_CallMethod(c->object, "dead", NULL);
             if (value && PyBytes_Check(value))
                 snprintf(text, DSC_BOARD_DEAD_MAX, "%s", PyBytes_AS_STRING(value));
             Py_XDECREF(value));
}

/* Leaving never fails: there is nobody to be told. */
static PyObject *call_leave(struct context *c) {
    PyObject *value = PyObject_CallMethod(c->object, "leave", NULL);
    if (!value)
        PyErr_Clear(); /* as said above */
    return value;
}

static void leave(void *context) {
    PyObject *value;
    WITH_GIL(value = call_leave(context); Py_XDECREF(value));
}

static void release(void *context) {
    struct context *c = context;
    WITH_GIL(PyBuffer_Release(&c->staging); Py_DECREF(c->object); PyMem_Free(c));
}

const char dsc_bind_delegate_doc[] =
    "delegate(mover, channel, rank, size, job_rank, job_size, timeout=0.0, node=None,\n"
    "rail=None, listener=-1, token=None) -> Comm\n\n"
    "A communicator over what `mover` (deepspeed_c._delegate.Mover) moves. channel: the same\n"
    "text on all its ranks, and no other communicator's of the job. node: the Comm of the ranks\n"
    "of this node, which is taken over; rail: the Mover of the ranks with this one's place on\n"
    "every node, over mover's staging; with both a node reduces within itself first. listener: "
    "the\n"
    "descriptor of a listening TCP socket, taken over, and token: what a connection to it has to\n"
    "show; without a token the communicator has no messages between two ranks.";

static struct context *new_context(PyObject *mover, int size) {
    PyObject *staging = PyObject_GetAttrString(mover, "staging");
    struct context *c = staging ? PyMem_Calloc(1, sizeof *c) : NULL;
    if (staging && !c)
        PyErr_NoMemory();
    if (c && PyObject_GetBuffer(staging, &c->staging, PyBUF_WRITABLE) < 0) {
        PyMem_Free(c);
        c = NULL;
    }
    Py_XDECREF(staging);
    if (!c)
        return NULL;
    c->object = Py_NewRef(mover);
    c->size = size;
    return c;
}

/* The second level of a new communicator, which is closed where that fails; 0 or -1 with an
 * exception. */
static int use_nodes(struct dsc_bind_state *state, struct dsc_comm *core, PyObject *node,
                     PyObject *rail) {
    struct dsc_comm *inside = dsc_bind_comm_take(state, node);
    struct context *c = NULL;
    enum dsc_status status;
    if (inside)
        c = new_context(rail, dsc_comm_size(core) / dsc_comm_size(inside));
    if (!c) {
        Py_BEGIN_ALLOW_THREADS; /* closing waits for threads that may want the GIL */
        dsc_comm_close(inside);
        dsc_comm_close(core);
        Py_END_ALLOW_THREADS;
        return -1;
    }
    Py_BEGIN_ALLOW_THREADS;
    status = dsc_comm_delegate_use_nodes(core, inside, c);
    if (status != DSC_OK)
        dsc_comm_close(core);
    Py_END_ALLOW_THREADS;
    if (status == DSC_OK)
        return 0;
    (void)dsc_bind_raise(state, status);
    return -1;
}

PyObject *dsc_bind_delegate(PyObject *type, PyObject *args) {
    struct dsc_bind_state *state = dsc_bind_state_of((PyTypeObject *)type);
    PyObject *mover, *node = Py_None, *rail = Py_None;
    const char *channel;
    int rank, size, job_rank, job_size;
    const char *token = NULL;
    double timeout_s = 0;
    int listener = -1;
    struct dsc_comm *core = NULL;
    if (!PyArg_ParseTuple(args, "Osiiii|dOOiz:delegate", &mover, &channel, &rank, &size, &job_rank,
                          &job_size, &timeout_s, &node, &rail, &listener, &token))
        return NULL;
    struct context *c = new_context(mover, size);
    if (!c) {
        if (token)
            (void)close(listener);
        return NULL;
    }
    struct dsc_delegate delegate = {
        .context = c,
        .staging = c->staging.buf,
        .n_staging = (size_t)c->staging.len,
        .channel = channel,
        .job_rank = job_rank,
        .job_size = job_size,
        .listener = listener,
        .token = token,
        .start = start,
        .wait = wait_for,
        .add = add,
        .put = put,
        .look = look,
        .dead = dead,
        .leave = leave,
        .release = release,
    };
    const struct dsc_comm_options options = {.timeout_s = timeout_s,
                                             .interrupted = dsc_bind_interrupted};
    const enum dsc_status status = dsc_comm_open_delegate(&options, &delegate, rank, size, &core);
    if (status != DSC_OK)
        return dsc_bind_raise(state, status);
    if (node != Py_None && use_nodes(state, core, node, rail) < 0)
        return NULL;
    return dsc_bind_wrap_comm((PyTypeObject *)type, core);
}
