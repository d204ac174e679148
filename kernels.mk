# GPU kernels: one module per target, into the class path. Included by the Makefile.
NVCC ?= nvcc
KERNEL_DIR := target/classes/io/moe4j/kernels
KERNEL_SOURCES := $(shell find src/main/cuda -type f)
TEST_HEADERS := $(wildcard src/test/cuda/*.h)

.PHONY: kernels step-test

kernels: target/kernels.built ## compile the CUDA kernels (needs nvcc; without it says so)

# The stamp depends on a manifest, so that an nvcc installed later is noticed.
target/kernels.built: $(KERNEL_SOURCES)
	@sh src/main/cuda/build.sh $(KERNEL_DIR) $(NVCC)
	@test ! -f $(KERNEL_DIR)/manifest.json || touch $@

# The whole step without a JVM, for the GPU machine and compute-sanitizer.
step-test: target/step_main target/ep_main

target/step_main: src/test/cuda/step_main.cu $(TEST_HEADERS) $(KERNEL_SOURCES)
	@mkdir -p target
	$(NVCC) -std=c++17 -O3 -lineinfo -gencode arch=compute_90a,code=sm_90a -gencode arch=compute_80,code=compute_80 -o $@ $<

# Dispatch and combine over several ranks and GPUs, the same way.
target/ep_main: src/test/cuda/ep_main.cu $(TEST_HEADERS) $(KERNEL_SOURCES)
	@mkdir -p target
	$(NVCC) -std=c++20 -O3 -lineinfo -gencode arch=compute_90a,code=sm_90a -gencode arch=compute_80,code=compute_80 -o $@ $< -lpthread
