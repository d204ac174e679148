# Included by the Makefile: everything that a machine with a GPU but without JDK, Maven and network
# needs, in one archive; and the GPU tests where a GPU is here.
GPU_BUNDLE ?= target/gpu-bundle

.PHONY: gpu-bundle gpu-test

gpu-bundle: kernels ## pack JVM, jars and GPU tests into target/moe4j-gpu-bundle.tar.xz
	@$(MVN) -B -q -DskipTests package
	@! command -v $(NVCC) > /dev/null || $(MAKE) -s step-test
	@$(MAKE) -s engines-test ENGINES_GOAL="-q test-compile"
	@MVN="$(MVN)" sh src/main/bundle/build-bundle.sh $(GPU_BUNDLE)

gpu-test: kernels ## run the tests that need a GPU (skipped, with the reason, where there is none)
	@rm -f target/surefire-reports/TEST-*.xml
	@$(MVN) -B -q test -Dgroups=gpu -Dsurefire.failIfNoSpecifiedTests=false
	@$(MVN) -B -q -DskipTests package
	@rm -f engines/*/target/surefire-reports/TEST-*.xml
	@$(MAKE) -s engines-test ENGINES_GOAL="-q test -Dgroups=gpu -Dsurefire.failIfNoSpecifiedTests=false"
	@sh src/main/bundle/count-tests.sh target/surefire-reports engines/*/target/surefire-reports
