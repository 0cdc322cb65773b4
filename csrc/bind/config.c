/* The Python type Config, and config_keys().
 *
 * Decides: how values come back. Invariant: a Config never changes; what it gives out are fresh
 * objects, so that nobody's edits reach it. `given` is the configuration as Python objects with
 * every "auto" left out: ints stay ints and tuples tuples, which a cJSON tree cannot keep. */
#include "config_source.h"

#include "../alloc.h"
#include "../config.h"

#include <stdlib.h>
#include <string.h>

typedef struct {
    PyObject_HEAD struct dsc_bind_given source; /* config and reading point into its tree */
    PyObject *given;
    PyObject *warnings;
    struct dsc_config config;
    struct dsc_config_reading reading;
} ConfigObject;

static bool is_auto(PyObject *object) {
    return PyUnicode_Check(object) && PyUnicode_CompareWithASCIIString(object, "auto") == 0;
}

/* A deep copy of dicts, lists and tuples without the keys whose value is "auto". Depth is bounded,
 * because config_source.c has accepted the object. */
static PyObject *copy_given(PyObject *object) {
    PyObject *key, *value; /* borrowed */
    Py_ssize_t position = 0;
    if (PyDict_Check(object)) {
        PyObject *copy = PyDict_New();
        while (copy && PyDict_Next(object, &position, &key, &value)) {
            if (is_auto(value))
                continue;
            PyObject *item = copy_given(value);
            if (!item || PyDict_SetItem(copy, key, item) < 0)
                Py_CLEAR(copy);
            Py_XDECREF(item);
        }
        return copy;
    }
    if (!PyList_Check(object) && !PyTuple_Check(object))
        return Py_NewRef(object);
    PyObject *copy = PyList_New(0);
    for (Py_ssize_t i = 0; copy && i < PySequence_Fast_GET_SIZE(object); i++) {
        PyObject *item = copy_given(PySequence_Fast_GET_ITEM(object, i));
        if (!item || PyList_Append(copy, item) < 0)
            Py_CLEAR(copy);
        Py_XDECREF(item);
    }
    if (!copy || PyList_Check(object))
        return copy;
    PyObject *tuple = PyList_AsTuple(copy);
    Py_DECREF(copy);
    return tuple;
}

static PyObject *text_list(char *const *texts, size_t n) {
    PyObject *list = PyList_New(0);
    for (size_t i = 0; list && i < n; i++) {
        PyObject *text = PyUnicode_DecodeUTF8(texts[i], (Py_ssize_t)strlen(texts[i]), "replace");
        if (!text || PyList_Append(list, text) < 0)
            Py_CLEAR(list);
        Py_XDECREF(text);
    }
    return list;
}

static bool is_strict(void) {
    const char *value = getenv("DS_CONFIG_STRICT");
    return value && value[0] && strcmp(value, "0") != 0;
}

/* The error in hand, with the warnings of the same reading as its attribute `warnings`. */
static void add_warnings(const struct dsc_config_reading *reading) {
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    PyErr_NormalizeException(&type, &error, &trace);
    PyObject *warnings = text_list(reading->warnings, reading->n_warnings);
    if (!error || !warnings || PyObject_SetAttrString(error, "warnings", warnings) < 0)
        PyErr_Clear(); /* the error itself says more than a list that could not be made */
    Py_XDECREF(warnings);
    PyErr_Restore(type, error, trace);
}

/* Sizes by key, of a dict; -1 with an exception for another key or value. */
static int read_layout(PyObject *dict, struct dsc_config_layout *out) {
    static const char *const keys[] = {
#define X(field) #field,
        DSC_CONFIG_LAYOUT_MAP(X)
#undef X
    };
    int64_t *const fields[] = {
#define X(field) &out->field,
        DSC_CONFIG_LAYOUT_MAP(X)
#undef X
    };
    Py_ssize_t n_found = 0;
    if (!PyDict_Check(dict)) {
        PyErr_Format(PyExc_TypeError, "layout is a dict or None, not %.60s",
                     Py_TYPE(dict)->tp_name);
        return -1;
    }
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        PyObject *size = PyDict_GetItemString(dict, keys[i]); /* borrowed */
        *fields[i] = size ? PyLong_AsLongLong(size) : 0;
        if (PyErr_Occurred())
            return -1;
        n_found += size != NULL;
    }
    if (n_found == PyDict_GET_SIZE(dict))
        return 0;
    PyErr_Format(PyExc_ValueError, "layout has a key that no mpu tells: %R", dict);
    return -1;
}

static int parse(ConfigObject *self, long long world_size, PyObject *layout_dict) {
    struct dsc_bind_state *state = dsc_bind_state_of(Py_TYPE(self));
    struct dsc_config_layout layout;
    char *text = NULL;
    const bool has_mpu = layout_dict != Py_None;
    if (has_mpu && read_layout(layout_dict, &layout) < 0)
        return -1;
    enum dsc_status status =
        dsc_config_parse(self->source.root, world_size, has_mpu ? &layout : NULL, is_strict(),
                         &self->config, &self->reading);
    if (status == DSC_OK)
        return 0;
    /* The core's last error is cut at its buffer; the report has every fault. */
    if (status == DSC_ECONFIG && dsc_config_report(&self->reading, &text) == DSC_OK)
        dsc_bind_config_raise(state, text);
    else
        dsc_bind_raise(state, status);
    dsc_free(text);
    add_warnings(&self->reading);
    return -1;
}

static PyObject *config_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *keys[] = {"source", "world_size", "layout", NULL};
    PyObject *source, *layout = Py_None;
    long long world_size = 1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|LO:Config", keys, &source, &world_size,
                                     &layout))
        return NULL;
    ConfigObject *self = (ConfigObject *)type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    if (dsc_bind_config_take(dsc_bind_state_of(type), source, &self->source) < 0 ||
        parse(self, world_size, layout) < 0)
        goto error;
    self->given = copy_given(self->source.objects);
    self->warnings = text_list(self->reading.warnings, self->reading.n_warnings);
    if (self->given && self->warnings)
        return (PyObject *)self;
error:
    Py_DECREF(self);
    return NULL;
}

static int config_traverse(ConfigObject *self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->source.objects);
    Py_VISIT(self->given);
    Py_VISIT(self->warnings);
    return 0;
}

static int config_clear(ConfigObject *self) {
    Py_CLEAR(self->source.objects);
    Py_CLEAR(self->given);
    Py_CLEAR(self->warnings);
    return 0;
}

static void config_dealloc(ConfigObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    (void)config_clear(self);
    dsc_config_reading_free(&self->reading);
    cJSON_Delete(self->source.root);
    type->tp_free(self);
    Py_DECREF(type);
}

/* What stands at a dotted path of a dict, borrowed; NULL without an exception if nothing does. */
static PyObject *item_at(PyObject *dict, const char *path) {
    PyObject *at = dict;
    while (at && *path) {
        size_t n = strcspn(path, ".");
        if (!PyDict_Check(at))
            return NULL;
        PyObject *name = PyUnicode_DecodeUTF8(path, (Py_ssize_t)n, "strict");
        at = name ? PyDict_GetItemWithError(at, name) : NULL;
        Py_XDECREF(name);
        path += n + (path[n] == '.');
    }
    return at;
}

/* What was given for a path under any of its names, borrowed; NULL if nothing or None. */
static PyObject *given_at(ConfigObject *self, const char *path) {
    char name[DSC_BIND_PATH_BYTES];
    for (size_t i = 0; dsc_config_spelling(path, i, name, sizeof name); i++) {
        PyObject *item = item_at(self->given, name);
        if ((item && item != Py_None) || PyErr_Occurred())
            return item;
    }
    return NULL;
}

/* Whether a path is a key, or lies in an object whose keys are not the table's. */
static bool is_known(const char *path) {
    char part[DSC_BIND_PATH_BYTES];
    if (strlen(path) >= sizeof part)
        return false;
    memcpy(part, path, strlen(path) + 1);
    const struct dsc_key *key = dsc_config_find(part);
    if (key)
        return true;
    for (char *dot = strrchr(part, '.'); dot && !key; dot = strrchr(part, '.')) {
        *dot = '\0';
        key = dsc_config_find(part);
    }
    return key && (key->open || key->kind == DSC_KEY_DICT || key->kind == DSC_KEY_ANY);
}

static int check_known(const char *path) {
    const char *paths[DSC_CONFIG_N_KEYS];
    size_t distance = 0;
    if (is_known(path))
        return 0;
    for (size_t i = 0; i < DSC_CONFIG_N_KEYS; i++)
        paths[i] = dsc_config_keys[i].path;
    PyErr_Format(PyExc_KeyError, "no key %.200s; nearest: %s", path,
                 dsc_config_nearest(path, paths, DSC_CONFIG_N_KEYS, &distance));
    return -1;
}

/* The value of a scalar key in `config`. */
static PyObject *scalar(const struct dsc_config *config, const struct dsc_key *key) {
    const char *field = (const char *)config + key->offset;
    switch (key->kind) {
    case DSC_KEY_BOOL:
        return PyBool_FromLong(*(const bool *)field);
    case DSC_KEY_TRI:
        return *(const int *)field < 0 ? Py_NewRef(Py_None) : PyBool_FromLong(*(const int *)field);
    case DSC_KEY_INT:
        if (*(const int64_t *)field == DSC_CONFIG_NONE)
            Py_RETURN_NONE;
        if (key->inf && *(const int64_t *)field == INT64_MAX)
            return PyFloat_FromDouble(INFINITY);
        return PyLong_FromLongLong(*(const int64_t *)field);
    case DSC_KEY_FLOAT:
        return PyFloat_FromDouble(*(const double *)field);
    case DSC_KEY_STR:
    case DSC_KEY_ENUM:
        if (!*(const char *const *)field)
            Py_RETURN_NONE;
        return PyUnicode_FromString(*(const char *const *)field);
    case DSC_KEY_SECTION:
    case DSC_KEY_LIST:
    case DSC_KEY_DICT:
    case DSC_KEY_ANY:
        break;
    }
    PyErr_Format(PyExc_SystemError, "%s is not a scalar", key->path);
    return NULL;
}

static PyObject *default_of(const struct dsc_key *key) {
    if (!key->text)
        return key->kind == DSC_KEY_SECTION ? Py_NewRef(Py_None)
                                            : scalar(&dsc_config_defaults, key);
    PyObject *text = PyUnicode_FromString(key->text);
    PyObject *value = text ? dsc_bind_json_loads(text) : NULL;
    Py_XDECREF(text);
    return value;
}

/* The effective value of a key that is no section. */
static PyObject *value_of(ConfigObject *self, const struct dsc_key *key) {
    if (!key->text)
        return scalar(&self->config, key);
    PyObject *given = given_at(self, key->path);
    if (given || PyErr_Occurred())
        return given ? copy_given(given) : NULL;
    return default_of(key);
}

/* Puts a value at a dotted path, making the dicts on the way. */
static int put_at(PyObject *dict, const char *path, PyObject *value) {
    int failed = 0;
    Py_INCREF(dict);
    for (size_t n = strcspn(path, "."); path[n] && !failed; n = strcspn(path, ".")) {
        PyObject *name = PyUnicode_DecodeUTF8(path, (Py_ssize_t)n, "strict");
        PyObject *fresh = name ? PyDict_New() : NULL;
        PyObject *inner = fresh ? PyDict_SetDefault(dict, name, fresh) : NULL; /* borrowed */
        failed = !inner;
        if (inner)
            Py_SETREF(dict, Py_NewRef(inner));
        Py_XDECREF(fresh);
        Py_XDECREF(name);
        path += n + 1;
    }
    if (!failed)
        failed = PyDict_SetItemString(dict, path, value);
    Py_DECREF(dict);
    return failed ? -1 : 0;
}

static PyObject *config_to_dict(ConfigObject *self, PyObject *unused) {
    (void)unused;
    PyObject *dict = PyDict_New();
    for (size_t i = 0; dict && i < DSC_CONFIG_N_KEYS; i++) {
        const struct dsc_key *key = &dsc_config_keys[i];
        if (key->kind == DSC_KEY_SECTION || strstr(key->path, "[]"))
            continue;
        PyObject *value = value_of(self, key);
        if (!value || put_at(dict, key->path, value) < 0)
            Py_CLEAR(dict);
        Py_XDECREF(value);
    }
    return dict;
}

static PyObject *config_get(ConfigObject *self, PyObject *arg) {
    const char *path = PyUnicode_AsUTF8(arg);
    if (!path || check_known(path) < 0)
        return NULL;
    const struct dsc_key *key = dsc_config_find(path);
    if (key && key->kind != DSC_KEY_SECTION)
        return value_of(self, key);
    PyObject *all = key ? config_to_dict(self, NULL) : Py_NewRef(self->given);
    PyObject *item = all ? item_at(all, key ? key->path : path) : NULL;
    PyObject *out = item ? copy_given(item) : PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
    Py_XDECREF(all);
    return out;
}

static PyObject *config_given(ConfigObject *self, PyObject *arg) {
    const char *path = PyUnicode_AsUTF8(arg);
    if (!path || check_known(path) < 0)
        return NULL;
    const struct dsc_key *key = dsc_config_find(path);
    if (key)
        return PyBool_FromLong(self->reading.given[key - dsc_config_keys] != NULL);
    PyObject *item = given_at(self, path);
    return PyErr_Occurred() ? NULL : PyBool_FromLong(item != NULL);
}

static PyObject *config_origin(ConfigObject *self, PyObject *arg) {
    const char *path = PyUnicode_AsUTF8(arg);
    if (!path || check_known(path) < 0)
        return NULL;
    const struct dsc_key *key = dsc_config_find(path);
    char written[DSC_BIND_PATH_BYTES] = "";
    const cJSON *given = key ? self->reading.given[key - dsc_config_keys] : NULL;
    const cJSON *absent = key ? self->reading.absent[key - dsc_config_keys] : NULL;
    if ((!given && !absent) ||
        !dsc_config_written(self->source.root, given ? given : absent, written, sizeof written))
        Py_RETURN_NONE;
    return Py_BuildValue("ss", written, given ? "given" : cJSON_IsString(absent) ? "auto" : "null");
}

static PyObject *config_subtree(ConfigObject *self, PyObject *arg) {
    const char *path = PyUnicode_AsUTF8(arg);
    if (!path || check_known(path) < 0)
        return NULL;
    PyObject *item = given_at(self, path);
    if (item)
        return copy_given(item);
    return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
}

static PyObject *config_get_warnings(ConfigObject *self, void *unused) {
    (void)unused;
    return copy_given(self->warnings);
}

static PyObject *config_get_source(ConfigObject *self, void *unused) {
    (void)unused;
    return Py_NewRef(self->source.objects);
}

const struct dsc_config *dsc_bind_config(struct dsc_bind_state *state, PyObject *object) {
    if (PyObject_TypeCheck(object, state->config_type))
        return &((ConfigObject *)object)->config;
    PyErr_Format(PyExc_TypeError, "a _core.Config is needed, not %.60s", Py_TYPE(object)->tp_name);
    return NULL;
}

PyDoc_STRVAR(
    config_doc,
    "Config(source, world_size=1, layout=None)\n\n"
    "A configuration: a dict (taken as it is), the path of a JSON file, JSON text, or\n"
    "base64 of it. world_size is the number of ranks that share a batch. layout: None\n"
    "without an mpu, else a dict of the sizes that it tells, by their keys here; with one\n"
    "world_size may be 0, and batch sizes are left as they are.\n"
    "DeepSpeedConfigError lists everything that is wrong. With DS_CONFIG_STRICT=1 an "
    "unknown top-level key is\n"
    "an error instead of a warning.");

static PyMethodDef config_methods[] = {
    {"get", (PyCFunction)config_get, METH_O,
     "get(path)\n\nThe setting in effect at a dotted path; a section gives a dict. KeyError for a "
     "path that is no key."},
    {"given", (PyCFunction)config_given, METH_O,
     "given(path) -> bool\n\nWhether the user set the key; null and \"auto\" do not count."},
    {"origin", (PyCFunction)config_origin, METH_O,
     "origin(path)\n\n(the path under which the user wrote the key, \"given\", \"auto\" or "
     "\"null\"); None where it is not written."},
    {"subtree", (PyCFunction)config_subtree, METH_O,
     "subtree(path)\n\nA copy of what was given there, without \"auto\" values; None if nothing."},
    {"to_dict", (PyCFunction)config_to_dict, METH_NOARGS,
     "to_dict() -> dict\n\nEvery setting in effect, nested."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef config_getset[] = {
    {"warnings", (getter)config_get_warnings, NULL, "What the user should know: list of str.",
     NULL},
    {"source", (getter)config_get_source, NULL,
     "The dict that was passed, or the content of the file or text.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot config_slots[] = {
    {Py_tp_doc, (void *)config_doc}, {Py_tp_new, config_new},
    {Py_tp_dealloc, config_dealloc}, {Py_tp_traverse, config_traverse},
    {Py_tp_clear, config_clear},     {Py_tp_methods, config_methods},
    {Py_tp_getset, config_getset},   {0, NULL},
};

static PyType_Spec config_spec = {
    .name = "deepspeed_c._core.Config",
    .basicsize = sizeof(ConfigObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = config_slots,
};

static const char *const kind_names[] = {
    [DSC_KEY_SECTION] = "section", [DSC_KEY_BOOL] = "bool",   [DSC_KEY_TRI] = "bool or null",
    [DSC_KEY_INT] = "int",         [DSC_KEY_FLOAT] = "float", [DSC_KEY_STR] = "string",
    [DSC_KEY_ENUM] = "enum",       [DSC_KEY_LIST] = "list",   [DSC_KEY_DICT] = "dict",
    [DSC_KEY_ANY] = "any",
};
static const char *const status_names[] = {
    [DSC_KEY_WORKS] = "works",
    [DSC_KEY_NO_EFFECT] = "no effect",
    [DSC_KEY_NOT_YET] = "not yet",
};

static PyObject *config_keys(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    PyObject *list = PyList_New(0);
    for (size_t i = 0; list && i < DSC_CONFIG_N_KEYS; i++) {
        const struct dsc_key *key = &dsc_config_keys[i];
        char allowed[256];
        dsc_config_allowed(key, allowed, sizeof allowed);
        PyObject *row = NULL, *value = default_of(key);
        if (value)
            row = Py_BuildValue("{ss ss sO ss ss sz ss}", "path", key->path, "type",
                                kind_names[key->kind], "default", value, "allowed", allowed,
                                "status", status_names[key->status], "accessor", key->accessor,
                                "help", key->help);
        if (!row || PyList_Append(list, row) < 0)
            Py_CLEAR(list);
        Py_XDECREF(row);
        Py_XDECREF(value);
    }
    return list;
}

static PyMethodDef functions[] = {
    {"config_keys", config_keys, METH_NOARGS,
     "config_keys() -> list of dict\n\nThe table of configuration keys: path, type, default, "
     "allowed, status ('works', 'no effect', 'not yet'), accessor (a method of DeepSpeedEngine, or "
     "None), help."},
    {NULL, NULL, 0, NULL},
};

int dsc_bind_add_config(PyObject *module) {
    struct dsc_bind_state *state = dsc_bind_module_state(module);
    state->config_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &config_spec, NULL);
    if (!state->config_type || PyModule_AddType(module, state->config_type) < 0)
        return -1;
    return PyModule_AddFunctions(module, functions);
}
