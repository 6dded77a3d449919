"""Records in, tidy rows out: metrics, the two protocols, and what a classifier, a guarantee and a memory do on records."""
