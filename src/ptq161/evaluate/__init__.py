"""Measuring models: perplexity here; tasks, memory and speed have modules of their own."""
