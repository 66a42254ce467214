"""What a run will need: bytes by card and phase, bytes sent, seconds of a step. Pure arithmetic on sizes."""
