# libqcow2: build, demo, check, install. Needs cargo and cc; check also python3, pkg-config and nm, and uses valgrind,
# qemu-img and qemu-io where they are installed.

VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
DESCRIPTION := $(shell sed -n 's/^description = "\(.*\)"/\1/p' Cargo.toml)
SONAME := libqcow2.so.0
SO := build/libqcow2.so.$(VERSION)

PREFIX ?= /usr/local
LIBDIR ?= $(PREFIX)/lib
INCLUDEDIR ?= $(PREFIX)/include
DESTDIR ?=

CC ?= cc
CFLAGS ?= -O2 -g
CARGO ?= cargo
OBJCOPY ?= objcopy
CARGO_TARGET := $(or $(CARGO_TARGET_DIR),target)
comma := ,
JOBS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: build demo check crash fuzz sanitize tsan bench bench-check bench-driver bench-peers install header clean fmt archive

build: $(SO)

# Cargo knows better than make whether anything changed; the copy is only touched if it did.
archive:
	@command -v $(CARGO) >/dev/null || { echo "make: cargo is not installed (see https://rustup.rs)" >&2; exit 1; }
	@command -v $(CC) >/dev/null || { echo "make: no C compiler ($(CC)) is installed" >&2; exit 1; }
	$(CARGO) build --release --locked -j $(JOBS) --features capi
	@mkdir -p build
	@cmp -s $(CARGO_TARGET)/release/libqcow2.a build/libqcow2.a || cp $(CARGO_TARGET)/release/libqcow2.a build/libqcow2.a

# With a recipe, if only one that does nothing: without one, make does not look at the file's time again.
build/libqcow2.a: archive
	@:

# The shared library is linked from the static one: the linker call of rustc takes no second version script. What
# debuggers need is 15 times the library, and left out unless it is asked for: make clean && make DEBUG=1.
STRIP_DEBUG := $(if $(filter-out 0,$(DEBUG)),,-Wl$(comma)--strip-debug)

$(SO): build/libqcow2.a libqcow2.map Makefile
	$(CC) -shared -o $@ -Wl,-soname,$(SONAME) -Wl,--version-script=libqcow2.map \
	    -Wl,--whole-archive build/libqcow2.a -Wl,--no-whole-archive \
	    -Wl,--gc-sections -Wl,-z,relro,-z,now -Wl,--no-undefined $(STRIP_DEBUG) -lgcc_s -lpthread -ldl -lm
	ln -sf $(notdir $@) build/$(SONAME)
	ln -sf $(SONAME) build/libqcow2.so

build/subcluster_write: examples/subcluster_write.c include/qcow2.h $(SO)
	$(CC) -std=c11 -Wall -Wextra -Werror $(CFLAGS) -Iinclude $< -o $@ -Lbuild -lqcow2 -Wl,-rpath,'$$ORIGIN'

demo: build/subcluster_write
	@examples/demo build/subcluster_write

# Everything, with one line at the end: 'N passed, N failed'.
check: build
	@CC='$(CC)' CARGO='$(CARGO)' MAKE='$(MAKE)' JOBS=$(JOBS) tests/check

# What the library costs over the raw system calls, beside QEMU and other libraries, in one table (benches/run.py says
# more). BENCH_QUICK=1: only whether it all works. PLOT=1: the table as a picture too, build/bench/table.svg.
# BENCH_DIRS="MEMORY DISK": where (default: /dev/shm and the folder for temporary files). BENCH_ARGS: more for run.py.
BENCH_DIRS ?=
BENCH_ARGS ?=
BENCH_PROGRAMS := $(addprefix build/bench/,driver driver-heap queue large check $(basename $(notdir $(wildcard benches/compressed.c))))
bench: bench-driver $(if $(filter-out 0,$(BENCH_QUICK)),,bench-peers)
	python3 benches/run.py --no-build $(if $(filter-out 0,$(PLOT)),--plot build/bench/table.svg) $(BENCH_ARGS) $(BENCH_DIRS)

# What a check costs beside the least that it has to do, and beside qemu-img.
bench-check: bench-driver
	python3 benches/run.py --no-build --only '^check' $(BENCH_DIRS)

bench-driver: $(BENCH_PROGRAMS)

# The peers are a crate of its own. Where they are not to be had, the table says so.
bench-peers:
	@$(CARGO) build -q --release --locked -j $(JOBS) --manifest-path benches/peers/Cargo.toml --target-dir build/bench/peers-target && \
	    cp build/bench/peers-target/release/peers build/bench/peers || { rm -f build/bench/peers; echo "bench: no peers" >&2; }

# The codecs alone are a crate of their own, which knows nothing of the library.
build/bench/compressed: benches/compressed.c benches/codec/src/lib.rs benches/codec/Cargo.toml include/qcow2.h $(SO)
	@mkdir -p build/bench
	$(CARGO) build -q --release --locked -j $(JOBS) --manifest-path benches/codec/Cargo.toml --target-dir $(CARGO_TARGET)/codec-alone
	$(CC) -std=c11 -Wall -Wextra -Werror $(CFLAGS) -Iinclude $< -o $@ $(CARGO_TARGET)/codec-alone/release/libcodec_alone.a \
	    -Lbuild -lqcow2 -lpthread -ldl -lm -lgcc_s -Wl,-rpath,'$$ORIGIN/..'

build/bench/%: benches/%.c benches/ring.h include/qcow2.h $(SO)
	@mkdir -p build/bench
	$(CC) -std=c11 -Wall -Wextra -Werror $(CFLAGS) -Iinclude $< -o $@ -Lbuild -lqcow2 -lpthread -Wl,-rpath,'$$ORIGIN/..'

# Linked statically, so that the library's calls of the heap go through the driver's counters.
build/bench/driver-heap: benches/driver.c include/qcow2.h build/libqcow2.a
	@mkdir -p build/bench
	$(CC) -std=c11 -Wall -Wextra -Werror $(CFLAGS) -DCOUNT_HEAP -Iinclude $< -o $@ build/libqcow2.a \
	    $(addprefix -Wl$(comma)--wrap=,malloc calloc realloc aligned_alloc posix_memalign) -lgcc_s -lpthread -ldl -lm

# The crash campaign at length: make crash CRASH_STATES=100000000 CRASH_SEED=7 (more settings: tests/sim/campaign.rs)
CRASH_STATES ?= 20000000
crash:
	@CRASH_ROWS=all CRASH_STATES=$(CRASH_STATES) $(CARGO) test -q --locked -j $(JOBS) --profile campaign --test sim campaign:: -- --nocapture

# Every fuzz target for so many seconds, after the inputs that broke it before: make fuzz SECONDS=600, or
# make fuzz SECONDS=60 TARGETS="operate c_calls" SANITIZE=address (which needs a nightly toolchain).
SECONDS ?= 30
TARGETS ?=
fuzz:
	CARGO='$(CARGO)' JOBS=$(JOBS) SANITIZE='$(SANITIZE)' fuzz/run $(SECONDS) $(TARGETS)

# The C tests with the library and themselves under the address sanitizer (and gcc's for undefined behaviour). The library
# is built anew for that, in a folder of its own: minutes, the first time.
HOST = $(shell rustc -vV | sed -n 's/^host: //p')
sanitize: $(SO)
	RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address $(CARGO) build -q --release --locked -j $(JOBS) --features capi \
	    --target $(HOST) --target-dir target/address
	CC='$(CC)' SANITIZE=address capi-tests/run $(TESTS)

# The tests that use threads under the thread sanitizer, with all of the standard library: needs the sources of that
# (tests/races says more). make tsan TESTS="--test queue" for some of them.
tsan:
	CARGO='$(CARGO)' JOBS=$(JOBS) tests/races $(TESTS)

install: build
	install -d $(DESTDIR)$(LIBDIR)/pkgconfig $(DESTDIR)$(INCLUDEDIR)
	install -m 755 $(SO) $(DESTDIR)$(LIBDIR)/
	ln -sf $(notdir $(SO)) $(DESTDIR)$(LIBDIR)/$(SONAME)
	ln -sf $(SONAME) $(DESTDIR)$(LIBDIR)/libqcow2.so
	install -m 644 build/libqcow2.a $(DESTDIR)$(LIBDIR)/
	$(if $(STRIP_DEBUG),! command -v $(OBJCOPY) >/dev/null || $(OBJCOPY) --strip-debug $(DESTDIR)$(LIBDIR)/libqcow2.a)
	install -m 644 include/qcow2.h $(DESTDIR)$(INCLUDEDIR)/
	sed -e 's|@PREFIX@|$(PREFIX)|' -e 's|@LIBDIR@|$(LIBDIR)|' -e 's|@INCLUDEDIR@|$(INCLUDEDIR)|' \
	    -e 's|@VERSION@|$(VERSION)|' -e 's|@DESCRIPTION@|$(DESCRIPTION)|' qcow2.pc.in \
	    > $(DESTDIR)$(LIBDIR)/pkgconfig/qcow2.pc

# Writes include/qcow2.h anew from the comments in src/capi/.
header:
	$(CARGO) check --locked -j $(JOBS) --features header

fmt:
	$(CARGO) fmt --all

clean:
	$(CARGO) clean
	rm -rf build
