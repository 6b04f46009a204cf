# Each target is one verb. The environments are .venv (serving, without torch) and .venv-test (everything).

PYTHON ?= python3
SERVE := .venv
TEST := .venv-test
# Two processes run the tests, because most tests wait for a service half of the time. Each process runs whole files, so
# that the tests of a file share their services. Waiting OpenMP threads sleep: where two processes share two cores,
# spinning takes the core from the thread that is waited for, and a third of the time.
PYTEST := OMP_WAIT_POLICY=passive $(TEST)/bin/python -m pytest -n 2 --dist loadfile
FIFTYONE := .venv-fiftyone
OLDEST := .venv-oldest
RIVALS := .venv-rivals
OPENVINO := .venv-openvino
COMPILER := .venv-compiler
READERS := .venv-readers
KERNEL := service/labelmint/kernel
MUTANTS := .venv-mutants
RELEASE := .venv-release
DIST := dist
SOURCE := .
PIP_FLAGS := --quiet --disable-pip-version-check --prefer-binary
UV_VERSION := 0.13.9
SERVE_EXTRAS := calibrate,docs,triton
TEST_EXTRAS := $(SERVE_EXTRAS),index,tracing,export,gpu,bench,test,dev
CLIENT_EXTRAS := huggingface,images,pull,s3,torch
comma := ,
space := $(subst ,, )
# The user's pip settings (variables or a file) could make pip install outside the environment, so they are overridden.
unexport PIP_TARGET PIP_PREFIX PIP_ROOT PIP_REQUIRE_VIRTUALENV PIP_NO_DEPS PIP_DRY_RUN PIP_PYTHON PYTHONHOME PYTHONPATH
export PIP_USER := 0
# An environment records the path of its checkout. If the checkout was moved or copied, the environment is rebuilt.
FORGOTTEN := $(shell for each in .venv .venv-test; do \
	test -s $$each/.ready && test "$$(cat $$each/.ready)" != "$$(pwd -P)" && rm -rf $$each; done)

CHECK_PYTHON = $(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13) and \
	"labelmint needs Python 3.10, 3.11 or 3.12; name one with: make PYTHON=python3.12 ...")'

# The client has its own copy in its own package. One process can load both, because they describe the same file.
CLIENT := clients/python/src/labelmint_client
COPY_PROTO = cp service/labelmint/v1/sample_service_pb2* $(CLIENT)/v1/ && \
	sed -i 's/^from labelmint\.v1 import/from labelmint_client.v1 import/' $(CLIENT)/v1/sample_service_pb2_grpc.py

.PHONY: serve test annotate unit check lock mutants torture bench images proto released-proto kernel compiler fiftyone readers oldest rivals openvino release packages manifests papers audit clean

# ARGS holds options for `labelmint serve`: make serve ARGS="--http-port 9090". If the checkout is read-only, set SERVE
# to a directory elsewhere: the environment is created there, with a copy of the program.
serve: $(SERVE)/.ready
	@exec $(SERVE)/bin/python -m labelmint.cli serve $(ARGS)

test: $(TEST)/.ready
	@$(PYTEST) $(PYTEST_FLAGS)

# Opens the page on which a person draws on the demo's images. DRAWINGS is the directory of the drawings.
annotate: $(TEST)/.ready
	@exec $(TEST)/bin/python -m labelmint.cli annotate --generator benchmarks/demo/weights/generator.safetensors --open \
		$(ARGS) $(or $(DRAWINGS),build/drawings)

# Runs the tests that need neither a service nor torch, in at most a minute.
unit: $(TEST)/.ready
	@$(PYTEST) -m unit $(PYTEST_FLAGS)

check: $(TEST)/.ready
	$(TEST)/bin/ruff check .
	$(TEST)/bin/ruff format --check .
	$(TEST)/bin/mypy

# Plants small faults in the decisions of the service and of its client, one at a time, and prints a table of how many
# the unit tests notice. FILES limits it to some of the files that tests/mutation/run.py lists, JOBS to some cores.
mutants: $(MUTANTS)/.ready
	@JOBS=$(JOBS) $(MUTANTS)/bin/python tests/mutation/run.py $(FILES)

# Runs the attacks of the tests at full length and prints a table. Fails if an attack found something.
torture: $(TEST)/.ready
	$(TEST)/bin/python -m tests.torture $(ATTACKS)

# Takes hours. Each benchmark is short or resumes after an interruption. Run nothing else on the machine meanwhile.
bench: $(TEST)/.ready $(RIVALS)/.ready
	$(TEST)/bin/python benchmarks/interpreter.py
	$(TEST)/bin/python benchmarks/dataloader.py
	$(TEST)/bin/python benchmarks/shuffled.py
	$(TEST)/bin/python benchmarks/seed_index.py
	$(TEST)/bin/python benchmarks/gate.py
	$(TEST)/bin/python benchmarks/latency.py
	$(TEST)/bin/python benchmarks/tax.py
	$(TEST)/bin/python benchmarks/gateway_cpu.py
	$(TEST)/bin/python benchmarks/encoders.py
	$(TEST)/bin/python benchmarks/startup.py
	$(TEST)/bin/python benchmarks/triton_memory.py
	$(TEST)/bin/python benchmarks/alternatives.py
	-@$(MAKE) --no-print-directory openvino
	$(TEST)/bin/python benchmarks/pair.py
	$(TEST)/bin/python benchmarks/growth.py
	$(TEST)/bin/python benchmarks/soak.py
	$(TEST)/bin/python benchmarks/slow_triton.py
	$(TEST)/bin/python benchmarks/autoscaling.py
	$(TEST)/bin/python benchmarks/labels_train_models.py
	PYTHONPATH=benchmarks $(TEST)/bin/python -m annotate.quick
	PYTHONPATH=benchmarks $(TEST)/bin/python -m annotate.latency
	PYTHONPATH=benchmarks $(TEST)/bin/python -m annotate.simulate
	$(TEST)/bin/python benchmarks/gpu_plan.py
	$(TEST)/bin/python benchmarks/report.py

# Builds the images with buildah and prints their sizes and digests. ARGS holds options, which `ARGS=--help` lists:
# make images ARGS="--push --name registry.example/labelmint".
images:
	@$(PYTHON) k8s/images/build.py $(ARGS)

proto: $(TEST)/.ready
	$(TEST)/bin/python -m grpc_tools.protoc -Iprotos --python_out=service --pyi_out=service \
		--grpc_python_out=service protos/labelmint/v1/sample_service.proto
	$(COPY_PROTO)
	cp protos/labelmint/v1/sample_service.proto clients/javascript/

# Writes the contract that tests/test_proto.py compares with. Run it for a release, never to make that test pass.
released-proto: $(TEST)/.ready
	$(TEST)/bin/buf build --exclude-source-info --output protos/labelmint/v1/released.binpb

# Compiles interpreter.c into the libraries that are shipped, for two levels of x86-64. clang, with its own headers and an
# old glibc's symbols, comes from one version of the package ziglang. With these flags the files name nothing of this
# machine, so the same source gives the same bytes everywhere.
KERNEL_FLAGS := -std=gnu11 -O3 -ffp-contract=fast -fPIC -shared -pthread -g0 -s -Wl,--build-id=none
kernel: $(COMPILER)/.ready
	@for level in v3 v4; do \
		$(COMPILER)/bin/python -m ziglang cc -target x86_64-linux-gnu.2.17 -mcpu=x86_64_$$level $(KERNEL_FLAGS) \
			service/labelmint/kernel/interpreter.c -o $(KERNEL)/interpreter.part && \
		mv $(KERNEL)/interpreter.part $(KERNEL)/interpreter.x86-64-$$level.so || exit 1; \
	done

# The compiler of the kernel, in an environment of its own: it takes 400 MB.
compiler: $(COMPILER)/.ready

# A separate environment for the test of FiftyOne's importer, because FiftyOne installs a gigabyte.
fiftyone: $(FIFTYONE)/.ready

# A separate environment for the tests of other projects' readers. Mosaic Streaming does not admit the transformers of
# the tests, and a torchvision that does not fit torch would break every library that imports it.
readers: $(READERS)/.ready

# Serving with the oldest ONNX Runtime that pyproject.toml admits: a test checks that samples are identical there.
oldest: $(OLDEST)/.ready

# The servers that benchmarks/alternatives.py compares labelmint with.
rivals: $(RIVALS)/.ready

# A separate environment for one arm of benchmarks/pair.py: its ONNX Runtime package replaces the usual one.
# If PyPI has no wheel of it for this machine, the benchmark leaves that arm out.
openvino: $(OPENVINO)/.ready

# Builds all files of a release in dist/, from the commit only: uncommitted changes are left out. The checksums are
# written last, so a release whose audit failed or could not be run has no checksums.
release: packages
	@rm -rf $(RELEASE)
	@$(PYTHON) -m venv --without-pip $(RELEASE)
	@$(TEST)/bin/python -m pip --python $(RELEASE)/bin/python install $(PIP_FLAGS) \
		"$$(echo $(DIST)/labelmint-*.whl)[$(SERVE_EXTRAS)]" $(DIST)/labelmint_client-*.whl
	@rm $(RELEASE)/lib/python*/site-packages/labelmint*/direct_url.json  # their path on this machine
	@$(MAKE) --no-print-directory manifests SOURCE=build/release/source
	@$(MAKE) --no-print-directory papers audit
	@cd $(DIST) && sha256sum -- * > SHA256SUMS
	@cat $(DIST)/SHA256SUMS

# Wheels and source archives of both distributions. The same commit and the same setuptools produce the same bytes:
# setuptools takes the dates in wheels from SOURCE_DATE_EPOCH. It does not for source archives, so those are repacked.
packages: export SOURCE_DATE_EPOCH = $(shell git log -1 --format=%ct)
packages: $(TEST)/.ready
	@rm -rf build/release $(DIST)
	@mkdir -p build/release/source $(DIST)
	@git archive HEAD | tar -x -C build/release/source
	@for directory in . clients/python; do \
		$(TEST)/bin/python -m build --outdir $(DIST) build/release/source/$$directory >build/release/log 2>&1 || \
			{ cat build/release/log; exit 1; }; \
	done
	@for archive in $(DIST)/*.tar.gz; do \
		mkdir build/release/again && tar -xzf $$archive -C build/release/again && \
		tar --sort=name --mtime=@$$SOURCE_DATE_EPOCH --owner=0 --group=0 --numeric-owner --mode=go=rX,u+rw \
			-cf - -C build/release/again $$(ls build/release/again) | gzip -n >$$archive && rm -r build/release/again || exit 1; \
	done

# Renders each overlay of $(SOURCE) to one file, which `kubectl apply -f` takes. Only complete files are in dist/.
manifests: $(TEST)/.ready
	@mkdir -p $(DIST)
	@for overlay in $(SOURCE)/k8s/overlays/*/; do \
		name=labelmint-$$(basename $$overlay).yaml; \
		$(TEST)/bin/kubectl kustomize $$overlay >$(DIST)/$$name.part && mv $(DIST)/$$name.part $(DIST)/$$name || exit 1; \
		echo $(DIST)/$$name; \
	done

# Writes the release documents about the packages in $(RELEASE): exact versions, licences, software bill of materials.
papers:
	@mkdir -p $(DIST)
	@$(TEST)/bin/python -m pip --python $(RELEASE)/bin/python freeze --exclude labelmint --exclude labelmint-client \
		--exclude-editable >$(DIST)/requirements.txt
	@$(TEST)/bin/pip-licenses --python $(RELEASE)/bin/python --from mixed --order name --with-urls --format markdown \
		--ignore-packages labelmint labelmint-client --output-file $(DIST)/LICENSES.md >/dev/null
	@$(TEST)/bin/cyclonedx-py environment --pyproject pyproject.toml --mc-type application --output-reproducible \
		--output-format JSON --output-file $(DIST)/labelmint.cdx.json $(RELEASE)/bin/python

# Asks PyPI for known vulnerabilities of those versions. With --strict, a package that cannot be checked fails the audit.
audit:
	@$(TEST)/bin/pip-audit --requirement $(DIST)/requirements.txt --no-deps --disable-pip --strict \
		--vulnerability-service pypi --progress-spinner off

clean:
	rm -rf $(SERVE) $(TEST) $(FIFTYONE) $(OLDEST) $(RIVALS) $(OPENVINO) $(COMPILER) $(READERS) $(MUTANTS) $(RELEASE) build dist
	rm -rf service/labelmint.egg-info clients/python/src/labelmint_client.egg-info

# Makes the environment $(1) and installs $(2) with uv. uv does not read pip's configuration, so the indexes and the
# certificates that somebody has configured for pip are passed on; all indexes are equal, as they are for pip.
define INSTALL
	@$(PYTHON) -m venv $(1)
	@$(1)/bin/python -m pip install $(PIP_FLAGS) uv==$(UV_VERSION)
	@setting() { $(1)/bin/python -m pip config get global.$$1 2>/dev/null | xargs; }; \
		UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX-$$(setting index-url)}" UV_INDEX="$${UV_INDEX-$$(setting extra-index-url)}" \
		UV_FIND_LINKS="$${UV_FIND_LINKS-$$(setting find-links)}" SSL_CERT_FILE="$${SSL_CERT_FILE-$$(setting cert)}" \
		UV_INDEX_STRATEGY=unsafe-best-match $(1)/bin/uv pip install --quiet --python $(1)/bin/python $(2)
endef

# In a read-only checkout, the environment gets a copy of the program, because an editable install writes to the source.
$(SERVE)/.ready: pyproject.toml requirements.lock
	@$(CHECK_PYTHON)
	@echo "labelmint: installing into $(SERVE) (once)"
	@$(if $(filter .venv,$(SERVE)),,mkdir -p $(SERVE) && rm -rf $(SERVE)/source && mkdir $(SERVE)/source && \
		cp -R pyproject.toml README.md LICENSE service $(SERVE)/source)
	$(call INSTALL,$(SERVE),--constraint requirements.lock $(if $(filter .venv,$(SERVE)),--editable '.[$(SERVE_EXTRAS)]','$(SERVE)/source[$(SERVE_EXTRAS)]'))
	@pwd -P >$@

$(TEST)/.ready: pyproject.toml clients/python/pyproject.toml requirements.lock
	@$(CHECK_PYTHON)
	@echo "labelmint: installing into $(TEST), with torch (once)"
	$(call INSTALL,$(TEST),--constraint requirements.lock --editable '.[$(TEST_EXTRAS)]' --editable 'clients/python[$(CLIENT_EXTRAS)]')
	@pwd -P >$@

# A comma would end an argument of `call`, so requirements with two limits are in variables.
FIFTYONE_PACKAGES := 'fiftyone>=1.5,<2' 'pycocotools>=2.0.8,<3'
$(FIFTYONE)/.ready:
	$(call INSTALL,$(FIFTYONE),$(FIFTYONE_PACKAGES))
	@touch $@

# With the torch of the other environments, which uv has then in its cache.
READERS_PACKAGES := 'albumentations>=2.0,<3' 'labelme>=6,<7' 'mosaicml-streaming>=0.13,<0.14' 'torchvision<1' 'ultralytics>=8.4,<8.5'
$(READERS)/.ready: clients/python/pyproject.toml constraints.txt
	@$(CHECK_PYTHON)
	$(call INSTALL,$(READERS),--constraint constraints.txt --editable clients/python $(READERS_PACKAGES))
	@touch $@

OLDEST_PACKAGE = $(shell sed -n 's/^triton = .*"onnxruntime>=\([0-9.]*\),.*/onnxruntime==\1/p' pyproject.toml)
$(OLDEST)/.ready: pyproject.toml
	@$(CHECK_PYTHON)
	$(call INSTALL,$(OLDEST),--editable '.[triton]' $(OLDEST_PACKAGE))
	@touch $@

$(RIVALS)/.ready: pyproject.toml constraints.txt
	@$(CHECK_PYTHON)
	$(call INSTALL,$(RIVALS),--constraint constraints.txt --editable '.[rivals]')
	@touch $@

OPENVINO_PACKAGES := 'onnxruntime-openvino>=1.22,<2' 'numpy>=1.26,<2'
$(OPENVINO)/.ready:
	$(call INSTALL,$(OPENVINO),$(OPENVINO_PACKAGES))
	@touch $@

$(COMPILER)/.ready:
	$(call INSTALL,$(COMPILER),'ziglang==0.17.1')
	@touch $@

# Writes the newest allowed versions of all packages into the lock file. constraints.txt pins those that decide the bytes
# of an export.
lock: $(TEST)/.ready
	@UV_CUSTOM_COMPILE_COMMAND='make lock' $(TEST)/bin/uv pip compile --quiet --universal --upgrade --no-annotate \
		--python-version 3.10 --no-python-downloads --constraint constraints.txt \
		$(addprefix --extra=,$(subst $(comma),$(space),$(TEST_EXTRAS)$(comma)$(CLIENT_EXTRAS))) \
		--output-file requirements.lock pyproject.toml clients/python/pyproject.toml

# It sees what .venv-test installs, except labelmint and its client: Python does not read the .pth files of such a
# directory, and the two are installed by those.
$(MUTANTS)/.ready: $(TEST)/.ready
	@rm -rf $(MUTANTS)
	$(call INSTALL,$(MUTANTS),'mutmut==3.8.1')
	@(cd $(TEST)/lib/python*/site-packages && pwd -P) >$$(echo $(MUTANTS)/lib/python*/site-packages)/tests.pth
	@touch $@
