"""From records to rewards, by whatever engine computes them."""
