"""How good an answer, a reward model or a policy is."""
