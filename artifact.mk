# Included by the Makefile: moe4j as a Maven artifact, and programs that depend on it.
PRIVATE_REPOSITORY := target/private-repository
PRIVATE_MVN = $(MVN) -B "-Dmaven.repo.local=$(CURDIR)/$(PRIVATE_REPOSITORY)"
INSTALL_FILE := org.apache.maven.plugins:maven-install-plugin:3.1.4:install-file

.PHONY: install example example-run reproducible install-private

install: kernels ## install jar, sources, javadoc and SBOM into the local Maven repository
	@umask 022; $(MVN) -B -q -Partifact -DskipTests -Dspotless.check.skip=true install
	@echo "install: io.moe4j:moe4j in $$(cat target/local-repository)"

example: demo-build example-run ## build and run an example that depends on the artifact

# why: `make test` comes here with the jar that it has just tested
example-run: install-private
	@MVN="$(MVN)" sh src/main/artifact/run-example.sh examples/hello-moe $(PRIVATE_REPOSITORY)

# The jar as it is in target, in a repository that only this checkout uses.
install-private:
	@sh src/main/artifact/private-repository.sh $(PRIVATE_REPOSITORY)
	@$(PRIVATE_MVN) -q $(INSTALL_FILE) -DpomFile=pom.xml -Dfile=target/moe4j.jar

reproducible: ## build everything twice, in two places, and compare every file bit by bit
	@MVN="$(MVN)" sh src/main/artifact/reproducible.sh
