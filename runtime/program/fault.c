/* fault.c: the handler of SIGBUS for the command line. It uses only what may be used in a signal handler. */
#include "fault.h"

#include "model.h"

#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* A handler has no argument of ours, so what it needs is here: written before the handler is set, or changed under no load. */
static struct {
    char message[4096];
    size_t length;
    uintptr_t first, size; /* of the addresses that count */
    int32_t exit_status;
} watched;

static void on_bus_error(int number, siginfo_t *facts, void *context)
{
    (void)context;
    const uintptr_t address = (uintptr_t)facts->si_addr;
    if (address - watched.first < watched.size) {
        const ssize_t written = write(STDERR_FILENO, watched.message, watched.length);
        (void)written;
        _exit(watched.exit_status);
    }
    (void)signal(number, SIG_DFL); /* not ours: it happens again on return, and ends the process as it would have */
}

int32_t mq_watch_file(const char *path, const mq_model *model, int32_t exit_status)
{
    const int length = snprintf(watched.message, sizeof watched.message,
                                "error: %s: cannot be read while it is mapped: it became shorter, or its disk failed; --no-mmap "
                                "reads it into memory first\n", path);
    if (length < 0) {
        return -1;
    }
    watched.length = (size_t)length < sizeof watched.message ? (size_t)length : sizeof watched.message - 1;
    watched.first = model == NULL ? 0 : (uintptr_t)model->mapping.data;
    watched.size = model == NULL ? UINTPTR_MAX : model->mapping.mapped ? model->mapping.size : 0;
    watched.exit_status = exit_status;
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = on_bus_error;
    action.sa_flags = SA_SIGINFO;
    (void)sigemptyset(&action.sa_mask);
    return sigaction(SIGBUS, &action, NULL) == 0 ? 0 : -1;
}
