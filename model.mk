# Included by the Makefile: the protocol between ranks, model-checked.

.PHONY: model

model: ## check the protocol models and their mutants (needs spin and gcc; without them says so)
	@sh src/test/promela/run.sh
