"""Moving the language model itself: DPO of a LoRA adapter, and the one file that knows TRL."""
