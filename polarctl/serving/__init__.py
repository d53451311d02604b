"""The reward model behind HTTP, for those who run no vLLM."""
