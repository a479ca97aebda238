"""vLLM servers as the rollout engine: samples over HTTP, weights by vLLM's own transfer interface."""
