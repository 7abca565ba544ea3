/* failures.c: every allocation, thread start and system call of loading, evaluating and closing fails once. Each failure must be a
 * named error, leave nothing allocated or open, and leave a session that was open before as it was.
 *
 *     failures FILE     linked with -Wl,--wrap for the functions below
 */
#include "harness.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { MOST_LIVE = 4096, TOKENS = 20, THREADS = 3 };

typedef enum kind { ALLOCATION, THREAD, OPEN, STAT, MAP, READ, KINDS } kind;

static const struct {
    const char *name;
    mq_status expected;
} KIND[KINDS] = {{"allocation", MQ_ERR_MEMORY}, {"thread", MQ_ERR_THREAD}, {"open", MQ_ERR_IO}, {"fstat", MQ_ERR_IO},
                 {"mmap", MQ_ERR_IO}, {"read", MQ_ERR_IO}};

static kind failing;
static size_t calls, fail_at; /* 0: none fails */
static void *live[MOST_LIVE];
static size_t live_count, open_files;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static int fails(kind k)
{
    return k == failing && ++calls == fail_at;
}

void *__real_aligned_alloc(size_t alignment, size_t size);
void __real_free(void *memory);
int __real_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *), void *argument);
int __real_open(const char *path, int flags, ...);
int __real_close(int file);
int __real_fstat(int file, struct stat *facts);
void *__real_mmap(void *address, size_t size, int protection, int flags, int file, off_t offset);
ssize_t __real_read(int file, void *data, size_t size);

void *__wrap_aligned_alloc(size_t alignment, size_t size);
void *__wrap_aligned_alloc(size_t alignment, size_t size)
{
    (void)pthread_mutex_lock(&lock);
    void *memory = fails(ALLOCATION) ? NULL : __real_aligned_alloc(alignment, size);
    if (memory != NULL) {
        REQUIRE(live_count < MOST_LIVE);
        live[live_count++] = memory;
    }
    (void)pthread_mutex_unlock(&lock);
    return memory;
}

void __wrap_free(void *memory);
void __wrap_free(void *memory)
{
    (void)pthread_mutex_lock(&lock);
    for (size_t i = 0; i < live_count; i++) {
        if (live[i] == memory) {
            live[i] = live[--live_count];
            break;
        }
    }
    (void)pthread_mutex_unlock(&lock);
    __real_free(memory);
}

int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *), void *argument);
int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *), void *argument)
{
    return fails(THREAD) ? EAGAIN : __real_pthread_create(thread, attributes, start, argument);
}

int __wrap_open(const char *path, int flags, ...);
int __wrap_open(const char *path, int flags, ...)
{
    if (fails(OPEN)) {
        errno = EMFILE;
        return -1;
    }
    const int file = __real_open(path, flags);
    open_files += file >= 0;
    return file;
}

int __wrap_close(int file);
int __wrap_close(int file)
{
    open_files--;
    return __real_close(file);
}

int __wrap_fstat(int file, struct stat *facts);
int __wrap_fstat(int file, struct stat *facts)
{
    if (fails(STAT)) {
        errno = EIO;
        return -1;
    }
    return __real_fstat(file, facts);
}

void *__wrap_mmap(void *address, size_t size, int protection, int flags, int file, off_t offset);
void *__wrap_mmap(void *address, size_t size, int protection, int flags, int file, off_t offset)
{
    if (fails(MAP)) {
        errno = ENOMEM;
        return MAP_FAILED;
    }
    return __real_mmap(address, size, protection, flags, file, offset);
}

/* In small pieces and interrupted now and then, as from a network. */
ssize_t __wrap_read(int file, void *data, size_t size);
ssize_t __wrap_read(int file, void *data, size_t size)
{
    enum { PIECE = 50000 };
    static size_t turns;
    if (++turns % 2 == 0) {
        errno = EINTR;
        return -1;
    }
    if (fails(READ)) {
        errno = EIO;
        return -1;
    }
    return __real_read(file, data, size < PIECE ? size : PIECE);
}

/* Load, evaluate, save, restore, close: up to the first error. */
static mq_status use(const char *path, int32_t no_mmap, mq_error *error)
{
    const mq_model_options model_options = {.no_mmap = no_mmap, .check_tensors = 1};
    const mq_session_options session_options = {.n_threads = THREADS, .n_batch = 8};
    mq_model *model = NULL;
    mq_session *session = NULL;
    int32_t tokens[TOKENS];
    uint8_t *state = NULL;
    mq_status status = mq_model_open(path, &model_options, &model, error);
    REQUIRE((status == MQ_OK) == (model != NULL));
    if (status == MQ_OK) {
        status = mq_session_open(model, &session_options, &session, error);
        REQUIRE((status == MQ_OK) == (session != NULL));
    }
    if (status == MQ_OK) {
        for (size_t i = 0; i < TOKENS; i++) {
            tokens[i] = (int32_t)i;
        }
        REQUIRE(mq_session_set_average_bits(session, 3.5f, error) == MQ_OK);
        status = mq_session_eval(session, tokens, TOKENS, NULL, 0, error);
    }
    if (status == MQ_OK) {
        int32_t chosen[2];
        status = mq_session_greedy(session, 1, 2, chosen, NULL, error);
        REQUIRE(mq_session_position(session) == (status == MQ_OK ? TOKENS + 2 : TOKENS));
    }
    if (status == MQ_OK) {
        const size_t size = mq_session_state_size(session);
        state = malloc(size);
        REQUIRE(state != NULL && mq_session_state_get(session, state, size, error) == MQ_OK);
        status = mq_session_state_set(session, state, size, error);
    }
    free(state);
    mq_session_close(session);
    mq_model_close(model);
    return status;
}

/* How often a call of this kind failed before one run went through. */
static size_t fail_each(const char *path, kind k, int32_t no_mmap, mq_session *witness, const float *expected, size_t vocab)
{
    const size_t live_before = live_count, open_before = open_files;
    float *found = malloc(vocab * sizeof *found);
    REQUIRE(found != NULL);
    for (fail_at = 1;; fail_at++) {
        mq_error error = {MQ_OK, ""};
        failing = k;
        calls = 0;
        const mq_status status = use(path, no_mmap, &error);
        const int32_t reached = calls >= fail_at;
        failing = KINDS;
        REQUIRE(live_count == live_before && open_files == open_before);
        if (!reached) {
            REQUIRE(status == MQ_OK);
            break;
        }
        if (status != KIND[k].expected || error.status != status || error.message[0] == '\0') {
            (void)fprintf(stderr, "%s %zu failed: %s, %s\n", KIND[k].name, fail_at, mq_status_name(status), error.message);
            abort();
        }
        const int32_t token = 1;
        REQUIRE(mq_session_rewind(witness, 0, NULL) == MQ_OK && mq_session_eval(witness, &token, 1, found, 1, NULL) == MQ_OK);
        REQUIRE(memcmp(found, expected, vocab * sizeof *found) == 0);
    }
    free(found);
    return fail_at - 1;
}

int main(int count, char **arguments)
{
    if (count != 2) {
        (void)fprintf(stderr, "usage: failures FILE\n");
        return 2;
    }
    failing = KINDS;
    mq_model *model = NULL;
    mq_session *witness = NULL;
    REQUIRE(mq_model_open(arguments[1], NULL, &model, NULL) == MQ_OK && mq_session_open(model, NULL, &witness, NULL) == MQ_OK);
    mq_model_info info;
    mq_model_get_info(model, &info);
    float *expected = malloc(info.vocab_size * sizeof *expected);
    const int32_t token = 1;
    REQUIRE(expected != NULL && mq_session_eval(witness, &token, 1, expected, 1, NULL) == MQ_OK);
    for (int32_t no_mmap = 0; no_mmap <= 1; no_mmap++) {
        (void)printf("%s:", no_mmap ? "read" : "mapped");
        for (kind k = 0; k < KINDS; k++) {
            (void)printf(" %zu %s", fail_each(arguments[1], k, no_mmap, witness, expected, info.vocab_size), KIND[k].name);
        }
        (void)printf(" failures, each a named error\n");
    }
    free(expected);
    mq_session_close(witness);
    mq_model_close(model);
    REQUIRE(live_count == 0 && open_files == 0);
    return 0;
}
