"""Answers for many at once: requests join and leave a batch between two tokens."""
