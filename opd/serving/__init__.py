"""What every HTTP service of ours shares: options, doors, a child process, and a patient client."""
