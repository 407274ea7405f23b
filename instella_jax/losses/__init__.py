"""Losses of the tokenizer: pure functions, and the networks that some of them need."""
