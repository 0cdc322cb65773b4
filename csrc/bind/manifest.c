/* The type Manifest: the table of a checkpoint (csrc/manifest.h) for Python.
 *
 * Invariant: once a manifest was written or opened it is closed and does not change, so that
 * readers use it without the GIL. */
#include "bind.h"
#include "checkpoint.h"

#include "../alloc.h"
#include "../manifest.h"

#include <string.h>

typedef struct {
    PyObject_HEAD struct dsc_manifest *core;
} ManifestObject;

const struct dsc_manifest *dsc_bind_manifest(PyObject *manifest) {
    return ((ManifestObject *)manifest)->core;
}

static PyObject *raise_from(ManifestObject *self, enum dsc_status status) {
    return dsc_bind_raise(dsc_bind_state_of(Py_TYPE(self)), status);
}

static PyObject *manifest_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *keys[] = {NULL};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, ":Manifest", keys))
        return NULL;
    ManifestObject *self = (ManifestObject *)type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    const enum dsc_status status = dsc_manifest_open(&self->core);
    if (status == DSC_OK)
        return (PyObject *)self;
    Py_DECREF(self);
    return dsc_bind_raise(dsc_bind_state_of(type), status);
}

static void manifest_dealloc(ManifestObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    dsc_manifest_free(self->core);
    type->tp_free(self);
    Py_DECREF(type);
}

PyDoc_STRVAR(parse_doc,
             "parse(text, path='manifest.json') -> Manifest\n\n"
             "From the bytes of a manifest.json; path is for messages. CheckpointError says what\n"
             "is damaged, and where.");

static PyObject *manifest_parse(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *keys[] = {"text", "path", NULL};
    PyObject *text, *path = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!|O&:parse", keys, &PyBytes_Type, &text,
                                     PyUnicode_FSConverter, &path))
        return NULL;
    ManifestObject *self = (ManifestObject *)type->tp_alloc(type, 0);
    enum dsc_status status = DSC_OK;
    const char *bytes = PyBytes_AS_STRING(text); /* with a zero byte behind them */
    const size_t n = (size_t)PyBytes_GET_SIZE(text);
    const char *name = path ? PyBytes_AS_STRING(path) : "manifest.json";
    if (self) {
        struct dsc_manifest *core = NULL;
        Py_BEGIN_ALLOW_THREADS;
        status = dsc_manifest_parse(bytes, n, name, &core);
        Py_END_ALLOW_THREADS;
        self->core = core;
    }
    if (status != DSC_OK) {
        Py_CLEAR(self);
        dsc_bind_raise(dsc_bind_state_of(type), status);
    }
    Py_XDECREF(path);
    return (PyObject *)self;
}

/* ---- sections and files ---- */

PyDoc_STRVAR(set_doc, "set(section, json_text)\n\n"
                      "One value as JSON text, in the place of what the section had. ValueError "
                      "where it is not JSON.");

static PyObject *manifest_set(ManifestObject *self, PyObject *args) {
    const char *section, *json;
    if (!PyArg_ParseTuple(args, "ss:set", &section, &json))
        return NULL;
    const enum dsc_status status = dsc_manifest_set(self->core, section, json);
    if (status != DSC_OK)
        return raise_from(self, status);
    Py_RETURN_NONE;
}

static PyObject *manifest_section(ManifestObject *self, PyObject *name) {
    const char *text = PyUnicode_AsUTF8(name);
    if (!text)
        return NULL;
    const char *json = dsc_manifest_section(self->core, text);
    return json ? PyUnicode_FromString(json) : Py_NewRef(Py_None);
}

static PyObject *manifest_sections(ManifestObject *self, PyObject *unused) {
    (void)unused;
    const size_t n = dsc_manifest_n_sections(self->core);
    PyObject *list = PyList_New((Py_ssize_t)n);
    for (size_t i = 0; list && i < n; i++) {
        PyObject *name = PyUnicode_FromString(dsc_manifest_section_name(self->core, i));
        if (!name)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, (Py_ssize_t)i, name);
    }
    return list;
}

PyDoc_STRVAR(add_file_doc,
             "add_file(name, n_bytes, head_crc) -> int\n\n"
             "A file of the checkpoint; files count from 0. head_crc: the CRC32C of what stands\n"
             "before its first tensor (ShardWriter.header_crc), of all of a file without tensors.");

static PyObject *manifest_add_file(ManifestObject *self, PyObject *args) {
    struct dsc_manifest_file file = {0};
    unsigned long long n_bytes;
    unsigned long crc;
    uint32_t number;
    PyObject *n_bytes_object, *crc_object;
    if (!PyArg_ParseTuple(args, "sO!O!:add_file", &file.name, &PyLong_Type, &n_bytes_object,
                          &PyLong_Type, &crc_object))
        return NULL;
    n_bytes = PyLong_AsUnsignedLongLong(n_bytes_object);
    crc = PyLong_AsUnsignedLong(crc_object);
    if (PyErr_Occurred())
        return NULL;
    if (crc > UINT32_MAX)
        return PyErr_Format(PyExc_ValueError, "%s: head_crc is %lu; allowed: 32 bits", file.name,
                            crc);
    file.n_bytes = n_bytes;
    file.head_crc = (uint32_t)crc;
    const enum dsc_status status = dsc_manifest_add_file(self->core, &file, &number);
    return status == DSC_OK ? PyLong_FromUnsignedLong(number) : raise_from(self, status);
}

static PyObject *manifest_files(ManifestObject *self, PyObject *unused) {
    (void)unused;
    const size_t n = dsc_manifest_n_files(self->core);
    PyObject *list = PyList_New((Py_ssize_t)n);
    for (size_t i = 0; list && i < n; i++) {
        const struct dsc_manifest_file *file = dsc_manifest_file(self->core, i);
        PyObject *item =
            Py_BuildValue("(sKkK)", file->name, (unsigned long long)file->n_bytes,
                          (unsigned long)file->head_crc, (unsigned long long)file->head_bytes);
        if (!item)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, (Py_ssize_t)i, item);
    }
    return list;
}

/* ---- tensors ---- */

int dsc_bind_place(PyObject *place, uint32_t out[2]) {
    unsigned long long ranks[2];
    if (!PyTuple_Check(place) || PyTuple_GET_SIZE(place) != 2) {
        PyErr_Format(PyExc_TypeError,
                     "place must be a tuple of two ranks (tensor, pipe), got %.100s",
                     Py_TYPE(place)->tp_name);
        return -1;
    }
    for (int i = 0; i < 2; i++) {
        ranks[i] = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(place, i));
        if (PyErr_Occurred())
            return -1;
        if (ranks[i] > UINT32_MAX) {
            PyErr_Format(PyExc_ValueError, "place has the rank %llu; allowed: 32 bits", ranks[i]);
            return -1;
        }
        out[i] = (uint32_t)ranks[i];
    }
    return 0;
}

/* Numbers of a sequence (of PySequence_Fast) into `out`. */
static int read_numbers(PyObject *fast, uint64_t *out) {
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(fast); i++) {
        out[i] = PyLong_AsUnsignedLongLong(PySequence_Fast_GET_ITEM(fast, i));
        if (PyErr_Occurred())
            return -1;
    }
    return 0;
}

static int read_dims(PyObject *sequence, const char *what, uint64_t out[], int *n) {
    PyObject *fast = PySequence_Fast(sequence, what);
    int failed = -1;
    if (!fast)
        return -1;
    if (PySequence_Fast_GET_SIZE(fast) > DSC_SHARD_MAX_DIMS)
        PyErr_Format(PyExc_ValueError, "%s: %zd dimensions; allowed: at most %d", what,
                     PySequence_Fast_GET_SIZE(fast), DSC_SHARD_MAX_DIMS);
    else
        failed = read_numbers(fast, out);
    *n = (int)PySequence_Fast_GET_SIZE(fast);
    Py_DECREF(fast);
    return failed;
}

struct pieces {
    struct dsc_manifest_piece *list;
    uint32_t *crcs;
    size_t n_crcs, room;
};

static int read_crcs(PyObject *sequence, struct pieces *pieces, size_t *n) {
    PyObject *fast = PySequence_Fast(sequence, "the checksums of a piece must be a sequence");
    int failed = fast ? 0 : -1;
    *n = fast ? (size_t)PySequence_Fast_GET_SIZE(fast) : 0;
    if (fast && pieces->n_crcs + *n > pieces->room) {
        const size_t room = dsc_max(pieces->n_crcs + *n, 2 * pieces->room);
        const enum dsc_status status =
            dsc_realloc((void **)&pieces->crcs, room * sizeof *pieces->crcs);
        pieces->room = status == DSC_OK ? room : pieces->room;
        failed = status == DSC_OK ? 0 : -1;
        if (failed)
            PyErr_NoMemory();
    }
    for (size_t i = 0; !failed && i < *n; i++) {
        const unsigned long crc =
            PyLong_AsUnsignedLong(PySequence_Fast_GET_ITEM(fast, (Py_ssize_t)i));
        if (!PyErr_Occurred() && crc > UINT32_MAX)
            PyErr_Format(PyExc_ValueError, "a checksum is %lu; allowed: 32 bits", crc);
        failed = PyErr_Occurred() ? -1 : 0;
        pieces->crcs[pieces->n_crcs++] = (uint32_t)crc;
    }
    Py_XDECREF(fast);
    return failed;
}

/* From (file, offset, begin, n, checksums). */
static int read_piece(PyObject *item, struct pieces *pieces, struct dsc_manifest_piece *out) {
    PyObject *fast = PySequence_Tuple(item), *crcs;
    unsigned long long file, offset, begin, n;
    int failed = -1;
    if (fast && PyArg_ParseTuple(fast, "KKKKO;a piece is (file, offset, begin, n, checksums)",
                                 &file, &offset, &begin, &n, &crcs)) {
        *out = (struct dsc_manifest_piece){(uint32_t)file, offset, begin, n, 0, 0};
        failed = read_crcs(crcs, pieces, &out->n_crcs);
        if (!failed && file > UINT32_MAX) {
            PyErr_Format(PyExc_ValueError, "a piece lies in file %llu; there is none", file);
            failed = -1;
        }
    }
    Py_XDECREF(fast);
    return failed;
}

static int read_pieces(PyObject *fast, struct pieces *pieces) {
    const Py_ssize_t n = PySequence_Fast_GET_SIZE(fast);
    if (dsc_alloc((size_t)n * sizeof *pieces->list, (void **)&pieces->list) != DSC_OK) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < n; i++)
        if (read_piece(PySequence_Fast_GET_ITEM(fast, i), pieces, &pieces->list[i]) < 0)
            return -1;
    return 0;
}

PyDoc_STRVAR(
    add_tensor_doc,
    "add_tensor(kind, name, place, dtype, shape, stride, group, pieces)\n\n"
    "place: (tensor rank, pipe rank); dtype: \"F32\", ...; stride: in elements, a permutation of\n"
    "C order; group: number of the parameter group, -1 for none; pieces: a sequence of\n"
    "(file, offset, begin, n, checksums), sorted by begin, that cover the elements once; none\n"
    "for a tensor without elements; checksums: one for each MiB begun (ShardWriter.pieces()).\n"
    "ValueError says what is wrong; nothing has changed then.");

static PyObject *manifest_add_tensor(ManifestObject *self, PyObject *args, PyObject *kwargs) {
    static char *keys[] = {"kind",   "name",  "place",  "dtype", "shape",
                           "stride", "group", "pieces", NULL};
    uint64_t shape[DSC_SHARD_MAX_DIMS], stride[DSC_SHARD_MAX_DIMS];
    struct dsc_manifest_tensor tensor = {.shape = shape, .stride = stride};
    struct pieces pieces = {0};
    PyObject *place, *shape_object, *stride_object, *list, *fast = NULL, *result = NULL;
    const char *dtype;
    long long group;
    int n_strides;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "ssOsOOLO:add_tensor", keys, &tensor.kind,
                                     &tensor.name, &place, &dtype, &shape_object, &stride_object,
                                     &group, &list) ||
        dsc_bind_place(place, tensor.place) < 0 ||
        read_dims(shape_object, "shape", shape, &tensor.n_dims) < 0 ||
        read_dims(stride_object, "stride", stride, &n_strides) < 0)
        return NULL;
    tensor.group = group;
    tensor.dtype = dsc_shard_dtype_of(dtype);
    if (tensor.dtype == DSC_SHARD_DTYPE_COUNT)
        return PyErr_Format(PyExc_ValueError,
                            "tensor %s/%s: dtype is \"%s\"; allowed: F32, BF16, "
                            "and the like of safetensors",
                            tensor.kind, tensor.name, dtype);
    if (n_strides != tensor.n_dims)
        return PyErr_Format(PyExc_ValueError, "tensor %s/%s has %d dimensions and %d strides",
                            tensor.kind, tensor.name, tensor.n_dims, n_strides);
    fast = PySequence_Fast(list, "pieces must be a sequence");
    if (fast && read_pieces(fast, &pieces) == 0) {
        const enum dsc_status status = dsc_manifest_add_tensor(
            self->core, &tensor, pieces.list, (size_t)PySequence_Fast_GET_SIZE(fast), pieces.crcs);
        result = status == DSC_OK ? Py_NewRef(Py_None) : raise_from(self, status);
    }
    Py_XDECREF(fast);
    dsc_free(pieces.list);
    dsc_free(pieces.crcs);
    return result;
}

static PyObject *tuple_of(const uint64_t *numbers, int n) {
    PyObject *tuple = PyTuple_New(n);
    for (int i = 0; tuple && i < n; i++) {
        PyObject *number = PyLong_FromUnsignedLongLong(numbers[i]);
        if (!number)
            Py_CLEAR(tuple);
        else
            PyTuple_SET_ITEM(tuple, i, number);
    }
    return tuple;
}

PyDoc_STRVAR(tensors_doc, "tensors() -> [(kind, name, place, dtype, shape, stride, group)]\n\n"
                          "In the order of the table.");

static PyObject *manifest_tensors(ManifestObject *self, PyObject *unused) {
    (void)unused;
    const size_t n = dsc_manifest_n_tensors(self->core);
    PyObject *list = PyList_New((Py_ssize_t)n);
    for (size_t i = 0; list && i < n; i++) {
        const struct dsc_manifest_tensor *tensor = dsc_manifest_tensor(self->core, i);
        PyObject *item = Py_BuildValue(
            "(ss(kk)sNNL)", tensor->kind, tensor->name, (unsigned long)tensor->place[0],
            (unsigned long)tensor->place[1], dsc_shard_dtype_name(tensor->dtype),
            tuple_of(tensor->shape, tensor->n_dims), tuple_of(tensor->stride, tensor->n_dims),
            (long long)tensor->group);
        if (!item)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, (Py_ssize_t)i, item);
    }
    return list;
}

const struct dsc_manifest_tensor *dsc_bind_find_tensor(PyObject *manifest, const char *kind,
                                                       const char *name, const uint32_t place[2]) {
    const struct dsc_manifest_tensor *tensor =
        dsc_manifest_find(dsc_bind_manifest(manifest), kind, name, place);
    if (!tensor)
        PyErr_Format(PyExc_KeyError, "the checkpoint has no tensor %s/%s of place (%lu, %lu)", kind,
                     name, (unsigned long)place[0], (unsigned long)place[1]);
    return tensor;
}

PyDoc_STRVAR(pieces_doc,
             "pieces(kind, name, place) -> [(file, offset, begin, n)]\n\n"
             "Where the elements of a tensor lie; file: its number. KeyError: no such tensor.");

static PyObject *manifest_pieces(ManifestObject *self, PyObject *args) {
    const char *kind, *name;
    PyObject *place_object;
    uint32_t place[2];
    if (!PyArg_ParseTuple(args, "ssO:pieces", &kind, &name, &place_object) ||
        dsc_bind_place(place_object, place) < 0)
        return NULL;
    const struct dsc_manifest_tensor *tensor =
        dsc_bind_find_tensor((PyObject *)self, kind, name, place);
    PyObject *list = tensor ? PyList_New((Py_ssize_t)tensor->n_pieces) : NULL;
    for (size_t i = 0; list && i < tensor->n_pieces; i++) {
        const struct dsc_manifest_piece *piece =
            &dsc_manifest_pieces(self->core)[tensor->first_piece + i];
        PyObject *item =
            Py_BuildValue("(kKKK)", (unsigned long)piece->file, (unsigned long long)piece->offset,
                          (unsigned long long)piece->begin, (unsigned long long)piece->n);
        if (!item)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, (Py_ssize_t)i, item);
    }
    return list;
}

/* ---- the whole ---- */

PyDoc_STRVAR(text_doc, "text() -> bytes\n\n"
                       "Of manifest.json. Looks at the table as a whole (ValueError where files "
                       "have bytes\nthat no piece covers) and closes it: nothing can be added.");

static PyObject *manifest_text(ManifestObject *self, PyObject *unused) {
    (void)unused;
    char *text = NULL;
    size_t n = 0;
    enum dsc_status status = dsc_manifest_close(self->core);
    if (status == DSC_OK)
        status = dsc_manifest_text(self->core, &text, &n);
    if (status != DSC_OK)
        return raise_from(self, status);
    PyObject *bytes = PyBytes_FromStringAndSize(text, (Py_ssize_t)n);
    dsc_free(text);
    return bytes;
}

PyDoc_STRVAR(open_doc, "open(folder) -> Reader\n\n"
                       "Of the files in this folder; the manifest is closed. Files are opened when "
                       "they are\nread.");

static PyObject *manifest_open(ManifestObject *self, PyObject *folder) {
    const enum dsc_status status = dsc_manifest_close(self->core);
    if (status != DSC_OK)
        return raise_from(self, status);
    return dsc_bind_open_reader(dsc_bind_state_of(Py_TYPE(self)), (PyObject *)self, folder);
}

static PyObject *manifest_n_bytes(ManifestObject *self, void *unused) {
    (void)unused;
    return PyLong_FromUnsignedLongLong(dsc_manifest_n_bytes(self->core));
}

static PyMethodDef manifest_methods[] = {
    {"parse", (PyCFunction)(void (*)(void))manifest_parse,
     METH_VARARGS | METH_KEYWORDS | METH_CLASS, parse_doc},
    {"set", (PyCFunction)manifest_set, METH_VARARGS, set_doc},
    {"section", (PyCFunction)manifest_section, METH_O,
     "section(name) -> str\n\nIts JSON text; None where there is none."},
    {"sections", (PyCFunction)manifest_sections, METH_NOARGS, "Names of sections, as a list."},
    {"add_file", (PyCFunction)manifest_add_file, METH_VARARGS, add_file_doc},
    {"files", (PyCFunction)manifest_files, METH_NOARGS,
     "files() -> [(name, n_bytes, head_crc, head_bytes)]; head_bytes is known once it is closed."},
    {"add_tensor", (PyCFunction)(void (*)(void))manifest_add_tensor, METH_VARARGS | METH_KEYWORDS,
     add_tensor_doc},
    {"tensors", (PyCFunction)manifest_tensors, METH_NOARGS, tensors_doc},
    {"pieces", (PyCFunction)manifest_pieces, METH_VARARGS, pieces_doc},
    {"text", (PyCFunction)manifest_text, METH_NOARGS, text_doc},
    {"open", (PyCFunction)manifest_open, METH_O, open_doc},
    {NULL},
};

static PyGetSetDef manifest_values[] = {
    {"n_bytes", (getter)manifest_n_bytes, NULL, "Bytes of all files.", NULL},
    {NULL},
};

static PyType_Slot manifest_slots[] = {
    {Py_tp_new, manifest_new},
    {Py_tp_dealloc, manifest_dealloc},
    {Py_tp_methods, manifest_methods},
    {Py_tp_getset, manifest_values},
    {Py_tp_doc, "Manifest()\n\nThe table of a checkpoint: files, tensors and where they lie, and "
                "sections of JSON."},
    {0, NULL},
};

static PyType_Spec manifest_spec = {
    .name = "deepspeed_c._core.Manifest",
    .basicsize = sizeof(ManifestObject),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = manifest_slots,
};

int dsc_bind_add_manifest(PyObject *module) {
    PyObject *type = PyType_FromModuleAndSpec(module, &manifest_spec, NULL);
    int failed = type ? PyModule_AddType(module, (PyTypeObject *)type) : -1;
    Py_XDECREF(type);
    return failed;
}
