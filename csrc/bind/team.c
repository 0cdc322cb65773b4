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

/* A function of torch's, in *out, which is a pointer to one (POSIX has it so; ISO C no such cast).
 */
static void find(void *torch, const char *name, void *out) {
    void *found = dlsym(torch, name);
    memcpy(out, &found, sizeof found);
}

/* OpenMP has a number of threads per thread. One that has not yet run a loop of torch's has not
 * got torch.set_num_threads() of another: torch's own count sees to it. */
struct dsc_team dsc_bind_team(const struct dsc_bind_state *state) {
    struct dsc_team team = {NULL, NULL};
    void *torch =
        getpid() == state->importer ? dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD) : NULL;
    if (!torch)
        return team;
    find(torch, "GOMP_parallel", &team.run);
    find(torch, "torch_get_num_threads", &team.count);
    dlclose(torch); /* torch keeps it loaded */
    return team;
}

PyDoc_STRVAR(loop_threads_doc,
             "loop_threads()\n--\n\n"
             "Whose threads the core's loops run on: \"torch's\" or \"its own\".");
static PyObject *loop_threads(PyObject *module, PyObject *unused) {
    (void)unused;
    return PyUnicode_FromString(dsc_bind_team(dsc_bind_module_state(module)).run ? "torch's"
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
