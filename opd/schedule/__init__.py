"""When the engine writes and the teacher scores, beside the learner that learns."""
