"""Does mixing help: in simulated training with known best mixtures, and on real text."""
