"""Visual questions in, an FGVEdit-like benchmark out, with a language model as judge."""
