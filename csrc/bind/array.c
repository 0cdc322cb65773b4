/* NumPy arrays handed out: rates and data order. The NumPy C API is imported by
 * the first call, in this file alone, so that importing deepspeed_c._core does not import NumPy. */
#include "bind.h"

#define NPY_NO_DEPRECATED_API NPY_1_7_API_VERSION
#define NPY_TARGET_VERSION NPY_1_23_API_VERSION
#include <numpy/arrayobject.h>

PyObject *dsc_bind_array(enum dsc_dtype dtype, Py_ssize_t count, void **data) {
    int type = dtype == DSC_F32 ? NPY_FLOAT : dtype == DSC_F64 ? NPY_DOUBLE : NPY_INT64;
    if (count < 0)
        return PyErr_Format(PyExc_ValueError, "count must not be negative, got %zd", count);
    if (!PyArray_API && _import_array() < 0)
        return NULL;
    npy_intp shape[1] = {count};
    PyObject *array = PyArray_SimpleNew(1, shape, type);
    if (array)
        *data = PyArray_DATA((PyArrayObject *)array);
    return array;
}
