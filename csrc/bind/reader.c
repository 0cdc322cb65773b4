/* The type Reader: tensors of a checkpoint (csrc/reader.h) into Python's. One call at a time. */
#include "bind.h"
#include "checkpoint.h"

#include "../reader.h"

typedef struct {
    PyObject_HEAD struct dsc_reader *core;
    PyObject *manifest;
    bool busy;
} ReaderObject;

PyObject *dsc_bind_open_reader(struct dsc_bind_state *state, PyObject *manifest, PyObject *folder) {
    PyObject *path;
    if (!PyUnicode_FSConverter(folder, &path))
        return NULL;
    ReaderObject *self = (ReaderObject *)state->reader_type->tp_alloc(state->reader_type, 0);
    enum dsc_status status = DSC_OK;
    if (self) {
        self->manifest = Py_NewRef(manifest);
        status = dsc_reader_open(dsc_bind_manifest(manifest), PyBytes_AS_STRING(path), &self->core);
    }
    if (status != DSC_OK) {
        Py_CLEAR(self);
        dsc_bind_raise(state, status);
    }
    Py_DECREF(path);
    return (PyObject *)self;
}

static int reader_traverse(ReaderObject *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->manifest);
    return 0;
}

static int reader_clear(ReaderObject *self) {
    dsc_reader_close(self->core);
    self->core = NULL;
    Py_CLEAR(self->manifest);
    return 0;
}

static void reader_dealloc(ReaderObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    (void)reader_clear(self);
    type->tp_free(self);
    Py_DECREF(type);
}

/* Under the GIL: the reader is this call's until it clears `busy`. */
static int enter(ReaderObject *self) {
    if (self->core && !self->busy) {
        self->busy = true;
        return 0;
    }
    PyErr_SetString(PyExc_RuntimeError,
                    self->core ? "Reader: already running in another thread" : "Reader: closed");
    return -1;
}

static PyObject *leave(ReaderObject *self, enum dsc_status status) {
    self->busy = false;
    if (status != DSC_OK)
        return dsc_bind_raise(dsc_bind_state_of(Py_TYPE(self)), status);
    Py_RETURN_NONE;
}

/* The tensor of (kind, name, place, ...); NULL with an exception. */
static const struct dsc_manifest_tensor *find(ReaderObject *self, const char *kind,
                                              const char *name, PyObject *place_object) {
    uint32_t place[2];
    if (!self->core) {
        PyErr_SetString(PyExc_RuntimeError, "Reader: closed");
        return NULL;
    }
    return dsc_bind_place(place_object, place) < 0
               ? NULL
               : dsc_bind_find_tensor(self->manifest, kind, name, place);
}

/* Memory for n elements of the tensor. Bytes (uint8) may stand for any type. */
static void *memory_of(ReaderObject *self, PyObject *out, const struct dsc_manifest_tensor *tensor,
                       unsigned long long n) {
    static const enum dsc_dtype own[DSC_SHARD_DTYPE_COUNT + 1] = {
        [DSC_SHARD_F64] = DSC_F64 + 1, [DSC_SHARD_F32] = DSC_F32 + 1,
        [DSC_SHARD_F16] = DSC_F16 + 1, [DSC_SHARD_BF16] = DSC_BF16 + 1,
        [DSC_SHARD_I64] = DSC_I64 + 1, [DSC_SHARD_I32] = DSC_I32 + 1,
    };
    const size_t size = dsc_shard_dtype_size(tensor->dtype);
    struct dsc_borrowed memory;
    if (dsc_bind_borrow_any(dsc_bind_state_of(Py_TYPE(self)), out, "out", &memory) < 0)
        return NULL;
    const size_t n_bytes = memory.n_elems * dsc_dtype_size(memory.dtype);
    const bool same_type =
        memory.dtype == DSC_U8 || own[tensor->dtype] == (enum dsc_dtype)(memory.dtype + 1);
    if (memory.on_cpu && memory.contiguous && same_type && n <= SIZE_MAX / size &&
        n_bytes == n * size)
        return memory.data ? memory.data : (void *)self; /* no byte will be written */
    PyErr_Format(
        PyExc_ValueError,
        "out: %llu elements of %s/%s need %llu contiguous bytes of the CPU, of dtype %s or "
        "uint8; it has %zu bytes (%s)",
        n, tensor->kind, tensor->name, n * size, dsc_shard_dtype_name(tensor->dtype), n_bytes,
        dsc_dtype_name(memory.dtype));
    return NULL;
}

PyDoc_STRVAR(read_doc,
             "read(kind, name, place, begin, n, out)\n\n"
             "Elements [begin, begin + n) of a tensor, in the order of storage, into a flat CPU\n"
             "tensor of its dtype (or uint8). Every block that they touch is checked.\n"
             "CheckpointError names file and tensor, OSError the file; out is undefined then.");

static PyObject *reader_read(ReaderObject *self, PyObject *args) {
    const char *kind, *name;
    PyObject *place, *out;
    unsigned long long begin, n;
    enum dsc_status status;
    if (!PyArg_ParseTuple(args, "ssOKKO:read", &kind, &name, &place, &begin, &n, &out))
        return NULL;
    const struct dsc_manifest_tensor *tensor = find(self, kind, name, place);
    void *memory = tensor ? memory_of(self, out, tensor, n) : NULL;
    if (!memory || enter(self) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    status = dsc_reader_read(self->core, tensor, begin, n, memory);
    Py_END_ALLOW_THREADS;
    return leave(self, status);
}

PyDoc_STRVAR(check_doc, "check(kind, name, place, begin, n)\n\n"
                        "The same without keeping what is read.");

static PyObject *reader_check(ReaderObject *self, PyObject *args) {
    const char *kind, *name;
    PyObject *place;
    unsigned long long begin, n;
    enum dsc_status status;
    if (!PyArg_ParseTuple(args, "ssOKK:check", &kind, &name, &place, &begin, &n))
        return NULL;
    const struct dsc_manifest_tensor *tensor = find(self, kind, name, place);
    if (!tensor || enter(self) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    status = dsc_reader_read(self->core, tensor, begin, n, NULL);
    Py_END_ALLOW_THREADS;
    return leave(self, status);
}

PyDoc_STRVAR(check_file_doc,
             "check_file(name)\n\n"
             "Size and head of a file; all of a file without tensors. Errors as read.");

static PyObject *reader_check_file(ReaderObject *self, PyObject *name) {
    const char *text = PyUnicode_AsUTF8(name);
    enum dsc_status status;
    if (!text || enter(self) < 0)
        return NULL;
    const int64_t file = dsc_manifest_find_file(dsc_bind_manifest(self->manifest), text);
    if (file < 0) {
        self->busy = false;
        return PyErr_Format(PyExc_KeyError, "the checkpoint has no file %s", text);
    }
    Py_BEGIN_ALLOW_THREADS;
    status = dsc_reader_check_file(self->core, (uint32_t)file);
    Py_END_ALLOW_THREADS;
    return leave(self, status);
}

/* Tells Python how far it is; false where that, or a signal handler, raised. */
static bool report(void *progress, uint64_t n_done) {
    PyGILState_STATE gil = PyGILState_Ensure();
    bool fine = PyErr_CheckSignals() == 0;
    if (fine && progress != Py_None) {
        PyObject *result = PyObject_CallFunction(progress, "K", (unsigned long long)n_done);
        fine = result != NULL;
        Py_XDECREF(result);
    }
    PyGILState_Release(gil);
    return fine;
}

PyDoc_STRVAR(verify_doc, "verify(progress=None)\n\n"
                         "Checks every byte, to the first fault; calls progress(bytes done) now "
                         "and then.");

static PyObject *reader_verify(ReaderObject *self, PyObject *args, PyObject *kwargs) {
    static char *keys[] = {"progress", NULL};
    PyObject *progress = Py_None;
    enum dsc_status status;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|O:verify", keys, &progress) || enter(self) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    status = dsc_reader_verify(self->core, report, progress);
    Py_END_ALLOW_THREADS;
    return leave(self, status);
}

static PyObject *reader_close(ReaderObject *self, PyObject *unused) {
    (void)unused;
    if (self->busy) {
        PyErr_SetString(PyExc_RuntimeError, "Reader: already running in another thread");
        return NULL;
    }
    (void)reader_clear(self);
    Py_RETURN_NONE;
}

static PyMethodDef reader_methods[] = {
    {"read", (PyCFunction)reader_read, METH_VARARGS, read_doc},
    {"check", (PyCFunction)reader_check, METH_VARARGS, check_doc},
    {"check_file", (PyCFunction)reader_check_file, METH_O, check_file_doc},
    {"verify", (PyCFunction)(void (*)(void))reader_verify, METH_VARARGS | METH_KEYWORDS,
     verify_doc},
    {"close", (PyCFunction)reader_close, METH_NOARGS, "Closes its files. Idempotent."},
    {NULL},
};

static PyType_Slot reader_slots[] = {
    {Py_tp_dealloc, reader_dealloc},
    {Py_tp_traverse, reader_traverse},
    {Py_tp_clear, reader_clear},
    {Py_tp_methods, reader_methods},
    {Py_tp_doc, "Reads tensors of a checkpoint. From Manifest.open()."},
    {0, NULL},
};

static PyType_Spec reader_spec = {
    .name = "deepspeed_c._core.Reader",
    .basicsize = sizeof(ReaderObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = reader_slots,
};

int dsc_bind_add_reader(PyObject *module) {
    struct dsc_bind_state *state = dsc_bind_module_state(module);
    state->reader_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &reader_spec, NULL);
    return state->reader_type ? PyModule_AddType(module, state->reader_type) : -1;
}
