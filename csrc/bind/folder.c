/* The type Folder: the folder of a checkpoint under way (csrc/publish.h). May be used by any
 * thread, one at a time. */
#include "bind.h"

#include "../publish.h"

typedef struct {
    PyObject_HEAD struct dsc_folder *core; /* NULL once published or abandoned */
    PyObject *path;                        /* str */
    bool busy;
} FolderObject;

static void folder_dealloc(FolderObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    dsc_folder_close(self->core);
    Py_XDECREF(self->path);
    type->tp_free(self);
    Py_DECREF(type);
}

static int enter(FolderObject *self) {
    if (self->core && !self->busy) {
        self->busy = true;
        return 0;
    }
    PyErr_Format(PyExc_RuntimeError,
                 self->core ? "%U: already running in another thread"
                            : "%U: published or abandoned already",
                 self->path);
    return -1;
}

static PyObject *leave(FolderObject *self, enum dsc_status status) {
    self->busy = false;
    if (status != DSC_OK)
        return dsc_bind_raise(dsc_bind_state_of(Py_TYPE(self)), status);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(
    folder_doc,
    "checkpoint_folder(dir, tag) -> Folder\n\n"
    "An empty folder aside, in `dir`, which is made where it is missing; debris of saves\n"
    "that died is removed first. ValueError: a tag that no folder can have. RuntimeError:\n"
    "another save of this tag is under way. OSError with path.");

static PyObject *checkpoint_folder(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *keys[] = {"dir", "tag", NULL};
    struct dsc_bind_state *state = dsc_bind_module_state(module);
    PyObject *dir = NULL, *tag = NULL;
    FolderObject *self = NULL;
    enum dsc_status status = DSC_OK;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&O&:checkpoint_folder", keys,
                                     PyUnicode_FSConverter, &dir, PyUnicode_FSConverter, &tag))
        goto out;
    self = (FolderObject *)state->folder_type->tp_alloc(state->folder_type, 0);
    if (self) {
        const char *dir_text = PyBytes_AS_STRING(dir), *tag_text = PyBytes_AS_STRING(tag);
        struct dsc_folder *core = NULL;
        Py_BEGIN_ALLOW_THREADS;
        status = dsc_folder_open(dir_text, tag_text, &core);
        Py_END_ALLOW_THREADS;
        self->core = core;
        if (status == DSC_OK)
            self->path = PyUnicode_DecodeFSDefault(dsc_folder_path(core));
        else
            dsc_bind_raise(state, status);
        if (!self->path)
            Py_CLEAR(self);
    }
out:
    Py_XDECREF(dir);
    Py_XDECREF(tag);
    return (PyObject *)self;
}

PyDoc_STRVAR(write_doc, "write(name, data)\n\n"
                        "A small file in it, whole and synced. OSError with path.");

static PyObject *folder_write(FolderObject *self, PyObject *args) {
    const char *name;
    Py_buffer data;
    enum dsc_status status;
    PyObject *result = NULL;
    if (!PyArg_ParseTuple(args, "sy*:write", &name, &data))
        return NULL;
    if (enter(self) == 0) {
        Py_BEGIN_ALLOW_THREADS;
        status = dsc_folder_write(self->core, name, data.buf, (size_t)data.len);
        Py_END_ALLOW_THREADS;
        result = leave(self, status);
    }
    PyBuffer_Release(&data);
    return result;
}

/* {name: bytes}; the array is for PyMem_Free, and lives no longer than the dict. */
static int read_beside(PyObject *dict, struct dsc_beside **out, size_t *n) {
    PyObject *name, *data; /* borrowed */
    Py_ssize_t position = 0;
    *n = 0;
    *out = PyMem_Calloc((size_t)PyDict_GET_SIZE(dict) + 1, sizeof **out);
    if (!*out) {
        PyErr_NoMemory();
        return -1;
    }
    while (PyDict_Next(dict, &position, &name, &data)) {
        const char *text = PyUnicode_Check(name) ? PyUnicode_AsUTF8(name) : NULL;
        if (!text || !PyBytes_Check(data)) {
            if (!PyErr_Occurred())
                PyErr_SetString(PyExc_TypeError, "beside must be a dict of str to bytes");
            return -1;
        }
        (*out)[(*n)++] =
            (struct dsc_beside){text, PyBytes_AS_STRING(data), (size_t)PyBytes_GET_SIZE(data)};
    }
    return 0;
}

PyDoc_STRVAR(
    publish_doc,
    "publish(latest, beside={})\n\n"
    "Makes it <dir>/<tag>, in the place of one that is there; latest: <dir>/latest names it then;\n"
    "beside: {name: bytes} of executables in <dir>. What was written into the folder must be\n"
    "synced before. OSError with path: the checkpoint is not there, unless the text says that it\n"
    "is; abandon() then removes the rest.");

static PyObject *folder_publish(FolderObject *self, PyObject *args, PyObject *kwargs) {
    static char *keys[] = {"latest", "beside", NULL};
    PyObject *dict = NULL, *result = NULL;
    struct dsc_beside *beside = NULL;
    size_t n_beside = 0;
    int latest;
    enum dsc_status status;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "p|O!:publish", keys, &latest, &PyDict_Type,
                                     &dict))
        return NULL;
    dict = dict ? PyDict_Copy(dict) : PyDict_New(); /* nobody changes it meanwhile */
    if (dict && read_beside(dict, &beside, &n_beside) == 0 && enter(self) == 0) {
        struct dsc_folder *core = self->core;
        Py_BEGIN_ALLOW_THREADS;
        status = dsc_folder_publish(core, latest, beside, n_beside);
        if (status == DSC_OK)
            dsc_folder_close(core);
        Py_END_ALLOW_THREADS;
        if (status == DSC_OK)
            self->core = NULL;
        result = leave(self, status);
    }
    PyMem_Free(beside);
    Py_XDECREF(dict);
    return result;
}

static PyObject *folder_abandon(FolderObject *self, PyObject *unused) {
    (void)unused;
    struct dsc_folder *core = self->core;
    if (!core)
        Py_RETURN_NONE;
    if (enter(self) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    dsc_folder_close(core);
    Py_END_ALLOW_THREADS;
    self->core = NULL;
    return leave(self, DSC_OK);
}

static PyObject *folder_path(FolderObject *self, void *unused) {
    (void)unused;
    return Py_NewRef(self->path);
}

static PyMethodDef folder_methods[] = {
    {"write", (PyCFunction)folder_write, METH_VARARGS, write_doc},
    {"publish", (PyCFunction)(void (*)(void))folder_publish, METH_VARARGS | METH_KEYWORDS,
     publish_doc},
    {"abandon", (PyCFunction)folder_abandon, METH_NOARGS,
     "Removes what was written. Nothing once it is published or abandoned."},
    {NULL},
};

static PyGetSetDef folder_values[] = {
    {"path", (getter)folder_path, NULL, "Where to write until it is published; absolute.", NULL},
    {NULL},
};

static PyType_Slot folder_slots[] = {
    {Py_tp_dealloc, folder_dealloc},
    {Py_tp_methods, folder_methods},
    {Py_tp_getset, folder_values},
    {Py_tp_doc, "The folder of a checkpoint under way. From checkpoint_folder()."},
    {0, NULL},
};

static PyType_Spec folder_spec = {
    .name = "deepspeed_c._core.Folder",
    .basicsize = sizeof(FolderObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = folder_slots,
};

static PyMethodDef functions[] = {
    {"checkpoint_folder", (PyCFunction)(void (*)(void))checkpoint_folder,
     METH_VARARGS | METH_KEYWORDS, folder_doc},
    {NULL},
};

int dsc_bind_add_folder(PyObject *module) {
    struct dsc_bind_state *state = dsc_bind_module_state(module);
    state->folder_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &folder_spec, NULL);
    if (!state->folder_type || PyModule_AddType(module, state->folder_type) < 0)
        return -1;
    return PyModule_AddFunctions(module, functions);
}
