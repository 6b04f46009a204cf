# One verb a target. Environments live in .venv (serving: no torch) and .venv-test (everything).

PYTHON ?= python3
SERVE := .venv
TEST := .venv-test
FIFTYONE := .venv-fiftyone
OLDEST := .venv-oldest
RIVALS := .venv-rivals
OPENVINO := .venv-openvino
RELEASE := .venv-release
DIST := dist
PIP_FLAGS := --quiet --disable-pip-version-check --prefer-binary
# What a person's pip is told, by variables or a file, to install elsewhere than into the environment that is asked for.
unexport PIP_TARGET PIP_PREFIX PIP_ROOT PIP_REQUIRE_VIRTUALENV PIP_NO_DEPS PIP_DRY_RUN PIP_PYTHON PYTHONHOME PYTHONPATH
export PIP_USER := 0
# An environment knows its checkout by its path: where that was moved or copied, it is made anew.
FORGOTTEN := $(shell for each in .venv .venv-test; do \
	test -s $$each/.ready && test "$$(cat $$each/.ready)" != "$$(pwd -P)" && rm -rf $$each; done)

CHECK_PYTHON = $(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13) and \
	"labelmint needs Python 3.10, 3.11 or 3.12; name one with: make PYTHON=python3.12 ...")'

# The client has a copy of its own under its own name; both can live in one process, as they describe the same file.
CLIENT := clients/python/src/labelmint_client
COPY_PROTO = cp service/labelmint/v1/sample_service_pb2* $(CLIENT)/v1/ && \
	sed -i 's/^from labelmint\.v1 import/from labelmint_client.v1 import/' $(CLIENT)/v1/sample_service_pb2_grpc.py

.PHONY: serve test unit check torture bench proto released-proto fiftyone oldest rivals openvino release packages papers audit clean

# Options of `labelmint serve` go into ARGS: make serve ARGS="--http-port 9090". In a checkout that cannot be written,
# SERVE names the environment's directory, elsewhere; it gets a copy of the program.
serve: $(SERVE)/.ready
	@exec $(SERVE)/bin/python -m labelmint.cli serve $(ARGS)

test: $(TEST)/.ready
	@$(TEST)/bin/python -m pytest $(PYTEST_FLAGS)

# What needs neither a service nor torch: a minute at most.
unit: $(TEST)/.ready
	@$(TEST)/bin/python -m pytest -m unit $(PYTEST_FLAGS)

check: $(TEST)/.ready
	$(TEST)/bin/ruff check .
	$(TEST)/bin/ruff format --check .
	$(TEST)/bin/mypy

# The attacks of the tests at full length; a table at the end, and a failure where one of them found something.
torture: $(TEST)/.ready
	$(TEST)/bin/python -m tests.torture $(ATTACKS)

# Hours; each benchmark goes on where it was interrupted, or is short. Leave the machine alone meanwhile.
bench: $(TEST)/.ready $(RIVALS)/.ready
	$(TEST)/bin/python benchmarks/interpreter.py
	$(TEST)/bin/python benchmarks/dataloader.py
	$(TEST)/bin/python benchmarks/gate.py
	$(TEST)/bin/python benchmarks/latency.py
	$(TEST)/bin/python benchmarks/tax.py
	$(TEST)/bin/python benchmarks/gateway_cpu.py
	$(TEST)/bin/python benchmarks/encoders.py
	$(TEST)/bin/python benchmarks/startup.py
	$(TEST)/bin/python benchmarks/alternatives.py
	-@$(MAKE) --no-print-directory openvino
	$(TEST)/bin/python benchmarks/pair.py
	$(TEST)/bin/python benchmarks/growth.py
	$(TEST)/bin/python benchmarks/soak.py
	$(TEST)/bin/python benchmarks/autoscaling.py
	$(TEST)/bin/python benchmarks/labels_train_models.py
	$(TEST)/bin/python benchmarks/gpu_plan.py
	$(TEST)/bin/python benchmarks/report.py

proto: $(TEST)/.ready
	$(TEST)/bin/python -m grpc_tools.protoc -Iprotos --python_out=service --pyi_out=service \
		--grpc_python_out=service protos/labelmint/v1/sample_service.proto
	$(COPY_PROTO)
	cp protos/labelmint/v1/sample_service.proto clients/javascript/

# What tests/test_proto.py holds the contract to. Run it at a release and never to make that test pass.
released-proto: $(TEST)/.ready
	$(TEST)/bin/buf build --exclude-source-info --output protos/labelmint/v1/released.binpb

# An environment of its own for the test of FiftyOne's importer: it brings a gigabyte.
fiftyone: $(FIFTYONE)/.ready

# Serving with the oldest ONNX Runtime that pyproject.toml admits, for the test of identity there.
oldest: $(OLDEST)/.ready

# The servers that benchmarks/alternatives.py compares labelmint with.
rivals: $(RIVALS)/.ready

# An environment of its own for one arm of benchmarks/pair.py: an ONNX Runtime that takes the place of the usual one.
# Where PyPI has no wheel of it for this machine, that arm is left out.
openvino: $(OPENVINO)/.ready

# Everything that a release hands out, in dist/: of the commit, never of what lies uncommitted. The checksums come
# last, so that a release whose audit found something, or could not be made, has none.
release: packages
	@rm -rf $(RELEASE)
	@$(PYTHON) -m venv --without-pip $(RELEASE)
	@$(TEST)/bin/python -m pip --python $(RELEASE)/bin/python install $(PIP_FLAGS) \
		"$$(echo $(DIST)/labelmint-*.whl)[triton]" $(DIST)/labelmint_client-*.whl
	@rm $(RELEASE)/lib/python*/site-packages/labelmint*/direct_url.json  # where on this machine they came from
	@$(MAKE) --no-print-directory papers audit
	@cd $(DIST) && sha256sum -- * > SHA256SUMS
	@cat $(DIST)/SHA256SUMS

# Wheels and source archives of both distributions. The same commit and setuptools give the same bytes: setuptools
# dates wheels by SOURCE_DATE_EPOCH, source archives are packed again because it does not date those.
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

# Of what $(RELEASE) has installed: the exact versions, their licences, and a software bill of materials.
papers:
	@mkdir -p $(DIST)
	@$(TEST)/bin/python -m pip --python $(RELEASE)/bin/python freeze --exclude labelmint --exclude labelmint-client \
		--exclude-editable >$(DIST)/requirements.txt
	@$(TEST)/bin/pip-licenses --python $(RELEASE)/bin/python --from mixed --order name --with-urls --format markdown \
		--ignore-packages labelmint labelmint-client --output-file $(DIST)/LICENSES.md >/dev/null
	@$(TEST)/bin/cyclonedx-py environment --pyproject pyproject.toml --mc-type application --output-reproducible \
		--output-format JSON --output-file $(DIST)/labelmint.cdx.json $(RELEASE)/bin/python

# Asks PyPI for known vulnerabilities of those versions. Strict: what could not be asked has not passed.
audit:
	@$(TEST)/bin/pip-audit --requirement $(DIST)/requirements.txt --no-deps --disable-pip --strict \
		--vulnerability-service pypi --progress-spinner off

clean:
	rm -rf $(SERVE) $(TEST) $(FIFTYONE) $(OLDEST) $(RIVALS) $(OPENVINO) $(RELEASE) build dist
	rm -rf service/labelmint.egg-info clients/python/src/labelmint_client.egg-info

# pip is renewed first: old resolvers try source packages for minutes.
$(SERVE)/.ready: pyproject.toml
	@$(CHECK_PYTHON)
	@echo "labelmint: installing into $(SERVE) (once)"
	@$(PYTHON) -m venv $(SERVE)
	@$(SERVE)/bin/python -m pip install $(PIP_FLAGS) --upgrade 'pip>=24'
	@$(if $(filter .venv,$(SERVE)),,rm -rf $(SERVE)/source && mkdir $(SERVE)/source && \
		cp -R pyproject.toml README.md LICENSE service $(SERVE)/source)
	@$(SERVE)/bin/python -m pip install $(PIP_FLAGS) $(if $(filter .venv,$(SERVE)),--editable '.[triton]','$(SERVE)/source[triton]')
	@pwd -P >$@

$(TEST)/.ready: pyproject.toml clients/python/pyproject.toml constraints.txt
	@$(CHECK_PYTHON)
	@echo "labelmint: installing into $(TEST), with torch (once)"
	@$(PYTHON) -m venv $(TEST)
	@$(TEST)/bin/python -m pip install $(PIP_FLAGS) --upgrade 'pip>=24'
	@$(TEST)/bin/python -m pip install $(PIP_FLAGS) --constraint constraints.txt --editable '.[triton,tracing,export,bench,test,dev]' \
		--editable 'clients/python[huggingface,images,pull,torch]'
	@pwd -P >$@

$(FIFTYONE)/.ready:
	@$(PYTHON) -m venv $(FIFTYONE)
	@$(FIFTYONE)/bin/python -m pip install $(PIP_FLAGS) --upgrade 'pip>=24'
	@$(FIFTYONE)/bin/python -m pip install $(PIP_FLAGS) 'fiftyone>=1.5,<2' 'pycocotools>=2.0.8,<3'
	@touch $@

$(OLDEST)/.ready: pyproject.toml
	@$(CHECK_PYTHON)
	@$(PYTHON) -m venv $(OLDEST)
	@$(OLDEST)/bin/pip install $(PIP_FLAGS) --upgrade 'pip>=24'
	@$(OLDEST)/bin/pip install $(PIP_FLAGS) --editable '.[triton]' \
		"$$(sed -n 's/^triton = .*"onnxruntime>=\([0-9.]*\),.*/onnxruntime==\1/p' pyproject.toml)"
	@touch $@

$(RIVALS)/.ready: pyproject.toml constraints.txt
	@$(CHECK_PYTHON)
	@$(PYTHON) -m venv $(RIVALS)
	@$(RIVALS)/bin/python -m pip install $(PIP_FLAGS) --upgrade 'pip>=24'
	@$(RIVALS)/bin/python -m pip install $(PIP_FLAGS) --constraint constraints.txt --editable '.[rivals]'
	@touch $@

$(OPENVINO)/.ready:
	@$(PYTHON) -m venv $(OPENVINO)
	@$(OPENVINO)/bin/python -m pip install $(PIP_FLAGS) --upgrade 'pip>=24'
	@$(OPENVINO)/bin/python -m pip install $(PIP_FLAGS) 'onnxruntime-openvino>=1.22,<2' 'numpy>=1.26,<2'
	@touch $@
