/* _core.ShardWriter: one rank's file of a checkpoint; csrc/save.h has the rules. _core.crc32c.
 *
 * Invariant: tensors live until their memory has been written or copied; the file is written by the
 * core. */
#include "bind.h"

#include "../alloc.h"
#include "../crc32c.h"
#include "../save.h"

typedef struct {
    PyObject_HEAD PyObject *path; /* bytes */
    PyObject *keep;               /* keys and tensors */
    int n_threads;
    size_t n_tensors, n_room;
    struct dsc_shard_tensor *tensors;
    const void **data;
    struct dsc_save *core; /* from write() on */
    bool busy;
} WriterObject;

static PyObject *raise_status(WriterObject *self, enum dsc_status status) {
    return dsc_bind_raise(dsc_bind_state_of(Py_TYPE(self)), status);
}

/* ---- life ---- */

static PyObject *writer_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *keys[] = {"path", "n_threads", NULL};
    PyObject *path = NULL;
    int n_threads = 1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&|i:ShardWriter", keys, PyUnicode_FSConverter,
                                     &path, &n_threads))
        return NULL;
    WriterObject *self = (WriterObject *)type->tp_alloc(type, 0);
    if (!self) {
        Py_DECREF(path);
        return NULL;
    }
    self->path = path;
    self->n_threads = n_threads;
    self->keep = PyList_New(0);
    if (self->keep)
        return (PyObject *)self;
    Py_DECREF(self);
    return NULL;
}

static void forget_tensors(WriterObject *self) {
    for (size_t i = 0; i < self->n_tensors; i++)
        dsc_free((void *)self->tensors[i].shape);
    dsc_free(self->tensors);
    dsc_free(self->data);
    self->tensors = NULL;
    self->data = NULL;
    self->n_tensors = self->n_room = 0;
}

static int writer_traverse(WriterObject *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->keep);
    return 0;
}

/* The thread reads the tensors: it ends first. */
static int writer_clear(WriterObject *self) {
    struct dsc_save *core = self->core;
    self->core = NULL;
    Py_BEGIN_ALLOW_THREADS;
    dsc_save_close(core);
    Py_END_ALLOW_THREADS;
    forget_tensors(self);
    Py_CLEAR(self->keep);
    return 0;
}

static void writer_dealloc(WriterObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    (void)writer_clear(self);
    Py_XDECREF(self->path);
    type->tp_free(self);
    Py_DECREF(type);
}

static int enter(WriterObject *self) {
    if (self->busy) {
        PyErr_SetString(PyExc_RuntimeError, "ShardWriter: running in another thread");
        return -1;
    }
    self->busy = true;
    return 0;
}

/* ---- what it will hold ---- */

/* A new array for the core, or NULL with an exception. */
static uint64_t *shape_of(PyObject *shape, int *n_dims) {
    PyObject *items = PySequence_Tuple(shape);
    void *out = NULL;
    if (!items)
        return NULL;
    Py_ssize_t n = PyTuple_GET_SIZE(items);
    if (n > DSC_SHARD_MAX_DIMS) {
        PyErr_Format(PyExc_ValueError, "shape has %zd dimensions; allowed: at most %d", n,
                     DSC_SHARD_MAX_DIMS);
    } else if (dsc_alloc((size_t)n * sizeof(uint64_t), &out) != DSC_OK) {
        PyErr_NoMemory();
    } else {
        for (Py_ssize_t i = 0; i < n && !PyErr_Occurred(); i++)
            ((uint64_t *)out)[i] = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(items, i));
        *n_dims = (int)n;
    }
    Py_DECREF(items);
    if (PyErr_Occurred()) {
        dsc_free(out);
        return NULL;
    }
    return out;
}

static int make_room(WriterObject *self) {
    if (self->n_tensors < self->n_room)
        return 0;
    size_t n = 2 * self->n_room + 64;
    if (dsc_realloc((void **)&self->tensors, n * sizeof *self->tensors) != DSC_OK ||
        dsc_realloc((void **)&self->data, n * sizeof *self->data) != DSC_OK) {
        PyErr_NoMemory();
        return -1;
    }
    self->n_room = n;
    return 0;
}

/* 0 where the memory is what dtype and shape say. */
static int check(WriterObject *self, const struct dsc_shard_tensor *tensor,
                 const struct dsc_borrowed *memory) {
    uint64_t n_bytes = 0, n_there = memory->n_elems * dsc_dtype_size(memory->dtype);
    enum dsc_status status = dsc_shard_size(tensor->dtype, tensor->n_dims, tensor->shape, &n_bytes);
    if (status != DSC_OK)
        (void)raise_status(self, status);
    else if (!memory->on_cpu || !memory->contiguous)
        PyErr_Format(PyExc_ValueError, "%s: its tensor must be contiguous and on the CPU",
                     tensor->key);
    else if (n_bytes != n_there)
        PyErr_Format(PyExc_ValueError,
                     "%s: dtype and shape have %llu bytes, the tensor's memory has %llu",
                     tensor->key, (unsigned long long)n_bytes, (unsigned long long)n_there);
    else
        return 0;
    return -1;
}

PyDoc_STRVAR(
    add_doc,
    "add(key, dtype, shape, tensor)\n\n"
    "A tensor of the file. dtype: as safetensors names it (\"F32\", ...); shape: as it is\n"
    "written; tensor: contiguous memory of that many bytes on the CPU, whatever its own\n"
    "dtype and shape, kept alive until write() returns.");

static PyObject *writer_add(WriterObject *self, PyObject *args) {
    struct dsc_shard_tensor tensor = {NULL};
    struct dsc_borrowed memory;
    const char *dtype;
    PyObject *key, *shape, *object;
    if (!PyArg_ParseTuple(args, "UsOO:add", &key, &dtype, &shape, &object) ||
        dsc_bind_borrow_any(dsc_bind_state_of(Py_TYPE(self)), object, "tensor", &memory) < 0)
        return NULL;
    tensor.key = PyUnicode_AsUTF8(key);
    if (!tensor.key)
        return NULL;
    if (self->core || self->busy)
        return PyErr_Format(PyExc_RuntimeError, "%s: the file has been written already",
                            tensor.key);
    tensor.dtype = dsc_shard_dtype_of(dtype);
    if (tensor.dtype == DSC_SHARD_DTYPE_COUNT)
        return PyErr_Format(PyExc_ValueError, "%s: dtype '%s'; allowed: F64, F32, F16, BF16, ...",
                            tensor.key, dtype);
    uint64_t *extents = shape_of(shape, &tensor.n_dims);
    tensor.shape = extents;
    if (!extents || check(self, &tensor, &memory) < 0 || make_room(self) < 0 ||
        PyList_Append(self->keep, key) < 0 || PyList_Append(self->keep, object) < 0) {
        dsc_free(extents);
        return NULL;
    }
    self->tensors[self->n_tensors] = tensor;
    self->data[self->n_tensors++] = memory.data;
    Py_RETURN_NONE;
}

/* ---- writing ---- */

struct report {
    PyObject *callable; /* or None */
    uint64_t last;
};

/* With signals, so that Ctrl-C ends a write. */
static bool report_progress(void *context, uint64_t n_done) {
    enum { EVERY = 32 << 20 };
    struct report *report = context;
    if (n_done - report->last < EVERY)
        return true;
    report->last = n_done;
    PyGILState_STATE gil = PyGILState_Ensure();
    PyObject *done = NULL;
    if (PyErr_CheckSignals() == 0)
        done = report->callable == Py_None
                   ? Py_NewRef(Py_None)
                   : PyObject_CallFunction(report->callable, "K", (unsigned long long)n_done);
    Py_XDECREF(done);
    PyGILState_Release(gil);
    return done != NULL;
}

/* The tensors are not needed any more. */
static int let_go(WriterObject *self) {
    forget_tensors(self);
    return PyList_SetSlice(self->keep, 0, PyList_GET_SIZE(self->keep), NULL);
}

/* Copies on threads of its own where it can have them. */
static enum dsc_status detach_core(struct dsc_save *core, int n_threads, struct dsc_team team) {
    struct dsc_pool *pool = NULL;
    (void)dsc_pool_open(n_threads, team, &pool);
    enum dsc_status status = dsc_save_detach(core, pool);
    dsc_pool_close(pool);
    return status;
}

enum way { IN_THIS_THREAD, IN_ANOTHER, FROM_A_COPY };

static enum dsc_status run_write(WriterObject *self, enum way way, PyObject *progress) {
    static const char *const metadata[] = {"format", "deepspeed_c", "version", "1", NULL};
    struct report report = {progress, 0};
    struct dsc_team team = dsc_bind_team(dsc_bind_state_of(Py_TYPE(self)));
    const char *path = PyBytes_AS_STRING(self->path);
    enum dsc_status status;
    Py_BEGIN_ALLOW_THREADS;
    status = dsc_save_open(path, self->tensors, self->data, self->n_tensors, metadata, &self->core);
    if (status == DSC_OK)
        status = way == IN_THIS_THREAD ? dsc_save_write(self->core, report_progress, &report)
                                       : dsc_save_start(self->core);
    if (status == DSC_OK && way == FROM_A_COPY)
        status = detach_core(self->core, self->n_threads, team);
    Py_END_ALLOW_THREADS;
    return status;
}

static PyObject *begin_write(WriterObject *self, enum way way, PyObject *progress) {
    if (self->core)
        return PyErr_Format(PyExc_RuntimeError, "%s: the file has been written already",
                            PyBytes_AS_STRING(self->path));
    if (enter(self) < 0)
        return NULL;
    enum dsc_status status = run_write(self, way, progress);
    self->busy = false;
    if (status != DSC_OK && self->core && !dsc_save_crcs(self->core)) {
        dsc_save_close(self->core); /* nothing has begun: it may be tried again */
        self->core = NULL;
    }
    PyObject *result = status == DSC_OK ? Py_NewRef(Py_None) : raise_status(self, status);
    if (self->core && way != IN_ANOTHER && let_go(self) < 0)
        Py_CLEAR(result);
    return result;
}

PyDoc_STRVAR(
    write_doc,
    "write(snapshot, progress=None)\n\n"
    "Writes all that was added to <path>.part, syncs it and renames it to <path>. With\n"
    "snapshot a thread writes, and what it has not read on return has been copied: see wait().\n"
    "progress(n_bytes) is called now and then without snapshot. OSError with errno and path;\n"
    "ValueError for a key that is there twice.");

static PyObject *writer_write(WriterObject *self, PyObject *args, PyObject *kwargs) {
    static char *keys[] = {"snapshot", "progress", NULL};
    int snapshot;
    PyObject *progress = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "p|O:write", keys, &snapshot, &progress))
        return NULL;
    return begin_write(self, snapshot ? FROM_A_COPY : IN_THIS_THREAD, progress);
}

PyDoc_STRVAR(start_doc, "start()\n\n"
                        "A thread writes, and reads the tensors where they lie: they must not\n"
                        "change before detach() or wait() has returned.");

static PyObject *writer_start(WriterObject *self, PyObject *unused) {
    (void)unused;
    return begin_write(self, IN_ANOTHER, Py_None);
}

PyDoc_STRVAR(detach_doc, "detach()\n\n"
                         "After start(): on return the tensors may change, and pieces() is final,\n"
                         "unless the write has failed, which wait() tells. What has not been\n"
                         "read by then is copied.");

static PyObject *writer_detach(WriterObject *self, PyObject *unused) {
    enum dsc_status status;
    (void)unused;
    if (!self->core)
        return PyErr_Format(PyExc_RuntimeError, "%s: start() has not been called",
                            PyBytes_AS_STRING(self->path));
    struct dsc_team team = dsc_bind_team(dsc_bind_state_of(Py_TYPE(self)));
    if (enter(self) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    status = detach_core(self->core, self->n_threads, team);
    Py_END_ALLOW_THREADS;
    self->busy = false;
    if (status != DSC_OK)
        return raise_status(self, status);
    return let_go(self) < 0 ? NULL : Py_NewRef(Py_None);
}

PyDoc_STRVAR(wait_doc, "wait()\n\nReturns once the file is on the disk; raises what the write "
                       "raised. Ctrl-C ends the wait, not the write.");

static PyObject *writer_wait(WriterObject *self, PyObject *unused) {
    enum dsc_status status;
    (void)unused;
    if (!self->core)
        return PyErr_Format(PyExc_RuntimeError, "%s: write() has not been called",
                            PyBytes_AS_STRING(self->path));
    /* Several threads may wait, and one may detach meanwhile. */
    Py_BEGIN_ALLOW_THREADS;
    status = dsc_save_wait(self->core, dsc_bind_interrupted, NULL);
    Py_END_ALLOW_THREADS;
    if (dsc_save_done(self->core) && let_go(self) < 0)
        return NULL;
    return status == DSC_OK ? Py_NewRef(Py_None) : raise_status(self, status);
}

PyDoc_STRVAR(done_doc, "done() -> bool\n\nWhether wait() would return, or raise, at once.");

static PyObject *writer_done(WriterObject *self, PyObject *unused) {
    (void)unused;
    return PyBool_FromLong(!self->core || dsc_save_done(self->core));
}

/* ---- what it holds ---- */

/* The layout, once the checksums are final; NULL with an exception before. */
static const struct dsc_shard_layout *layout_of(WriterObject *self) {
    if (self->core && dsc_save_crcs(self->core))
        return dsc_save_layout(self->core);
    PyErr_Format(PyExc_RuntimeError, "%s: neither write() nor detach() has returned",
                 PyBytes_AS_STRING(self->path));
    return NULL;
}

static PyObject *piece(const struct dsc_shard_layout *layout, const uint32_t *crcs, size_t i) {
    const struct dsc_shard_tensor *tensor = &layout->tensors[i];
    size_t first = layout->first_crc[i], n = layout->first_crc[i + 1] - first;
    PyObject *list = PyList_New((Py_ssize_t)n);
    for (size_t k = 0; list && k < n; k++) {
        PyObject *number = PyLong_FromUnsignedLong(crcs[first + k]);
        if (!number)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, (Py_ssize_t)k, number);
    }
    return list ? Py_BuildValue("sKKN", tensor->key, (unsigned long long)tensor->offset,
                                (unsigned long long)tensor->n_bytes, list)
                : NULL;
}

PyDoc_STRVAR(pieces_doc,
             "pieces() -> list of (key, offset, n_bytes, crcs)\n\n"
             "Where everything stands, in the order of the file; offset from its start; crcs: the\n"
             "CRC32C of each MiB of the tensor. After write().");

static PyObject *writer_pieces(WriterObject *self, PyObject *unused) {
    (void)unused;
    const struct dsc_shard_layout *layout = layout_of(self);
    PyObject *list = layout ? PyList_New((Py_ssize_t)layout->n_tensors) : NULL;
    for (size_t i = 0; list && i < layout->n_tensors; i++) {
        PyObject *item = piece(layout, dsc_save_crcs(self->core), i);
        if (!item)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, (Py_ssize_t)i, item);
    }
    return list;
}

static PyObject *writer_header_crc(WriterObject *self, void *unused) {
    (void)unused;
    const struct dsc_shard_layout *layout = layout_of(self);
    return layout ? PyLong_FromUnsignedLong(layout->header_crc) : NULL;
}

static PyObject *writer_n_bytes(WriterObject *self, void *unused) {
    (void)unused;
    const struct dsc_shard_layout *layout = layout_of(self);
    return layout ? PyLong_FromUnsignedLongLong(layout->n_bytes) : NULL;
}

static PyMethodDef writer_methods[] = {
    {"add", (PyCFunction)writer_add, METH_VARARGS, add_doc},
    {"write", (PyCFunction)(void (*)(void))writer_write, METH_VARARGS | METH_KEYWORDS, write_doc},
    {"start", (PyCFunction)writer_start, METH_NOARGS, start_doc},
    {"detach", (PyCFunction)writer_detach, METH_NOARGS, detach_doc},
    {"wait", (PyCFunction)writer_wait, METH_NOARGS, wait_doc},
    {"done", (PyCFunction)writer_done, METH_NOARGS, done_doc},
    {"pieces", (PyCFunction)writer_pieces, METH_NOARGS, pieces_doc},
    {NULL},
};

static PyGetSetDef writer_getset[] = {
    {"header_crc", (getter)writer_header_crc, NULL,
     "CRC32C of everything before the data: length, JSON and padding. After write().", NULL},
    {"n_bytes", (getter)writer_n_bytes, NULL, "Bytes of the file. After write().", NULL},
    {NULL},
};

static PyType_Slot writer_slots[] = {
    {Py_tp_new, writer_new},
    {Py_tp_dealloc, writer_dealloc},
    {Py_tp_traverse, writer_traverse},
    {Py_tp_clear, writer_clear},
    {Py_tp_methods, writer_methods},
    {Py_tp_getset, writer_getset},
    {Py_tp_doc, "ShardWriter(path, n_threads=1): a file in the safetensors layout, written once. "
                "n_threads: that copy a snapshot."},
    {0, NULL},
};

static PyType_Spec writer_spec = {
    .name = "deepspeed_c._core.ShardWriter",
    .basicsize = sizeof(WriterObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = writer_slots,
};

/* ---- checksums ---- */

PyDoc_STRVAR(crc32c_doc, "crc32c(data, before=0)\n--\n\n"
                         "CRC32C of a buffer, going on from that of what came before it.");

static PyObject *crc32c(PyObject *module, PyObject *args) {
    Py_buffer data;
    unsigned long before = 0;
    uint32_t crc;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*|k:crc32c", &data, &before))
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    crc = dsc_crc32c((uint32_t)before, data.buf, (size_t)data.len);
    Py_END_ALLOW_THREADS;
    PyBuffer_Release(&data);
    return PyLong_FromUnsignedLong(crc);
}

static PyMethodDef functions[] = {
    {"crc32c", crc32c, METH_VARARGS, crc32c_doc},
    {NULL},
};

int dsc_bind_add_shard_writer(PyObject *module) {
    PyObject *type = PyType_FromModuleAndSpec(module, &writer_spec, NULL);
    int failed = type ? PyModule_AddType(module, (PyTypeObject *)type) : -1;
    Py_XDECREF(type);
    return failed < 0 ? failed : PyModule_AddFunctions(module, functions);
}
