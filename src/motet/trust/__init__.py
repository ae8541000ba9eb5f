"""Trust: who may be hostile, and what they would do."""
