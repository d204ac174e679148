# Everything a developer needs; run `make` for the list.
MVN ?= mvn
DEMO_CHECKPOINT ?= src/test/resources/golden/qwen3_moe
DEMO_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo build test format bench-docs clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) \
	  | awk -F ':.*## ' '{ printf "make %-11s %s\n", $$1, $$2 }'

demo: demo-build ## build, then run one layer over 4 ranks and compare it with recorded output
	@bin/moe4j demo --checkpoint $(DEMO_CHECKPOINT) $(DEMO_ARGS)

build: kernels ## compile and package target/moe4j.jar without running tests
	@$(MVN) -B -q -DskipTests package

# why: without a GPU the demo does not wait a minute for kernels that nothing here can run
.PHONY: demo-build
ifneq ($(wildcard /dev/nvidia0 /dev/dxg),)
demo-build: build
else
demo-build:
	@$(MVN) -B -q -DskipTests package
endif

test: kernels ## run all tests, the example and the format check
	$(MVN) -B verify
	@$(MAKE) -s engines-test example-run

format: ## format all sources
	@$(MVN) -B -q spotless:apply

bench-docs: ## write the figures and plots of the documentation from bench/results
	@$(MVN) -B -q test -Dtest=BenchDocsTest -DbenchDocs=write

clean: ## remove everything that was built
	@$(MVN) -B -q clean
	@rm -rf engines/*/target

include kernels.mk native.mk bundle.mk model.mk artifact.mk engines.mk
