/* threads.h: a pool that runs one function over the items of a job. Which thread computes an item never changes its result.
 *
 * Items are handed out one by one, so a thread whose core is taken by another process holds up at most the item it is in,
 * and a thread that has not woken up is not waited for at all. Waiting threads spin briefly, then yield, then sleep.
 */
#ifndef MQ_THREADS_H
#define MQ_THREADS_H

#include "mobiquant.h"

typedef struct mq_pool mq_pool;

/* thread: 0..n_threads-1, for scratch memory of its own; 0 is the caller of mq_pool_run. */
typedef void (*mq_task)(void *context, size_t item, uint32_t thread);

/* A pool of n_threads, the caller of mq_pool_run counted in. */
mq_status mq_pool_open(uint32_t n_threads, mq_pool **pool, mq_error *error);
void mq_pool_close(mq_pool *pool); /* NULL is allowed; also right in a forked child, where the workers do not exist */

/* Run task(context, 0..items-1) and return when all are done. After fork the first run in the child starts new workers;
 * if that fails the caller does all the work. */
void mq_pool_run(mq_pool *pool, mq_task task, void *context, size_t items);
uint32_t mq_pool_threads(const mq_pool *pool);

#endif
