# Included by the Makefile: the libraries that let JCublas and JCudnn run on CUDA 13 and cuDNN 9.
# Maven builds them as part of every build; this target builds them alone.

.PHONY: bridges

bridges: ## build the cuBLAS and cuDNN bridges alone (needs gcc)
	@$(MVN) -B -q process-resources
