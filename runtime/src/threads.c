/* threads.c: the pool. One 64-bit word carries the job: generation, an open bit, and how many workers are inside it.
 *
 * A worker enters by raising the count while the bit is set; the caller, having taken the last item, clears the bit and
 * waits for the count to fall to zero. The job's fields are written only while the bit is clear and the count is zero.
 */
#include "threads.h"

#include "error.h"
#include "memory.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#if defined(__x86_64__) || defined(__i386__)
#define CPU_RELAX() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define CPU_RELAX() __asm__ volatile("yield")
#else
#define CPU_RELAX() ((void)0)
#endif

enum {
    MAX_THREADS = 256,
    SPINS_BEFORE_YIELD = 2000, /* some 20 µs: longer than the gap between two linears of one token */
    YIELDS_BEFORE_SLEEP = 50,
};

#define OPEN_BIT ((uint64_t)1 << 16)
#define COUNT_MASK (OPEN_BIT - 1)
#define GENERATION ((uint64_t)1 << 17)

typedef struct worker {
    mq_pool *pool;
    pthread_t thread;
    uint32_t index;
} worker;

struct mq_pool {
    _Alignas(64) _Atomic uint64_t state;
    _Alignas(64) atomic_size_t next_item;
    _Alignas(64) mq_task task;
    void *context;
    size_t items;
    worker *workers; /* [n_threads - 1] */
    uint32_t n_threads, n_started;
    pid_t owner;     /* process whose workers these are */
    atomic_uint sleeping;
    atomic_bool closing;
    pthread_mutex_t mutex; /* guards going to sleep only */
    pthread_cond_t wake;
};

static void run_items(mq_pool *pool, uint32_t thread)
{
    for (;;) {
        const size_t item = atomic_fetch_add_explicit(&pool->next_item, 1, memory_order_relaxed);
        if (item >= pool->items) {
            return;
        }
        pool->task(pool->context, item, thread);
    }
}

/* True when a job newer than `seen` was entered; *seen is then its generation. */
static bool try_enter(mq_pool *pool, uint64_t *seen)
{
    uint64_t state = atomic_load_explicit(&pool->state, memory_order_relaxed);
    while ((state & OPEN_BIT) != 0 && state / GENERATION != *seen) {
        if (atomic_compare_exchange_weak_explicit(&pool->state, &state, state + 1, memory_order_acquire,
                                                  memory_order_relaxed)) {
            *seen = state / GENERATION;
            return true;
        }
    }
    return false;
}

static bool has_news(mq_pool *pool, uint64_t seen)
{
    const uint64_t state = atomic_load(&pool->state);
    return atomic_load(&pool->closing) || ((state & OPEN_BIT) != 0 && state / GENERATION != seen);
}

static void sleep_until_news(mq_pool *pool, uint64_t seen)
{
    (void)pthread_mutex_lock(&pool->mutex);
    atomic_fetch_add(&pool->sleeping, 1); /* before the last look: mq_pool_run opens first, then reads this */
    while (!has_news(pool, seen)) {
        (void)pthread_cond_wait(&pool->wake, &pool->mutex);
    }
    atomic_fetch_sub(&pool->sleeping, 1);
    (void)pthread_mutex_unlock(&pool->mutex);
}

static void *worker_main(void *argument)
{
    const worker *self = argument;
    mq_pool *pool = self->pool;
    uint64_t seen = 0;
    uint32_t idle = 0;
    while (!atomic_load_explicit(&pool->closing, memory_order_relaxed)) {
        if (try_enter(pool, &seen)) {
            run_items(pool, self->index);
            atomic_fetch_sub_explicit(&pool->state, 1, memory_order_release);
            idle = 0;
        } else if (idle < SPINS_BEFORE_YIELD) {
            CPU_RELAX();
            idle++;
        } else if (idle < SPINS_BEFORE_YIELD + YIELDS_BEFORE_SLEEP) {
            (void)sched_yield();
            idle++;
        } else {
            sleep_until_news(pool, seen);
            idle = 0;
        }
    }
    return NULL;
}

/* Start the workers in this process; fewer than asked for is not an error here. */
static void start_workers(mq_pool *pool)
{
    pool->owner = getpid();
    pool->n_started = 0;
    atomic_store(&pool->state, 0);
    atomic_store(&pool->sleeping, 0);
    (void)pthread_mutex_init(&pool->mutex, NULL);
    (void)pthread_cond_init(&pool->wake, NULL);
    for (uint32_t i = 0; i + 1 < pool->n_threads; i++) {
        worker *w = &pool->workers[i];
        w->pool = pool;
        w->index = i + 1;
        if (pthread_create(&w->thread, NULL, worker_main, w) != 0) {
            return;
        }
        pool->n_started++;
    }
}

mq_status mq_pool_open(uint32_t n_threads, mq_pool **out, mq_error *error)
{
    *out = NULL;
    if (n_threads < 1 || n_threads > MAX_THREADS) {
        return mq_fail(error, MQ_ERR_ARGUMENT, "n_threads: expected 1 to %d, found %u", MAX_THREADS, n_threads);
    }
    mq_pool *pool = mq_alloc(1, sizeof *pool);
    if (pool != NULL) {
        pool->workers = mq_alloc(n_threads, sizeof *pool->workers);
    }
    if (pool == NULL || pool->workers == NULL) {
        free(pool);
        return mq_fail(error, MQ_ERR_MEMORY, "cannot allocate a pool of %u threads", n_threads);
    }
    pool->n_threads = n_threads;
    start_workers(pool);
    if (pool->n_started + 1 != n_threads) {
        const uint32_t started = pool->n_started + 1;
        mq_pool_close(pool);
        return mq_fail(error, MQ_ERR_THREAD, "expected to start %u threads, %u started", n_threads, started);
    }
    *out = pool;
    return MQ_OK;
}

void mq_pool_close(mq_pool *pool)
{
    if (pool == NULL) {
        return;
    }
    if (pool->owner == getpid()) {
        (void)pthread_mutex_lock(&pool->mutex);
        atomic_store(&pool->closing, true);
        (void)pthread_cond_broadcast(&pool->wake);
        (void)pthread_mutex_unlock(&pool->mutex);
        for (uint32_t i = 0; i < pool->n_started; i++) {
            (void)pthread_join(pool->workers[i].thread, NULL);
        }
        (void)pthread_cond_destroy(&pool->wake);
        (void)pthread_mutex_destroy(&pool->mutex);
    }
    free(pool->workers);
    free(pool);
}

void mq_pool_run(mq_pool *pool, mq_task task, void *context, size_t items)
{
    if (pool->n_threads == 1 || items <= 1) {
        for (size_t item = 0; item < items; item++) {
            task(context, item, 0);
        }
        return;
    }
    if (pool->owner != getpid()) { /* forked: the workers stayed in the parent */
        start_workers(pool);
    }
    pool->task = task;
    pool->context = context;
    pool->items = items;
    atomic_store_explicit(&pool->next_item, 0, memory_order_relaxed);
    const uint64_t generation = atomic_load_explicit(&pool->state, memory_order_relaxed) / GENERATION + 1;
    atomic_store(&pool->state, generation * GENERATION + OPEN_BIT);
    if (atomic_load(&pool->sleeping) > 0) {
        (void)pthread_mutex_lock(&pool->mutex);
        (void)pthread_cond_broadcast(&pool->wake);
        (void)pthread_mutex_unlock(&pool->mutex);
    }
    run_items(pool, 0);
    uint64_t state = atomic_fetch_and(&pool->state, ~OPEN_BIT);
    for (uint32_t spins = 0; (state & COUNT_MASK) != 0; spins++) {
        if (spins < SPINS_BEFORE_YIELD) {
            CPU_RELAX();
        } else {
            (void)sched_yield();
        }
        state = atomic_load_explicit(&pool->state, memory_order_acquire);
    }
    atomic_thread_fence(memory_order_acquire);
}

uint32_t mq_pool_threads(const mq_pool *pool)
{
    return pool->n_threads;
}
