"""Publishing on the Hugging Face Hub: what may go, what is said of it, and how it gets there."""
