# One verb a target. Environments live in .venv (serving: no torch) and .venv-test (everything).

PYTHON ?= python3
SERVE := .venv
TEST := .venv-test
FIFTYONE := .venv-fiftyone
PIP_FLAGS := --quiet --disable-pip-version-check --prefer-binary

CHECK_PYTHON = $(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13) and \
	"labelmint needs Python 3.10, 3.11 or 3.12; name one with: make PYTHON=python3.12 ...")'

# The client has a copy of its own under its own name; both can live in one process, as they describe the same file.
CLIENT := clients/python/src/labelmint_client
COPY_PROTO = cp service/labelmint/v1/sample_service_pb2* $(CLIENT)/v1/ && \
	sed -i 's/^from labelmint\.v1 import/from labelmint_client.v1 import/' $(CLIENT)/v1/sample_service_pb2_grpc.py

.PHONY: serve test check bench proto released-proto fiftyone clean

serve: $(SERVE)/.ready
	@exec $(SERVE)/bin/labelmint serve

test: $(TEST)/.ready
	@$(TEST)/bin/python -m pytest $(PYTEST_FLAGS)

check: $(TEST)/.ready
	$(TEST)/bin/ruff check .
	$(TEST)/bin/ruff format --check .
	$(TEST)/bin/mypy

# Hours; each benchmark goes on where it was interrupted, or is short. Leave the machine alone meanwhile.
bench: $(TEST)/.ready
	$(TEST)/bin/python benchmarks/dataloader.py
	$(TEST)/bin/python benchmarks/gate.py
	$(TEST)/bin/python benchmarks/latency.py
	$(TEST)/bin/python benchmarks/autoscaling.py
	$(TEST)/bin/python benchmarks/labels_train_models.py
	$(TEST)/bin/python benchmarks/report.py

proto: $(TEST)/.ready
	$(TEST)/bin/python -m grpc_tools.protoc -Iprotos --python_out=service --pyi_out=service \
		--grpc_python_out=service protos/labelmint/v1/sample_service.proto
	$(COPY_PROTO)

# What tests/test_proto.py holds the contract to. Run it at a release and never to make that test pass.
released-proto: $(TEST)/.ready
	$(TEST)/bin/buf build --exclude-source-info --output protos/labelmint/v1/released.binpb

# An environment of its own for the test of FiftyOne's importer: it brings a gigabyte.
fiftyone: $(FIFTYONE)/.ready

clean:
	rm -rf $(SERVE) $(TEST) $(FIFTYONE) build dist service/labelmint.egg-info clients/python/src/labelmint_client.egg-info

# pip is renewed first: old resolvers try source packages for minutes.
$(SERVE)/.ready: pyproject.toml
	@$(CHECK_PYTHON)
	@echo "labelmint: installing into $(SERVE) (once)"
	@$(PYTHON) -m venv $(SERVE)
	@$(SERVE)/bin/pip install $(PIP_FLAGS) --upgrade 'pip>=24'
	@$(SERVE)/bin/pip install $(PIP_FLAGS) --editable '.[triton]'
	@touch $@

$(TEST)/.ready: pyproject.toml clients/python/pyproject.toml constraints.txt
	@$(CHECK_PYTHON)
	@echo "labelmint: installing into $(TEST), with torch (once)"
	@$(PYTHON) -m venv $(TEST)
	@$(TEST)/bin/pip install $(PIP_FLAGS) --upgrade 'pip>=24'
	@$(TEST)/bin/pip install $(PIP_FLAGS) --constraint constraints.txt --editable '.[triton,tracing,export,bench,test,dev]' \
		--editable 'clients/python[huggingface,images,pull,torch]'
	@touch $@

$(FIFTYONE)/.ready:
	@$(PYTHON) -m venv $(FIFTYONE)
	@$(FIFTYONE)/bin/pip install $(PIP_FLAGS) --upgrade 'pip>=24'
	@$(FIFTYONE)/bin/pip install $(PIP_FLAGS) 'fiftyone>=1.5,<2' 'pycocotools>=2.0.8,<3'
	@touch $@
