"""The variational selector and what feeds it: a frozen language model, a feature cache, whitening."""
