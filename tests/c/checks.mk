# The C library under sanitizers, fuzzers, injected failures and the static analyser; results go to build/checks.
#   make asan ubsan tsan msan   tests/c/suite.c under one sanitizer (asan and ubsan: failures.c and a sweep too)
#   make fuzz                   every target of tests/fuzz for FUZZ_SECONDS in all, from its corpus
#   make sweep                  every cut of a file and every value of every byte of its metadata
#   make analyze                clang's static analyser over the library and these programs
#   make coverage               lines of runtime/src that suite, failures and sweep reach

CLANG ?= clang
CHECKS := build/checks
FUZZ_SECONDS ?= 120
FUZZ_TARGETS := file state api

CHECK_FLAGS := -std=c11 -D_GNU_SOURCE -g -ffp-contract=off -fno-omit-frame-pointer -I$(CURDIR)/runtime/include -I$(CURDIR)/runtime/src
CHECK_LIBRARY := $(abspath $(C_SOURCES) tests/c/harness.c)
CHECK_HEADERS := $(C_HEADERS) $(wildcard tests/c/*.h tests/fuzz/*.h)
STRICT := -fno-sanitize-recover=all
# Each of these fails once at a time in tests/c/failures.c.
WRAPPED := aligned_alloc free pthread_create open close fstat mmap read
WRAP := $(WRAPPED:%=-Wl,--wrap=%)

SANITIZE_asan := -fsanitize=address
SANITIZE_ubsan := -fsanitize=undefined,float-cast-overflow,implicit-conversion
SANITIZE_tsan := -fsanitize=thread
SANITIZE_msan := -fsanitize=memory
SANITIZE_fuzz := -fsanitize=fuzzer-no-link,address,undefined,float-cast-overflow
BUILD_plain := $(CC) $(CHECK_FLAGS) -O2
BUILD_asan := $(CLANG) $(CHECK_FLAGS) -O1 $(STRICT) $(SANITIZE_asan)
BUILD_ubsan := $(CLANG) $(CHECK_FLAGS) -O1 $(STRICT) $(SANITIZE_ubsan)
BUILD_tsan := $(CLANG) $(CHECK_FLAGS) -O1 $(STRICT) $(SANITIZE_tsan)
BUILD_msan := $(CLANG) $(CHECK_FLAGS) -O1 $(STRICT) $(SANITIZE_msan)
BUILD_fuzz := $(CLANG) $(CHECK_FLAGS) -O2 $(STRICT) $(SANITIZE_fuzz)
BUILD_coverage := $(CC) $(CHECK_FLAGS) -O0 --coverage

.PHONY: asan ubsan tsan msan fuzz sweep analyze coverage

asan ubsan: %: $(CHECKS)/suite-% $(CHECKS)/failures-% $(CHECKS)/sweep-% $(CHECKS)/files
	$(CHECKS)/suite-$* $(CHECKS)/tiny.gguf $(CHECKS)/malformed
	$(CHECKS)/failures-$* $(CHECKS)/tiny.gguf
	$(CHECKS)/sweep-$* $(CHECKS)/small.gguf 16 1

tsan msan: %: $(CHECKS)/suite-% $(CHECKS)/files
	$(CHECKS)/suite-$* $(CHECKS)/tiny.gguf $(CHECKS)/malformed

sweep: $(CHECKS)/sweep-plain $(CHECKS)/files
	$(CHECKS)/sweep-plain $(CHECKS)/small.gguf 1 255

# A target stops at its first finding and writes the input to build/checks; what it learns goes to build/checks too.
fuzz: $(FUZZ_TARGETS:%=$(CHECKS)/fuzz-%)
	for target in $(FUZZ_TARGETS); do \
	  mkdir -p $(CHECKS)/corpus-$$target; \
	  ASAN_OPTIONS=quarantine_size_mb=1:thread_local_quarantine_size_kb=64:malloc_context_size=2 \
	  $(CHECKS)/fuzz-$$target -max_len=256 -timeout=20 -print_final_stats=1 -verbosity=0 -artifact_prefix=$(CHECKS)/ \
	    -max_total_time=$$(($(FUZZ_SECONDS) / $(words $(FUZZ_TARGETS)))) \
	    $(CHECKS)/corpus-$$target tests/fuzz/corpus/$$target || exit 1; \
	done

analyze: $(INSTALLED)
	for file in $(C_SOURCES) $(wildcard tests/c/*.c) $(filter-out tests/fuzz/base.c,$(wildcard tests/fuzz/*.c)); do \
	  $(CLANG) --analyze --analyzer-output text -Xclang -analyzer-werror $(CHECK_FLAGS) $$file || exit 1; \
	done

coverage: $(CHECKS)/suite-coverage $(CHECKS)/failures-coverage $(CHECKS)/sweep-coverage $(CHECKS)/files
	rm -f $(CHECKS)/coverage/*.gcda
	$(CHECKS)/suite-coverage $(CHECKS)/tiny.gguf $(CHECKS)/malformed
	$(CHECKS)/failures-coverage $(CHECKS)/tiny.gguf
	$(CHECKS)/sweep-coverage $(CHECKS)/small.gguf 64 1
	$(BIN)/python tests/c/coverage.py $(CHECKS)/coverage runtime/src

$(CHECKS)/files: $(NATIVE) tests/c/small.py tests/tiny.py $(wildcard export/*.py tests/malformed/*.py)
	mkdir -p $(CHECKS)
	PYTHONPATH=tests $(BIN)/python tests/c/small.py $(CHECKS)/small.gguf $(CHECKS)/tiny.gguf
	rm -rf $(CHECKS)/malformed
	PYTHONPATH=tests $(BIN)/python -m malformed $(CHECKS)/tiny.gguf $(CHECKS)/malformed
	touch $@

# suite-asan, failures-ubsan, sweep-plain, ...: program and how it is built.
define LIBRARY
$(CHECKS)/$(1)/library.a: $(CHECK_LIBRARY) $(CHECK_HEADERS)
	rm -rf $(CHECKS)/$(1) && mkdir -p $(CHECKS)/$(1)
	cd $(CHECKS)/$(1) && $(BUILD_$(1)) -c $(CHECK_LIBRARY) && $(AR) cr library.a *.o
endef
$(foreach kind,plain asan ubsan tsan msan fuzz coverage,$(eval $(call LIBRARY,$(kind))))

define PROGRAM
$(CHECKS)/$(1)-$(2): tests/c/$(1).c $(CHECKS)/$(2)/library.a
	$(BUILD_$(2)) tests/c/$(1).c $(CHECKS)/$(2)/library.a -lm -pthread $(if $(filter failures,$(1)),$(WRAP)) -o $$@
endef
$(foreach program,suite failures sweep,\
  $(foreach kind,plain asan ubsan tsan msan coverage,$(eval $(call PROGRAM,$(program),$(kind)))))

$(CHECKS)/fuzz-%: tests/fuzz/%.c tests/fuzz/base.c $(CHECKS)/fuzz/library.a $(CHECKS)/files
	$(BUILD_fuzz) -fsanitize=fuzzer -DFUZZ_BASE_FILE='"$(CHECKS)/small.gguf"' tests/fuzz/$*.c tests/fuzz/base.c \
	  $(CHECKS)/fuzz/library.a -lm -pthread -o $@
