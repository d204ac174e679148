# Included by the Makefile: moe4j in engines that need a newer JDK than moe4j does. Maven and the
# tests run on the newest JDK that is installed; without one this says so and goes on.
ENGINES_JDK ?= $(shell sh src/main/bundle/newest-jdk.sh javac 22)

.PHONY: engines engines-test

engines: demo-build engines-test ## build moe4j and test it in engines that need JDK 22 or newer

# why: `make test` comes here with the jar that it has just tested
engines-test: install-private
	@set -e; jdk="$(ENGINES_JDK)"; \
	if [ -z "$$jdk" ]; then \
	    echo "engines: skipped: no JDK 22 or newer found (JAVA_HOME, JAVA_HOME_*, /usr/lib/jvm, ~/.sdkman); moe4j itself needs 17"; \
	else \
	    echo "engines: $$jdk"; \
	    "$$jdk/bin/jar" --create --no-compress --file target/moe4j-tests.jar -C target/test-classes io; \
	    $(PRIVATE_MVN) -q $(INSTALL_FILE) -DpomFile=pom.xml -DgeneratePom=false \
	        -Dfile=target/moe4j-tests.jar -Dclassifier=tests; \
	    JAVA_HOME="$$jdk" $(PRIVATE_MVN) -f engines/pom.xml $(ENGINES_GOAL); \
	fi

ENGINES_GOAL ?= verify
