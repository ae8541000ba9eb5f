"""Evaluation that cannot fool itself: pairs neither trained on nor in the context, controls, intervals."""
