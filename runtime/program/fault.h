/* fault.h: one clear line when a mapped file fails under the program: it became shorter, or its disk cannot be read.
 *
 * Not part of the library, which leaves signals alone: a process has one handler for SIGBUS, and only the program that owns
 * the process may set it. Only the command line calls this (runtime/commands/faults.py).
 */
#ifndef MQ_FAULT_H
#define MQ_FAULT_H

#include "mobiquant.h"

/* cffi: begin */
/* From now on a bus error while reading `path` ends the process with `exit_status` after one line on stderr. model NULL, as
 * before it is opened: any bus error counts as the file's; else only those inside its mapping. Returns 0, or -1 when the
 * handler cannot be set. For one file at a time, and while no other thread reads it. */
int32_t mq_watch_file(const char *path, const mq_model *model, int32_t exit_status);
/* cffi: end */

#endif
