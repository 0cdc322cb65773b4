/* torch's threads, for the core's loops.
 *
 * Decides: which OpenMP runtime is torch's: the one that libtorch_cpu was linked with, whatever
 * others the process has loaded. Invariant: nothing is loaded here. No team where torch is not
 * loaded or not built with OpenMP, and none in a forked child: an OpenMP runtime does not survive a
 * fork, and its next loop would wait for threads that are not there. */
#define _GNU_SOURCE
#include "bind.h"

#include <dlfcn.h>
#include <string.h>
#include <unistd.h>

dsc_team *dsc_bind_team(const struct dsc_bind_state *state) {
    dsc_team *team = NULL;
    void *torch =
        getpid() == state->importer ? dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD) : NULL;
    if (!torch)
        return NULL;
    void *found = dlsym(torch, "GOMP_parallel");
    memcpy(&team, &found, sizeof team); /* as POSIX has it; ISO C has no such cast */
    dlclose(torch);                     /* torch keeps it loaded */
    return team;
}

PyDoc_STRVAR(loop_threads_doc,
             "loop_threads()\n--\n\n"
             "Whose threads the core's loops run on: \"torch's\" or \"its own\".");
static PyObject *loop_threads(PyObject *module, PyObject *unused) {
    (void)unused;
    return PyUnicode_FromString(dsc_bind_team(dsc_bind_module_state(module)) ? "torch's"
                                                                             : "its own");
}

static PyMethodDef functions[] = {
    {"loop_threads", loop_threads, METH_NOARGS, loop_threads_doc},
    {NULL},
};

int dsc_bind_add_team(PyObject *module) {
    dsc_bind_module_state(module)->importer = getpid();
    return PyModule_AddFunctions(module, functions);
}
