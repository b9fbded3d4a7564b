"""Array operations, each a plain XLA function whose numbers never depend on how many rows a step has."""
