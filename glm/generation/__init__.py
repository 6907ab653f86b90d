"""Answers: batched decoding."""
