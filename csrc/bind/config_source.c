/* From what a script calls a configuration to the tree that the core reads.
 *
 * Decides: how a Python dict, a file, JSON text or base64 of it is taken, and which Python values
 * have a place in JSON. Invariant: what is refused names where it stands. */
#include "config_source.h"

#include "../alloc.h"
#include "../config.h"

#include <string.h>

enum { DEPTH_LIMIT = 64 };

/* Where in the configuration a value stands, for messages. */
struct step {
    const struct step *up;
    const char *name;
    int depth;
};

static void show_step(const struct step *step, char *out, size_t n) {
    if (step->up)
        show_step(step->up, out, n);
    size_t used = strlen(out);
    PyOS_snprintf(out + used, n - used, "%s%s", used ? "." : "", step->name);
}

PyObject *dsc_bind_config_raise(struct dsc_bind_state *state, const char *text) {
    PyObject *message = PyUnicode_DecodeUTF8(text, (Py_ssize_t)strlen(text), "replace");
    if (message)
        PyErr_SetObject(state->config_error, message);
    Py_XDECREF(message);
    return NULL;
}

/* DeepSpeedConfigError "optimizer.params.lr: ...". The exception that was set is dropped: it is the
 * reason, and `why` says it. */
static void *refuse(struct dsc_bind_state *state, const struct step *at, const char *why,
                    PyObject *object) {
    char path[DSC_BIND_PATH_BYTES] = "";
    show_step(at, path, sizeof path);
    PyErr_Clear(); /* replaced by the exception below */
    PyObject *name = PyUnicode_DecodeUTF8(path, (Py_ssize_t)strlen(path), "replace");
    if (name)
        PyErr_Format(state->config_error, "%U: %s (%.60s)", name, why, Py_TYPE(object)->tp_name);
    Py_XDECREF(name);
    return NULL;
}

static const char *text_of(struct dsc_bind_state *state, PyObject *object, const struct step *at) {
    Py_ssize_t n;
    const char *text = PyUnicode_AsUTF8AndSize(object, &n);
    if (!text)
        return refuse(state, at, "text with a lone surrogate", object);
    if (strlen(text) != (size_t)n)
        return refuse(state, at, "text with a zero byte", object);
    return text;
}

static cJSON *tree_of(struct dsc_bind_state *state, PyObject *object, const struct step *at);

static cJSON *tree_of_dict(struct dsc_bind_state *state, PyObject *dict, const struct step *at) {
    cJSON *tree = cJSON_CreateObject();
    PyObject *key, *value; /* borrowed */
    Py_ssize_t position = 0;
    while (tree && PyDict_Next(dict, &position, &key, &value)) {
        struct step here = {at->name[0] ? at : NULL, "", at->depth + 1};
        const char *name = NULL;
        cJSON *item = NULL;
        /* A value's own __float__ or __fspath__ may take both out of the dict. */
        Py_INCREF(key);
        Py_INCREF(value);
        if (!PyUnicode_Check(key))
            refuse(state, at, "a key that is not a string", key);
        else
            name = text_of(state, key, at);
        here.name = name;
        if (name)
            item = tree_of(state, value, &here);
        bool added = item && cJSON_AddItemToObject(tree, name, item);
        Py_DECREF(key);
        Py_DECREF(value);
        if (!added) {
            cJSON_Delete(item);
            cJSON_Delete(tree);
            return PyErr_Occurred() ? NULL : (cJSON *)PyErr_NoMemory();
        }
    }
    return tree ? tree : (cJSON *)PyErr_NoMemory();
}

static cJSON *tree_of_list(struct dsc_bind_state *state, PyObject *list, const struct step *at) {
    cJSON *tree = cJSON_CreateArray();
    for (Py_ssize_t i = 0; tree && i < PySequence_Fast_GET_SIZE(list); i++) {
        char name[32];
        PyOS_snprintf(name, sizeof name, "[%zd]", i);
        struct step here = {at, name, at->depth + 1};
        PyObject *value = Py_NewRef(PySequence_Fast_GET_ITEM(list, i));
        cJSON *item = tree_of(state, value, &here);
        Py_DECREF(value);
        if (!item || !cJSON_AddItemToArray(tree, item)) {
            cJSON_Delete(item);
            cJSON_Delete(tree);
            return PyErr_Occurred() ? NULL : (cJSON *)PyErr_NoMemory();
        }
    }
    return tree ? tree : (cJSON *)PyErr_NoMemory();
}

/* Numbers of NumPy and torch count as what float() makes of them. */
static cJSON *tree_of_number(struct dsc_bind_state *state, PyObject *object,
                             const struct step *at) {
    PyNumberMethods *methods = Py_TYPE(object)->tp_as_number;
    if (!methods || (!methods->nb_float && !methods->nb_index))
        return refuse(state, at,
                      "not a value for a configuration; allowed: None, bool, int, float, str, "
                      "list, tuple, dict",
                      object);
    double value = PyFloat_AsDouble(object);
    if (value == -1 && PyErr_Occurred())
        return refuse(state, at, "a number that a float cannot hold", object);
    cJSON *tree = cJSON_CreateNumber(value);
    return tree ? tree : (cJSON *)PyErr_NoMemory();
}

static cJSON *tree_of_text(struct dsc_bind_state *state, PyObject *object, const struct step *at) {
    const char *text = text_of(state, object, at);
    if (!text)
        return NULL;
    cJSON *tree = cJSON_CreateString(text);
    return tree ? tree : (cJSON *)PyErr_NoMemory();
}

static cJSON *tree_of(struct dsc_bind_state *state, PyObject *object, const struct step *at) {
    cJSON *tree = NULL;
    if (at->depth > DEPTH_LIMIT)
        return refuse(state, at, "nested too deeply", object);
    if (PyDict_Check(object))
        return tree_of_dict(state, object, at);
    if (PyList_Check(object) || PyTuple_Check(object))
        return tree_of_list(state, object, at);
    if (PyUnicode_Check(object))
        return tree_of_text(state, object, at);
    if (object == Py_None)
        tree = cJSON_CreateNull();
    else if (PyBool_Check(object))
        tree = cJSON_CreateBool(object == Py_True);
    else if (PyObject_HasAttrString((PyObject *)Py_TYPE(object), "__fspath__")) {
        PyObject *path = PyOS_FSPath(object);
        tree = path && PyUnicode_Check(path) ? tree_of_text(state, path, at)
                                             : refuse(state, at, "a path that is not text", object);
        Py_XDECREF(path);
        return tree;
    } else
        return tree_of_number(state, object, at);
    return tree ? tree : (cJSON *)PyErr_NoMemory();
}

PyObject *dsc_bind_json_loads(PyObject *text) {
    PyObject *json = PyImport_ImportModule("json");
    PyObject *value = json ? PyObject_CallMethod(json, "loads", "O", text) : NULL;
    Py_XDECREF(json);
    return value;
}

/* The same text for Python. json is stricter than cJSON in a few places (a number like 01), and
 * what it refuses is refused. */
static PyObject *objects_of_text(struct dsc_bind_state *state, const char *text, size_t n,
                                 const char *name) {
    size_t mark = n >= 3 && memcmp(text, "\xEF\xBB\xBF", 3) == 0 ? 3 : 0;
    PyObject *decoded = PyUnicode_DecodeUTF8(text + mark, (Py_ssize_t)(n - mark), "strict");
    PyObject *value = decoded ? dsc_bind_json_loads(decoded) : NULL;
    Py_XDECREF(decoded);
    if (value || !PyErr_ExceptionMatches(PyExc_ValueError))
        return value;
    PyObject *type, *why, *trace;
    PyErr_Fetch(&type, &why, &trace);
    PyErr_Format(state->config_error, "%s: not JSON: %S", name, why ? why : Py_None);
    Py_XDECREF(type);
    Py_XDECREF(why);
    Py_XDECREF(trace);
    return NULL;
}

static int take_text(struct dsc_bind_state *state, const char *text, size_t n, const char *name,
                     struct dsc_bind_given *out) {
    enum dsc_status status = dsc_config_tree(text, n, name, &out->root);
    if (status == DSC_OK)
        out->objects = objects_of_text(state, text, n, name);
    else if (status == DSC_ECONFIG)
        dsc_bind_config_raise(state, dsc_last_error());
    else
        dsc_bind_raise(state, status);
    return out->objects ? 0 : -1;
}

/* Whether text is base64 of a JSON object. */
static bool is_base64(const char *base64, char **text, size_t *n) {
    if (dsc_config_decode(base64, text, n) != DSC_OK)
        return false;
    if ((*text)[strspn(*text, " \t\r\n")] == '{')
        return true;
    dsc_free(*text);
    *text = NULL;
    return false;
}

/* A file, or where there is none, base64 of JSON text. */
static int take_file(struct dsc_bind_state *state, PyObject *source, struct dsc_bind_given *out) {
    PyObject *path = NULL;
    char *text = NULL;
    size_t n = 0;
    enum dsc_status status;
    if (!PyUnicode_FSConverter(source, &path))
        return -1;
    const char *name = PyBytes_AS_STRING(path);
    Py_BEGIN_ALLOW_THREADS status = dsc_config_read_file(name, &text, &n);
    Py_END_ALLOW_THREADS int failed = status != DSC_OK;
    if (!failed) {
        failed = take_text(state, text, n, name, out);
    } else if (status == DSC_ECONFIG) {
        dsc_bind_config_raise(state, dsc_last_error());
        if (is_base64(name, &text, &n)) {
            PyErr_Clear(); /* there is no such file, and need not be */
            failed = take_text(state, text, n, "the configuration in base64", out);
        }
    } else {
        dsc_bind_raise(state, status);
    }
    dsc_free(text);
    Py_DECREF(path);
    return failed ? -1 : 0;
}

/* Text that begins with a brace is JSON, any other text a path or base64. */
int dsc_bind_config_take(struct dsc_bind_state *state, PyObject *source,
                         struct dsc_bind_given *out) {
    if (PyDict_Check(source)) {
        struct step top = {NULL, "", 0};
        out->objects = Py_NewRef(source);
        out->root = tree_of(state, source, &top);
        return out->root ? 0 : -1;
    }
    if (PyUnicode_Check(source)) {
        Py_ssize_t n;
        const char *text = PyUnicode_AsUTF8AndSize(source, &n);
        if (text && text[strspn(text, " \t\r\n")] == '{')
            return take_text(state, text, (size_t)n, "the configuration text", out);
        PyErr_Clear(); /* a path may hold bytes that UTF-8 cannot carry */
        return take_file(state, source, out);
    }
    if (PyObject_HasAttrString((PyObject *)Py_TYPE(source), "__fspath__"))
        return take_file(state, source, out);
    PyErr_Format(PyExc_TypeError,
                 "a configuration is a dict, a path, JSON text or base64 of it, not %.60s",
                 Py_TYPE(source)->tp_name);
    return -1;
}
