/* The one place where a status becomes an exception, and where signals are polled. */
#include "bind.h"

#include "../log.h"

#include <string.h>

static PyObject *exception_of(struct dsc_bind_state *state, enum dsc_status status) {
#define NONE PyExc_SystemError
#define VALUE PyExc_ValueError
#define TYPE PyExc_TypeError
#define MEMORY PyExc_MemoryError
#define OS PyExc_OSError
#define TIMEOUT PyExc_TimeoutError
#define COMM state->comm_error
#define PENDING PyExc_KeyboardInterrupt
#define NOTYET PyExc_NotImplementedError
#define RUNTIME PyExc_RuntimeError
#define CONFIG state->config_error
#define CHECKPOINT state->checkpoint_error
    switch (status) {
#define X(name, value, sentence, kind)                                                             \
    case name:                                                                                     \
        return kind;
        DSC_STATUS_MAP(X)
#undef X
    }
    return PyExc_SystemError;
}

PyObject *dsc_bind_raise(struct dsc_bind_state *state, enum dsc_status status) {
    if (status == DSC_EINTR && PyErr_Occurred())
        return NULL;
    const char *text = dsc_last_error();
    if (!text[0])
        text = dsc_status_sentence(status);
    /* A text that was cut inside a character is still a text. */
    PyObject *message = PyUnicode_DecodeUTF8(text, (Py_ssize_t)strlen(text), "replace");
    if (message && status == DSC_EIO && dsc_last_errno() > 0) /* OSError(errno, text) */
        message = Py_BuildValue("(iN)", dsc_last_errno(), message);
    if (message)
        PyErr_SetObject(exception_of(state, status), message);
    Py_XDECREF(message);
    return NULL;
}

bool dsc_bind_interrupted(void *context) {
    (void)context;
    PyGILState_STATE gil = PyGILState_Ensure();
    int raised = PyErr_CheckSignals();
    PyGILState_Release(gil);
    return raised != 0;
}

/* Lines go to the "DeepSpeed" logger. */
static void log_to_python(enum dsc_log_level level, const char *text) {
    if (!Py_IsInitialized())
        return;
    PyGILState_STATE gil = PyGILState_Ensure();
    PyObject *type, *value, *trace, *logging = NULL, *logger = NULL, *done = NULL;
    PyErr_Fetch(&type, &value, &trace);
    logging = PyImport_ImportModule("logging");
    if (logging)
        logger = PyObject_CallMethod(logging, "getLogger", "s", "DeepSpeed");
    if (logger)
        done = PyObject_CallMethod(logger, "log", "iss", (int)level, "%s", text);
    if (!done)
        PyErr_WriteUnraisable(logger);
    Py_XDECREF(done);
    Py_XDECREF(logger);
    Py_XDECREF(logging);
    PyErr_Restore(type, value, trace);
    PyGILState_Release(gil);
}

int dsc_bind_add_errors(PyObject *module) {
    struct dsc_bind_state *state = dsc_bind_module_state(module);
    state->config_error = PyErr_NewExceptionWithDoc(
        "deepspeed_c.DeepSpeedConfigError",
        "The configuration is wrong; the text names key, value and what is allowed.",
        PyExc_ValueError, NULL);
    if (!state->config_error ||
        PyModule_AddObjectRef(module, "DeepSpeedConfigError", state->config_error) < 0)
        return -1;
    state->comm_error = PyErr_NewExceptionWithDoc(
        "deepspeed_c.CommError",
        "Ranks diverged or one died; the text names the rank and the calls.", PyExc_RuntimeError,
        NULL);
    if (!state->comm_error || PyModule_AddObjectRef(module, "CommError", state->comm_error) < 0)
        return -1;
    state->checkpoint_error = PyErr_NewExceptionWithDoc(
        "deepspeed_c.CheckpointError",
        "A checkpoint is damaged or does not fit; the text names the file and the tensor.",
        PyExc_RuntimeError, NULL);
    if (!state->checkpoint_error ||
        PyModule_AddObjectRef(module, "CheckpointError", state->checkpoint_error) < 0)
        return -1;
    dsc_log_set_sink(log_to_python);
    return 0;
}

bool dsc_bind_interpreter_ends(void) {
#if PY_VERSION_HEX >= 0x030d0000
    return Py_IsFinalizing();
#else
    return _Py_IsFinalizing();
#endif
}
