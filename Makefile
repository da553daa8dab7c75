# Every target is one line: scripts/dev.py does the work, on a laptop and in CI alike.
PYTHON ?= python3
VERBS = help setup fix check test accept sim sim-long mutants chaos prove bench demo ci clean

.PHONY: $(VERBS)
$(VERBS):
	@$(PYTHON) scripts/dev.py $@
