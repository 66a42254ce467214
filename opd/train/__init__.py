"""Training the student: engines, one optimizer step, masks, checkpoints, a record of the weights."""
