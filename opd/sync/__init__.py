"""The learner's weights into the rollout engine: dense in this process, sparse over HTTP."""
