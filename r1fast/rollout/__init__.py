"""The embedded rollout engine: it samples from the trainer's own weights."""
