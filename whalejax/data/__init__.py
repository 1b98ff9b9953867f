"""Text to batches: corpora, token streams, the random-access loader, and n-gram baselines."""
