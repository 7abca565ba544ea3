/* suite.c: the C API from end to end, for runs under sanitizers: every kernel, threads, batches, states, two threads on one
 * session, wrong arguments, and a folder of malformed files.
 *
 *     suite FILE FOLDER     FILE: a good file; FOLDER: malformed ones
 */
#include "harness.h"

#include <dirent.h>
#include <math.h>
#include <pthread.h>
#include <string.h>

enum { TOKENS = 40, DEPTHS = 4, MORE = 3 };

static int32_t prompt[TOKENS];

typedef struct budget {
    float bits;
    enum { ONE_DEPTH, ROUTED, STATIC } kind;
} budget;

static const budget BUDGETS[] = {{1, ONE_DEPTH}, {2, ONE_DEPTH}, {3, ONE_DEPTH}, {4, ONE_DEPTH},
                                 {2, ROUTED}, {3.3f, ROUTED}, {8, ROUTED}, {4.5f, STATIC}};

static mq_session *session_of(const mq_model *model, const char *kernel, uint32_t threads, uint32_t batch)
{
    const mq_session_options options = {.n_threads = threads, .n_batch = batch, .kernel = kernel};
    mq_session *session = NULL;
    mq_error error = {MQ_OK, ""};
    if (mq_session_open(model, &options, &session, &error) != MQ_OK) {
        (void)fprintf(stderr, "%s\n", error.message);
        abort();
    }
    return session;
}

static void set_budget(mq_session *session, budget b)
{
    const mq_status status = b.kind == ONE_DEPTH ? mq_session_set_depth(session, (uint32_t)b.bits, NULL)
                             : b.kind == ROUTED  ? mq_session_set_average_bits(session, b.bits, NULL)
                                                 : mq_session_set_static_bits(session, b.bits, NULL);
    REQUIRE(status == MQ_OK);
}

/* Logits of the last three tokens of the prompt, [MORE][vocab]. */
static float *logits_of(mq_session *session, const mq_model_info *info, budget b)
{
    float *logits = malloc((size_t)MORE * info->vocab_size * sizeof *logits);
    REQUIRE(logits != NULL);
    REQUIRE(mq_session_rewind(session, 0, NULL) == MQ_OK);
    set_budget(session, b);
    REQUIRE(mq_session_eval(session, prompt, TOKENS, logits, MORE, NULL) == MQ_OK);
    return logits;
}

/* Every kernel, thread count and batch gives the bits of the definition. */
static void check_kernels(const mq_model *model, const mq_model_info *info)
{
    static const uint32_t threads[] = {1, 2, 4}, batches[] = {1, 7, 64};
    mq_session *scalar = session_of(model, "scalar", 1, 64);
    for (size_t b = 0; b < sizeof BUDGETS / sizeof BUDGETS[0]; b++) {
        float *expected = logits_of(scalar, info, BUDGETS[b]);
        for (size_t k = 0; mq_kernel_name(k) != NULL; k++) {
            for (size_t i = 0; mq_kernel_supported(k) && i < sizeof threads / sizeof threads[0]; i++) {
                mq_session *session = session_of(model, mq_kernel_name(k), threads[i], batches[i]);
                float *found = logits_of(session, info, BUDGETS[b]);
                REQUIRE(memcmp(expected, found, (size_t)MORE * info->vocab_size * sizeof *found) == 0);
                free(found);
                mq_session_close(session);
            }
        }
        free(expected);
    }
    mq_session_close(scalar);
}

/* A saved state goes on in another session with the same bits; rewinding too. */
static void check_states(const mq_model *model, const mq_model_info *info)
{
    const size_t row = info->vocab_size * sizeof(float);
    mq_session *first = session_of(model, NULL, 1, 16), *second = session_of(model, NULL, 2, 5);
    float *a = logits_of(first, info, BUDGETS[5]), *b = malloc(row), *hidden = malloc(MORE * info->embedding_length * sizeof *hidden);
    REQUIRE(b != NULL && hidden != NULL);
    const size_t size = mq_session_state_size(first);
    uint8_t *state = malloc(size);
    REQUIRE(state != NULL && mq_session_state_get(first, state, size, NULL) == MQ_OK);
    REQUIRE(mq_session_state_get(first, state, size - 1, NULL) == MQ_ERR_ARGUMENT);
    REQUIRE(mq_session_set_average_bits(second, BUDGETS[5].bits, NULL) == MQ_OK);
    REQUIRE(mq_session_state_set(second, state, size, NULL) == MQ_OK);
    REQUIRE(mq_session_eval(first, prompt, 1, a, 1, NULL) == MQ_OK && mq_session_eval(second, prompt, 1, b, 1, NULL) == MQ_OK);
    REQUIRE(memcmp(a, b, row) == 0);
    REQUIRE(mq_session_rewind(second, TOKENS, NULL) == MQ_OK && mq_session_eval(second, prompt, 1, b, 1, NULL) == MQ_OK);
    REQUIRE(memcmp(a, b, row) == 0);
    REQUIRE(mq_session_eval_hidden(second, prompt, MORE, hidden, MORE, NULL) == MQ_OK);
    for (size_t cut = 0; cut < size; cut += cut < 200 ? 1 : 997) {
        REQUIRE(mq_session_state_set(second, state, cut, NULL) != MQ_OK);
    }
    state[size / 2] ^= 1;
    REQUIRE(mq_session_state_set(second, state, size, NULL) == MQ_ERR_FORMAT);
    REQUIRE(mq_session_position(second) == TOKENS + 1 + MORE);
    uint8_t *depths = malloc((size_t)TOKENS * info->block_count * 7);
    REQUIRE(depths != NULL && mq_session_depths(second, 0, TOKENS, depths, NULL) == MQ_OK);
    REQUIRE(mq_session_depths(second, TOKENS, TOKENS, depths, NULL) == MQ_ERR_ARGUMENT);
    mq_stats stats;
    mq_session_get_stats(second, &stats);
    REQUIRE(stats.tokens == 2 + MORE);
    free(depths);
    free(state);
    free(a);
    free(b);
    free(hidden);
    mq_session_close(first);
    mq_session_close(second);
}

typedef struct shared {
    const mq_model *model;
    mq_session *session; /* NULL: a session of its own */
    size_t done, busy;
} shared;

static void *evaluate_in_thread(void *argument)
{
    shared *s = argument;
    mq_session *session = s->session != NULL ? s->session : session_of(s->model, NULL, 2, 8);
    for (size_t i = 0; i < 50; i++) {
        const mq_status status = mq_session_eval(session, prompt, 1, NULL, 0, NULL);
        REQUIRE(status == MQ_OK || (s->session != NULL && status == MQ_ERR_BUSY));
        s->done += status == MQ_OK;
        s->busy += status == MQ_ERR_BUSY;
    }
    if (s->session == NULL) {
        mq_session_close(session);
    }
    return NULL;
}

/* Sessions of their own in threads; then one session in two threads, where one of the two gets a named error. */
static void check_threads(const mq_model *model)
{
    enum { THREADS = 4, SHARED = 2, EACH = 50, ENOUGH = 200 };
    pthread_t threads[THREADS];
    shared own[THREADS] = {{0}}, both[SHARED] = {{0}};
    for (size_t i = 0; i < THREADS; i++) {
        own[i].model = model;
        REQUIRE(pthread_create(&threads[i], NULL, evaluate_in_thread, &own[i]) == 0);
    }
    for (size_t i = 0; i < THREADS; i++) {
        REQUIRE(pthread_join(threads[i], NULL) == 0 && own[i].done == EACH);
    }
    const mq_session_options options = {.n_ctx = ENOUGH < model->hparams.context_length ? ENOUGH : 0, .n_batch = 8};
    mq_session *session = NULL;
    REQUIRE(mq_session_open(model, &options, &session, NULL) == MQ_OK);
    REQUIRE(mq_session_context(session) >= SHARED * EACH);
    for (size_t i = 0; i < SHARED; i++) {
        both[i] = (shared){.model = model, .session = session};
        REQUIRE(pthread_create(&threads[i], NULL, evaluate_in_thread, &both[i]) == 0);
    }
    for (size_t i = 0; i < SHARED; i++) {
        REQUIRE(pthread_join(threads[i], NULL) == 0 && both[i].done + both[i].busy == EACH);
    }
    REQUIRE(mq_session_position(session) == both[0].done + both[1].done);
    mq_session_close(session);
}

static void check_arguments(const char *path, const mq_model *model, const mq_model_info *info)
{
    mq_error error = {MQ_OK, ""};
    mq_model *none = NULL;
    mq_session *session = NULL;
    const char *text = NULL;
    size_t size = 0, count = 0;
    REQUIRE(mq_model_open(NULL, NULL, &none, &error) == MQ_ERR_ARGUMENT && mq_model_open(path, NULL, NULL, &error) == MQ_ERR_ARGUMENT);
    REQUIRE(mq_model_open("/no/such/file", NULL, &none, &error) == MQ_ERR_IO && strstr(error.message, "/no/such/file") != NULL);
    REQUIRE(mq_model_open("/dev/null", NULL, &none, NULL) == MQ_ERR_IO && mq_model_open("/", NULL, &none, NULL) == MQ_ERR_IO);
    char long_path[3000];
    memset(long_path, 'a', sizeof long_path);
    long_path[sizeof long_path - 1] = '\0';
    REQUIRE(mq_model_open(long_path, NULL, &none, &error) == MQ_ERR_IO && strstr(error.message, "a: cannot open: ") != NULL);
    REQUIRE(mq_session_open(NULL, NULL, &session, &error) == MQ_ERR_ARGUMENT);
    REQUIRE(mq_session_open(model, NULL, NULL, &error) == MQ_ERR_ARGUMENT);
    const mq_session_options options[] = {{.n_threads = 257}, {.n_ctx = info->context_length + 1}, {.kernel = "none"}};
    for (size_t i = 0; i < sizeof options / sizeof options[0]; i++) {
        REQUIRE(mq_session_open(model, &options[i], &session, &error) == MQ_ERR_ARGUMENT && session == NULL);
    }
    REQUIRE(mq_model_string(model, "no.such.key", &text, &size, &error) == MQ_OK && text == NULL);
    REQUIRE(mq_model_string(model, "general.alignment", &text, &size, &error) == MQ_ERR_FORMAT);
    REQUIRE(mq_model_u32(model, "general.name", NULL, 0, &count, &error) == MQ_ERR_FORMAT);
    session = session_of(model, NULL, 1, 8);
    static const float wrong[] = {NAN, INFINITY, -1.0f, 0.0f, 1.9f, 8.1f};
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        REQUIRE(mq_session_set_average_bits(session, wrong[i], &error) == MQ_ERR_ARGUMENT);
        REQUIRE(mq_session_set_static_bits(session, wrong[i], &error) == MQ_ERR_ARGUMENT);
    }
    REQUIRE(mq_session_set_depth(session, 0, &error) == MQ_ERR_ARGUMENT && mq_session_set_depth(session, 5, &error) == MQ_ERR_ARGUMENT);
    REQUIRE(mq_session_set_output_depth(session, 5, &error) == MQ_ERR_ARGUMENT);
    const int32_t outside[] = {-1, (int32_t)info->vocab_size, INT32_MAX, INT32_MIN};
    for (size_t i = 0; i < sizeof outside / sizeof outside[0]; i++) {
        REQUIRE(mq_session_eval(session, &outside[i], 1, NULL, 0, &error) == MQ_ERR_ARGUMENT);
    }
    REQUIRE(mq_session_eval(session, NULL, 0, NULL, 0, &error) == MQ_OK);
    REQUIRE(mq_session_eval(session, NULL, 1, NULL, 0, &error) == MQ_ERR_ARGUMENT);
    REQUIRE(mq_session_eval(session, prompt, 1, NULL, 1, &error) == MQ_ERR_ARGUMENT);
    REQUIRE(mq_session_eval_hidden(session, prompt, 1, NULL, 1, &error) == MQ_ERR_ARGUMENT);
    REQUIRE(mq_session_eval(session, prompt, 1, NULL, 2, &error) == MQ_ERR_ARGUMENT);
    REQUIRE(mq_session_eval(session, prompt, info->context_length + 1, NULL, 0, &error) == MQ_ERR_CONTEXT_FULL);
    REQUIRE(mq_session_rewind(session, 1, &error) == MQ_ERR_ARGUMENT);
    REQUIRE(mq_session_state_get(session, NULL, SIZE_MAX, &error) == MQ_ERR_ARGUMENT);
    REQUIRE(mq_session_state_set(session, NULL, 1, &error) == MQ_ERR_ARGUMENT);
    REQUIRE(mq_session_position(session) == 0);
    mq_session_close(session);
    mq_session_close(NULL);
    mq_model_close(NULL);
}

/* Every malformed file is refused, or is one whose fault lies in values: then it runs, and the check of its tensors finds it. */
static void check_malformed(const char *folder)
{
    DIR *files = opendir(folder);
    REQUIRE(files != NULL);
    size_t refused = 0, ran = 0;
    for (struct dirent *entry = readdir(files); entry != NULL; entry = readdir(files)) {
        if (strstr(entry->d_name, ".gguf") == NULL) {
            continue;
        }
        char path[4096];
        REQUIRE((size_t)snprintf(path, sizeof path, "%s/%s", folder, entry->d_name) < sizeof path);
        for (int32_t no_mmap = 0; no_mmap <= 1; no_mmap++) {
            const mq_model_options options = {.no_mmap = no_mmap};
            mq_model *model = NULL;
            mq_error error = {MQ_OK, ""};
            if (mq_model_open(path, &options, &model, &error) != MQ_OK) {
                REQUIRE(strstr(error.message, entry->d_name) != NULL);
                refused++;
            } else {
                evaluate_briefly(model);
                for (size_t i = 0; i <= model->file.tensor_count; i++) {
                    (void)mq_model_check(model, i, &error);
                }
                ran++;
            }
            mq_model_close(model);
        }
    }
    REQUIRE(closedir(files) == 0);
    REQUIRE(refused > ran);
    (void)printf("malformed files: %zu opened, %zu refused, %zu ran\n", refused + ran, refused, ran);
}

int main(int count, char **arguments)
{
    if (count != 3) {
        (void)fprintf(stderr, "usage: suite FILE FOLDER\n");
        return 2;
    }
    const mq_model_options options = {.check_tensors = 1};
    mq_model *model = NULL;
    mq_error error = {MQ_OK, ""};
    if (mq_model_open(arguments[1], &options, &model, &error) != MQ_OK) {
        (void)fprintf(stderr, "%s\n", error.message);
        return 1;
    }
    mq_model_info info;
    mq_model_get_info(model, &info);
    for (size_t i = 0; i < TOKENS; i++) {
        prompt[i] = (int32_t)(i * 37 % info.vocab_size);
    }
    check_kernels(model, &info);
    check_states(model, &info);
    check_threads(model);
    check_arguments(arguments[1], model, &info);
    check_malformed(arguments[2]);
    mq_model_close(model);
    (void)printf("suite: ok\n");
    return 0;
}
