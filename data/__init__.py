"""What is read and written: runs, texts, first stages, lists. Knows nothing of models."""
