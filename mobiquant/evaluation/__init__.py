"""How good a model is at each budget: scoring, zero-shot tasks, tables and pictures (`mobiquant evaluate`)."""
