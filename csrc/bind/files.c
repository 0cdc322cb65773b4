/* _core: how this machine reads and writes files, for a report. */
#include "bind.h"

#include "../file_io.h"

PyDoc_STRVAR(no_io_uring_doc, "no_io_uring() -> str or None\n\n"
                              "Why io_uring does not move the bytes of files here; None: it does.");

static PyObject *no_io_uring(PyObject *module, PyObject *unused) {
    const struct dsc_io_options options = {.kind = DSC_IO_RING, .queue_depth = 1};
    struct dsc_io *io = NULL;
    (void)unused;
    enum dsc_status status = dsc_io_open(&options, &io);
    dsc_io_close(io);
    if (status == DSC_OK)
        Py_RETURN_NONE;
    if (status == DSC_ENOTYET)
        return PyUnicode_FromString(dsc_last_error());
    return dsc_bind_raise(dsc_bind_module_state(module), status);
}

PyDoc_STRVAR(
    has_direct_io_doc,
    "has_direct_io(folder) -> bool\n\n"
    "Whether files in a folder are read and written past the page cache (O_DIRECT), found\n"
    "with a file that has no name. OSError where none can be made; a folder that is missing\n"
    "is made.");

static PyObject *has_direct_io(PyObject *module, PyObject *folder) {
    PyObject *path;
    struct dsc_file *file = NULL;
    enum dsc_status status;
    if (!PyUnicode_FSConverter(folder, &path))
        return NULL;
    const char *text = PyBytes_AS_STRING(path);
    Py_BEGIN_ALLOW_THREADS;
    status = dsc_file_open(text, "report", DSC_FILE_ALIGN, &file);
    Py_END_ALLOW_THREADS;
    Py_DECREF(path);
    if (status != DSC_OK)
        return dsc_bind_raise(dsc_bind_module_state(module), status);
    bool direct = dsc_file_is_direct(file);
    dsc_file_close(file);
    return PyBool_FromLong(direct);
}

static PyMethodDef functions[] = {
    {"has_direct_io", has_direct_io, METH_O, has_direct_io_doc},
    {"no_io_uring", no_io_uring, METH_NOARGS, no_io_uring_doc},
    {NULL},
};

int dsc_bind_add_files(PyObject *module) {
    return PyModule_AddFunctions(module, functions);
}
